"""One row of data to tokens and labels, in TRL's conventions: prompt + completion, messages, or text.

Loss is on the completion, on the assistant's turns, or on the whole text. For an encoder-decoder the prompt is the
encoder's input and the completion its labels. A row that cannot be used is refused by its place in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from gora_serve.config import ROW_FIELDS
from gora_serve.errors import InputError, listed
from gora_serve.integrity.canonical import is_unicode

FIELDS = frozenset().union(*ROW_FIELDS)
IGNORED = -100  # label of a token without loss, as transformers has it
Segments = list[tuple[str, bool]]  # pieces of text in order, and whether they carry loss


@dataclass(frozen=True)
class Example:
    """One row as tokens. labels[i] is input_ids[i], or IGNORED where the token carries no loss.

    For an encoder-decoder input_ids are the encoder's, and labels, of another length, all carry loss.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Row:
    """One row as read, and its place for messages: file and line."""

    values: Mapping[str, Any]
    place: str

    def refused(self, what: str, expected: str) -> InputError:
        hint = "give each row prompt and completion, messages, or text"
        return InputError(what, code="GS-378", hint=hint, file=self.place, expected=expected)

    def lacking(self, what: str, expected: str) -> InputError:
        """Return the error for fields that are not there, or not by the names that are known."""
        refused = self.refused(what, expected)
        others = [name for name in self.values if name not in FIELDS]
        given = FIELDS & self.values.keys()
        if not others or given not in (set(), {"prompt"}, {"completion"}):
            return refused
        if separator := next((mark for name in others for mark in ";\t|" if mark in name), None):
            return refused.advising(f"separate the columns by commas, not by {separator!r}")
        return refused.advising(
            "say which columns are prompt and completion: --columns prompt=COLUMN,completion=COLUMN; or rename them"
        )

    def of_columns(self, column_of: Mapping[str, str]) -> Row:
        """Return the row with the named columns alone, by their fields' names; as it is where none is named."""
        if absent := [column for column in column_of.values() if column not in self.values]:
            raise InputError(
                f"the row has no column {absent[0]!r}", code="GS-378", file=self.place,
                expected=f"one of {listed(map(repr, self.values), 12)}", hint="correct --columns",
            )  # fmt: skip
        named = {field: self.values[column] for field, column in column_of.items()}
        return Row(named or self.values, self.place)


def encode_row(row: Row, tokenizer: Any, *, template: bool) -> Example:
    """Return the row's tokens and labels; `template`: render turns with the tokenizer's chat template.

    Raises InputError naming file and line for a row without the needed fields, or without a token to predict.
    """
    values = {key: value for key, value in row.values.items() if value is not None}
    start: list[int] = [] if template else _start(tokenizer)  # a chat template spells its own
    if "messages" in values:
        segments = _conversation(_turns(values["messages"], row), tokenizer, row, template)
    elif "prompt" in values and "completion" in values:
        segments = _prompt_completion(values, tokenizer, template, row)
    elif values.get("text") and isinstance(values["text"], str):
        segments, start = [(values["text"], True), *_end(values["text"], tokenizer)], _start(tokenizer)
    else:
        raise row.lacking(
            "the row lacks the needed fields", f"prompt and completion, messages, or text; got {sorted(values)}"
        )
    if not is_unicode("".join(text for text, _ in segments)):  # no tokenizer takes half of a surrogate pair
        raise row.refused("the text is not Unicode", "no lone surrogate such as \\ud800")
    example = _tokens(segments, tokenizer, start)
    if not predicts(example.labels):
        raise row.refused("no token of the row carries loss", "a completion that is not empty")
    return example


