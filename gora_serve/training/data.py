"""From files to token batches, in TRL's conventions: prompt + completion, messages, or text.

Loss is on the completion, on the assistant's turns, or on the whole text. Every row that is refused is named by
file and line; every row that is cut or left out is counted and reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gora_serve.config import DataConfig
from gora_serve.errors import InputError, MachineError
from gora_serve.integrity.canonical import is_unicode
from gora_serve.integrity.files import sha256_file

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
AS_TEXT = dict.fromkeys(("prompt", "completion", "text"), str)  # columns in which "1" and "None" of a CSV stay text
IGNORED = -100  # label of a token without loss, as transformers has it


@dataclass(frozen=True)
class Example:
    """One row as tokens. labels[i] is input_ids[i], or IGNORED where the token carries no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows, and what is known about where they come from."""

    name: str
    examples: tuple[Example, ...]
    digest: str
    rows: int
    cut: int
    left_out: int

    def summary(self) -> dict[str, Any]:
        """Return what run.json records: name, sha256 of the file, and how many rows were used, cut, left out."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "rows": self.rows,
            "used": len(self.examples),
            "cut": self.cut,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class _Row:
    values: Mapping[str, Any]
    place: str  # "line 3" or "row 3", for messages


def load_data(source: str, tokenizer: Any, config: DataConfig) -> Dataset:
    """Read and tokenise a JSONL, JSON, CSV or Parquet file, or a hub dataset's train split.

    Rows longer than config.max_length lose the end of their completion; rows whose prompt alone fills the limit
    are left out; both are counted. Raises InputError naming file and line for a malformed row, or when no row
    is left, and MachineError for a missing file.
    """
    path = Path(source)
    rows, digest = _read_file(path) if path.suffix in BUILDERS or path.exists() else _read_hub(source)
    if not rows:
        raise InputError("the data file has no rows", code="GS-372", file=source)
    template = config.chat_template and bool(getattr(tokenizer, "chat_template", None))
    examples, cut, left_out = [], 0, 0
    for row in rows:
        example = _tokenize(row, tokenizer, template, source)
        shorter = _fit_length(example, config.max_length)
        left_out += shorter is None
        if shorter is not None:
            cut += len(shorter.input_ids) < len(example.input_ids)
            examples.append(shorter)
    if not examples:
        raise InputError(
            f"no row fits: in all {len(rows)} rows the prompt alone reaches --max-length", code="GS-373",
            file=source, expected=f"prompts under {config.max_length} tokens", hint="raise --max-length",
        )  # fmt: skip
    return Dataset(path.name if path.exists() else source, tuple(examples), digest, len(rows), cut, left_out)


def _read_file(path: Path) -> tuple[list[_Row], str]:
    if not path.is_file():
        raise MachineError("no such data file", code="GS-522", file=path, hint="check --data")
    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise InputError("unknown kind of data file", code="GS-374", file=path, expected=", ".join(BUILDERS))
    size, digest = sha256_file(path)
    if size == 0:
        raise InputError("the data file is empty", code="GS-372", file=path)
    if path.suffix == ".jsonl":
        return _json_lines(path), digest
    return _numbered(_load(builder, path)), digest


