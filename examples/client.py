"""Ask the base and every adapter of a server the same thing at the same time: the `openai` package is client enough.

    gora-serve serve base -a banking=adapters/banking -a requests=adapters/requests &
    python examples/client.py "I lost my card"

A model's name is the adapter's name. Requests of different adapters share a batch in the engine, so that asking all of
them takes about as long as asking one. Where the server wants a key, set VLLM_API_KEY here too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time

import openai
from rich.console import Console
from rich.table import Table
from rich.text import Text


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, most: int) -> tuple[str, str, float]:
    """Return the model's name, its answer, and how many seconds it took."""
    began = time.perf_counter()
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=most, temperature=0.0
    )
    return model, answer.choices[0].message.content or "", time.perf_counter() - began


async def ask_all(url: str, prompt: str, most: int) -> list[tuple[str, str, float]]:
    key = os.environ.get("VLLM_API_KEY") or "none"
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=300) as client:
        models = [model.id async for model in client.models.list()]
        return await asyncio.gather(*(ask(client, model, prompt, most) for model in models))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    try:
        answers = asyncio.run(ask_all(options.url, options.prompt, options.max_tokens))
    except openai.OpenAIError as err:
        print(f"{options.url}: {err}", file=sys.stderr)
        sys.exit(1)
    table = Table("model", "answer", "seconds")
    for model, answer, seconds in answers:
        table.add_row(Text(model), Text(answer.strip()), f"{seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