def encode_pair(row: Row, tokenizer: Any, *, template: bool) -> Example:
    """Return a row for an encoder-decoder: the prompt's tokens, and the completion's as labels, which end in EOS.

    Both are as the tokenizer encodes them, with the special tokens that it adds. `template`: the prompt, a text or a
    list of turns, is rendered with the tokenizer's chat template. Raises InputError naming file and line for a row
    that has not both fields.
    """
    prompt, completion = row.values.get("prompt"), row.values.get("completion")
    absent = [name for name in ("prompt", "completion") if row.values.get(name) is None]
    if absent:
        how = " and ".join(f"{name} is {'null' if name in row.values else 'missing'}" for name in absent)
        raise row.lacking(f"an encoder-decoder needs a prompt and a completion: {how}", "both fields, as text")
    if template and isinstance(prompt, list):
        prompt = _render(_turns(prompt, row), tokenizer, row, add_generation_prompt=True)
    elif template and isinstance(prompt, str):
        prompt = _render([{"role": "user", "content": prompt}], tokenizer, row, add_generation_prompt=True)
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise row.refused("prompt and completion are not both text", "two strings; turns need a chat template")
    if not completion:
        raise row.refused("the completion is empty", "a completion that is not empty")
    if not is_unicode(prompt + completion):
        raise row.refused("the text is not Unicode", "no lone surrogate such as \\ud800")
    input_ids = tokenizer(prompt, add_special_tokens=not template)["input_ids"]
    if not input_ids:
        raise row.refused("the prompt has no token", "a prompt that is not empty")
    labels = tokenizer(text_target=completion)["input_ids"]
    special = set(tokenizer.all_special_ids)
    tail = list(takewhile(special.__contains__, reversed(labels)))  # mBART's ends in EOS and the language
    return Example(input_ids, labels if tokenizer.eos_token_id in tail else [*labels, tokenizer.eos_token_id])


def predicts(labels: Sequence[int]) -> bool:
    """Return whether any token is predicted with loss; the first token of a row never is."""
    return any(label != IGNORED for label in labels[1:])


def _turns(value: Any, row: Row) -> list[dict[str, Any]]:
    fine = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )
    if not fine or not value:
        raise row.refused("messages is not a list of turns", "a list of {role, content}, both text")
    return value  # type: ignore[no-any-return]


def _prompt_completion(values: Mapping[str, Any], tokenizer: Any, template: bool, row: Row) -> Segments:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked, answered = _turns(prompt, row), _turns(completion, row)
        return _conversation(asked + answered, tokenizer, row, template, first=len(asked))
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise row.refused("prompt and completion are not both text", "two strings, or two lists of turns")
    if not completion:
        raise row.refused("the completion is empty", "a completion that is not empty")
    if template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(turns, tokenizer, row, template)
    return [(prompt, False), (completion, True), *_end(completion, tokenizer)]


def _start(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before a plain text.

    An id, not text: after its text some tokenizers, Llama's for one, leave out the mark that they begin a text with.
    """
    ids: list[int] = tokenizer("", add_special_tokens=True)["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _end(text: str, tokenizer: Any) -> Segments:
    return [] if text.endswith(tokenizer.eos_token) else [(tokenizer.eos_token, True)]


def _conversation(turns: list[dict[str, Any]], tokenizer: Any, row: Row, template: bool, first: int = 0) -> Segments:
    """Render the turns; the assistant's from turn `first` on carry loss, end-of-turn mark included.

    The text before each such turn is what a server renders for a request.
    """
    if not template:
        raise row.refused("messages need a chat template", "a tokenizer with one, or prompt and completion")
    segments: Segments = []
    done = ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index < first:
            continue
        before = _render(turns[:index], tokenizer, row, add_generation_prompt=True)
        after = _render(turns[: index + 1], tokenizer, row, add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise row.refused("the chat template rewrites earlier turns", "one assistant turn at the end of a row")
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return segments


def _render(turns: list[dict[str, Any]], tokenizer: Any, row: Row, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError) as err:
        roles = [turn["role"] for turn in turns]
        raise row.refused(f"the chat template refuses the turns {roles}: {err}", "turns that the base knows") from err
    return text


def _tokens(segments: Segments, tokenizer: Any, start: list[int]) -> Example:
    """Tokenise the segments so that the tokens before an answer are those of the text before it, as a server sends it.

    An answer's tokens are what it adds to the tokens of the whole text so far; where a tokenizer would merge across
    its beginning, and so change the prompt, it is tokenised by itself. `start` goes before all of them, without loss.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    so_far = ""
    for text, has_loss in segments:
        so_far += text
        whole = tokenizer(so_far, add_special_tokens=False)["input_ids"]
        kept = whole[: len(input_ids)] == input_ids
        added = whole[len(input_ids) :] if kept else tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids = input_ids + added
        labels += added if has_loss else [IGNORED] * len(added)
    return Example(start + input_ids, [IGNORED] * len(start) + labels)