def _load(builder: str, path: Path) -> list[Mapping[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    options: dict[str, Any] = {"converters": AS_TEXT, "keep_default_na": False} if builder == "csv" else {}
    try:
        loaded = datasets.load_dataset(builder, data_files=str(path.resolve()), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as err:
        cause = err.__cause__ or err
        raise InputError(
            f"cannot be read as {path.suffix[1:]}", code="GS-375", file=path,
            actual=str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__,
        ) from err  # fmt: skip
    return list(loaded)


def _json_lines(path: Path) -> list[_Row]:
    """Parse line by line, so that a fault has a line number; blank lines are skipped."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as err:
        place = err.object[: err.start].count(b"\n") + 1
        raise InputError("not UTF-8", code="GS-376", file=f"{path}:{place}") from err
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise InputError("not JSON", code="GS-377", file=f"{path}:{number}", actual=str(err)) from err
        if not isinstance(value, dict):
            raise InputError("not a JSON object", code="GS-377", file=f"{path}:{number}", actual=line[:60])
        rows.append(_Row(value, str(number)))
    return rows


def _numbered(values: Sequence[Mapping[str, Any]]) -> list[_Row]:
    return [_Row(value, f"row {number}") for number, value in enumerate(values, start=1)]


def _read_hub(source: str) -> tuple[list[_Row], str]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as err:
        raise MachineError(
            "no such data file, and the hub could not give it as a dataset", code="GS-523", file=source,
            hint="check --data, the network and HF_TOKEN",
        ) from err  # fmt: skip
    rows = _numbered(list(loaded))
    lines = (json.dumps(row.values, sort_keys=True, default=str) for row in rows)
    return rows, hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tokenize(row: _Row, tokenizer: Any, template: bool, source: str) -> Example:
    """Turn a row into segments of text with and without loss, and those into tokens, segment by segment."""
    values = {key: value for key, value in row.values.items() if value is not None}
    if "messages" in values:
        segments = _conversation(_messages(values["messages"], row, source), tokenizer, row, source, template)
    elif "prompt" in values and "completion" in values:
        segments = _prompt_completion(values, tokenizer, template, row, source)
    elif values.get("text") and isinstance(values["text"], str):
        _check_unicode(values["text"], row, source)
        return _plain_text(values["text"], tokenizer)
    else:
        raise _bad_row(
            row,
            source,
            "the row lacks the needed fields",
            f"prompt and completion, messages, or text; got {sorted(values)}",
        )
    _check_unicode("".join(text for text, _ in segments), row, source)
    example = _encode(segments, tokenizer)
    if all(label == IGNORED for label in example.labels):
        raise _bad_row(row, source, "no token of the row carries loss", "a completion that is not empty")
    return example


def _bad_row(row: _Row, source: str, what: str, expected: str) -> InputError:
    return InputError(what, code="GS-378", file=f"{source}:{row.place}", expected=expected)


def _check_unicode(text: str, row: _Row, source: str) -> None:
    if not is_unicode(text):  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise _bad_row(row, source, "the text is not Unicode", "no lone surrogate such as \\ud800")


def _messages(value: Any, row: _Row, source: str) -> list[dict[str, Any]]:
    fine = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )
    if not fine or not value:
        raise _bad_row(row, source, "messages is not a list of turns", "a list of {role, content}, both text")
    return value  # type: ignore[no-any-return]


def _prompt_completion(
    values: Mapping[str, Any], tokenizer: Any, template: bool, row: _Row, source: str
) -> list[tuple[str, bool]]:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _messages(prompt, row, source), _messages(completion, row, source)
        return _conversation(turns[0] + turns[1], tokenizer, row, source, template, first=len(turns[0]))
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise _bad_row(row, source, "prompt and completion are not both text", "two strings, or two lists of turns")
    if not completion:
        raise _bad_row(row, source, "the completion is empty", "a completion that is not empty")
    if template:
        turns_ = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(turns_, tokenizer, row, source, template)
    return [(tokenizer.bos_token or "", False)] * _adds_bos(tokenizer) + [
        (prompt, False),
        (completion + tokenizer.eos_token, True),
    ]


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return bool(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])


def _conversation(
    turns: list[dict[str, Any]], tokenizer: Any, row: _Row, source: str, template: bool, first: int = 0
) -> list[tuple[str, bool]]:
    """Render the turns; the assistant's from turn `first` on carry loss, end-of-turn mark included.

    The text before each such turn is what the server renders for a request, so both see the same tokens.
    """
    if not template:
        raise _bad_row(row, source, "messages need a chat template", "a tokenizer with one, or prompt and completion")
    segments: list[tuple[str, bool]] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index < first:
            continue
        before = tokenizer.apply_chat_template(turns[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(turns[: index + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise _bad_row(
                row,
                source,
                "the chat template rewrites earlier turns",
                "one assistant turn at the end of a row",
            )
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return segments


def _encode(segments: Sequence[tuple[str, bool]], tokenizer: Any) -> Example:
    input_ids: list[int] = []
    labels: list[int] = []
    for text, has_loss in segments:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids += ids
        labels += ids if has_loss else [IGNORED] * len(ids)
    return Example(input_ids, labels)


def _plain_text(text: str, tokenizer: Any) -> Example:
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Example(list(ids), list(ids))


def _fit_length(example: Example, limit: int) -> Example | None:
    """Cut the end off to `limit` tokens. None if no token with loss would be left: the prompt fills it alone."""
    if len(example.input_ids) <= limit:
        return example
    shorter = Example(example.input_ids[:limit], example.labels[:limit])
    return None if all(label == IGNORED for label in shorter.labels) else shorter


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest example. Returns input_ids, attention_mask and labels, (batch, length)."""
    length = max(len(example.input_ids) for example in examples)

    def padded(rows: Iterator[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded((example.input_ids for example in examples), pad_token_id),
        "attention_mask": padded(([1] * len(example.input_ids) for example in examples), 0),
        "labels": padded((example.labels for example in examples), IGNORED),
    }


def schedule(count: int, batch_size: int, *, batches: int, seed: int) -> list[list[int]]:
    """Return `batches` lists of example indices: passes over all examples, each in its own seeded order.

    A batch may span two passes, so every batch is full; with fewer examples than batch_size a batch holds each
    once. The first batches do not depend on how many are asked for.
    """
    size = min(batch_size, count)
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while len(order) < batches * size:
        order += torch.randperm(count, generator=generator).tolist()
    return [order[start : start + size] for start in range(0, batches * size, size)]
