"""What N tasks take to deploy, by method: N bases, or one base and N adapters. Sizes in bytes, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gora_serve.adapter.format import ENGINE_RANKS
from gora_serve.config import RankConfig
from gora_serve.deploy.gap import ModuleGap

BUCKETS = (1, *ENGINE_RANKS)  # the values that vLLM takes for --max-lora-rank


@dataclass(frozen=True)
class Deployment:
    """One way to deploy `tasks` tasks.

    stored: bases and adapters on disk. max_rank: the largest rank of an adapter, 0 without adapters. bucket: the
    --max-lora-rank that it forces; None where there is no adapter, or no bucket is large enough. in_memory: bases, and
    the engine's slots, each module padded to the bucket; None where no engine holds the rank. is_bound: max_rank is the
    most that it can be, not what it is.
    """

    name: str
    tasks: int
    stored: int
    max_rank: int
    bucket: int | None
    in_memory: int | None
    is_bound: bool = False


def bucket_of(rank: int) -> int | None:
    """Return the smallest rank that vLLM can be told to hold, None above the largest."""
    return next((bucket for bucket in BUCKETS if bucket >= rank), None) if rank else None


def deployments(
    modules: Mapping[str, ModuleGap], *, base_bytes: int, itemsize: int, tasks: int
) -> tuple[Deployment, ...]:
    """Return what each method takes for `tasks` tasks that are like this adapter.

    A base per task: mutated ones with their adapters, or merged ones. One base and N adapters: the exact factors as
    concatenation gives them (rank 2r), as converted, and GoRA with as many parameters as the adapter has as trained,
    whose ranks are RankConfig's: up to four times the mean. itemsize: bytes of an adapter's value.
    """
    width = sum(module.parameters for module in modules.values())  # parameters of rank 1 everywhere
    trained = {path: module.served_rank or module.rank for path, module in modules.items()}
    plain = {path: module.plain_rank for path, module in modules.items()}
    converted = {path: module.rank for path, module in modules.items()}
    budget = _parameters(modules, trained)
    mean = -(-budget // width) if width else 0

    def over_one_base(name: str, parameters: int, rank: int) -> Deployment:
        bucket = bucket_of(rank)
        memory = None if bucket is None and rank else base_bytes + tasks * width * (bucket or 0) * itemsize
        return Deployment(name, tasks, base_bytes + tasks * parameters * itemsize, rank, bucket, memory)

    return (
        Deployment("a base per task", tasks, tasks * base_bytes, 0, None, tasks * base_bytes),
        over_one_base("one base, concatenated", _parameters(modules, plain), max(plain.values(), default=0)),
        over_one_base("one base, converted", _parameters(modules, converted), max(converted.values(), default=0)),
        replace(over_one_base("one base, GoRA", budget, RankConfig(mean).highest if mean else 0), is_bound=True),
    )


def _parameters(modules: Mapping[str, ModuleGap], ranks: Mapping[str, int]) -> int:
    return sum(module.parameters * ranks[path] for path, module in modules.items())
