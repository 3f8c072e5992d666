"""Broken adapters, one builder a row: what an engine would serve wrongly, refuse late, or choke on.

Each row takes a sound adapter of another tool (plain PEFT LoRA over a Llama, in float32, with more than one rank) and
edits a copy of it. `code` is the refusal's, `told` what its message must name. The first part is what vLLM 0.32 was
seen to serve wrongly or to fail over; then what it cannot serve; then damaged and hostile files.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.canonical import canonical_json
from gora_serve.integrity.manifest import hash_adapter
from gora_serve.integrity.record import RECORD_SCHEMA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ELSEWHERE = f"gb1:sha256:{'0' * 64}"  # the root of no base
Edit = Callable[[Path], None]
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One way to be broken: how, the code and the exit status of the refusal, and words that it must say."""

    name: str
    edit: Edit
    code: str
    told: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return int(self.code[3])

    def build(self, sound: Path, folder: Path) -> Path:
        """Copy the sound adapter to `folder`, break the copy, return it."""
        shutil.copytree(sound, folder)
        self.edit(folder)
        return folder


def write_sound(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, seed: int = 0, base: str = "", rank: int = 4
) -> Path:
    """Write a sound adapter: q_proj at half the rank, others at `rank`. shapes: (out, in) of each of its modules."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors: Arrays = {}
    for module, (out, width) in shapes.items():
        own = rank // 2 if module.endswith("q_proj") else rank
        tensors[key(module, "A")] = random.normal(0, width**-0.5, (own, width)).astype(np.float32)
        tensors[key(module, "B")] = random.normal(0, 0.1, (out, own)).astype(np.float32)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": 8,
        "rank_pattern": {"q_proj": rank // 2}, "alpha_pattern": {}, "bias": "none", "init_lora_weights": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}), "use_rslora": False,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def config(**changes: Any) -> Edit:
    """Set keys of the configuration; None removes one."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return edit


def tensors(change: Callable[[Arrays], Arrays]) -> Edit:
    """Replace the tensors; the header's metadata stays."""

    def edit(folder: Path) -> None:
        with safe_open(folder / WEIGHTS, "np") as opened:
            metadata = opened.metadata()
        arrays = change(load_file(folder / WEIGHTS))
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / WEIGHTS, metadata)

    return edit


def first(arrays: Arrays, side: str) -> str:
    return next(name for name in sorted(arrays) if name.endswith(f"lora_{side}.weight"))


def without(side: str) -> Edit:
    return tensors(lambda arrays: {name: a for name, a in arrays.items() if name != first(arrays, side)})


def with_value(value: float) -> Edit:
    def change(arrays: Arrays) -> Arrays:
        arrays[first(arrays, "B")][0, 0] = value
        return arrays

    return tensors(change)


def adding(name: str, *shape: int) -> Edit:
    return tensors(lambda arrays: arrays | {name: np.zeros(shape, np.float32)})


def renamed(old: str, new: str) -> Edit:
    return tensors(lambda arrays: {name.replace(old, new): array for name, array in arrays.items()})


