"""The roots of what decides a model's outputs beside its weights: configuration, tokenizer and chat template."""

from __future__ import annotations

import re
from pathlib import Path

from gora_serve.errors import InputError
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.digest import root
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.layout import confined

_IGNORED_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash")
_TOKENIZER_FILES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|spiece|sentencepiece).*"
)


def config_root(directory: Path) -> str | None:
    """Return "gc1:sha256:<hex>" of config.json without the keys that say how it was saved; None without one."""
    path = directory / "config.json"
    return None if not path.exists() else _config_root(read_json(confined(directory, path.name)), path)


def _config_root(config: object, path: Path) -> str:
    if not isinstance(config, dict):
        raise InputError("this file does not hold a JSON object", code="GS-335", hint="fetch the file again", file=path)
    kept = {name: _exact(item) for name, item in config.items() if name not in _IGNORED_CONFIG}
    return root("gc1", "gora-serve/config/1", kept)


def _exact(value: object) -> object:
    """Return `value` without what has no canonical form: 10000.0 becomes 10000 (JSON has one kind of number), other
    floats and very large integers become an object with their exact text."""
    if isinstance(value, int) and abs(value) >= 2**53:
        return {"__int__": str(value)}
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else {"__float__": value.hex()}
    if isinstance(value, dict):
        return {name: _exact(item) for name, item in value.items()}
    return [_exact(item) for item in value] if isinstance(value, list) else value


def tokenizer_root(directory: Path) -> str | None:
    """Return "gt1:sha256:<hex>" over names and SHA-256 of the tokenizer and chat template files; None without any."""
    records = {name: sha256_file(confined(directory, name))[1] for name in tokenizer_names(directory)}
    return root("gt1", "gora-serve/tokenizer/1", records) if records else None


def tokenizer_names(directory: Path) -> list[str]:
    """Return the names of the files of `directory` that decide how text becomes tokens, sorted."""
    return sorted(path.name for path in directory.iterdir() if _TOKENIZER_FILES.fullmatch(path.name) and path.is_file())
