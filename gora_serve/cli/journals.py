"""How `serve` tells what happens: in words on standard error, or as JSON lines."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from gora_serve.cli.render import say
from gora_serve.cli.watching import watching
from gora_serve.config import ServeConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.hub import without_tokens
from gora_serve.integrity.record import ASSERTED
from gora_serve.progress import Listener, silent

if TYPE_CHECKING:
    from gora_serve.serving.journal import JsonLines, Pump
    from gora_serve.serving.served import ServedAdapter


class Journal:
    """In words, for people: what is no news to them is not said. `failed`: the error that was told."""

    failed: GoraError | None = None

    def __init__(self, log: Path | None) -> None:
        self.log = log

    def watching(self) -> AbstractContextManager[Listener]:
        return watching()

    def pump(self) -> Pump | None:
        """Return what takes the engine's output, where it is not passed on as it is."""
        return None

    def tell(self, event: str, message: str, *, level: str = "info", **fields: object) -> None:
        say(message)

    def change(self, text: str, *, level: str = "info", **fields: object) -> None:
        """Say what became of an adapter while the server runs."""
        self.tell("adapters", text, level=level, **fields)

    def warn(self, warning: str) -> None:
        self.tell("warning", f"warning: {warning}", level="warning")

    def verified(self, adapters: Sequence[ServedAdapter]) -> None:
        """Say what is known of the adapters that will be served."""
        for adapter in adapters:
            if adapter.claim == ASSERTED:
                who = "was asserted (gora-serve bind or convert), not recorded by the tool that made it"
                self.tell("note", f"note: {adapter.name}: its base {who}", model=adapter.name)

    def stopped(self, code: int) -> None:
        """Say that the server has ended because it was asked to."""


class JsonJournal(Journal):
    """As JSON lines, the engine's own among them; these go to `log`, where there is one."""

    def __init__(self, lines: JsonLines, log: Path | None, key_file: Path | None, stack: ExitStack) -> None:
        super().__init__(log)
        self._lines, self._key_file, self._stack = lines, key_file, stack

    def pump(self) -> Pump:
        from gora_serve.serving.journal import JsonLines, Pump
        from gora_serve.serving.keys import read_keys
        from gora_serve.serving.process import open_log

        keys = read_keys(os.environ, self._key_file)
        if self.log is None:
            return Pump(self._lines, keys)
        return Pump(JsonLines(self._stack.enter_context(open_log(self.log))), keys, events=self._lines)

    def watching(self) -> AbstractContextManager[Listener]:
        return nullcontext(silent)

    def tell(self, event: str, message: str, *, level: str = "info", **fields: object) -> None:
        self._lines.tell(event, message, level=level, **fields)

    def verified(self, adapters: Sequence[ServedAdapter]) -> None:
        super().verified(adapters)
        for adapter in adapters:
            self.tell(
                "adapter verified", f"{adapter.name}: every byte", model=adapter.name, root=adapter.root,
                form=adapter.form, rank=adapter.max_rank, claim=adapter.claim or "unbound", source=adapter.source,
                seconds=round(adapter.verify_seconds, 3),
            )  # fmt: skip

    def stopped(self, code: int) -> None:
        self.tell("stop", "every process has ended", code=code)


@contextmanager
def journal(config: ServeConfig, log: Path | None) -> Iterator[Journal]:
    """Yield what to tell events to. As JSON, an error of the block is told there too, and ends the block."""
    if config.log_format == "text":
        yield Journal(log)
        return
    from gora_serve.serving.journal import JsonLines, LogHandler

    with ExitStack() as stack:
        lines = JsonLines(sys.stderr.buffer)
        told, handler = JsonJournal(lines, log, config.key_file, stack), LogHandler(lines)
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)
        try:
            yield told
        except GoraError as err:
            told.tell("failed", without_tokens(str(err)), level="error", code=err.code, what=without_tokens(err.what))
            told.failed = err
