"""Is damage found and located, how fast is hashing, and what does a hostile adapter cost?

    .venv/bin/python benchmarks/integrity.py [--base FOLDER] [--flips N] [--only PART ...]

flips: random single bits of a model of every dtype, in its files; each must be found and located to the tensor, and
those in tensors of several chunks, a tenth, to the chunk of 4 MiB; as many as a tenth of them in torch's tensors in
memory. speed: against
hashlib.sha256 on the same bytes, on one core and on two, in one run. verify: wall clock of fresh processes over BASE
(SmolLM2-135M in bf16, 269 MB), start-up apart; peak memory by file size. layouts: 50 that keep the root, 50 edits that
change it. hostile: adapters that must be refused in a second and 100 MB, before torch is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import facts, write

from gora_serve.integrity.digest import CHUNK, TensorRecord, differences, tensor_digest, weights_root
from gora_serve.integrity.headers import DTYPE_BITS, encode_header, read_header
from gora_serve.integrity.manifest import Manifest, hash_model
from gora_serve.integrity.verify import damaged_chunk

MIB = 1 << 20
ROOT = Path(__file__).parent.parent


def write_model(
    folder: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], files: int = 1, **how: Any
) -> None:
    """Write tensors, in the order given, over so many files; `how`: metadata, config."""
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[index::files] for index in range(files)]
    placed = {}
    for index, part in enumerate(parts):
        file = "model.safetensors" if files == 1 else f"model-{index + 1:05}-of-{files:05}.safetensors"
        with (folder / file).open("wb") as stream:
            layout = [(name, tensors[name][0], tensors[name][1]) for name in part]
            stream.write(encode_header(layout, how.get("metadata", {})))
            for name in part:
                stream.write(tensors[name][2])
        placed |= dict.fromkeys(part, file)
    if files > 1:
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(how.get("config", {"model_type": "llama"})))


def all_dtypes(chance: random.Random) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Two tensors of every dtype, and two that have more than one chunk."""
    tensors = {}
    for dtype, bits in DTYPE_BITS.items():
        for shape in ((8, 16), (64,)):
            tensors[f"{dtype}.{len(shape)}"] = (dtype, shape, chance.randbytes(math.prod(shape) * bits // 8))
    tensors["large.0"] = ("BF16", (9 * MIB // 4, 2), chance.randbytes(9 * MIB))
    tensors["large.1"] = ("F32", (5 * MIB // 4,), chance.randbytes(5 * MIB))
    return tensors


def flips(work: Path, count: int) -> dict[str, Any]:
    """A tenth of the flips falls on the two large tensors, which have several chunks, the others on the small ones."""
    chance = random.Random(0)
    tensors = all_dtypes(chance)
    write_model(work / "flips", tensors, files=2)
    expected = hash_model(work / "flips")
    places = {}
    for file in sorted((work / "flips").glob("*.safetensors")):
        header = read_header(file)
        places |= {
            entry.name: (file, header.data_start + entry.begin, entry.nbytes) for entry in header.entries.values()
        }
    large = [name for name in tensors if name.startswith("large")]
    small = [name for name in tensors if name not in large]
    found = {"found": 0, "located to the tensor": 0, "located to the chunk": 0}
    by_dtype: dict[str, int] = {}
    began = time.perf_counter()
    for number in range(count):
        name = chance.choice(large if number % 10 == 0 else small)
        file, start, nbytes = places[name]
        bit = chance.randrange(8 * nbytes)
        with file.open("r+b") as stream:
            damage = flip_in(stream, start + bit // 8, bit % 8)
            stream.flush()
            changed = _differences(expected, file, name, work / "flips", whole=number % 100 == 0)
            flip_in(stream, start + bit // 8, bit % 8)
        assert damage
        by_dtype[tensors[name][0]] = by_dtype.get(tensors[name][0], 0) + 1
        found["found"] += changed["found"]
        found["located to the tensor"] += changed["tensors"] == [name]
        found["located to the chunk"] += changed["chunk"] == bit // 8 // CHUNK
    assert hash_model(work / "flips").roots == expected.roots
    return {"flips": count, **found, "by dtype": by_dtype, "seconds": round(time.perf_counter() - began, 1),
            "in memory": memory_flips(count // 10)}  # fmt: skip


def flip_in(stream: Any, at: int, bit: int) -> bool:
    stream.seek(at)
    byte = stream.read(1)[0]
    stream.seek(at)
    stream.write(bytes([byte ^ 1 << bit]))
    return True


def _differences(expected: Manifest, file: Path, name: str, folder: Path, *, whole: bool) -> dict[str, Any]:
    """What differs now. The product's own function over the whole folder each 100th time, over the file else."""
    actual = hash_model(folder) if whole or name.startswith("large") else _hash_file(expected, file)
    changed = differences(expected.tensors, actual.tensors)
    told = damaged_chunk(expected, actual, name)
    chunk = int(told.partition("from chunk ")[2].split()[0]) - 1 if told else 0
    return {"found": bool(changed) and actual.roots.weights != expected.roots.weights,
            "tensors": [*changed.changed, *changed.missing, *changed.extra], "chunk": chunk}  # fmt: skip


def _hash_file(expected: Manifest, file: Path) -> Manifest:
    """The manifest after a change of the small tensors of one file; the large ones are taken as they were."""
    header = read_header(file)
    tensors = dict(expected.tensors)
    with file.open("rb") as stream:
        for entry in header.entries.values():
            if entry.nbytes < MIB:
                stream.seek(header.data_start + entry.begin)
                digest = tensor_digest([stream.read(entry.nbytes)])
                tensors[entry.name] = TensorRecord(entry.dtype, entry.shape, entry.nbytes, digest)
    return Manifest(type(expected.roots)(weights_root(tensors)), tensors, leaves=expected.leaves)


def memory_flips(count: int) -> dict[str, Any]:
    """Bits of torch's tensors in memory, by the digest that training takes of a model's parameters."""
    import torch

    chance = random.Random(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64,
              torch.float8_e4m3fn, torch.float8_e5m2, torch.bool)  # fmt: skip
    sizes = {dtype: torch.empty(0, dtype=dtype).element_size() for dtype in dtypes}
    state = {str(dtype): torch.zeros(64 * sizes[dtype], dtype=torch.uint8) for dtype in dtypes}  # bytes of such a one
    digest = {name: tensor_digest([memoryview(tensor.numpy())]) for name, tensor in state.items()}
    hits = 0
    for _ in range(count):
        name = chance.choice(list(state))
        bit = chance.randrange(8 * state[name].numel())
        state[name][bit // 8] ^= 1 << bit % 8
        hits += [
            key for key, tensor in state.items() if tensor_digest([memoryview(tensor.numpy())]) != digest[key]
        ] == [name]
        state[name][bit // 8] ^= 1 << bit % 8
    return {"flips": count, "found and located to the tensor": hits}


def speed(work: Path, rounds: int = 7) -> dict[str, Any]:
    """Ours over hashlib's rate; best of rounds, interleaved, so that a busy machine bends both alike."""
    size = 256 * MIB
    data = os.urandom(size)
    write_model(work / "speed", {f"t{index}": ("U8", (size // 8,), data[index * size // 8 : (index + 1) * size // 8])
                                 for index in range(8)})  # fmt: skip
    file = work / "speed" / "model.safetensors"
    header = read_header(file)
    spans = [(header.data_start + entry.begin, header.data_start + entry.end) for entry in header.entries.values()]
    from gora_serve.integrity.reading import open_regular, pieces

    def ours(span: tuple[int, int]) -> str:
        return tensor_digest(pieces(fd, *span, path=file))

    best: dict[str, float] = {}

    def timed(name: str, clock: Callable[[], float], work: Callable[[], object]) -> None:
        began = clock()
        work()
        best[name] = min(best.get(name, math.inf), clock() - began)

    def whole_file() -> None:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")

    memory_rate = "hashlib.sha256 of bytes in memory, CPU"
    one, all_threads = time.thread_time, time.perf_counter  # the first does not count what other processes take
    with open_regular(file) as fd, ThreadPoolExecutor(2) as pool:
        for _ in range(rounds):
            timed(memory_rate, one, lambda: hashlib.sha256(data).digest())
            timed("hashlib.file_digest, CPU", one, whole_file)
            timed("ours from the file, CPU", one, lambda: [ours(span) for span in spans])
            timed("ours in memory, CPU", one, lambda: tensor_digest([data]))
            timed("hashlib.file_digest, wall", all_threads, whole_file)
            timed("ours on two threads, wall", all_threads, lambda: list(pool.map(ours, spans)))
    rates = {name: round(size / seconds / 1e9, 3) for name, seconds in best.items()}

    def ratio(name: str, over: str) -> float:
        return round(rates[name] / rates[over], 3)

    return {
        "bytes": size, "GB/s": rates,
        "one core, in memory, over hashlib.sha256": ratio("ours in memory, CPU", memory_rate),
        "one core, from the file, over hashlib.file_digest": ratio(
            "ours from the file, CPU", "hashlib.file_digest, CPU"
        ),
        "one core, from the file, over hashlib.sha256 in memory": ratio("ours from the file, CPU", memory_rate),
        "two threads over hashlib.file_digest": ratio("ours on two threads, wall", "hashlib.file_digest, wall"),
    }  # fmt: skip


CHILD = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from gora_serve.cli.main import main
import gora_serve.cli.render_adapters, gora_serve.cli.watching, gora_serve.integrity.verify, gora_serve.integrity.bases
ready = time.perf_counter()
status = main(sys.argv[2:])
done = time.perf_counter()
Path(sys.argv[1]).write_text(json.dumps({
    "status": status, "imports": ready - began, "work": done - ready, "CPU": time.process_time(),
    "peak MiB": int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024,
    "torch": "torch" in sys.modules}))
"""


def fresh(work: Path, *argv: str) -> dict[str, Any]:
    """Run a command in a new process; return its own clock and peak memory, and the wall clock from outside."""
    report = work / "report.json"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(report), *argv], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(work / "cache")},
    )  # fmt: skip
    wall = time.perf_counter() - began
    assert report.exists(), done.stderr
    value = json.loads(report.read_text())
    report.unlink()
    return {**value, "wall": wall, "start-up": wall - value["work"], "stderr": done.stderr}


def verify(work: Path, base: Path, rounds: int = 9) -> dict[str, Any]:
    manifest = work / "base.json"
    assert fresh(work, "hash", str(base), "--output", str(manifest))["status"] == 0
    runs = [fresh(work, "verify", str(base), "--manifest", str(manifest)) for _ in range(rounds)]
    assert all(run["status"] == 0 and not run["torch"] for run in runs)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    names = ("wall", "start-up", "work", "CPU", "peak MiB")
    return {"bytes": size, "best": {name: round(min(run[name] for run in runs), 3) for name in names},
            "median": {name: round(statistics.median(run[name] for run in runs), 3) for name in names},
            "runs": rounds}  # fmt: skip


def memory(work: Path) -> dict[str, Any]:
    """Peak memory of verify in fresh processes, by the size of the one weight file."""
    found = {}
    for mib in (1, 64, 256, 1024):
        folder = work / f"memory-{mib}"
        block = random.Random(mib).randbytes(MIB)
        folder.mkdir()
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(encode_header([("t", "U8", (mib * MIB,))], {}))
            for _ in range(mib):
                stream.write(block)
        (folder / "config.json").write_text("{}")
        assert fresh(work, "hash", str(folder), "--output", str(work / f"{mib}.json"))["status"] == 0
        run = fresh(work, "verify", str(folder), "--manifest", str(work / f"{mib}.json"))
        assert run["status"] == 0, run
        found[f"{mib} MiB"] = round(run["peak MiB"], 1)
        shutil.rmtree(folder)
    empty = subprocess.run(
        [sys.executable, "-c", "print(int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {"peak MiB by file size": found, "an empty Python": round(float(empty.stdout), 1)}


def layouts(work: Path) -> dict[str, Any]:
    chance = random.Random(2)
    tensors = {
        f"model.layers.{i}.w{j}": ("F32", (4, 3 + j), chance.randbytes(16 * (3 + j))) for i in range(5) for j in (0, 1)
    }
    write_model(work / "original", tensors)
    root = hash_model(work / "original").roots.weights
    kept = changed = 0
    for number in range(50):
        folder = work / f"layout-{number}"
        order = dict(chance.sample(list(tensors.items()), len(tensors)))
        metadata = chance.choice(({}, {"format": "pt"}, {"x": str(number)}))
        write_model(folder, order, files=chance.randrange(1, 6), metadata=metadata, config={"number": number})
        if number % 3 == 0:
            _as_snapshot(folder)
        kept += hash_model(folder).roots.weights == root
    for number in range(50):
        folder = work / f"edit-{number}"
        write_model(folder, _edited(tensors, chance, number % 7), files=chance.randrange(1, 4))
        changed += hash_model(folder).roots.weights != root
    return {"50 relayouts: same root": kept, "50 semantic edits: another root": changed}


def _as_snapshot(folder: Path) -> None:
    """Files become links into blobs, as in the hub's cache."""
    blobs = folder / "blobs"
    blobs.mkdir()
    for index, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(blobs / f"blob{index}")
        file.symlink_to(f"blobs/blob{index}")


def _edited(tensors: dict[str, Any], chance: random.Random, kind: int) -> dict[str, Any]:
    names = chance.sample(list(tensors), 2)
    dtype, shape, data = tensors[names[0]]
    edited = dict(tensors)
    if kind == 0:
        at = chance.randrange(len(data))
        edited[names[0]] = (dtype, shape, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif kind == 1:
        edited[names[0]] = (dtype, (1, *shape), data)
    elif kind == 2:
        edited[names[0]] = ("I32", shape, data)
    elif kind == 3:
        edited[f"{names[0]}.renamed"] = edited.pop(names[0])
    elif kind == 4:
        del edited[names[0]]
    elif kind == 5:
        edited["one.more"] = ("F32", (0,), b"")
    else:
        other = next(name for name in tensors if name != names[0] and tensors[name][1] == shape)
        edited[names[0]], edited[other] = tensors[other], tensors[names[0]]
    return edited


def hostile(work: Path) -> dict[str, Any]:
    """Each in a fresh process that reads it as `serve` does first: its own clock and memory, and no torch."""
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = encode_header([(key.format("A"), "F32", (2, 4)), (key.format("B"), "F32", (4, 2))], {}) + bytes(64)
    entry = b'"%08d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    million = b"{" + b"".join(entry % index for index in range(1_000_000))[:-1] + b"}"
    flood = b'{"a":{"dtype":"U8","shape":[' + b"0," * 20_000_000 + b'0],"data_offsets":[0,0]}}'
    deep = b'{"a":' + b"[" * 5_000_000 + b"]" * 5_000_000 + b"}"
    framed: Callable[[bytes], bytes] = lambda text: len(text).to_bytes(8, "little") + text  # noqa: E731
    cases: dict[str, tuple[Any, bytes]] = {
        "rank bomb": (good | {"r": 10**9}, pair),
        "rank in the tensor": (good, encode_header([(key.format("A"), "F32", (10**6, 10**6))], {}) + bytes(8)),
        "ReDoS in rank_pattern": (good | {"rank_pattern": {"(a+)+$": 2, "(.*)*x": 2}}, pair),
        "alpha NaN": ('{"r": 2, "lora_alpha": NaN}', pair),
        "r as text": (good | {"r": "2"}, pair),
        "1,000,000 tensors": (good, framed(million)),
        "a shape of 20,000,000 numbers": (good, framed(flood)),
        "deep header": (good, framed(deep)),
        "deep configuration": ('{"a":' + "[" * 3_000_000 + "]" * 3_000_000 + "}", pair),
        "configuration of 50 MB": ('{"a":"' + "x" * 50_000_000 + '"}', pair),
        "header length 2**63": (good, (1 << 63).to_bytes(8, "little") + b"{}"),
        "overlapping tensors": (good, framed(json.dumps({name: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
                                                         for name in "ab"}).encode()) + bytes(8)),
        "name with ESC": (good, framed(json.dumps({"\x1b[2J": {"dtype": "U8", "shape": [1],
                                                               "data_offsets": [0, 1]}}).encode()) + b"x"),
        "pickle renamed": (good, b"\x80\x02}q\x00." + bytes(64)),
    }  # fmt: skip
    found = {}
    for name, (config, weights) in cases.items():
        folder = work / "hostile"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(weights)
        found[name] = refused(folder)
        shutil.rmtree(folder)
    folder = work / "hostile"  # a pattern here is a legal thing: accepted, and never run
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(good | {"target_modules": "(a|aa)+$"}))
    (folder / "adapter_model.safetensors").write_bytes(pair)
    never_run = refused(folder)
    return {
        "a ReDoS pattern in target_modules is not run": never_run,
        "refused": sum(case["refused"] for case in found.values()), "of": len(found),
        "slowest, seconds": max(case["seconds"] for case in found.values()),
        "largest, MiB": max(case["peak MiB"] for case in found.values()),
        "torch imported": sum(case["torch"] for case in found.values()), "cases": found,
    }  # fmt: skip


REFUSING = """
import json, sys, time
from pathlib import Path
from gora_serve.errors import GoraError
from gora_serve.serving.adapter_dir import read_adapter_dir
from gora_serve.serving.preflight import check_adapter, refuse
began, code = time.perf_counter(), None
try:
    refuse(check_adapter(read_adapter_dir("x", Path(sys.argv[1]))))
except GoraError as err:
    code = err.code
print(json.dumps({"refused": code is not None, "code": code, "seconds": round(time.perf_counter() - began, 3),
    "peak MiB": round(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024, 1),
    "torch": "torch" in sys.modules}))
"""


def refused(folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--only", nargs="*")
    chosen = parser.parse_args()
    result = facts(".venv/bin/python benchmarks/integrity.py" + (" --base BASE" if chosen.base else ""))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        work = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "flips": lambda: flips(work, chosen.flips), "layouts": lambda: layouts(work),
            "hostile": lambda: hostile(work), "speed": lambda: speed(work), "memory": lambda: memory(work),
        }  # fmt: skip
        if chosen.base:
            parts["verify"] = lambda: verify(work, chosen.base)
        for part, measure in parts.items():
            if not chosen.only or part in chosen.only:
                result[part] = measure()
                print(part, json.dumps(result[part]), flush=True)
    result["load of the machine (1 min)"] = round(os.getloadavg()[0], 1)
    if not chosen.only:
        write("integrity", result)


if __name__ == "__main__":
    main()
