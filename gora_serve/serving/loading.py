"""Adapters that come and go while the engine runs: the half in the parent, which asks the one inside the engine.

A version is loaded under a new number and a name that nobody can guess, asked a few questions, and only then gets its
name. What it replaces stays loaded until no request uses it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
import urllib.error
from dataclasses import dataclass
from typing import Any

from gora_serve.errors import GoraError, RunError
from gora_serve.integrity.reading import check_unchanged, stamps
from gora_serve.serving.canary import Checked
from gora_serve.serving.client import change_adapters
from gora_serve.serving.engine import check_served
from gora_serve.serving.keys import read_keys
from gora_serve.serving.plan import ServePlan
from gora_serve.serving.room import SWAP
from gora_serve.serving.served import ServedAdapter

ERROR = re.compile(
    r"error\[(?P<code>GS-\d+)\] (?P<what>.*)\n?(?P<fields>(?:  [a-z]+: .*\n?)*)"
)  # as `GoraError` prints
FIELD = re.compile(r"^  ([a-z]+): (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Loaded:
    """An adapter that the engine serves: its number there, what the canary found, and what loading it took."""

    adapter: ServedAdapter
    number: int
    checked: Checked
    seconds: float


class RunningEngine:
    """An engine that is asked to change what it holds. One thread at a time."""

    def __init__(self, plan: ServePlan, token: str | None) -> None:
        self._plan = plan
        self._token = token
        self._key = next(iter(read_keys(os.environ, plan.key_file)), None)
        self._most = str(plan.watched.room.adapters + SWAP) if plan.watched else "0"
        self.resident: frozenset[int] = frozenset()  # as the engine said last

    def load(self, adapter: ServedAdapter) -> Loaded:
        """Load an adapter, hold it to its fingerprint, and give it its name.

        Raises RunError where the engine refuses it (GS-7600) or it does not pass (GS-735n), MismatchError where a file
        changed meanwhile (GS-101): it is not served then, and unloaded by the next `unload`.
        """
        begun, alias = time.monotonic(), f"{adapter.name}.{secrets.token_hex(16)}"
        verified = stamps(adapter.path.iterdir())
        number = int(
            self._ask("try", name=adapter.name, path=str(adapter.path), alias=alias, most=self._most)["number"]
        )
        seconds = time.monotonic() - begun
        try:
            check_unchanged(verified)  # what the engine has read is what was verified
            checked = check_served(self._plan, adapter, self._key, self._token, alias=alias)
        except BaseException:
            with contextlib.suppress(GoraError):
                self._ask("drop", alias=alias)
            raise
        self._ask("publish", name=adapter.name, alias=alias)
        return Loaded(adapter, number, checked, seconds)

    def withdraw(self, name: str) -> None:
        """Take away a name: requests that are at work end as they began, new ones get 404."""
        self._ask("withdraw", name=name)

    def unload(self) -> None:
        """Unload what has no name and no request; `resident` says what is left."""
        self._ask("unload")

    def _ask(self, do: str, **more: str) -> dict[str, Any]:
        try:
            told = change_adapters(self._plan.url, {"do": do, **more}, self._key, self._token)
            self.resident = frozenset(int(number) for number in told["resident"])
        except RunError as err:
            if do != "try" or not isinstance(err.__cause__, urllib.error.HTTPError):
                raise
            raise refused(str(err.fields.get("actual"))) from err
        return dict(told)


def refused(told: str) -> RunError:
    """Return what the engine told of an adapter that it does not load, in the words of the error that it raised.

    vLLM passes that on as text: "... 'error[GS-nnnn] what\\n  tensor: ...\\n  try: ...', please check the stack ...".
    """
    found = ERROR.search(told.replace("\\n", "\n").partition("', please check")[0])
    if found is None:
        return RunError(
            "the engine refused the adapter", code="GS-7600", actual=told,
            hint="see the engine's log; an adapter that passed the checks should load",
        )  # fmt: skip
    fields = dict(FIELD.findall(found["fields"]))
    return RunError(
        f"the engine refused the adapter: {found['code']}, {found['what']}", code="GS-7600",
        tensor=fields.get("tensor"), expected=fields.get("expected"), actual=fields.get("actual"),
        hint=fields.get("try", "see the engine's log"),
    )  # fmt: skip
