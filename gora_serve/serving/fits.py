"""Whether an adapter can belong to a base at all: modules, shapes, and that it is whole.

Of the architectures whose checkpoints, adapters and engine spell every layer alike, a module is known by its path. Of
others, whose names differ between checkpoints, transformers' versions and engines, by the numbers in its path and its
last name; what cannot be told by these passes, and the canary has the last word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from gora_serve.errors import BindingError, GoraError, InputError, listed
from gora_serve.integrity.digest import TensorRecord
from gora_serve.serving.adapter_dir import AdapterDir
from gora_serve.serving.preflight import FLOATS
from gora_serve.serving.room import SAME_NAMES
from gora_serve.serving.unserved import TRAIN_ELSE, convert_command

Place = tuple[tuple[str, ...], str]
RIGHT_BASE = "give the base that the adapter was trained on"
HEAD = "lm_head"  # which tied checkpoints do not hold
# Classes of SAME_NAMES whose `embedding_modules` in vLLM 0.32 are not empty: of the others it drops such factors.
ADAPTED_EMBEDDINGS = frozenset({"LlamaForCausalLM", "Qwen3ForCausalLM"})
# Keys that make PEFT leave out some of the modules that target_modules names.
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def place_of(module: str) -> Place:
    """Return the numbers in a module's path (layer, expert) and its last name."""
    parts = module.split(".")
    return tuple(part for part in parts if part.isdecimal()), parts[-1]


def fit_errors(
    adapter: AdapterDir, tensors: Mapping[str, TensorRecord], architecture: str | None
) -> Iterator[GoraError]:
    """Yield what speaks against this base: modules that it lacks (GS-471), has in another shape (GS-472) or that are no
    matrix (GS-4350), those that the engine would pass over (GS-4351), and those that are missing (GS-3220).

    tensors: those of the base. architecture: of the base; in one of SAME_NAMES its files name every layer as adapters
    do, so that a module is known by its whole path. All modules are counted, the first five named.
    """
    same_names = architecture in SAME_NAMES
    strange = _strange(adapter, tensors, same_names=same_names)
    if strange:
        yield BindingError(
            f"{_count(strange, adapter)} are not in the base: {listed(strange)}", code="GS-471",
            file=adapter.weights_file, tensor=strange[0], hint=_way(adapter, tensors, strange),
        )  # fmt: skip
    yield from _shape_errors(adapter, tensors)
    if same_names:
        yield from _unwrapped_errors(adapter, tensors, str(architecture))
        if not strange:
            yield from _missing_errors(adapter, {place_of(name.rpartition(".")[0]) for name in tensors})


def _strange(adapter: AdapterDir, tensors: Mapping[str, TensorRecord], *, same_names: bool) -> list[str]:
    """Return the modules that are not in the base; those of which that cannot be told are taken."""
    known = {name.rpartition(".")[0] for name in tensors}
    if same_names and any(name.startswith("model.layers.") for name in known):
        return [module for module in adapter.pairs if module not in known and module != HEAD]
    places = {place_of(name) for name in known}
    leaves = {leaf for _, leaf in places}
    return [
        module
        for module in adapter.pairs
        if (place := place_of(module)) not in places and place[0] and (same_names or place[1] in leaves)
    ]


def _way(adapter: AdapterDir, tensors: Mapping[str, TensorRecord], strange: Collection[str]) -> str:
    """Return what to do about modules that are not in the base: some may lack only the first part of their names.

    `convert` leaves the names of FEATURE_EXTRACTION as they are: they are right for the model without its head.
    """
    tails = {name.partition(".")[2] for name in tensors}
    if not all(f"{module}.weight" in tails for module in strange):
        return RIGHT_BASE
    if adapter.config.get("task_type") == "FEATURE_EXTRACTION":
        return "serve it with PEFT over AutoModel: it belongs to the base without its head"
    return f"the first part of their names is missing: {convert_command(adapter.path, None)}"


def _shape_errors(adapter: AdapterDir, tensors: Mapping[str, TensorRecord]) -> Iterator[GoraError]:
    shapes: dict[Place, list[tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATS:
            shapes.setdefault(place_of(name.removesuffix(".weight")), []).append(tensor.shape)
    found = {
        module: (pair.B.shape[0], pair.A.shape[1])
        for module, pair in adapter.pairs.items()
        if pair.A and pair.B and len(pair.A.shape) == len(pair.B.shape) == 2
    }
    wrong = {
        module: known
        for module, shape in found.items()
        if (known := shapes.get(place_of(module))) and shape not in known and shape[::-1] not in known
    }
    if wrong:
        first = next(iter(wrong))
        yield BindingError(
            f"{_count(wrong, adapter)} have another shape than the base's: {listed(wrong)}", code="GS-472",
            file=adapter.weights_file, tensor=first, expected=f"(out, in) {wrong[first][0]}", actual=found[first],
            hint=RIGHT_BASE,
        )  # fmt: skip


def _unwrapped_errors(
    adapter: AdapterDir, tensors: Mapping[str, TensorRecord], architecture: str
) -> Iterator[GoraError]:
    flat = [module for module in adapter.pairs if len(getattr(tensors.get(f"{module}.weight"), "shape", (0, 0))) != 2]
    if flat:
        yield BindingError(
            f"{_count(flat, adapter)} are no matrices of the base: {listed(flat)}", code="GS-4350",
            file=adapter.weights_file, tensor=flat[0], hint=RIGHT_BASE,
        )  # fmt: skip
    ends = [module for module in adapter.pairs if module == HEAD or module.endswith("embed_tokens")]
    if ends and architecture not in ADAPTED_EMBEDDINGS:
        yield BindingError(
            f"vLLM would pass over {listed(ends)}: it adapts neither embeddings nor head of {architecture}",
            code="GS-4351", file=adapter.weights_file, tensor=ends[0], hint=f"{TRAIN_ELSE}: {listed(ends)}",
        )  # fmt: skip


def _missing_errors(adapter: AdapterDir, places: Collection[Place]) -> Iterator[GoraError]:
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or any(adapter.config.get(key) for key in _NARROWING):
        return
    wanted = {place for place in places if place[0] and place[1] in targets}
    missing = sorted(wanted - {place_of(module) for module in adapter.pairs})
    if missing:
        shown = [".".join((*numbers, leaf)) for numbers, leaf in missing]
        yield InputError(
            f"the adapter lacks {len(missing)} of the {len(wanted)} modules that its target_modules names:"
            f" {listed(shown)}", code="GS-3220", file=adapter.weights_file, tensor=shown[0],
            hint="fetch the adapter again, whole; or name in target_modules the paths of the modules that it has",
        )  # fmt: skip


def _count(some: Collection[str], adapter: AdapterDir) -> str:
    return f"{len(some)} of the adapter's {len(adapter.pairs)} modules"
