"""Rows to tokens: labelled tokens are decoded and compared with the text that ought to carry loss."""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build_tokenizer, write_jsonl

from gora_serve.config import DataConfig
from gora_serve.errors import GoraError, InputError, MachineError
from gora_serve.training.data import Dataset, _read_hub, check_ids, collate, load_data, schedule
from gora_serve.training.data_files import csv_rows, json_rows
from gora_serve.training.encode import IGNORED, Example, Row

PLAIN = DataConfig(chat_template=False, max_length=256)
CHAT = DataConfig(max_length=256)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What color is the apple?"},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "And the river?"},
    {"role": "assistant", "content": "The river is blue."},
]


def load(path: Path, tokenizer: Any, config: DataConfig = CHAT) -> Dataset:
    """Third-party readers must not litter: pandas and datasets may leave files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        return load_data(str(path), tokenizer, config)


def load_rows(tmp_path: Path, rows: list[Any], tokenizer: Any, config: DataConfig = CHAT) -> Dataset:
    return load(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, config)


def with_loss(example: Example, tokenizer: Any) -> str:
    """Decode the labelled tokens; each label must be its own token."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    text: str = tokenizer.decode([label for label in example.labels if label != -100])
    return text


def prompt_tokens(example: Example) -> list[int]:
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    return example.input_ids[:first]


def test_prompt_completion_with_template(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "What color is the apple?", "completion": "Red."}]
    (example,) = load_rows(tmp_path, rows, tokenizer).examples
    assert with_loss(example, tokenizer) == "Red.<|im_end|>\n"
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What color is the apple?"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt_tokens(example) == served


def test_prompt_completion_without_template(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "The apple is", "completion": " red"}]
    (example,) = load_rows(tmp_path, rows, tokenizer, PLAIN).examples
    assert with_loss(example, tokenizer) == " red<|im_end|>"
    assert prompt_tokens(example) == tokenizer("The apple is")["input_ids"]


def test_a_tokenizer_without_template_needs_no_switch(tmp_path: Path) -> None:
    bare = build_tokenizer()
    bare.chat_template = None
    rows = [{"prompt": "The apple is", "completion": " red"}]
    assert load_rows(tmp_path, rows, bare).examples == load_rows(tmp_path, rows, bare, PLAIN).examples


def test_a_tokenizer_that_puts_bos_in_front_gets_it_once(tmp_path: Path) -> None:
    """As Llama's does: the prompt's tokens must be those of tokenizer(prompt), BOS included."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    rows = [{"prompt": "The apple is", "completion": " red"}, {"text": "The apple"}]
    one, two = load_rows(tmp_path, rows, tokenizer, PLAIN).examples
    assert prompt_tokens(one) == tokenizer("The apple is")["input_ids"]
    assert one.input_ids.count(1) == two.input_ids.count(1) == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_bos_takes_no_space_from_the_text_after_it(tmp_path: Path, legacy: bool) -> None:
    """LlamaTokenizer's Metaspace puts its mark before the first word only where nothing, not even BOS, is before it."""
    from transformers import LlamaTokenizer

    words = ["<unk>", "<s>", "</s>", "▁", "h", "i", "hi", "▁hi", "!"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("h", "i"), ("▁", "hi")]
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, legacy=legacy)
    assert tokenizer("hi hi")["input_ids"] == [1, 7, 7]
    rows = [{"prompt": "hi hi", "completion": " hi"}, {"text": "hi hi"}, {"prompt": "", "completion": "hi!</s>"}]
    one, two, three = load_rows(tmp_path, rows, tokenizer).examples
    assert one == Example([1, 7, 7, 7, 2], [-100, -100, -100, 7, 2])
    assert two == Example([1, 7, 7, 2], [-100, 7, 7, 2])
    assert three == Example([1, 7, 8, 2], [-100, 7, 8, 2])
    assert load_rows(tmp_path, rows, tokenizer, DataConfig(max_length=4)).examples[0].input_ids == [1, 7, 7, 7]


