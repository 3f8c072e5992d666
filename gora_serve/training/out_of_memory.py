"""Memory that ran out, on the device or on the host, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gora_serve.errors import MachineError, first_line

SAID = ("can't allocate memory", "out of memory")  # by torch's allocator for CPUs, and by CUDA itself


@contextmanager
def naming_memory() -> Iterator[None]:
    """Turn memory that ran out into an error that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, MemoryError | torch.OutOfMemoryError) and not any(word in str(err) for word in SAID):
            raise
        raise MachineError(
            "the device ran out of memory", code="GS-526", actual=first_line(err),
            hint="--offload cpu or disk, --gradient-checkpointing, or a smaller --batch-size or --max-length; "
            "gora-serve plan says what each takes",
        ) from err  # fmt: skip
