"""A small client of the OpenAI-compatible HTTP interface: what the demo and the tests ask a server.

Standard library only. Where no key is given it is that of VLLM_API_KEY. `token` lets the
server's own parent in before it is ready.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

from gora_serve.errors import RunError
from gora_serve.progress import Listener, Progress, silent
from gora_serve.serving.guard import TOKEN_HEADER
from gora_serve.serving.inside import ROUTE

TIMEOUT = 600.0  # seconds for one answer; a slow CPU needs minutes
PROBE_TIMEOUT = 5.0
TOKEN_PREFIX = "token_id:"
Message = Mapping[str, str]
T = TypeVar("T")


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


# No proxy, and no redirection is followed: the key goes to the address that was given, or nowhere.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())


@dataclass(frozen=True)
class Completion:
    """A continued prompt. `top` has one mapping per generated token: token id -> log probability, best
    first.
    """

    text: str
    top: tuple[Mapping[int, float], ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """One question for `ask_all`."""

    model: str
    messages: Sequence[Message]
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int | None = None


def chat(
    url: str,
    model: str,
    messages: Sequence[Message],
    max_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    timeout: float = TIMEOUT,
) -> str:
    """Return the assistant's answer."""
    body: dict[str, Any] = {
        "model": model, "messages": [dict(message) for message in messages],
        "max_tokens": max_tokens, "temperature": temperature,
    }  # fmt: skip
    if seed is not None:
        body["seed"] = seed
    answer = _request(f"{url}/v1/chat/completions", body, timeout)
    return _read(answer, lambda: str(answer["choices"][0]["message"]["content"] or ""))


def complete(
    url: str,
    model: str,
    prompt: str | Sequence[int],
    max_tokens: int = 16,
    *,
    logprobs: int | None = None,
    temperature: float = 0.0,
    timeout: float = TIMEOUT,
    key: str | None = None,
    token: str | None = None,
) -> Completion:
    """Continue a text or a list of token ids; with `logprobs`, also return the best tokens at each step."""
    body: dict[str, Any] = {
        "model": model, "prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": max_tokens,
        "temperature": temperature, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    if logprobs is not None:
        body["logprobs"] = logprobs
    answer = _request(f"{url}/v1/completions", body, timeout, key, token)
    return _read(answer, lambda: _completion(answer["choices"][0]))


def ask_all(url: str, requests: Sequence[ChatRequest], *, workers: int = 8, listen: Listener = silent) -> list[str]:
    """Send all requests, at most `workers` at a time, and return the answers in the order of the requests."""
    jobs = [lambda r=r: chat(url, r.model, r.messages, r.max_tokens, temperature=r.temperature, seed=r.seed)
            for r in requests]  # fmt: skip
    return run_all(jobs, workers=workers, listen=listen)


def run_all(jobs: Sequence[Callable[[], T]], *, workers: int = 8, listen: Listener = silent) -> list[T]:
    """Run the jobs in threads and return their results in order. The first error cancels what has not begun."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                listen(Progress("ask", done, len(jobs)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def is_healthy(url: str, key: str | None = None, token: str | None = None) -> bool:
    """Tell whether /health answers 200. vLLM opens its socket only after the model and all adapters are
    loaded.
    """
    try:
        asked = urllib.request.Request(f"{url}/health", headers=_authorization(key, token))
        with opener.open(asked, timeout=PROBE_TIMEOUT) as response:
            return int(response.status) == 200
    except urllib.error.HTTPError as err:
        err.close()
        return False
    except (OSError, http.client.HTTPException):  # URLError is an OSError
        return False


def list_models(url: str, key: str | None = None, token: str | None = None) -> tuple[str, ...]:
    """Return the names that /v1/models lists."""
    answer = _request(f"{url}/v1/models", None, PROBE_TIMEOUT * 4, key, token)
    return _read(answer, lambda: tuple(str(model["id"]) for model in answer["data"]))


def change_adapters(
    url: str, asked: Mapping[str, str], key: str | None, token: str | None, timeout: float = TIMEOUT
) -> Mapping[str, Any]:
    """Ask the half inside the engine's process for one change; RunError (GS-784) with what it says against it."""
    return _request(f"{url}{ROUTE}", asked, timeout, key, token)


def _completion(choice: Mapping[str, Any]) -> Completion:
    steps = (choice.get("logprobs") or {}).get("top_logprobs") or []
    top = [{int(token.removeprefix(TOKEN_PREFIX)): float(value) for token, value in step.items()} for step in steps]
    return Completion(str(choice["text"]), tuple(top))


def _authorization(key: str | None, token: str | None = None) -> dict[str, str]:
    key = key or os.environ.get("VLLM_API_KEY")
    known = {"Authorization": f"Bearer {key}"} if key else {}
    return known | ({TOKEN_HEADER: token} if token else {})


def _request(
    url: str, body: Mapping[str, Any] | None, timeout: float, key: str | None = None, token: str | None = None
) -> Mapping[str, Any]:
    headers = {"Content-Type": "application/json"} | _authorization(key, token)
    data = None if body is None else json.dumps(body).encode()
    try:
        with opener.open(urllib.request.Request(url, data, headers), timeout=timeout) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as err:
        with err:
            detail = err.read(2000).decode(errors="replace")
        raise RunError(
            f"the server refused: HTTP {err.code}",
            code="GS-784",
            hint="see what the server says under actual:",
            file=url,
            actual=detail,
        ) from err
    except (OSError, http.client.HTTPException) as err:
        raise RunError(
            f"no answer from the server: {err}",
            code="GS-786",
            hint="check that the server runs, and its address",
            file=url,
        ) from err
    except ValueError as err:
        raise RunError(
            "the server's answer is not JSON", code="GS-787", hint="check that vLLM answers at this address", file=url
        ) from err
    return answer if isinstance(answer, dict) else {}


def _read(answer: Mapping[str, Any], reader: Callable[[], T]) -> T:
    try:
        return reader()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as err:
        raise RunError(
            "the server's answer has another shape",
            code="GS-787",
            hint="check that vLLM answers at this address",
            actual=str(answer)[:500],
        ) from err