@pytest.mark.parametrize("count", [3, 5])
def test_messages_with_one_and_two_assistant_turns(tmp_path: Path, tokenizer: Any, count: int) -> None:
    (example,) = load_rows(tmp_path, [{"messages": TURNS[:count]}], tokenizer).examples
    expected = "Red.<|im_end|>\n" if count == 3 else "Red.<|im_end|>\nThe river is blue.<|im_end|>\n"
    assert with_loss(example, tokenizer) == expected
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(TURNS[:count], tokenize=False)
    served = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(example) == served


def test_a_turn_after_the_last_answer_is_left_off(tmp_path: Path, tokenizer: Any) -> None:
    (example,) = load_rows(tmp_path, [{"messages": TURNS[:4]}], tokenizer).examples
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(TURNS[:3], tokenize=False)


def test_conversational_prompt_and_completion(tmp_path: Path, tokenizer: Any) -> None:
    """Assistant turns of the prompt are context: no loss on them."""
    rows = [{"prompt": TURNS[:4], "completion": TURNS[4:]}]
    (example,) = load_rows(tmp_path, rows, tokenizer).examples
    assert with_loss(example, tokenizer) == "The river is blue.<|im_end|>\n"
    served = tokenizer.apply_chat_template(TURNS[:4], add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(example) == served


def test_text_carries_loss_everywhere_and_ends(tmp_path: Path, tokenizer: Any) -> None:
    for config in (CHAT, PLAIN):
        (example,) = load_rows(tmp_path, [{"text": "The apple is red."}], tokenizer, config).examples
        assert with_loss(example, tokenizer) == "The apple is red.<|im_end|>"
        assert example.labels == example.input_ids


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    """Reasoning models drop earlier thoughts: turn by turn, training would not see what the server renders."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(InputError, match="GS-378"):
        load_rows(tmp_path, [{"messages": TURNS}], tokenizer)
    (example,) = load_rows(tmp_path, [{"messages": TURNS[:3]}], tokenizer).examples
    assert with_loss(example, tokenizer) == "<think></think>Red.<|im_end|>\n"


def write_as(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("words", [("red", "None", "17", "NA"), ("0", "1", "0", "1")])
def test_every_kind_of_file_gives_the_same_examples(
    tmp_path: Path, tokenizer: Any, ending: str, words: tuple[str, ...]
) -> None:
    """CSV has no types: the labels 0 and 1, and the words None and NA, are text there as elsewhere."""
    rows = [{"prompt": f"Color of thing {i}?", "completion": word} for i, word in enumerate(words)]
    path = write_as(tmp_path / f"rows.{ending}", rows)
    dataset = load(path, tokenizer)
    assert [with_loss(example, tokenizer) for example in dataset.examples] == [f"{word}<|im_end|>\n" for word in words]
    assert dataset.summary() == {
        "name": f"rows.{ending}", "given": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 4, "used": 4, "cut": 0, "left_out": 0,
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_fields_that_are_called_otherwise(tmp_path: Path, tokenizer: Any, ending: str) -> None:
    """The named columns alone count: here `text` and `completion` are something else."""
    rows = [{"text": f"Color of a {word}?", "label": word, "completion": "no"} for word in ("plum", "pear")]
    plain = [{"prompt": row["text"], "completion": row["label"]} for row in rows]
    named = replace(CHAT, columns="prompt=text, completion=label")
    found = load(write_as(tmp_path / f"rows.{ending}", rows), tokenizer, named)
    assert found.examples == load(write_as(tmp_path / f"plain.{ending}", plain), tokenizer).examples


def test_a_column_is_called_as_the_file_has_it(tmp_path: Path, tokenizer: Any) -> None:
    """A CSV with spaces behind its commas, and a name with an equals sign."""
    (tmp_path / "rows.csv").write_text("a=b, answer\nred?,yes\n")
    config = replace(CHAT, columns="prompt=a=b,completion= answer")
    config.validate()
    (example,) = load(tmp_path / "rows.csv", tokenizer, config).examples
    assert with_loss(example, tokenizer) == "yes<|im_end|>\n"


def test_turns_and_text_that_are_called_otherwise(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"conversation": TURNS, "story": "Once."}]
    for columns, plain in (("messages=conversation", {"messages": TURNS}), ("text=story", {"text": "Once."})):
        found = load_rows(tmp_path, rows, tokenizer, replace(CHAT, columns=columns))
        assert found.examples == load_rows(tmp_path, [plain], tokenizer).examples


def test_other_columns_and_blank_lines_are_ignored(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": 7, "prompt": "a", "completion": "b", "text": null}\r\n\r\n  \n{"text": "c\xe2\x80\xa8d"}'
    )
    one, two = load(path, tokenizer).examples
    assert with_loss(one, tokenizer) == "b<|im_end|>\n"
    assert with_loss(two, tokenizer) == "c\u2028d<|im_end|>"


GOOD = '{"prompt": "a", "completion": "b"}'
BAD_LINES: list[Any] = [
    pytest.param('{"prompt": "a"}', "GS-378", id="missing field"),
    pytest.param('{"prompt": "a", "completion": null}', "GS-378", id="null"),
    pytest.param('{"question": "a", "answer": "b"}', "GS-378", id="other fields"),
    pytest.param('{"prompt": "a", "completion": 5}', "GS-378", id="number"),
    pytest.param('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "GS-378", id="mixed"),
    pytest.param('{"prompt": "a", "completion": ""}', "GS-378", id="empty completion"),
    pytest.param('{"text": ""}', "GS-378", id="empty text"),
    pytest.param('{"text": 5}', "GS-378", id="text is a number"),
    pytest.param('{"messages": []}', "GS-378", id="no turns"),
    pytest.param('{"messages": "hello"}', "GS-378", id="messages is text"),
    pytest.param('{"messages": [{"role": "user"}]}', "GS-378", id="turn without content"),
    pytest.param('{"messages": [{"role": "user", "content": "a"}]}', "GS-378", id="no answer"),
    pytest.param('{"prompt": "a", "completion": "\\ud800"}', "GS-378", id="lone surrogate"),
    pytest.param('{"prompt": "a", ', "GS-377", id="not JSON"),
    pytest.param('["a", "b"]', "GS-377", id="not an object"),
    pytest.param("[" * 100_000, "GS-377", id="deep"),
    pytest.param(b'{"text": "\xff"}', "GS-376", id="not UTF-8"),
]


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("line", "code"), BAD_LINES)
def test_a_bad_line_is_named(
    tmp_path: Path, tokenizer: Any, line: str | bytes, code: str, bom: bytes, template: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    good = GOOD.encode() + b"\n"
    path.write_bytes(bom + good + b"\n" + good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(GoraError) as caught:
        load(path, tokenizer, CHAT if template else PLAIN)
    assert caught.value.code == code
    assert isinstance(caught.value, InputError)
    assert caught.value.fields["file"] == f"{path}:4"


def test_a_bad_byte_right_after_a_line_break_is_on_the_next_line(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\n\xff")
    with pytest.raises(InputError) as caught:
        load(path, tokenizer)
    assert caught.value.fields["file"] == f"{path}:2"


def test_messages_need_a_template(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="GS-378"):
        load_rows(tmp_path, [{"messages": TURNS}], tokenizer, PLAIN)


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_a_bad_row_of_other_files_is_named(tmp_path: Path, tokenizer: Any, ending: str) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    path = write_as(tmp_path / f"rows.{ending}", rows)
    with pytest.raises(InputError, match="GS-378") as caught:
        load(path, tokenizer)
    assert caught.value.fields["file"] == f"{path}:row 2"


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_files_that_are_something_else_are_named(tmp_path: Path, tokenizer: Any, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(b"{[nonsense\x00\x01")
    with pytest.raises(InputError, match="GS-375") as caught:
        load(path, tokenizer)
    assert caught.value.fields["file"] == path


@pytest.mark.parametrize(
    ("text", "row", "fields"),
    [
        ("prompt,completion\nHello, world,answer\nBye, moon,answer\n", 1, 3),  # every row: no column is an index
        ("text\nHello\nBye, moon\n", 2, 2),
        ("prompt,completion\na,b,\n", 1, 3),
        ("\n  \nprompt,completion\na,b\n\n \nc\n", 2, 1),
    ],
)
def test_a_comma_without_quotes_moves_no_text(tmp_path: Path, tokenizer: Any, text: str, row: int, fields: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="GS-375") as caught:
        load(path, tokenizer)
    assert (caught.value.fields["file"], caught.value.fields["actual"]) == (f"{path}:row {row}", fields)


@pytest.mark.parametrize("text", ['prompt,completion\na,"b', "prompt,prompt,completion\na,b,c\n"])
def test_a_csv_that_is_none_is_named(tmp_path: Path, tokenizer: Any, text: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InputError, match="GS-375"):
        load(tmp_path / "rows.csv", tokenizer)


def test_text_in_a_csv_stays_as_it_is(tmp_path: Path) -> None:
    """Python's own csv module wrote it: quotes, commas, breaks of all kinds, numbers, and fields above its limit."""
    odd = ["1", "None", "NA", "", ' "a", b', "two\nlines", "two\r\nlines", "a\u2028b", "x" * 200_000, "2020-01-01"]
    path = tmp_path / "rows.CSV"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["prompt", "completion"], *([text, text[::-1]] for text in odd)])
    limit = csv.field_size_limit()
    assert [dict(row.values) for row in csv_rows(path)] == [{"prompt": text, "completion": text[::-1]} for text in odd]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("value", ["null", "3", '"abc"', "[1]", "[" * 100_000, '[{"text": "a"}', '{"a": 1\n"b": 2}'])
