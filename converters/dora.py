"""DoRA: LoRA whose merged rows are brought to trained lengths (Liu et al. 2024). The update has full rank."""

from __future__ import annotations

import math
from dataclasses import replace

from converters import lora
from converters.checks import check_numbers
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.linalg import as_factors
from gora_serve.adapter.names import PREFIX
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import InputError

PART = ".lora_magnitude_vector"
ENDINGS = (PART, f"{PART}.weight", f"{PART}.default", f"{PART}.default.weight")


def read(source: Source, inputs: Inputs) -> Reading:
    """Read DoRA: delta = (D - I) W0 + D s B A, D = diag(m / rownorm(W0 + s B A)) (paper, eq. 5). Needs the base.

    The row norms are those of the weight in use, as in PEFT's forward pass; training took them for constants, which
    changes gradients only. Modules without a magnitude are plain LoRA.
    """
    base = inputs.need_base("DoRA")
    magnitudes = _magnitudes(source)
    plain = lora.read(_without(source), inputs)
    alone = sorted(magnitudes.keys() - set(plain.adapter.modules))
    if alone:
        raise InputError(
            "a magnitude without LoRA factors", code="GS-3154", file=source.weights, tensor=magnitudes[alone[0]],
            hint="the file is not whole: save the adapter again",
        )  # fmt: skip

    _check_magnitudes(source, magnitudes, base)

    def factors(path: str) -> LoraFactors:
        low_rank = plain.adapter.modules[path]
        return _delta(source, magnitudes[path], path, low_rank, base) if path in magnitudes else low_rank

    modules = LazyModules(plain.adapter.modules, factors)
    return replace(
        plain,
        adapter=replace(plain.adapter, modules=modules),
        applied=plain.applied | frozenset(magnitudes.values()),
        beyond=replace(plain.beyond, magnitudes=magnitudes, before=plain.adapter.modules),
        served=None,  # PEFT loads it, no engine serves it
        full_rank=True,
        method="(D - I) W0 + D s B A, D = diag(m / rownorm(W0 + s B A))",
        notes=(*plain.notes, "DoRA has full rank: merging it into the base is exact, LoRA is the nearest low rank"),
    )


def _magnitudes(source: Source) -> dict[str, str]:
    """Return module path -> name of its magnitude. Raises InputError (GS-3151) where there is none."""
    found = {}
    for name in source.tensors:
        ending = next((one for one in ENDINGS if name.endswith(one)), None)
        if ending and name.startswith(PREFIX):
            found[name.removeprefix(PREFIX).removesuffix(ending)] = name
    if not found:
        raise InputError(
            "no tensor of this family", code="GS-3151", file=source.weights, expected=PART[1:],
            hint="leave out --from, and the family is found by itself",
        )  # fmt: skip
    check_numbers(source, found.values())
    return found


def _check_magnitudes(source: Source, magnitudes: dict[str, str], base: BaseWeights) -> None:
    """Refuse what is not one number for each output (GS-3155). Of embeddings, PEFT scales the columns."""
    for path, name in magnitudes.items():
        outputs, shape = base.shape(path)[0], source.tensors.shape(name)
        if math.prod(shape) != outputs or base.is_embedding(path):
            raise InputError(
                "the magnitude is not one number for each output", code="GS-3155", file=source.weights, tensor=name,
                expected=outputs, actual=f"{shape}, of embeddings" if base.is_embedding(path) else shape,
                hint="DoRA on embeddings, and of other tools, scales along inputs: merge with the tool that made it",
            )  # fmt: skip


def _without(source: Source) -> Source:
    """The same adapter as plain LoRA sees it."""
    return replace(source, config={**source.config, "use_dora": False})


def _delta(source: Source, name: str, path: str, low_rank: LoraFactors, base: BaseWeights) -> LoraFactors:
    """Return the update of one module at full rank; the two terms W0 are added to and taken from cancel in float64."""
    base.check_shape(path, low_rank.shape)
    W = base.weight(path).double()  # (out, in)
    m = source.tensors[name].double().flatten()
    merged = W + low_rank.delta()
    return as_factors((m / merged.norm(dim=1))[:, None] * merged - W)
