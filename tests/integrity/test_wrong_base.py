"""A bound adapter on every base but its own is refused, and on every other layout of its own base is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import NORM, Change, K, Q, Tensors, base_tensors, bound_adapter, changed, one_ulp, save_base

from gora_serve.errors import BindingError
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.verify import verify_unsealed

Q1, K1 = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


def only(name: str, bits: int) -> Change:
    values = torch.tensor([0.0, 1.0, -2.0, 3.0])
    values.view(torch.int32)[0] = bits
    return lambda tensors: {**tensors, name: values}


def twin(name: str, place: int) -> Change:
    return changed(name, one_ulp(place))


WRONG: dict[str, Change] = {
    "1 ulp, bfloat16, first": twin(f"{Q}.weight", 0),
    "1 ulp, bfloat16, last": twin(f"{Q}.weight", -1),
    "1 ulp, float16, first": twin(f"{K}.weight", 0),
    "1 ulp, float16, last": twin(f"{K}.weight", -1),
    "1 ulp, float32, first": twin(Q1, 0),
    "1 ulp, float32, last": twin(Q1, -1),
    "1 ulp, embeddings": twin("model.embed_tokens.weight", 17),
    "1 ulp, everywhere": lambda ts: {n: one_ulp(0)(t) if t.is_floating_point() else t for n, t in ts.items()},
    "-0.0 for 0.0": only(f"{NORM}.weight", -(2**31)),
    "NaN for 0.0": only(f"{NORM}.weight", 0x7FC00000),
    "another NaN": only(f"{NORM}.weight", 0x7FC00001),
    "an integer": changed("model.steps", lambda t: t + 1),
    "a bool": changed("model.mask", lambda t: ~t),
    "two tensors swapped": lambda ts: {**ts, Q1: ts[K1], K1: ts[Q1]},
    "a tensor renamed": lambda ts: {(K1 + "s" if n == K1 else n): t for n, t in ts.items()},
    "a tensor missing": lambda ts: {n: t for n, t in ts.items() if n != K1},
    "a tensor more": lambda ts: {**ts, "model.extra": torch.zeros(1)},
    "an empty tensor more": lambda ts: {**ts, "model.extra": torch.zeros(0)},
    "another shape, same bytes": changed(Q1, lambda t: t.reshape(2, 8)),
    "transposed": changed(Q1, lambda t: t.T),
    "another type, same bytes": changed(Q1, lambda t: t.view(torch.int32)),
    "widened": changed(f"{Q}.weight", lambda t: t.float()),
    "rounded": changed(Q1, lambda t: t.bfloat16()),
    "scaled": changed(Q1, lambda t: t * 2),
    "rows permuted": changed(Q1, lambda t: t.flip(0)),
    "zeros": changed(Q1, torch.zeros_like),
}


def reorder(key: Callable[[str], object]) -> list[list[str]]:
    return [sorted(base_tensors(), key=key)]  # type: ignore[arg-type, type-var]


NAMES = sorted(base_tensors())
SHARDS: dict[str, list[list[str]] | None] = {
    **{f"{n} shards": [NAMES[i::n] for i in range(n)] for n in range(1, 9)},
    **{f"cut at {n}": [NAMES[:n], NAMES[n:]] for n in range(1, 8)},
    "reversed": reorder(lambda name: [-ord(letter) for letter in name]),
    "by length": reorder(len),
    "one file": None,
}
LINKS = ("folder", "files", "files and index", "copied", "read-only", "renamed")


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bound")
    manifest = hash_model(save_base(place / "base", base_tensors()))
    remember_manifest(manifest)
    return bound_adapter(place / "adapter", manifest.roots)


def test_there_are_enough_of_both() -> None:
    assert len(WRONG) >= 20
    assert len(SHARDS) + len(LINKS) >= 20


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("shards", [None, "each"])
def test_every_other_base_is_refused_and_the_difference_named(
    tmp_path: Path, bound: Path, name: str, shards: str | None
) -> None:
    before, tensors = base_tensors(), WRONG[name](base_tensors())
    base = save_base(tmp_path / "base", tensors, [[one] for one in tensors] if shards else None)
    with pytest.raises(BindingError) as caught:
        verify_unsealed(bound, base=base, base_manifest=hash_model(base))
    assert (caught.value.code, caught.value.exit_code) == ("GS-401", 4)
    differing = {one for one in before.keys() | tensors.keys() if not same(before.get(one), tensors.get(one))}
    named = [one for one in differing if f"{one} (" in caught.value.what]
    assert len(named) == min(5, len(differing))
    assert ("more" in caught.value.what) == (len(differing) > 5)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return raw(one) == raw(other)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", SHARDS)
def test_the_same_weights_in_other_files_are_taken(tmp_path: Path, bound: Path, name: str) -> None:
    base = save_base(tmp_path / "base", base_tensors(), SHARDS[name], {"format": "pt", "note": name})
    assert settings_alone(verify_unsealed(bound, base=base, base_manifest=hash_model(base)).warnings)


def settings_alone(warnings: tuple[str, ...]) -> bool:
    """One warning, of the seal that these adapters lack: neither weights nor settings differ."""
    return len(warnings) == 1 and "no gora_manifest.json" in warnings[0]


@pytest.mark.parametrize("how", LINKS)
def test_the_same_weights_elsewhere_are_taken(tmp_path: Path, bound: Path, how: str) -> None:
    original = save_base(tmp_path / "original", base_tensors(), SHARDS["3 shards"])
    base = place(original, tmp_path, how)
    assert settings_alone(verify_unsealed(bound, base=base, base_manifest=hash_model(base)).warnings)


def place(original: Path, tmp_path: Path, how: str) -> Path:
    other = tmp_path / "other"
    if how == "folder":
        other.symlink_to(original)
    elif how == "copied":
        shutil.copytree(original, other)
    elif how == "read-only":
        shutil.copytree(original, other)
        for path in other.iterdir():
            path.chmod(0o444)
    elif how == "renamed":
        other = original.rename(tmp_path / "another name, with a blank")
    else:  # a hub snapshot: links into the repository's blobs
        blobs, other = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c"
        blobs.mkdir(parents=True)
        other.mkdir(parents=True)
        for number, path in enumerate(sorted(original.iterdir())):
            if how == "files" and path.suffix == ".json":
                shutil.copy(path, other)
                continue
            shutil.copy(path, blobs / str(number))
            (other / path.name).symlink_to(f"../../blobs/{number}")
    return other


def refusal(bound: Path, base: Path) -> BindingError:
    with pytest.raises(BindingError) as caught:
        verify_unsealed(bound, base=base, base_manifest=hash_model(base))
    return caught.value


@pytest.mark.parametrize(
    ("modules", "edited", "residual"),
    [
        ((Q,), (Q,), True),
        ((Q, K), (Q, K), True),
        ((Q, K), (Q,), True),
        ((Q,), (Q, K), False),
        ((Q,), (Q, NORM), False),
        ((Q,), (NORM,), False),
    ],
)
def test_what_looks_like_a_residual_base_is_called_so(
    tmp_path: Path, modules: tuple[str, ...], edited: tuple[str, ...], residual: bool
) -> None:
    manifest = hash_model(save_base(tmp_path / "base", base_tensors()))
    remember_manifest(manifest)
    adapter = bound_adapter(tmp_path / "adapter", manifest.roots, modules=modules)
    tensors: Tensors = base_tensors()
    for path in edited:
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"] * 0.5
    err = refusal(adapter, save_base(tmp_path / "edited", tensors))
    assert ("looks like a residual base" in err.what) == residual
    assert ("--mutated-base" in str(err.fields["try"])) == residual


def test_another_form_is_no_residual_base(tmp_path: Path, bound: Path) -> None:
    tensors = changed(f"{Q}.weight", lambda t: t.float())(base_tensors())
    assert "residual" not in refusal(bound, save_base(tmp_path / "base", tensors)).what


def test_where_the_other_base_is_not_at_hand_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "cache"))
    base = save_base(tmp_path / "base", base_tensors())
    adapter = bound_adapter(tmp_path / "adapter", hash_model(base).roots, str(base))
    other = save_base(tmp_path / "other", WRONG["scaled"](base_tensors()))
    assert f"{Q1} (changed)" in refusal(adapter, other).what  # from the folder that the adapter names
    save_base(base, WRONG["zeros"](base_tensors()))
    assert "which tensors differ is not known here" in refusal(adapter, other).what  # it is another base by now
    shutil.rmtree(base)
    assert "which tensors differ is not known here" in refusal(adapter, other).what


def test_a_damaged_manifest_in_the_cache_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "cache"))
    manifest = hash_model(save_base(tmp_path / "base", base_tensors()))
    remember_manifest(manifest)
    adapter = bound_adapter(tmp_path / "adapter", manifest.roots)
    other = save_base(tmp_path / "other", WRONG["scaled"](base_tensors()))
    (entry,) = (tmp_path / "cache" / "manifests").iterdir()
    text = entry.read_text()
    for damaged in ("", text[:-9], text.replace("0", "1"), "[]", text.replace("gora-serve/", "x")):
        entry.write_text(damaged)
        assert "not known here" in refusal(adapter, other).what
    entry.write_text(text)
    assert f"{Q1} (changed)" in refusal(adapter, other).what
    entry.chmod(0o666)
    assert "not known here" in refusal(adapter, other).what
