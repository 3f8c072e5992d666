"""The state of every random generator of this process, as JSON and back: Python's, NumPy's, torch's on each device."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_WORDS = struct.Struct("<625I")  # Mersenne twister: 624 words and the position


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the generators' states, bytes as hexadecimal. "cuda" is that of `device`; None where it is no GPU."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": _WORDS.pack(*words).hex(), "gauss": gauss},
        "numpy": {
            "keys": np.asarray(keys, dtype="<u4").tobytes().hex(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators into the states that `random_state` returned."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], _WORDS.unpack(bytes.fromhex(python["words"])), python["gauss"]))
    keys = np.frombuffer(bytes.fromhex(numpy["keys"]), dtype="<u4").astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _hex(state: torch.Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
