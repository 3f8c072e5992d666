"""From rows to token batches. Rows come from files (data_files.py) or a hub dataset, and become tokens in encode.py.

Every row that is refused is named by file and line; every row that is cut or left out is counted and reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gora_serve.config import DataConfig
from gora_serve.errors import InputError, MachineError
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.hub import is_hub_id
from gora_serve.training.data_files import READERS, numbered
from gora_serve.training.encode import IGNORED, Example, Row, encode_pair, encode_row, predicts

OTHERS = (".txt", ".tsv", ".md", ".ndjson", ".xlsx", ".arrow", ".gz", ".zst", ".zip")  # no name of a dataset ends so


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows, and what is known about where they come from.

    places: file and line of each example. given: the file or dataset as it was named.
    """

    name: str
    examples: tuple[Example, ...]
    digest: str
    rows: int
    cut: int
    left_out: int
    places: tuple[str, ...]
    given: str = ""

    def summary(self) -> dict[str, Any]:
        """Return what run.json records: names, sha256 of the file, and how many rows were used, cut, left out."""
        return {
            "name": self.name,
            "given": self.given,
            "sha256": self.digest,
            "rows": self.rows,
            "used": len(self.examples),
            "cut": self.cut,
            "left_out": self.left_out,
        }


def load_data(source: str, tokenizer: Any, config: DataConfig, *, encoder_decoder: bool = False) -> Dataset:
    """Read and tokenise a JSONL, JSON, CSV or Parquet file, or a hub dataset, NAME[:[CONFIGURATION][:SPLIT]].

    Rows longer than config.max_length lose the end of their completion; rows whose prompt alone fills the limit
    are left out; both are counted. For an encoder-decoder the limit holds for prompt and completion each.
    Raises InputError naming file and line for a malformed row, or when no row is left, and MachineError for a missing
    file.
    """
    path = Path(source)
    rows, digest = _read_file(path) if _means_file(source) else _read_hub(source)
    if not rows:
        raise InputError("the data file has no rows", code="GS-372", hint="check the file, and --data", file=source)
    template = config.chat_template and bool(getattr(tokenizer, "chat_template", None))
    encode, fit_length = (encode_pair, _fit_pair) if encoder_decoder else (encode_row, _fit_length)
    examples, places, cut, left_out = [], [], 0, 0
    column_of = config.column_of
    for row in rows:
        example = encode(row.of_columns(column_of), tokenizer, template=template)
        shorter = fit_length(example, config.max_length)
        left_out += shorter is None
        if shorter is not None:
            cut += len(shorter.labels) < len(example.labels)
            examples.append(shorter)
            places.append(row.place)
    if not examples:
        raise InputError(
            f"no row fits: in all {len(rows)} rows the prompt alone reaches --max-length", code="GS-373",
            file=source, expected=f"prompts under {config.max_length} tokens", hint="raise --max-length",
        )  # fmt: skip
    name = path.name if path.exists() else source
    return Dataset(name, tuple(examples), digest, len(rows), cut, left_out, tuple(places), source)


def check_ids(data: Dataset, vocabulary: int, *, padding: int) -> None:
    """Refuse a token that the model has no embedding for: ids must be below `vocabulary`. Raises InputError."""
    hint = "the tokenizer is another model's, or tokens were added to it and not to the model"
    for place, example in zip(data.places, data.examples, strict=True):
        largest = max(*example.input_ids, *example.labels)
        if largest >= vocabulary:
            raise InputError(
                "a token of this row has no embedding in the base", code="GS-392", file=place,
                expected=f"token ids below {vocabulary}", actual=largest, hint=hint,
            )  # fmt: skip
    if padding >= vocabulary:
        raise InputError(
            "the tokenizer's padding token has no embedding in the base", code="GS-392", file=data.name,
            expected=f"token ids below {vocabulary}", actual=padding, hint=hint,
        )  # fmt: skip


def _means_file(source: str) -> bool:
    """Tell whether `source` is a file, there or not: where it is no name of the hub's, or ends as files do."""
    name = source.partition(":")[0]
    endings = {Path(one).suffix.lower() for one in (name, source)}
    return Path(source).exists() or not is_hub_id(name) or not endings.isdisjoint((*READERS, *OTHERS))


def _read_file(path: Path) -> tuple[list[Row], str]:
    if not path.is_file():
        raise MachineError("no such data file", code="GS-522", file=path, hint="check --data")
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(
            "unknown kind of data file",
            code="GS-374",
            hint="write it as .jsonl, .json, .csv or .parquet",
            file=path,
            expected=", ".join(READERS),
        )
    size, digest = sha256_file(path)
    if size == 0:
        raise InputError("the data file is empty", code="GS-372", hint="check the file, and --data", file=path)
    return read(path), digest


def _read_hub(source: str) -> tuple[list[Row], str]:
    """Read a split of a dataset, NAME[:[CONFIGURATION][:SPLIT]]; SPLIT is "train", or as `datasets` has them."""
    import datasets

    name, configuration, split = [*source.split(":", 2), "", ""][:3]
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as err:
        raise MachineError(
            "no such data file, and the hub could not give it as a dataset", code="GS-523", file=source,
            actual=" ".join(str(err).split()),
            hint="check --data (NAME:CONFIGURATION:SPLIT where a dataset has several), the network and HF_TOKEN",
        ) from err  # fmt: skip
    rows = numbered(list(loaded), source)
    lines = (json.dumps(row.values, sort_keys=True, default=str) for row in rows)
    return rows, hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _fit_length(example: Example, limit: int) -> Example | None:
    """Cut the end off to `limit` tokens. None if no token with loss would be left: the prompt fills it alone."""
    if len(example.input_ids) <= limit:
        return example
    shorter = Example(example.input_ids[:limit], example.labels[:limit])
    return shorter if predicts(shorter.labels) else None


def _fit_pair(example: Example, limit: int) -> Example | None:
    """Cut the labels off to `limit` tokens. None if the encoder's input is longer than that."""
    return Example(example.input_ids, example.labels[:limit]) if len(example.input_ids) <= limit else None


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest example. Returns input_ids, attention_mask and labels, (batch, length).

    The labels of an encoder-decoder have a length of their own.
    """
    return {
        "input_ids": _padded([example.input_ids for example in examples], pad_token_id),
        "attention_mask": _padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": _padded([example.labels for example in examples], IGNORED),
    }


def _padded(rows: Sequence[list[int]], filler: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


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