def halved(arrays: Arrays) -> Arrays:
    """Another model's width: A has half the columns, B half the rows."""
    return {name: a[:, : a.shape[1] // 2] if "lora_A" in name else a[: a.shape[0] // 2] for name, a in arrays.items()}


def widened(rank: int) -> Edit:
    """Give the first module this rank, by zeros, and say nothing of it in the configuration."""

    def change(arrays: Arrays) -> Arrays:
        a, b = first(arrays, "A"), first(arrays, "B")
        more = rank - arrays[a].shape[0]
        return arrays | {a: np.pad(arrays[a], ((0, more), (0, 0))), b: np.pad(arrays[b], ((0, 0), (0, more)))}

    return tensors(change)


def raw(file: str, content: Callable[[bytes], bytes]) -> Edit:
    def edit(folder: Path) -> None:
        (folder / file).write_bytes(content((folder / file).read_bytes()))

    return edit


def missing(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def recorded(root: str | None = None, base: object = None) -> Edit:
    """Write gora-serve's own record into the header: the root of its tensors (true by default), the base's root."""

    def edit(folder: Path) -> None:
        arrays, file = load_file(folder / WEIGHTS), folder / WEIGHTS
        binding = {"weights_root": ELSEWHERE} if base is None else base
        record = {"schema": RECORD_SCHEMA, "adapter_root": root or hash_adapter(file)[0], "base": binding, "origin": {}}
        save_file(arrays, file, {"format": "pt", "gora_serve": canonical_json(record).decode()})

    return edit


def changed_after_sealing(folder: Path) -> None:
    recorded()(folder)
    root = hash_adapter(folder / WEIGHTS)[0]
    seal_folder(folder, {"adapter_root": root, "binding": {"weights_root": ELSEWHERE}})
    config(lora_alpha=16)(folder)


INITS = [
    Row("init pissa", config(init_lora_weights="pissa"), "GS-383", ("gora-serve convert", "--base")),
    Row("init pissa by fast SVD", config(init_lora_weights="pissa_niter_4"), "GS-383", ("--init-adapter",)),
    Row("init olora", config(init_lora_weights="olora"), "GS-383", ("gora-serve convert",)),
    Row("init corda", config(init_lora_weights="corda"), "GS-383", ("--cache",)),
    Row("init loftq", config(init_lora_weights="loftq"), "GS-383", ("--init-adapter",)),
    Row("init lora_ga", config(init_lora_weights="lora_ga"), "GS-383", ("--init-adapter",)),
    Row("init unknown", config(init_lora_weights="gora"), "GS-383", ("not known", "--from")),
]
SERVED_WRONGLY = [
    *INITS,
    Row("rank of the configuration", config(r=16), "GS-388", ("scaled wrongly",)),
    Row("rank_pattern removed", config(rank_pattern=None), "GS-388", ("q_proj",)),
    Row("another width", tensors(halved), "GS-472", ("another shape",)),
    Row("wrong module path", renamed("model.layers", "decoder.blocks"), "GS-471", ("are not in the base",)),
    Row("wrong prefix, right ending", renamed("self_attn", "attention"), "GS-471", ("attention",)),
    Row("NaN", with_value(float("nan")), "GS-339", ("[0, 0]",)),
    Row("infinity", with_value(float("inf")), "GS-339", ("[0, 0]",)),
    Row("base of another name", config(base_model_name_or_path="other-org/other-model"), "GS-4352", ("other-model",)),
    Row("B missing", without("B"), "GS-384", ("lora_B is missing",)),
    Row("A missing", without("A"), "GS-384", ("lora_A is missing",)),
    Row("rank above the configuration's", widened(96), "GS-388", ("96",)),
    Row("rank above every engine's", widened(513), "GS-387", ("512",)),
    Row("absurd alpha", config(lora_alpha=1e12), "GS-3351", ("scale",)),
    Row("rsLoRA by a text", config(use_rslora="false"), "GS-3350", ("use_rslora",)),
]
UNSERVED = [
    Row("DoRA", config(use_dora=True), "GS-382", ("use_dora", "--rank")),
    Row("bias of LoRA", config(lora_bias=True), "GS-382", ("lora_bias",)),
    Row("biases", config(bias="all"), "GS-382", ("bias",)),
    Row("modules_to_save", config(modules_to_save=["lm_head"]), "GS-382", ("modules_to_save",)),
    Row("activated LoRA", config(alora_invocation_tokens=[1]), "GS-382", ("alora",)),
    Row("repeated layers", config(layer_replication=[[0, 1]]), "GS-382", ("layer_replication",)),
    Row("BD-LoRA", config(use_bdlora=True), "GS-382", ("use_bdlora",)),
    Row("QALoRA", config(use_qalora=True), "GS-382", ("use_qalora",)),
    Row("trained tokens", config(trainable_token_indices=[1]), "GS-382", ("trainable_token_indices", "convert")),
    Row("bare parameters", config(target_parameters=["x"]), "GS-382", ("target_parameters", "convert")),
    Row("VeRA", config(peft_type="VERA"), "GS-382", ("peft_type", "convert")),
    Row("prompt tuning", config(peft_type="PROMPT_TUNING"), "GS-382", ("peft_type", "PEFT")),
    Row("a whole head", adding("base_model.model.lm_head.base_layer.weight", 2, 2), "GS-385", ("lm_head",)),
    Row("magnitudes of DoRA", adding("base_model.model.x.lora_magnitude_vector", 2), "GS-385", ("magnitude",)),
    Row("a bias beside B", adding("base_model.model.x.lora_B.bias", 2), "GS-385", ("lora_B.bias",)),
    Row("a norm", adding("base_model.model.model.norm.weight", 2), "GS-385", ("norm",)),
    Row(
        "another vocabulary",
        tensors(
            lambda arrays: (
                arrays
                | {
                    "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 999), np.float32),
                    "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((32, 4), np.float32),
                }
            )
        ),
        "GS-472",
        ("embed_tokens",),
    ),
    Row("only a pickle", only_a_pickle, "GS-3221", ("--allow-pickle",)),
]
DAMAGED = [
    Row("cut off", raw(WEIGHTS, lambda data: data[:-1]), "GS-306", ("ends early",)),
    Row("empty", raw(WEIGHTS, lambda _: b""), "GS-301", ("empty",)),
    Row("trailing bytes", raw(WEIGHTS, lambda data: data + b"x"), "GS-307"),
    Row("a web page", raw(WEIGHTS, lambda _: b"<!DOCTYPE html><html></html>"), "GS-302"),
    Row(
        "an LFS pointer",
        raw(WEIGHTS, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "GS-303",
    ),
    Row("no weights", missing(WEIGHTS), "GS-583", (WEIGHTS,)),
    Row("no configuration", missing(CONFIG), "GS-583", (CONFIG,)),
    Row("configuration cut off", raw(CONFIG, lambda data: data[:20]), "GS-319"),
    Row("a key twice", raw(CONFIG, lambda _: b'{"r": 4, "r": 4}'), "GS-309"),
    Row("a list as configuration", raw(CONFIG, lambda _: b"[]"), "GS-381"),
    Row("configuration without end", raw(CONFIG, lambda _: b'{"a": ' + b"[" * 100_000), "GS-320"),
    Row("rank 0", config(r=0), "GS-381", ("a positive integer",)),
    Row("alpha as text", config(lora_alpha="8"), "GS-381", ("a number above 0",)),
    Row("pattern without end", config(alpha_pattern={"(a+)+$": 2}), "GS-381", ("(a+)+$",)),
    Row(
        "half of the layers", tensors(lambda arrays: {n: a for n, a in arrays.items() if ".layers.0." in n}), "GS-3220"
    ),
    Row("a layer that is none", renamed(".layers.1.", ".layers.77."), "GS-471", ("layers.77",)),
    Row(
        "integers",
        tensors(lambda arrays: arrays | {first(arrays, "A"): arrays[first(arrays, "A")].astype(np.int32)}),
        "GS-386",
    ),
    Row("no factors", tensors(lambda _: {"x": np.zeros(1, np.float32)}), "GS-385"),
    Row("bound to another base", recorded(), "GS-401", (ELSEWHERE,)),
    Row("other tensors than its record's", recorded(root=ELSEWHERE), "GS-115"),
    Row("a record that is none", recorded(base="x"), "GS-363"),
    Row("edited after it was sealed", changed_after_sealing, "GS-102", (CONFIG,)),
]
CORPUS = (*SERVED_WRONGLY, *UNSERVED, *DAMAGED)
