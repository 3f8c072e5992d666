"""KaSA of PEFT (Wang et al. 2024): W0 loses its r smallest singular values, and s B diag(d) A is learned.

The update on W0 is s B diag(d) A less the part that was dropped: rank 2 r, exactly. The dropped part is computed from
W0 where its spectrum has a gap there, or is W0 - W_res. It was never in an adapter.
"""

from __future__ import annotations

from dataclasses import replace

from converters import lora
from converters.checks import check_numbers
from converters.decompose import minor
from converters.initial import Rules, find_initial
from converters.pairs import pairs_of
from converters.pissa import gap_note
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.linalg import subtract
from gora_serve.adapter.names import PREFIX
from gora_serve.errors import InputError, UsageError


def read(source: Source, inputs: Inputs) -> Reading:
    """Read KaSA. Raises InputError: GS-3130 for no gap in W0's spectrum, GS-3133 for a missing lora_diag."""
    if inputs.init_adapter or inputs.cache:
        raise UsageError(
            "what KaSA takes out of the base is in no adapter and no cache", code="GS-233",
            hint="leave --init-adapter and --cache out, or give --mutated-base",
        )  # fmt: skip
    base = inputs.need_base("KaSA edits the base; its conversion")
    plain = lora.read(source, inputs)
    pairs = {path: pair for path, pair in pairs_of(source).items() if path not in plain.adapter.embeddings}
    names = {path: _diagonal(source, path, pair.A) for path, pair in pairs.items()}
    ranks = {path: plain.adapter.modules[path].rank for path in names}
    computed = "initial is the part of W0 that belongs to its r smallest singular values"
    rules = Rules("kasa", lambda path, rank: minor(base.weight(path), rank), computed, in_adapter=False)
    initial = find_initial(source, inputs, plain, rules, list(names))
    notes = () if inputs.mutated_base else (gap_note(base, ranks, inputs, smallest=True),)

    def update(path: str) -> LoraFactors:
        factors = plain.adapter.modules[path]
        if path not in names:
            return factors
        diagonal = source.tensors[names[path]].double()  # (r,)
        trained = LoraFactors(factors.A.double(), factors.B.double() * diagonal, factors.scale)
        return subtract(trained, initial.modules[path])

    return replace(
        plain,
        adapter=replace(plain.adapter, modules=LazyModules(plain.adapter.modules, update)),
        applied=plain.applied | frozenset(names.values()),
        served=None,  # vLLM refuses lora_diag; PEFT takes the part out of the base again
        initial=initial.modules,
        edited=initial.edited,
        files=initial.files,
        method=f"s B diag(d) A less initial; {initial.method.removeprefix('trained less initial; ')}",
        notes=(*plain.notes, *notes, *initial.notes),
    )


def _diagonal(source: Source, path: str, name_of_a: str) -> str:
    """Return the name of a module's lora_diag, (r,). Raises InputError (GS-3133) where it has none that fits."""
    name = f"{PREFIX}{path}.lora_diag"
    if name not in source.tensors or source.tensors.shape(name) != source.tensors.shape(name_of_a)[:1]:
        raise InputError(
            "a module of a KaSA adapter has no diagonal, or one of another length", code="GS-3133",
            file=source.weights, tensor=name, expected=f"({source.tensors.shape(name_of_a)[0]},)",
            hint="save the adapter again, whole; --from lora if it was never KaSA",
        )  # fmt: skip
    check_numbers(source, [name])
    return name
