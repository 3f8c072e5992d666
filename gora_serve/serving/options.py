"""vLLM's own options after `--`: which of them may replace a computed flag, and which would undo a check.

The user's option wins over ours, except where it would serve wrong answers, open the server, put a secret into
the process list, or leave us unable to tell when the engine is ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gora_serve.errors import UsageError

REFUSED: Mapping[str, str] = {
    "--api-key": "a key on the command line is visible to every process: set VLLM_API_KEY in the environment",
    "--lora-modules": "adapters are checked before they are served: name them with -a NAME=DIR",
    "--default-mm-loras": "adapters are checked before they are served: name them with -a NAME=DIR",
    "--model": "the base is the first argument of the command",
    "--config": "options in a file cannot be checked: write them after --",
    "--no-enable-lora": "leave out the adapters to serve the base alone",
    "--uds": "readiness is checked over HTTP on a host and a port",
    "--headless": "readiness is checked over HTTP on a host and a port",
    "--grpc": "readiness is checked over HTTP on a host and a port",
    "--ssl-keyfile": "put a TLS proxy in front of the server",
    "--ssl-certfile": "put a TLS proxy in front of the server",
}
# Options of vLLM 0.32 that make several processes of it, each of which would know other adapters.
SEVERAL = ("--api-server-count", "-asc", "--data-parallel-size", "-dp")
SHARED = (
    "--data-parallel-rank", "-dpn", "--data-parallel-start-rank", "-dpr", "--data-parallel-size-local", "-dpl",
    "--data-parallel-hybrid-lb", "-dph", "--data-parallel-external-lb", "-dpe",
    "--data-parallel-multi-port-external-lb", "-dpm",
)  # fmt: skip
# What else is asked for by name, beside our own flags: abbreviated, it would go unseen.
READ = ("--load-format", "--lora-target-modules", "--max-logprobs", "--kv-cache-memory-bytes")
HINT = "write options of vLLM after --, in full, as vllm serve --help has them"


def group_options(extra: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return option -> values, each option spelled as vLLM's parser reads it (dashes for underscores).

    Short and dotted options are kept under their own spelling. An option given twice keeps its last values, as
    in argparse.
    """
    grouped: dict[str, tuple[str, ...]] = {}
    current: str | None = None
    for word in extra:
        if word.startswith("-") and not _is_number(word):
            name, equals, value = word.partition("=")
            current = name.replace("_", "-") if name.startswith("--") and "." not in name else name
            grouped[current] = (value,) if equals else ()
        elif current is None:
            raise UsageError("an engine option must start with a dash", code="GS-284", hint=HINT, actual=word)
        else:
            grouped[current] = (*grouped[current], word)
    return grouped


def check_options(options: Mapping[str, Sequence[str]], ours: Sequence[str]) -> None:
    """Refuse the options of `REFUSED`, and abbreviations of these, of our flags and of what is asked for by name,
    which argparse would accept, also after one dash. A dotted option is judged by what stands before the dot: vLLM
    makes one value of all of these.
    """
    guarded = (*REFUSED, *READ, *SEVERAL, *SHARED, *ours)
    for given in options:
        option = given.partition(".")[0].replace("_", "-") if given.startswith("--") else given
        if option in REFUSED:
            raise UsageError(f"{option} cannot be passed on", code="GS-284", hint=REFUSED[option])
        full = [name for name in guarded if name.startswith(option) and name != option]
        if full and option not in guarded:
            raise UsageError(
                f"write {option} in full", code="GS-284", hint=HINT, expected=", ".join(full), actual=option
            )


def single(options: Mapping[str, Sequence[str]], name: str) -> str | None:
    """Return the one value of an option, or None where it was not given."""
    values = options.get(name)
    if values is None:
        return None
    if len(values) != 1:
        raise UsageError(f"{name} takes one value", code="GS-284", hint=HINT, actual=" ".join(values))
    return values[0]


def whole_number(options: Mapping[str, Sequence[str]], name: str) -> int | None:
    """Return the value of an option as an integer that is not negative, or None where it was not given."""
    value = single(options, name)
    if value is None:
        return None
    if not value.isdecimal():
        raise UsageError(f"{name} takes a whole number", code="GS-284", hint=HINT, actual=value)
    return int(value)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
