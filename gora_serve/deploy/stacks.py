"""The experts of a layer, made whole for engines that fuse them again: all of them, each projection at one rank.

vLLM 0.32 stacks the factors of a layer's experts: it dies of an expert or of a projection that is missing, and refuses
experts of unlike ranks. PEFT 0.21 stacks them too. What an update lacks for that is filled with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count

import torch

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import pad_rank
from gora_serve.adapter.spectra import Spectra
from gora_serve.deploy.base import BaseWeights

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.([^.]+)")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def level(ranks: Mapping[str, int], base: BaseWeights) -> dict[str, int]:
    """Return the ranks with those of experts raised: over a layer's experts, each projection has its largest, and 1 is
    the least. Layers without any update of their experts stay without, and modules that are no experts as they are.
    """
    largest: dict[str, dict[str, int]] = {}
    for path, rank in ranks.items():
        found = _EXPERT.fullmatch(path)
        if found and rank and found.group(2) in _PROJECTIONS:
            of_layer = largest.setdefault(found.group(1), {})
            of_layer[found.group(2)] = max(rank, of_layer.get(found.group(2), 0))
    levelled = dict(ranks)
    for layer, of_layer in largest.items():
        for path in _experts_of(base, layer):
            levelled[path] = of_layer.get(path.rpartition(".")[2], 1)
    return levelled


def _experts_of(base: BaseWeights, layer: str) -> Iterator[str]:
    """Yield the modules of a layer's experts."""
    for expert in count():
        paths = [f"{layer}.{expert}.{name}" for name in _PROJECTIONS]
        found = [path for path in paths if base.find(path)]
        if not found:
            return
        yield from found


def levelled_factors(spectra: Spectra, path: str, rank: int, base: BaseWeights) -> LoraFactors:
    """Return a module's best update of that rank, with zeros where its own rank is lower."""
    held = min(rank, len(spectra[path].singular)) if path in spectra else 0
    if held:
        return pad_rank(spectra[path].load().first(held), rank)
    out_features, in_features = base.shape(path)
    zeros = torch.zeros(rank, in_features, dtype=torch.float64), torch.zeros(out_features, rank, dtype=torch.float64)
    return LoraFactors(*zeros, 1.0)
