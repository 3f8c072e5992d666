"""What the server says of itself: GET /gora-serve/status, and our metrics brought up to date when /metrics is asked.

An ASGI class for `vllm serve --middleware`, inside the guard, so that whoever gets here may ask.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gora_serve.serving.asgi import App, Receive, Scope, Send, answer_json
from gora_serve.serving.guard import STATE_FILE, read_state, route_of
from gora_serve.serving.ledger import LEDGER, read_ledger
from gora_serve.serving.metrics import PREFIX, UNKNOWN, WHERE, Metrics, quantile, shared
from gora_serve.serving.residency import Residency, served_names

ROUTE, SCHEMA = "/gora-serve/status", "gora-serve/status/1"
_COUNTS = {
    "prompt_tokens_total": "prompt_tokens", "completion_tokens_total": "completion_tokens",
    "requests_without_usage_total": "requests_without_usage", "last_server_error_time_seconds": "last_server_error",
}  # fmt: skip
_MOST = 100  # refused folders that are named
_KNOWN = ("kind", "since", "root", "form", "rank", "verify_seconds", "load_seconds", "error")


class StatusRoute:
    """Answers the route, refreshes what is not counted but looked up, and lets everything else pass."""

    def __init__(self, app: App, environ: Mapping[str, str] | None = None, metrics: Metrics | None = None) -> None:
        told = os.environ if environ is None else environ
        self._app = app
        self._where = Residency()
        self._seen: set[str] = set()  # adapters that are, or were, served
        self._failing: set[str] = set()  # labels that failures were counted under
        self._metrics = metrics or shared()
        self._state = Path(told[STATE_FILE]) if told.get(STATE_FILE) else None
        self._ledger = Path(told[LEDGER]) if told.get(LEDGER) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, as ASGI has it."""
        route = route_of(scope) if scope["type"] == "http" and scope.get("method") == "GET" else None
        if route not in (ROUTE, "/metrics"):
            return await self._app(scope, receive, send)
        app = scope.get("app")
        where, ledger = await self._where.ask(app), read_ledger(self._ledger)
        degraded = read_state(self._state).get("degraded") if self._state else None
        self._refresh(ledger, where, served_names(app), degraded=bool(degraded))
        if route == "/metrics":
            return await self._app(scope, receive, send)
        said = status(ledger, where, served_names(app), degraded, counted(self._metrics))
        await answer_json(send, 200, said)

    def _refresh(
        self, ledger: Mapping[str, Any], where: Mapping[str, str], served: frozenset[str], *, degraded: bool
    ) -> None:
        metrics = self._metrics
        metrics.degraded.set(degraded)
        metrics.start.set(ledger.get("start_seconds") or 0)
        self._seen |= set(where)
        for name in self._seen:
            for one in WHERE:
                metrics.residency.labels(name, one).set(where.get(name) == one)
        gauges = {"since": metrics.since, "load_seconds": metrics.load, "verify_seconds": metrics.verify}
        models = {name: entry for name, entry in ledger.get("models", {}).items() if name in served}
        for key, gauge in gauges.items():
            for name, entry in models.items():
                if isinstance(entry.get(key), int | float):
                    gauge.labels(name).set(entry[key])
            for name in self._seen - models.keys():  # it was served
                gauge.labels(name).set(math.nan)
        failures: dict[str, int] = {}
        for name, count in ledger.get("failures", {}).items():
            label = name if name in served else UNKNOWN
            failures[label] = failures.get(label, 0) + count
        self._failing |= set(failures)
        for label in self._failing:
            metrics.failures.labels(label).set(failures.get(label, 0))


def status(
    ledger: Mapping[str, Any],
    where: Mapping[str, str],
    served: frozenset[str],
    degraded: object,
    counts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what the route says: the state, and of each model what is known and what was counted."""
    models = []
    for name, entry in ledger.get("models", {}).items():
        if name in served:
            known = {key: entry.get(key) for key in _KNOWN}
            models.append({"name": name, **known, "resident": where.get(name), **counts.get(name, _no_counts())})
    return {
        "schema": SCHEMA, "state": "degraded" if degraded else "ready", "degraded": degraded or None, "models": models,
        "start_seconds": ledger.get("start_seconds"), "failures": ledger.get("failures", {}),
        "refused": dict(islice(ledger.get("refused", {}).items(), _MOST)),
        "others": {name: count for name, count in counts.items() if name not in served},  # unknown, and former ones
    }  # fmt: skip


def _no_counts() -> dict[str, Any]:
    return {
        "requests": {}, "prompt_tokens": 0, "completion_tokens": 0, "requests_without_usage": 0,
        "last_server_error": None, "p50": None, "p95": None, "first_p50": None, "first_p95": None,
    }  # fmt: skip


def counted(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """Return what the metrics say of each model; latencies in seconds, estimated from the histograms."""
    found: dict[str, dict[str, Any]] = {}
    buckets: dict[tuple[str, str], dict[float, float]] = {}
    for sample in (sample for family in metrics.families() for sample in family.samples):
        name, model = sample.name.removeprefix(PREFIX), sample.labels.get("model")
        if model is None:
            continue
        if name == "requests_total":
            found.setdefault(model, _no_counts())["requests"][sample.labels["status"]] = int(sample.value)
        elif name in _COUNTS:
            found.setdefault(model, _no_counts())[_COUNTS[name]] = (
                int(sample.value) if name.endswith("_total") else sample.value
            )
        elif name.endswith("_seconds_bucket"):
            buckets.setdefault((model, name), {})[float(sample.labels["le"])] = sample.value
    for (model, name), counts in buckets.items():
        prefix = "first_" if name.startswith("first") else ""
        for share in (50, 95):
            value = quantile(counts, share / 100)
            if value is not None and math.isfinite(value):
                found.setdefault(model, _no_counts())[f"{prefix}p{share}"] = value
    return found
