"""What lies in a model's folder beside its weights, copied into a merged model's. An edge."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gora_serve.integrity.files import copy_file, write_json
from gora_serve.integrity.layout import confined
from gora_serve.integrity.roots import tokenizer_names

CONFIG = "config.json"
# Weights of any kind, their indexes, what another tool or an earlier merge says of the folder.
_LEFT = re.compile(
    r"(?i).*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|ot|npz|lock|tmp)|.*\.index\.json|readme\S*|\..*"
    r"|gora_manifest\.json|merge\.json|conversion\.json"
)


def copy_beside(
    base: Path, stage: Path, config: Mapping[str, Any] | None, tokenizer: Path | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy configuration, tokenizer, licence and code of `base` into `stage`; return what was copied and what was not.

    config: config.json where it changes. tokenizer: the folder that the tokenizer is taken from instead.
    """
    instead = tokenizer_names(tokenizer) if tokenizer is not None else []
    copied, left = [], []
    for name in sorted(entry.name for entry in os.scandir(base)):
        if (config is not None and name == CONFIG) or (instead and name in tokenizer_names(base)):
            continue
        if _LEFT.fullmatch(name) or not (base / name).is_file():
            left.append(name)
            continue
        copy_file(confined(base, name), stage / name)
        copied.append(name)
    for name in instead:
        assert tokenizer is not None
        copy_file(confined(tokenizer, name), stage / name)
        copied.append(name)
    if config is not None:
        write_json(stage / CONFIG, config)
    return tuple(copied), tuple(left)
