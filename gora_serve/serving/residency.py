"""What the engine's own objects say of the models: which names it serves, and where each adapter is.

The names of vLLM 0.32's attributes are here alone. Where one is missing, the answer is that nothing is known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

PATIENCE = 5.0  # seconds; the engine answers between two of its steps
FRESH = 1.0  # seconds that an answer is used again, so that no number of scrapes keeps the engine busy


def served_names(app: Any) -> frozenset[str]:
    """Return the names that an application of vLLM answers for at this moment: the base's, and its adapters'."""
    models = getattr(getattr(app, "state", None), "openai_serving_models", None)
    bases = [str(base.name) for base in getattr(models, "base_model_paths", ())]
    return frozenset([*bases, *getattr(models, "lora_requests", {})])


async def residency(app: Any) -> Mapping[str, str]:
    """Return where each adapter is: "slot" of the computing device, "memory" of the engine, "listed" by name alone.

    vLLM lists what its workers hold, and not what lies in their slots. Whatever is loaded is put into a slot, and
    leaves it only for another one; so it is in a slot while no more are loaded than there are slots. Else "memory" is
    said, also of those that may be in a slot. "unknown" while the engine does not answer.
    """
    state = getattr(app, "state", None)
    adapters = getattr(getattr(state, "openai_serving_models", None), "lora_requests", {})
    loaded, slots = await _loaded(getattr(state, "engine_client", None))
    if loaded is None:
        return dict.fromkeys(adapters, "unknown")
    held = "slot" if slots is not None and len(loaded) <= slots else "memory"
    return {name: held if request.lora_int_id in loaded else "listed" for name, request in adapters.items()}


class Residency:
    """Asks the engine where the adapters are, once at a time and not too often."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._known: Mapping[str, str] = {}
        self._until = 0.0

    async def ask(self, app: Any) -> Mapping[str, str]:
        """Return what `residency` says, or said less than a second ago."""
        async with self._lock:
            if time.monotonic() >= self._until:
                self._known = await residency(app)
                self._until = time.monotonic() + FRESH
            return self._known


async def _loaded(engine: Any) -> tuple[set[int] | None, int | None]:
    """Return the ids of the adapters that the engine holds, and how many slots it has."""
    if engine is None:
        return None, None
    slots = getattr(getattr(getattr(engine, "vllm_config", None), "lora_config", None), "max_loras", None)
    try:
        return set(await asyncio.wait_for(engine.list_loras(), PATIENCE)), slots
    except Exception:  # a dead, a busy or another engine: a scrape does not fail for it
        return None, slots
