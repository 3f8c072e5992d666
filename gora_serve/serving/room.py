"""What the engine has room for: slots, ranks and module names, and the LoRA flags that say so.

An engine that only serves what it was started with gets exactly that. One that takes adapters while it runs gets
headroom, and what does not fit into it is refused by `require_room`. Pure: names and numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gora_serve.adapter.engine_ranks import LARGEST_RANK, bucket_of
from gora_serve.config import ServeConfig
from gora_serve.config import ServeDevice as Device
from gora_serve.errors import BindingError, InputError, UsageError
from gora_serve.serving.canary import ASKED
from gora_serve.serving.options import SEVERAL, SHARED, whole_number
from gora_serve.serving.served import ServedAdapter

# vLLM's packed layers and the projections that adapters name (packed_modules_mapping of the classes below).
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
# Classes whose module names agree between checkpoint and vLLM 0.32; in others --lora-target-modules could
# silently drop a module (experts of MoE layers, renamed layers), so the flag stays away.
SAME_NAMES = frozenset(
    {
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    }
)  # fmt: skip
SWAP = 1  # slots for a new version of an adapter, beside the one that it replaces
Flags = dict[str, tuple[str, ...]]


def rank_bucket(rank: int) -> int:
    """Return the smallest `--max-lora-rank` that vLLM accepts and that holds `rank`."""
    bucket = bucket_of(rank)
    if bucket is None:
        raise InputError(
            "the rank is above what vLLM serves", code="GS-387", expected=LARGEST_RANK, actual=rank,
            hint="convert the adapter with a smaller --rank",
        )  # fmt: skip
    return bucket


@dataclass(frozen=True)
class Room:
    """What an engine that takes adapters while it runs was started for.

    adapters: how many may be served at once. rank: the largest. targets: names of modules, None where all are taken.
    """

    adapters: int
    rank: int
    targets: frozenset[str] | None


def target_modules(
    adapters: Sequence[ServedAdapter], architecture: str | None, beside: frozenset[str] = frozenset()
) -> tuple[str, ...] | None:
    """Return the exact union of adapted module names and `beside`, or None where vLLM must wrap everything.

    vLLM 0.32 (lora/utils.py, is_in_target_modules) matches a packed layer when any of its projections is
    named, so the adapters' own names are enough. What the list leaves out is not wrapped, and an adapter that
    has it is cut without a message: the list is only made for names and architectures known to be spelled
    alike on both sides.
    """
    names = beside | _names(adapters)
    experts = any(".experts." in module for adapter in adapters for module in adapter.modules)
    if architecture not in SAME_NAMES or experts or not names or not names <= PROJECTIONS:
        return None
    return tuple(sorted(names))


def slots(count: int, device: Device, *, live: bool) -> int:
    """Return how many adapter slots the engine needs for `count` adapters.

    On CPU one more than there are adapters: tokens without an adapter carry the index -1, which vLLM's torch
    kernels read as the last slot (vllm-project/vllm#48421). Slots fill from the lowest, so a spare last one
    holds zeros, and requests for the base are never answered with an adapter. live: one more, for a version that
    replaces another, so that the engine never has to evict one that a request in flight uses.
    """
    return count + (SWAP if live else 0) + _spare(device)


def lora_flags(
    adapters: Sequence[ServedAdapter],
    watched: Sequence[ServedAdapter] | None,
    config: ServeConfig,
    options: Mapping[str, Sequence[str]],
    architecture: str | None,
) -> Flags:
    """Return the engine's LoRA flags for the adapters that it starts with.

    watched: where a directory is watched, what it holds at the start; there is headroom then. None where none is.
    """
    everything, live = (*adapters, *(watched or ())), watched is not None
    if not everything and not live:
        return {}
    count = max(len(everything), config.max_adapters) if live else len(everything)
    largest = max(adapter.max_rank for adapter in everything) if everything else 0
    largest = max(largest, config.rank_headroom or 0, config.max_rank if live else 0)
    needed = slots(count, config.device, live=live)
    modules = tuple(json.dumps({"name": adapter.name, "path": str(adapter.path)}) for adapter in adapters)
    flags: Flags = {
        "--enable-lora": (),
        "--max-lora-rank": (str(rank_bucket(largest)),),
        "--max-loras": (str(needed),),
        "--max-cpu-loras": (str(max(needed, whole_number(options, "--max-loras") or 0)),),
    }
    flags |= {"--lora-modules": modules} if modules else {}
    targets = target_modules(everything, architecture, PROJECTIONS if live else frozenset())
    return flags if targets is None else flags | {"--lora-target-modules": targets}


def room_in(flags: Flags, options: Mapping[str, Sequence[str]], device: Device) -> Room:
    """Return what fits into an engine with these flags, of which `options` replace some."""
    final = flags | {name: tuple(values) for name, values in options.items()}
    named = final.get("--lora-target-modules")
    loras, rank = whole_number(final, "--max-loras"), whole_number(final, "--max-lora-rank")
    return Room(
        (loras or 0) - slots(0, device, live=True), rank or 0, None if named is None else frozenset(_covered(named))
    )


def require_room(adapter: ServedAdapter, room: Room) -> None:
    """Raise BindingError for an adapter that the running engine has no room for: GS-4601 rank, GS-4602 modules."""
    restart = "; a restart counts what the directory holds"
    if adapter.max_rank > room.rank:
        raise BindingError(
            "its rank is larger than the engine was started for", code="GS-4601", file=adapter.source,
            expected=f"<= {room.rank}", actual=adapter.max_rank,
            hint=f"serve with --max-rank {rank_bucket(adapter.max_rank)}{restart}",
        )  # fmt: skip
    more = _names([adapter]) - room.targets if room.targets is not None else frozenset()
    if room.targets is not None and more:
        names = " ".join(sorted(room.targets | more))
        raise BindingError(
            "it adapts modules that the engine was not started for, and would drop without a message", code="GS-4602",
            file=adapter.source, expected=f"only {', '.join(sorted(room.targets))}", actual=", ".join(sorted(more)),
            hint=f"serve with -- --lora-target-modules {names}{restart}",
        )  # fmt: skip


def require_place(adapter: ServedAdapter, served: int, room: Room) -> None:
    """Raise BindingError (GS-4603) for one more adapter than there is room for. served: how many there are already."""
    if served >= room.adapters:
        raise BindingError(
            "as many adapters are served as the engine has room for", code="GS-4603", file=adapter.source,
            expected=f"<= {room.adapters}", actual=room.adapters + 1,
            hint=f"remove another one, or serve with --max-adapters {room.adapters + 1}",
        )  # fmt: skip


def check_lora_options(
    options: Mapping[str, Sequence[str]], adapters: Sequence[ServedAdapter], config: ServeConfig, *, live: bool
) -> None:
    """Refuse values that vLLM accepts and then answers wrongly with, or that it would refuse after a slow start."""
    if live:
        _refuse_several(options)
    if not adapters and not live:
        return
    count, rank = whole_number(options, "--max-loras"), whole_number(options, "--max-lora-rank")
    needed = slots(max(len(adapters), 1), config.device, live=live)
    largest = max((adapter.max_rank for adapter in adapters), default=0)
    if count is not None and (config.device == "cpu" or live) and count < needed:
        what = "too few slots: on CPU the last slot must stay empty, or the base answers as an adapter"
        if live:
            what = "too few slots for adapters that come and go"
        _refuse_option(what, f"--max-loras >= {needed}", count)
    if rank is not None and rank < largest:
        _refuse_option("an adapter's rank is larger", f"--max-lora-rank >= {largest}", rank)
    logprobs = whole_number(options, "--max-logprobs")
    if logprobs is not None and logprobs < ASKED:
        what = "too few log probabilities for the check of the adapters"
        _refuse_option(what, f"--max-logprobs >= {ASKED}", logprobs)
    if "--lora-target-modules" in options:
        missing = _names(adapters) - _covered(options["--lora-target-modules"])
        if missing:
            what = "vLLM would drop adapted modules without a message"
            _refuse_option(what, f"also {', '.join(sorted(missing))}", None)


def _refuse_several(options: Mapping[str, Sequence[str]]) -> None:
    """Adapters are loaded into one process of the engine's: several would come to know different ones."""
    for name in options:
        if name in SHARED or (name in SEVERAL and (whole_number(options, name) or 0) > 1):
            raise BindingError(
                "a watched directory needs one engine behind one API server", code="GS-4606", actual=name,
                hint="start one server for each replica, over the same directory, behind a load balancer",
            )  # fmt: skip


def _refuse_option(what: str, expected: str, actual: object) -> None:
    raise UsageError(what, code="GS-285", hint="leave the option to gora-serve", expected=expected, actual=actual)


def _names(adapters: Sequence[ServedAdapter]) -> frozenset[str]:
    return frozenset(module.rpartition(".")[2] for adapter in adapters for module in adapter.modules)


def _covered(named: Sequence[str]) -> frozenset[str]:
    return frozenset(named) | {child for packed in named for child in PACKED.get(packed, ())}


def _spare(device: Device) -> int:
    return 1 if device == "cpu" else 0
