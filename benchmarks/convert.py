"""What a conversion costs and how exact it is: a 7B-shaped adapter, stored bfloat16, the size of the core.

    python benchmarks/convert.py

Three questions. Time and peak memory of `gora-serve convert` on an adapter of 224 modules at rank 16, whose base has
the shapes of Llama-2-7B (its weight files are sparse: converting with an initial adapter reads the base to hash it, and
its values play no part). The error of the stored update in bfloat16 as training moves less and less, against
concatenating trained and initial factors. The time of the QR core against the SVD of the product.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import facts, write
from safetensors.torch import save_file

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import compress, distance, norm, subtract
from gora_serve.integrity.headers import encode_header

LAYERS, HIDDEN, INNER, VOCABULARY, RANK = 32, 4096, 11008, 32000, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
CHILD = """
import sys
from gora_serve.cli.main import main
code = main(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0], file=sys.stderr)
sys.exit(code)
"""


def make_base(folder: Path) -> None:
    """Write Llama-2-7B's shapes in bfloat16: config.json and one sparse file a shard, 13 GB that take no room."""
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 32, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()} for layer in range(LAYERS)
    ]
    shards.append({"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)})
    placed = {}
    for index, tensors in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        header = encode_header([(key, "BF16", shape) for key, shape in tensors.items()], {"format": "pt"})
        with (folder / name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(2 * shape[0] * shape[1] for shape in tensors.values()))
        placed |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def make_adapter(folder: Path, *, moved: float, seed: int = 0) -> None:
    """Write a LoRA-GA adapter, as PEFT saves it: orthogonal factors, and trained ones `moved` away from them."""
    folder.mkdir()
    generator, trainer = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, width) in LINEARS.items():
            for part, shape in (("A", (RANK, width)), ("B", (out, RANK))):
                start, step = (torch.randn(shape, generator=one) for one in (generator, trainer))
                tall = start if part == "B" else start.T
                unit = torch.linalg.qr(tall).Q * 0.3  # singular vectors
                start = unit if part == "B" else unit.T
                step *= float(start.std())
                key = f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"
                tensors[key] = (start + moved * step).bfloat16().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "init_lora_weights": "lora_ga", "bias": "none",
              "target_modules": [name.rpartition(".")[2] for name in LINEARS], "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def seven_b(folder: Path, dtype: str) -> dict[str, Any]:
    """Convert the 7B-shaped adapter in a process of its own; seconds, and the peak of its resident memory."""
    output = folder / f"converted-{dtype}"
    words = ["convert", str(folder / "trained"), "--base", str(folder / "base"), "--output", str(output),
             "--init-adapter", str(folder / "initial"), "--dtype", dtype, "--json"]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.rpartition("VmHWM:")[2].split()[0]) / 2**20
    value = json.loads(done.stdout)
    return {
        "seconds": round(seconds, 1), "peak_resident_GiB": round(peak, 3), "modules": len(value["modules"]),
        "relative_error": value["error"], "largest_rank": max(one["rank"] for one in value["modules"].values()),
    }  # fmt: skip


def hash_seconds(base: Path) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "gora_serve", "hash", str(base)], capture_output=True, check=True)
    return round(time.monotonic() - start, 1)


def stored_in_bfloat16() -> list[dict[str, float]]:
    """Errors of dW in bfloat16 at rank 16 on 1024 x 1024 with PiSSA's initial factors, by |dW| / |P0|."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator, dtype=torch.float64) * 0.02
    U, S, Vh = torch.linalg.svd(weight)
    root = S[:RANK].sqrt()
    initial = LoraFactors((root[:, None] * Vh[:RANK]).float(), (U[:, :RANK] * root).float(), 1.0)
    steps = torch.randn(RANK, 1024, generator=generator), torch.randn(1024, RANK, generator=generator)
    rows = []
    for wanted in (0.1, 0.03, 0.01, 0.003):
        size = wanted
        for _ in range(20):  # the step that moves the product by `wanted`
            trained = _moved(initial, steps, size)
            size *= wanted / (distance(trained, initial) / norm(initial))
        exact = subtract(trained, initial)
        plain = LoraFactors(exact.A.bfloat16(), exact.B.bfloat16(), 1.0)
        spectrum = compress(exact, tolerance=5e-4)
        ours = spectrum.first(spectrum.numerical_rank)
        ours = LoraFactors(ours.A.bfloat16(), ours.B.bfloat16(), 1.0)
        rows.append({"moved": wanted, "concatenated": distance(plain, exact) / norm(exact),
                     "recompressed": distance(ours, exact) / norm(exact)})  # fmt: skip
    return rows


def _moved(initial: LoraFactors, steps: tuple[torch.Tensor, torch.Tensor], size: float) -> LoraFactors:
    A = initial.A + size * steps[0] * initial.A.norm() / steps[0].norm()
    B = initial.B + size * steps[1] * initial.B.norm() / steps[1].norm()
    return LoraFactors(A, B, 1.0)


def core_against_svd() -> dict[str, float]:
    """Seconds for one 4096 x 4096 module at rank 32: QR and the small SVD, and the SVD of the product (float32)."""
    generator = torch.Generator().manual_seed(0)
    factors = LoraFactors(torch.randn(32, HIDDEN, generator=generator), torch.randn(HIDDEN, 32, generator=generator), 1)
    compress(factors)
    start = time.monotonic()
    for _ in range(5):
        compress(factors)
    core = (time.monotonic() - start) / 5
    product = factors.delta().float()
    start = time.monotonic()
    torch.linalg.svd(product, full_matrices=False)
    whole = time.monotonic() - start
    return {"core_seconds": round(core, 4), "svd_seconds": round(whole, 2), "ratio": round(whole / core, 1)}


def main() -> None:
    result = facts("python benchmarks/convert.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        make_adapter(folder / "initial", moved=0.0)
        make_adapter(folder / "trained", moved=0.01)
        result["hash_of_the_base_seconds"] = hash_seconds(folder / "base")
        result["7B_rank_16"] = {dtype: seven_b(folder, dtype) for dtype in ("float32", "bfloat16")}
    result["error_stored_in_bfloat16"] = stored_in_bfloat16()
    result["core_against_svd_4096_rank_32"] = core_against_svd()
    write("convert", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