def test_json_that_is_no_list_of_objects_is_named(tmp_path: Path, tokenizer: Any, value: str) -> None:
    (tmp_path / "rows.json").write_text(value)
    with pytest.raises(InputError, match="GS-375"):
        load(tmp_path / "rows.json", tokenizer)


def test_json_is_a_list_or_a_line_for_each_row(tmp_path: Path) -> None:
    """Text that looks like a date stays text."""
    rows = [{"prompt": "When?", "completion": "2020-01-01 00:00:00"}, {"prompt": "And?", "completion": "2021-01-01"}]
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2), "\n".join(map(json.dumps, rows))):
        path.write_text(text)
        assert [row.values for row in json_rows(path)] == rows
    path.write_text(json.dumps(rows[0], indent=2))
    assert [row.values for row in json_rows(path)] == rows[:1]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_an_empty_file_is_named(tmp_path: Path, tokenizer: Any, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.touch()
    with pytest.raises(InputError, match="GS-372") as caught:
        load(path, tokenizer)
    assert str(caught.value.fields["file"]) == str(path)


def test_blank_lines_alone_are_no_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="GS-372"):
        load(tmp_path / "rows.jsonl", tokenizer)


def test_missing_and_unknown_files(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(MachineError, match="GS-522") as caught:
        load(tmp_path / "nowhere.jsonl", tokenizer)
    assert str(caught.value.fields["file"]) == str(tmp_path / "nowhere.jsonl")
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(InputError, match="GS-374"):
        load(tmp_path / "rows.xml", tokenizer)
    with pytest.raises(MachineError):
        load(tmp_path, tokenizer)


def read_dataset(source: str) -> list[Row]:
    """A folder stands for a repository of the hub: `datasets` takes both by the same call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _read_hub(source)[0]


def test_a_dataset_of_several_configurations(tmp_path: Path) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    names = ("main", "other")
    for name in names:
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": name, "completion": "b"}])
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names)
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    with pytest.raises(MachineError, match="GS-523") as caught:
        read_dataset(str(folder))
    assert "['main', 'other']" in str(caught.value.fields["actual"])
    assert [dict(row.values) for row in read_dataset(f"{folder}:other")] == [{"prompt": "other", "completion": "b"}]


def test_a_split_of_a_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(3)])

    def texts(source: str) -> list[str]:
        return [row.values["text"] for row in read_dataset(source)]

    assert texts(str(folder)) == texts(f"{folder}:") == texts(f"{folder}::train") == ["train 0", "train 1", "train 2"]
    assert texts(f"{folder}::test") == ["test 0", "test 1", "test 2"]
    assert texts(f"{folder}:default:test[:2]") == ["test 0", "test 1"]
    for source, known in ((f"{folder}::dev", "test"), (f"{folder}::test[", "test[")):
        with pytest.raises(MachineError, match="GS-523") as caught:
            read_dataset(source)
        assert known in str(caught.value.fields["actual"])


def test_a_dataset_with_a_script_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("raise SystemExit")
    with pytest.raises(MachineError, match="GS-523") as caught:
        read_dataset(str(tmp_path / "old"))
    assert "scripts are no longer supported" in str(caught.value.fields["actual"])


def test_long_rows_are_cut_or_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "short", "completion": "fine"},
        {"prompt": "short", "completion": "long " * 60},
        {"prompt": "long " * 60, "completion": "fine"},
    ]
    uncut = load_rows(tmp_path, rows, tokenizer, DataConfig(max_length=1000)).examples
    dataset = load_rows(tmp_path, rows, tokenizer, DataConfig(max_length=40))
    assert (dataset.rows, dataset.cut, dataset.left_out, len(dataset.examples)) == (3, 1, 1, 2)
    assert dataset.examples[0] == uncut[0]
    assert dataset.examples[1].input_ids == uncut[1].input_ids[:40]
    assert dataset.examples[1].labels == uncut[1].labels[:40]
    assert any(label != -100 for label in dataset.examples[1].labels)


def test_the_limit_is_exact(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "short", "completion": "fine"}]
    (full,) = load_rows(tmp_path, rows, tokenizer).examples
    length, prompt = len(full.input_ids), len(prompt_tokens(full))
    assert load_rows(tmp_path, rows, tokenizer, DataConfig(max_length=length)).cut == 0
    assert load_rows(tmp_path, rows, tokenizer, DataConfig(max_length=length - 1)).cut == 1
    assert load_rows(tmp_path, rows, tokenizer, DataConfig(max_length=prompt + 1)).cut == 1
    with pytest.raises(InputError, match="GS-373") as caught:
        load_rows(tmp_path, rows * 3, tokenizer, DataConfig(max_length=prompt))
    assert "3 rows" in caught.value.what


def test_collate_pads_on_the_right(tokenizer: Any) -> None:
    batch = collate([Example([5, 6, 7], [-100, 6, 7]), Example([8], [8])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["input_ids"].dtype == torch.int64


@settings(deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 16), batches=st.integers(1, 30), seed=st.integers(0, 5))
def test_schedule_covers_every_example_once_a_pass(count: int, size: int, batches: int, seed: int) -> None:
    plan = schedule(count, size, batches=batches, seed=seed)
    flat = [index for batch in plan for index in batch]
    assert len(plan) == batches
    assert all(len(batch) == min(size, count) for batch in plan)
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        assert max(Counter(part).values()) == 1
        assert len(part) < count or sorted(part) == list(range(count))
    assert schedule(count, size, batches=batches, seed=seed) == plan
    assert schedule(count, size, batches=batches + 7, seed=seed)[:batches] == plan


def test_schedule_shuffles_every_pass_anew_and_by_seed() -> None:
    first = schedule(50, 10, batches=10, seed=1)
    assert list(chain(*first[:5])) != list(chain(*first[5:]))
    assert first != schedule(50, 10, batches=10, seed=2)


@pytest.mark.parametrize(
    ("largest", "padding", "file"), [(9, 0, "rows.jsonl:3"), (8, 0, None), (8, 9, "rows.jsonl"), (9, 9, "rows.jsonl:3")]
)
def test_tokens_without_an_embedding_are_refused_by_their_line(largest: int, padding: int, file: str | None) -> None:
    examples = (Example([1, 2], [IGNORED, 2]), Example([1, largest], [3]))
    data = Dataset("rows.jsonl", examples, "", 3, 0, 1, ("rows.jsonl:1", "rows.jsonl:3"))
    if file is None:
        check_ids(data, 9, padding=padding)
        return
    with pytest.raises(InputError) as caught:
        check_ids(data, 9, padding=padding)
    assert (caught.value.code, caught.value.fields["file"], caught.value.fields["actual"]) == ("GS-392", file, 9)


def test_places_go_with_their_examples(tmp_path: Path, tokenizer: Any) -> None:
    """A row that is left out takes its place with it."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a " * 200, "completion": "b"}, {"text": "c"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert load_data(str(file), tokenizer, DataConfig(max_length=32)).places == (f"{file}:1", f"{file}:3")
