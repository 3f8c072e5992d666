"""The ranks that engines hold: each module of each adapter is padded to one of them. No torch."""

from __future__ import annotations

ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that every engine reading PEFT LoRA can hold
RANK_BUCKETS = (1, *ENGINE_RANKS)  # the values of --max-lora-rank: vLLM 0.32, config/lora.py, MaxLoRARanks
LARGEST_RANK = ENGINE_RANKS[-1]


def bucket_of(rank: int) -> int | None:
    """Return the smallest rank that vLLM can be told to hold and that holds `rank`, None above the largest."""
    return next((bucket for bucket in RANK_BUCKETS if bucket >= rank), None)


def padded_rank(widest: int) -> int | None:
    """Return the one rank of the padded form for modules of up to `widest`, None above the largest."""
    return next((rank for rank in ENGINE_RANKS if rank >= widest), None)
