"""The folder of a run while it is being written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gora_serve.integrity.files import write_json


class RunFolder:
    """The run folder as the main process sees it; on other processes it writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        if self.path:
            write_json(self.path / name, value)

    def line(self, name: str, value: Mapping[str, Any]) -> None:
        if self.path:
            with (self.path / name).open("a") as file:
                finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
                file.write(json.dumps(finite) + "\n")
