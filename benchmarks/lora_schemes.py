"""How the adapters of a batch are best multiplied on CPU: the layers of SmolLM2, without an engine.

    python benchmarks/lora_schemes.py [--threads N]

Each scheme adds the adapters' share of 8 blocks' linear layers (qkv, o, gate and up, down). The time is that of the
process's CPU (best of some), as a part of what the base's own products take. `padded` is one product over all slots at
the largest rank with a mask, as in a first trial.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import machine
import torch
from serving import RANK_MAX, draw_rank
from vllm.platforms import current_platform

from gora_serve.vllm_plugin import dense, prepared, product
from gora_serve.vllm_plugin.kernel import has_kernel
from gora_serve.vllm_plugin.pool import RankPool
from gora_serve.vllm_plugin.route import Route, make_route

LAYERS = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))  # in, out of each slice
BLOCKS = 8
TOKENS = (1, 8, 32, 128, 512, 2048)
NEVER = 10**9
# Thresholds of gora_serve/vllm_plugin: tokens from which each adapter is multiplied alone, and up to which 16-bit
# weights are converted; whether the layers are packed; and up to which number of tokens their sums are prepared.
SCHEMES = {
    "side by side": (NEVER, 0, False, 0), "side by side, in float32": (NEVER, NEVER, False, 0),
    "by adapter": (0, 0, False, 0), "by adapter, in float32": (0, NEVER, False, 0),
    "packed, side by side": (NEVER, 0, True, 0), "packed, by adapter": (0, 0, True, 0),
    "packed, prepared": (NEVER, 0, True, prepared.FEW),
}  # fmt: skip


@contextmanager
def scheme(many: int, few: int, prepare: int) -> Iterator[None]:
    names = ("MANY", "MANY_16_BIT", "MANY_PACKED")
    kept = [getattr(product, name) for name in names], dense.FEW, product.FEW
    for name in names:
        setattr(product, name, many)
    dense.FEW, product.FEW = few, prepare
    try:
        yield
    finally:
        for name, value in zip(names, kept[0], strict=True):
            setattr(product, name, value)
        dense.FEW, product.FEW = kept[1:]


def pools(adapters: int, dtype: torch.dtype, *, packed: bool) -> list[RankPool]:
    chance = random.Random(0)
    made = []
    for wide, outs in LAYERS * BLOCKS:
        ranks = [[draw_rank(chance) for _ in outs] for _ in range(adapters)]
        room = [sum(column) for column in zip(*ranks, strict=True)]
        pool = RankPool(room, wide, outs, dtype, packed=packed)
        for slot, slices in enumerate(ranks):
            pool.put(slot, [(torch.randn(r, wide), torch.randn(out, r)) for r, out in zip(slices, outs, strict=True)])
        made.append(pool)
    return made


def seconds(work: Callable[[], None]) -> float:
    """Return the least CPU time of several runs."""
    work()
    found = []
    while len(found) < 3 or (sum(found) < 0.6 and len(found) < 30):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def padded(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> None:
    """x (tokens, in), a (slots * rank, in), b (slots * rank, out)."""
    y.addmm_(torch.mm(x, a.t()).mul_(mask), b)


def case(adapters: int, tokens: int, dtype: torch.dtype, held: Mapping[bool, list[RankPool]]) -> dict[str, float]:
    torch.manual_seed(0)
    xs = {wide: torch.randn(tokens, wide).to(dtype) for wide, _ in LAYERS}
    ys = [torch.zeros(tokens, sum(outs), dtype=dtype) for _, outs in LAYERS]
    weights = [torch.randn(sum(outs), wide).to(dtype) for wide, outs in LAYERS * BLOCKS]
    slots = torch.arange(tokens) % adapters if tokens <= 64 else torch.arange(tokens) * adapters // tokens
    route: Route = make_route(slots)

    def base() -> None:
        for number, weight in enumerate(weights):
            torch.nn.functional.linear(xs[LAYERS[number % 4][0]], weight)

    def ours(packed: bool) -> None:
        for number, pool in enumerate(held[packed]):
            product.add_linear(ys[number % 4], xs[LAYERS[number % 4][0]], pool, route)

    wide_slots = [
        (torch.randn(len(outs), (adapters + 1) * RANK_MAX, wide).to(dtype),
         [torch.randn((adapters + 1) * RANK_MAX, out).to(dtype) for out in outs]) for wide, outs in LAYERS
    ]  # fmt: skip
    mask = (torch.arange((adapters + 1) * RANK_MAX) // RANK_MAX == slots[:, None]).to(dtype)

    def all_slots() -> None:
        for number in range(len(weights)):
            wide, outs = LAYERS[number % 4]
            a, b = wide_slots[number % 4]
            start = 0
            for index, out in enumerate(outs):
                padded(ys[number % 4][:, start : start + out], xs[wide], a[index], b[index], mask)
                start += out

    reference = seconds(base)
    found = {"padded": seconds(all_slots)}
    for name, (many, few, packed, prepare) in SCHEMES.items():
        if packed in held and tokens <= (prepare or NEVER) and (dtype != torch.float32 or "float32" not in name):
            with scheme(many, few, prepare):
                found[name] = seconds(partial(ours, packed))
    found["as it is"] = seconds(partial(ours, True in held))
    return {name: round(value / reference, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    current_platform.import_kernels()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for adapters in (1, 2, 8):
            kinds = [False, True] if dtype == torch.bfloat16 and has_kernel() else [False]
            held = {packed: pools(adapters, dtype, packed=packed) for packed in kinds}
            for tokens in TOKENS:
                if tokens >= adapters:
                    name = f"{str(dtype).removeprefix('torch.')}, {adapters} adapters, {tokens} tokens"
                    found[name] = case(adapters, tokens, dtype, held)
                    print(name, found[name], flush=True)
    result = {
        "threads": arguments.threads,
        "many": [product.MANY, product.MANY_16_BIT, product.MANY_PACKED],
        "few": dense.FEW,
        "part of the base's time": found,
    }
    machine.write("lora_schemes", machine.facts("python benchmarks/lora_schemes.py") | result)


if __name__ == "__main__":
    main()
