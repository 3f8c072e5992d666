"""Faults 44 to 57: adapters of other tools that are hostile, broken, or for another base. All through `serve`."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalogue.conftest import CONFIG, WEIGHTS, K, Place, Q, V, factors, key
from gora_serve.bind import bind

NAN, INF = float("nan"), float("inf")


class Harm:
    """Unpickled without care, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("command", ["serve", "bind", "convert"])
def test_only_a_pickle(place: Place, command: str) -> None:
    """44: not read, and not run; the way out is named with its risk."""
    folder, canary = place.adapter(), place.folder / "canary"
    (folder / WEIGHTS).unlink()
    file = folder / "adapter_model.bin"
    file.write_bytes(pickle.dumps({"a": Harm(canary)}, protocol=2))
    words, gs = {
        "serve": (place.serve(folder), "GS-3221"),
        "bind": (("bind", folder, "--base", place.base, "--output", place.out), "GS-337"),
        "convert": (("convert", folder, "--base", place.base, "--output", place.out), "GS-3110"),
    }[command]
    place.refuses(words, 3, gs, "pickle", "run code", "--allow-pickle", "trust", file=file)
    assert not canary.exists()


def test_a_pickle_beside_safetensors(place: Place) -> None:
    """45: the safetensors file is used, and that is said."""
    folder = place.adapter()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Harm(place.folder / "canary")}, protocol=2))
    answer = place.accepts(*place.serve(folder))
    assert answer.err.count(f"warning: adapter: adapter_model.bin is not used, {WEIGHTS} is") == 1


@pytest.mark.parametrize(
    "name",
    ["base_model.model.lm_head.base_layer.weight", f"base_model.model.{Q}.base_layer.weight",
     "base_model.model.model.norm.weight", "base_model.model.model.embed_tokens.weight"],
)  # fmt: skip
def test_weights_of_the_base(place: Place, name: str) -> None:
    """46: named."""
    folder = place.adapter(factors() | {name: np.zeros((2, 2), np.float32)})
    place.refuses(place.serve(folder), 3, "GS-385", name, file=folder / WEIGHTS)


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_of_a_pair(place: Place, side: str) -> None:
    """47."""
    tensors = factors() | factors(K)
    del tensors[key(K, side)]
    folder = place.adapter(tensors, target_modules=[Q, K])
    place.refuses(place.serve(folder), 3, "GS-384", K, f"lora_{side} is missing", file=folder / WEIGHTS)


def test_half_of_the_layers(place: Place) -> None:
    """47: target_modules names the projection of every layer, the file has the first layer's."""
    folder = place.adapter(factors() | factors(V), target_modules=["q_proj", "v_proj"])
    place.refuses(place.serve(folder), 3, "GS-3220", "2 of the 4 modules", file=folder / WEIGHTS, tensor="1.q_proj")


@pytest.mark.parametrize("module", ["model.layers.7.self_attn.q_proj", "model.layers.0.self_attn.z_proj"])
def test_an_unknown_layer(place: Place, module: str) -> None:
    """47: for which exit 4 is said, as by bind, convert and gap: it may be right for another base."""
    other = {name.replace(Q, module): array for name, array in factors().items()}
    folder = place.adapter(factors() | other, target_modules=[Q, module])
    place.refuses(
        place.serve(folder), 4, "GS-471", "1 of the adapter's 2 modules", file=folder / WEIGHTS, tensor=module
    )


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite(place: Place, value: float) -> None:
    """48: tensor and index; by serve, bind and convert, and by verify of a folder that says it is whole."""
    tensors = factors() | factors(K)
    tensors[key(K, "B")] = tensors[key(K, "B")].copy()
    sound = place.adapter(tensors, name="sound", target_modules=[Q, K])
    bind(sound, str(place.base), place.folder / "sealed")
    tensors[key(K, "B")][3, 1] = value
    folder = place.adapter(tensors, target_modules=[Q, K])
    out = ("--base", place.base, "--output", place.out)
    where = {"tensor": key(K, "B"), "file": folder / WEIGHTS}
    place.refuses(place.serve(folder), 3, "GS-339", "[3, 1]", **where)
    place.refuses(("bind", folder, *out), 3, "GS-339", "[3, 1]", **where)
    place.refuses(("convert", folder, *out), 3, "GS-3105", K)


