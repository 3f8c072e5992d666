"""Llama as Meta's own code writes it: other module names, and the rows of the queries and keys in another order.

There RoPE rotates neighboring rows (2 i, 2 i + 1) of a head; transformers rotates rows i and i + d / 2. The rows of wq
and wk, and so those of their B, are permuted from the one order to the other. A stays as it is.
"""

from __future__ import annotations

import re

from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.rope_rows import separate
from gora_serve.errors import BindingError

HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def translate(path: str, names: dict[str, str]) -> str | None:
    """Return transformers' path of a module, or None for one that is not in `names`.

    names: a module's name within its layer (attention.wq), or its whole path (output), to transformers'. A leading
    `model.` is dropped first.
    """
    path = path.removeprefix("model.")
    if path in names:
        return names[path]
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    if found is None or found.group(2) not in names:
        return None
    return f"model.layers.{found.group(1)}.{names[found.group(2)]}"


def to_halves(factors: LoraFactors, path: str, base: BaseWeights) -> LoraFactors:
    """Return the update of a module in transformers' order."""
    return LoraFactors(factors.A, halve_rows(factors.B, path, base), factors.scale)


def halve_rows(rows: Tensor, path: str, base: BaseWeights) -> Tensor:
    """Return rows (out, n) of a module in transformers' order: permuted where it is q_proj or k_proj, else as they are.

    The base's configuration says how many heads there are. Raises BindingError (GS-460) where that cannot be.
    """
    key = HEADS.get(path.rpartition(".")[2])
    if key is None:
        return rows
    config = base.config.get("text_config") or base.config
    heads = config.get(key) or config.get("num_attention_heads")
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or rows.shape[0] % (2 * heads):
        raise BindingError(
            "the rows cannot be put into transformers' order: they are not the base's heads", code="GS-460",
            file=base.folder / "config.json", tensor=path, expected=f"{key} heads of an even size",
            actual=f"{heads} heads, {rows.shape[0]} rows", hint="give the base that the adapter was trained on",
        )  # fmt: skip
    return separate(rows, heads)
