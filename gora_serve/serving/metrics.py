"""The metrics that vLLM's /metrics shows beside its own: names, labels and buckets. Of the engine's process alone.

They are plain objects of prometheus_client, which vLLM brings, in the registry that vLLM exposes; so they add up over
several API servers too. Label values are the names of models that are served, and UNKNOWN for every other name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

UNKNOWN = "(unknown)"  # no name of an adapter begins with a parenthesis
WHERE = ("slot", "memory", "listed", "unknown")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PREFIX = "gora_serve_"


class Metrics:
    """What is counted. Safe to use from several threads, and from several processes where vLLM has set that up."""

    def __init__(self, registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        self.registry = into = registry or REGISTRY
        model = ("model",)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels or model, registry=into)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=into, multiprocess_mode="mostrecent")

        self.requests = counter("requests", "Requests that ended, by HTTP status or 'disconnected'.", "model", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, of requests whose usage is known.")
        self.completion_tokens = counter("completion_tokens", "Tokens of answers, of requests whose usage is known.")
        self.without_usage = counter("requests_without_usage", "Requests that began to be answered, and told no usage.")
        self.seconds = Histogram(
            PREFIX + "request_seconds", "From a request to the end of its answer, of those answered by 2xx.", model,
            buckets=SECONDS, registry=into,
        )  # fmt: skip
        self.first = Histogram(
            PREFIX + "first_token_seconds", "From a request to the first bytes of a streamed answer.", model,
            buckets=FIRST, registry=into,
        )  # fmt: skip
        self.last_error = gauge("last_server_error_time_seconds", "When a request was last answered by 5xx.", "model")
        self.residency = gauge(
            "adapter_residency", "1 where the adapter is: in a slot, in the engine's memory, only listed.",
            "model", "where",
        )  # fmt: skip
        self.since = gauge("served_since_time_seconds", "When the model began to be served.", "model")
        self.load = gauge(
            "adapter_load_seconds", "What loading took, of an adapter added to a running server.", "model"
        )
        self.verify = gauge("adapter_verify_seconds", "What verifying and copying an adapter took.", "model")
        self.failures = gauge("verification_failures", "Adapters refused since the start.", "model")
        self.start = gauge("start_seconds", "From the start of the engine until it was ready.")
        self.degraded = gauge("degraded", "1 where /health answers 503 because a verified file changed.")

    def families(self) -> Iterator[Any]:
        """Yield what /metrics shows of ours: over all processes, where vLLM has several API servers."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = self.registry
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        yield from (family for family in registry.collect() if family.name.startswith(PREFIX))


@functools.cache
def shared() -> Metrics:
    """Return this process's one set of metrics, in the registry that vLLM exposes."""
    return Metrics()


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Estimate a quantile of a histogram from its cumulative buckets (upper bound -> count), as Prometheus does.

    Linear within a bucket; beyond the last bound, that bound. None where nothing was observed.
    """
    total = max(buckets.values(), default=0.0)
    if total <= 0:
        return None
    wanted, below, counted = share * total, 0.0, 0.0
    for bound in sorted(buckets):
        if buckets[bound] >= wanted:
            if bound == float("inf"):
                return below
            inside = buckets[bound] - counted
            return below + (bound - below) * ((wanted - counted) / inside if inside else 1.0)
        below, counted = bound, buckets[bound]
    return below