def test_verify_of_a_sealed_adapter_with_nan(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """48: a tool without this check may have sealed it."""
    import gora_serve.bind as module

    tensors = factors(fill=NAN)
    monkeypatch.setattr(module, "check_finite", lambda path: None)
    bind(place.adapter(tensors), str(place.base), place.folder / "sealed")
    file = place.folder / "sealed" / WEIGHTS
    for words in (("verify", place.folder / "sealed"), place.serve(place.folder / "sealed")):
        place.refuses(words, 3, "GS-339", "[0, 0]", file=file, tensor=key(Q, "A"))


def test_another_base(place: Place) -> None:
    """49: a bound adapter is refused, an unbound one of the same shapes is told of."""
    foreign = place.adapter()
    bind(foreign, str(place.base), place.folder / "bound")
    shard = sorted(place.base.glob("model-*"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    place.refuses(place.serve(place.folder / "bound"), 4, "GS-401", "expected: gb1:", "actual: gb1:", file=place.base)
    answer = place.accepts(*place.serve(foreign))
    assert answer.err.count("warning: adapter: nothing proves which base") == 1


@pytest.mark.parametrize("what", ["hidden", "vocabulary"])
def test_another_size(place: Place, what: str) -> None:
    """50."""
    module, wrong = (Q, np.zeros((2, 48), np.float32)), np.zeros((2, 999), np.float32)
    if what == "hidden":
        folder, named = place.adapter(factors() | {key(Q, "A"): module[1]}), Q
    else:
        named = "model.embed_tokens"
        pair = {"A": wrong, "B": np.zeros((32, 2), np.float32)}
        tensors = {f"base_model.model.{named}.lora_embedding_{side}": array for side, array in pair.items()}
        folder = place.adapter(factors() | tensors, target_modules=[Q, named])
    mention = "(384, 32)" if what == "vocabulary" else "(32, 32)"
    place.refuses(place.serve(folder), 4, "GS-472", mention, file=folder / WEIGHTS, tensor=named)


NUMBERS: dict[str, dict[str, Any]] = {
    **{f"r {value}": {"r": value} for value in (0, -1, 2.0, "2", True, None, 10**9)},
    **{f"alpha {value}": {"lora_alpha": value} for value in (0, -1, "16", True, None, 1e31)},
    "rank_pattern 0": {"rank_pattern": {"q_proj": 0}},
    "rank_pattern 1e9": {"rank_pattern": {"q_proj": 10**9}},
    "alpha_pattern a string": {"alpha_pattern": {"q_proj": "x"}},
    "no r": {"remove": "r"},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_no_rank_and_no_scale(place: Place, name: str) -> None:
    """51."""
    folder = place.adapter(**NUMBERS[name])
    told = place.run(*place.serve(folder))
    fits = name not in ("r 1000000000", "rank_pattern 1e9")
    assert (told.code, told.gs) == (3, "GS-381" if fits else "GS-388"), told.err
    assert str(folder / (CONFIG if fits else WEIGHTS)) in told.err
    assert told.field("try")
    assert "Traceback" not in told.err


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*)*x", "((q_proj)+)+!", "a" * 2000])
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_hostile_patterns(place: Place, name: str, pattern: str) -> None:
    """52: refused, or matched as plain text; never run."""
    folder = place.adapter(**{name: {pattern: 2}})
    place.refuses(place.serve(folder), 3, "GS-381", name, file=folder / CONFIG)


def test_a_hostile_target_modules_is_never_run(place: Place) -> None:
    """52: nobody here asks it: modules are those of the tensors."""
    place.accepts(*place.serve(place.adapter(target_modules="((a+)+)+!")))


FEATURES: dict[str, Any] = {
    "use_dora": True, "bias": "all", "lora_bias": True, "modules_to_save": ["lm_head"],
    "megatron_config": {"a": 1}, "alora_invocation_tokens": [1], "layer_replication": [[0, 1]], "peft_type": "VERA",
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_features_that_are_no_plain_lora(place: Place, feature: str) -> None:
    """53."""
    folder = place.adapter(**{feature: FEATURES[feature]})
    place.refuses(place.serve(folder), 3, "GS-382", feature, file=folder / CONFIG)


def test_a_module_that_the_configuration_names_is_not_imported(place: Place) -> None:
    """53: PEFT writes auto_mapping into many sound adapters, and imports what it names; we read over it."""
    (place.folder / "gora_canary_module.py").write_text("raise SystemExit(9)\n")
    mapping = {"base_model_class": "X", "parent_library": "gora_canary_module"}
    place.accepts(*place.serve(place.adapter(auto_mapping=mapping)))
    assert "gora_canary_module" not in sys.modules


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", "a" * 300, "CON", "nul.x", "-a", "é", "a\x1b"])
def test_names(place: Place, name: str) -> None:
    """54."""
    place.refuses(place.serve(f"{name}={place.adapter()}"), 2, "GS-281")


@pytest.mark.parametrize(("one", "two"), [("sql", "SQL"), ("sql", "sql"), ("base", None), ("BASE", None)])
def test_names_that_are_taken(place: Place, one: str, two: str | None) -> None:
    """54: twins, also in case alone, and the base's own name."""
    folder = place.adapter()
    place.refuses(place.serve(*(f"{name}={folder}" for name in (one, two) if name)), 2, "GS-282", one)


CONTENTS: dict[str, tuple[bytes, str]] = {
    "truncated": (b'{"r": 2, "lora_al', "GS-319"),
    "a key twice": (b'{"r": 2, "r": 3}', "GS-309"),
    "byte order mark": (b'\xef\xbb\xbf{"r": 2}', "GS-319"),
    "50 MB": (b" " * 50_000_000, "GS-318"),
    "deep": (b'{"a": ' + b"[" * 100_000, "GS-320"),
    "a list": (b"[]", "GS-381"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_configurations(place: Place, name: str) -> None:
    """55."""
    content, gs = CONTENTS[name]
    folder = place.adapter()
    (folder / CONFIG).write_bytes(content)
    place.refuses(place.serve(folder), 3, gs, file=folder / CONFIG)


@pytest.mark.parametrize("init", ["pissa", "lora_ga", "olora", "corda"])
def test_initialisations_that_edited_the_base(place: Place, init: str) -> None:
    """56: serve refuses it as it is (3). What convert needs beside it is asked for by name: converters' tests."""
    folder = place.adapter(init_lora_weights=init)
    place.refuses(place.serve(folder), 3, "GS-383", "init_lora_weights", init, file=folder / CONFIG)


@pytest.mark.parametrize("kind", ["zip", "bomb", "tar"])
def test_archives(place: Place, kind: str) -> None:
    """57: nothing is unpacked."""
    file = place.folder / f"adapter.{'tar' if kind == 'tar' else 'zip'}"
    if kind == "tar":
        import io
        import tarfile

        with tarfile.open(file, "w") as tar:
            member = tarfile.TarInfo("../escaped")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    else:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../escaped" if kind == "zip" else "adapter_model.safetensors", b"\0" * 10_000_000)
    place.refuses(place.serve(f"a={file}"), 3, "GS-3222", "not unpacked", file=file)
    answer = place.run("convert", file, "--base", place.base, "--output", place.out)
    assert answer.code in (2, 3), answer.err
    assert "Traceback" not in answer.err
    assert not place.out.exists()


LIGHT = r"""
import json, re, sys, time
begun = time.process_time()
from gora_serve.cli.main import main
code = main(sys.argv[1:])
used = time.process_time() - begun
heavy = sorted({"torch", "transformers", "peft", "vllm", "numpy"} & set(sys.modules))
peak = int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
print(json.dumps([code, used, peak, heavy]))
"""


def test_refusals_are_cheap(place: Place) -> None:
    """A second and 100 MB, and no torch: in one process each, for the costliest of them."""
    hostile: dict[str, Callable[[str], Path]] = {
        "rank": lambda name: place.adapter(name=name, r=10**9),
        "pattern": lambda name: place.adapter(name=name, rank_pattern={"(a+)+$": 2}),
        "nan": lambda name: place.adapter(factors(fill=NAN), name=name),
    }
    folders = {name: build(name) for name, build in hostile.items()}
    place.run("--version")
    for name, folder in folders.items():
        words = [str(word) for word in place.serve(folder)]
        done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, check=False)
        code, used, peak, heavy = json.loads(done.stdout)
        assert (name, code, heavy) == (name, 3, [])
        assert peak < 100_000, (name, peak)
        assert used < 2, (name, used)  # processor time, on a machine that others use too
