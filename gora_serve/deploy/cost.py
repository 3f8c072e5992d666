"""What N tasks take to deploy, by method: N bases, or one base and N adapters. Sizes in bytes, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gora_serve.adapter.engine_ranks import bucket_of
from gora_serve.config import RankConfig
from gora_serve.deploy.gap import ModuleGap


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


def deployments(
    modules: Mapping[str, ModuleGap], *, trained: int, base_bytes: int, itemsize: int, tasks: int
) -> tuple[Deployment, ...]:
    """Return what each method takes for `tasks` tasks that are like this adapter.

    A base per task: mutated ones, or merged ones. One base and N adapters: the exact factors as concatenation gives
    them (rank 2r), as converted, and GoRA with about as many parameters as the adapter has as trained, whose ranks are
    RankConfig's: up to four times the mean. trained: these parameters; 0 for an update of full rank, which is no
    adapter: for GoRA then the default rank counts. itemsize: bytes of an adapter's value.
    """
    width = sum(module.parameters for module in modules.values())  # parameters of rank 1 everywhere
    plain = {path: module.plain_rank for path, module in modules.items()}
    converted = {path: module.rank for path, module in modules.items()}
    mean = max(1, round(trained / width)) if trained else RankConfig.rank
    budget = mean * width

    def over_one_base(name: str, parameters: int, rank: int) -> Deployment:
        bucket = bucket_of(rank)
        memory = None if bucket is None else base_bytes + tasks * width * bucket * itemsize
        return Deployment(name, tasks, base_bytes + tasks * parameters * itemsize, rank, bucket, memory)

    ways = [Deployment("a base per task", tasks, tasks * base_bytes, 0, None, tasks * base_bytes)]
    for name, ranks in (("one base, not compressed", plain), ("one base, converted", converted)):
        if any(ranks.values()):
            ways.append(over_one_base(name, _parameters(modules, ranks), max(ranks.values())))
    gora = over_one_base(f"one base, GoRA at rank {mean}", budget, RankConfig(mean).highest)
    return (*ways, replace(gora, is_bound=True))


def _parameters(modules: Mapping[str, ModuleGap], ranks: Mapping[str, int]) -> int:
    return sum(module.parameters * ranks[path] for path, module in modules.items())
