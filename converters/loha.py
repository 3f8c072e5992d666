"""LoHa: the elementwise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2022), as PEFT saves it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from converters.checks import check_fits, check_pair, check_shape
from converters.parts import Parts, parts_of, reading_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.linalg import as_factors
from gora_serve.adapter.peft_config import foreign_scales

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CONVOLUTION = ("hada_t1", "hada_t2")


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoHa: delta = alpha / r * (w1_a w1_b) ∘ (w2_a w2_b), exactly of rank r² by Khatri-Rao products.

    Convolutions with cores (t1, t2) are refused (GS-3150).
    """
    parts = parts_of(source, PARTS + CONVOLUTION, [PARTS])
    for path, one in parts.items():
        _check_shapes(source, inputs, path, [one[name] for name in PARTS])
    ranks = {path: source.tensors.shape(one["hada_w1_b"])[0] for path, one in parts.items()}
    scales = lycoris_scales(source, ranks)

    def factors(path: str) -> LoraFactors:
        w1_a, w1_b, w2_a, w2_b = _pieces(source, parts[path])
        if ranks[path] ** 2 > min(w1_a.shape[0], w1_b.shape[1]):
            return as_factors(scales[path] * (w1_a @ w1_b) * (w2_a @ w2_b))
        B = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)  # (out, r²)
        A = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)  # (r², in)
        return LoraFactors(A, B, scales[path])

    method = "Khatri-Rao products of the two pairs, rank r squared"
    notes = (f"the exact rank is up to {max(ranks.values()) ** 2}: --rank or --tolerance makes it smaller",)
    return reading_of(source, inputs, LazyModules(parts, factors), parts, method=method, notes=notes)


def _check_shapes(source: Source, inputs: Inputs, path: str, names: list[str]) -> None:
    w1_a, w1_b, w2_a, w2_b = names
    check_pair(source, w1_b, w1_a)
    check_pair(source, w2_b, w2_a)
    (out_features, rank), (_, in_features) = source.tensors.shape(w1_a), source.tensors.shape(w1_b)
    check_shape(source, w2_a, (out_features, rank))
    check_shape(source, w2_b, (rank, in_features))
    check_fits(inputs, path, (out_features, in_features))


def _pieces(source: Source, parts: Parts) -> list[Tensor]:
    """w1_a (out, r), w1_b (r, in), w2_a (out, r), w2_b (r, in), in float64."""
    return [source.tensors[parts[name]].double() for name in PARTS]


def lycoris_scales(source: Source, ranks: Mapping[str, int]) -> dict[str, float]:
    """Return alpha / r per module: PEFT's rule for LoHa and LoKr, whose configuration says `alpha`."""
    config = {**source.config, "lora_alpha": source.config.get("alpha", 8), "use_rslora": False}
    return foreign_scales(config, ranks, file=source.config_file)
