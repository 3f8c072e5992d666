"""Encoder-decoders from rows to the exported adapter, against transformers' own loss and PEFT's own loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import build_bart, build_t5, color_rows, write_jsonl
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, MBartConfig, MBartForConditionalGeneration

from gora_serve.adapter.factors import Adapter
from gora_serve.config import (
    DataConfig,
    ExportConfig,
    FitConfig,
    Form,
    InitConfig,
    ModelConfig,
    ProbeConfig,
    RankConfig,
    TrainConfig,
)
from gora_serve.errors import InputError
from gora_serve.gora.ranks import uniform_ranks
from gora_serve.integrity.bases import Base
from gora_serve.progress import silent
from gora_serve.training import inject
from gora_serve.training.data import Dataset, collate, load_data
from gora_serve.training.encode import Example
from gora_serve.training.export import export
from gora_serve.training.fit import FitResult, fit
from gora_serve.training.loss import input_tokens, loss_tokens, mean_loss
from gora_serve.training.models import load_model
from gora_serve.training.probe import probe
from gora_serve.training.session import open_session
from gora_serve.training.targets import find_targets, linear_modules

CONFIG = FitConfig(
    model=ModelConfig(dtype="float32"),
    data=DataConfig(max_length=48, batch_size=4),
    probe=ProbeConfig(steps=3, mode="exact"),
    ranks=RankConfig(rank=4),
    init=InitConfig(gamma="auto", search_batches=2),
    train=TrainConfig(steps=3, lr=1e-3),
)
BUILDS = [pytest.param(build_t5, id="t5"), pytest.param(build_bart, id="bart")]
ROWS = color_rows(60)


def load_rows(tmp_path: Path, rows: list[Any], tokenizer: Any, length: int = 48) -> Dataset:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return load_data(str(path), tokenizer, DataConfig(max_length=length), encoder_decoder=True)


def make_batch(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Three rows of different lengths, with the decoder's inputs as the model makes them."""
    words = [("red", "The apple is red."), ("What color is the river 3?", "no"), ("x", "The stone")]
    examples = [Example(tokenizer(one)["input_ids"], tokenizer(two)["input_ids"]) for one, two in words]
    batch = collate(examples, 0)
    return batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


def lora_model(build: Callable[[], Any]) -> Any:
    """All linear layers with LoRA of rank 2, B drawn at random."""
    model = build()
    shapes = {path: tuple(module.weight.shape) for path, module in linear_modules(model).items()}
    plan = uniform_ranks(shapes, RankConfig(rank=2))
    factors = inject.lora_factors(plan, alpha=8.0, generator=torch.Generator().manual_seed(1))
    wrapped = inject.attach(model, factors, task_type="SEQ_2_SEQ_LM", fan_in_fan_out=False)
    with torch.no_grad():
        for layer in inject.lora_layers(wrapped).values():
            layer.lora_B["default"].weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return wrapped


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", BUILDS)
def test_mean_loss_is_transformers_loss(build: Callable[[], Any], pair_tokenizer: Any) -> None:
    model = lora_model(build)
    batch = make_batch(model.get_base_model(), pair_tokenizer)
    theirs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    theirs.backward()
    expected = gradients(model)
    model.zero_grad()
    ours = mean_loss(model, batch)
    ours.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    found = gradients(model)
    assert set(found) == set(expected)
    assert len(found) == 2 * len(inject.lora_layers(model))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_tokens_are_counted_on_both_sides(pair_tokenizer: Any) -> None:
    batch = make_batch(build_t5(), pair_tokenizer)
    sides = [("red", "The apple is red."), ("What color is the river 3?", "no"), ("x", "The stone")]
    lengths = [[len(pair_tokenizer(text)["input_ids"]) for text in pair] for pair in sides]
    assert loss_tokens(batch) == sum(length[1] for length in lengths)
    assert int(input_tokens(batch)) == sum(sum(length) for length in lengths)


def test_a_row_is_two_texts_as_the_tokenizer_encodes_them(tmp_path: Path, pair_tokenizer: Any) -> None:
    (example,) = load_rows(tmp_path, [ROWS[1]], pair_tokenizer).examples
    assert example.input_ids == pair_tokenizer(ROWS[1]["prompt"])["input_ids"]
    assert example.labels == pair_tokenizer(ROWS[1]["completion"])["input_ids"]
    assert example.input_ids[-1] == example.labels[-1] == pair_tokenizer.eos_token_id


def test_labels_end_in_eos_where_the_tokenizer_adds_none(tmp_path: Path, tokenizer: Any) -> None:
    """And a tokenizer with a chat template renders the prompt with it."""
    example, turns = load_rows(
        tmp_path,
        [{"prompt": "Hi", "completion": "Red."}, {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Red."}],
        tokenizer,
    ).examples
    assert tokenizer.decode(example.labels) == "Red.<|im_end|>"
    served = [{"role": "user", "content": "Hi"}]
    expected = tokenizer.apply_chat_template(served, add_generation_prompt=True, return_dict=False)
    assert example.input_ids == expected
    assert turns == example


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "a"},
        {"prompt": "a"},
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": 5},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": "\ud800", "completion": "b"},
    ],
)
def test_other_rows_are_refused_by_their_line(tmp_path: Path, pair_tokenizer: Any, row: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        load_rows(tmp_path, [ROWS[0], row], pair_tokenizer)
    assert caught.value.code == "GS-378"
    assert caught.value.fields["file"] == f"{tmp_path / 'rows.jsonl'}:2"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"prompt": "a"}, "completion is missing"),
        ({"prompt": None, "text": "a"}, "prompt is null and completion is missing"),
    ],
)
def test_the_field_that_is_not_there_is_named(
    tmp_path: Path, pair_tokenizer: Any, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_rows(tmp_path, [row], pair_tokenizer)
    assert caught.value.what.endswith(f": {said}")


def test_the_limit_holds_for_each_side(tmp_path: Path, pair_tokenizer: Any) -> None:
    rows = [
        {"prompt": "apple", "completion": "red"},
        {"prompt": "apple", "completion": "red " * 30},
        {"prompt": "apple " * 30, "completion": "red"},
    ]
    whole = load_rows(tmp_path, rows, pair_tokenizer, 1000).examples
    longest = len(whole[0].input_ids)
    dataset = load_rows(tmp_path, rows, pair_tokenizer, max(longest, len(whole[0].labels)))
    assert (dataset.rows, dataset.cut, dataset.left_out) == (3, 1, 1)
    assert dataset.examples[0] == whole[0]
    assert dataset.examples[1].labels == whole[1].labels[: max(longest, len(whole[0].labels))]
    with pytest.raises(InputError, match="GS-373"):
        load_rows(tmp_path, rows, pair_tokenizer, longest - 1)


def test_collate_pads_each_side_by_itself() -> None:
    batch = collate([Example([5, 6, 1], [7, 1]), Example([1], [8, 9, 9, 1])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100, -100], [8, 9, 9, 1]]


@pytest.fixture(scope="module", params=["tiny_t5", "tiny_bart"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    """A run with γ searched and evaluated, of each kind of base."""
    base: Path = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("pairs")
    data = write_jsonl(folder / "data.jsonl", ROWS[:40])
    held_out = write_jsonl(folder / "eval.jsonl", ROWS[40:])
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()}
    result = fit(str(base), str(data), folder / "run", CONFIG, eval_data=str(held_out))
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()} == before
    return base, result


def load_base(base: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32).eval()


def plain_loss(model: Any, tokenizer: Any) -> float:
    """Loss per label token on the held-out rows, one by one, by transformers alone."""
    total = count = 0.0
    for row in ROWS[40:]:
        source = tokenizer(row["prompt"], return_tensors="pt")
        labels = tokenizer(text_target=row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(input_ids=source["input_ids"], attention_mask=source["attention_mask"], labels=labels).loss
        total += float(loss) * labels.numel()
        count += labels.numel()
    return total / count


def test_fit_learns_and_peft_gets_its_losses(finished: tuple[Path, FitResult], pair_tokenizer: Any) -> None:
    base, result = finished
    losses = result.losses
    assert losses["end"] < losses["start"] < losses["base"]
    assert plain_loss(load_base(base), pair_tokenizer) == pytest.approx(losses["base"], rel=1e-5)
    model = PeftModel.from_pretrained(load_base(base), result.folder / "adapter").eval()
    assert plain_loss(model, pair_tokenizer) == pytest.approx(losses["end"], rel=1e-5)


def test_the_files_say_what_kind_of_model_it_is_and_count_both_sides(
    finished: tuple[Path, FitResult], pair_tokenizer: Any
) -> None:
    base, result = finished
    config = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == result.adapter.task_type == "SEQ_2_SEQ_LM"
    assert set(result.adapter.modules) == set(linear_modules(load_base(base)))
    assert not any("lm_head" in path or "shared" in path for path in result.adapter.modules)
    lengths = {len(pair_tokenizer(row["prompt"])["input_ids"]) + len(pair_tokenizer(row["completion"])["input_ids"])
               for row in ROWS[:40]}  # fmt: skip
    probe_json = json.loads((result.folder / "probe" / "probe.json").read_text())
    assert probe_json["samples"] == 12
    assert 12 * min(lengths) <= probe_json["tokens"] <= 12 * max(lengths)
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    (last,) = (entry["tokens"] for entry in metrics if entry["step"] == 3 and "tokens" in entry)
    assert 12 * min(lengths) <= last <= 12 * max(lengths)


def edited(base: Path, adapter: Adapter) -> Any:
    """The base in float64 with every update added to its weight."""
    model = load_base(base).double()
    with torch.no_grad():
        for path, factors in adapter.modules.items():
            model.get_submodule(path).weight.add_(factors.scale * factors.B.double() @ factors.A.double())
    return model


@pytest.mark.parametrize("form", ["unit", "padded", "native"])
def test_every_form_of_the_export_gives_the_logits_of_the_edited_base(
    finished: tuple[Path, FitResult], form: Form, tmp_path: Path, pair_tokenizer: Any
) -> None:
    base, result = finished
    folder = export(result.folder, tmp_path / "adapter", ExportConfig(form=form)).folder
    batch = make_batch(load_base(base), pair_tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    with torch.no_grad():
        expected = edited(base, result.adapter)(**inputs).logits
        served = PeftModel.from_pretrained(load_base(base), folder).double().eval()
        assert type(served).__name__ == "PeftModelForSeq2SeqLM"
        logits = served(**inputs).logits
        plain = load_base(base).double()(**inputs).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    assert float((expected - plain).norm() / plain.norm()) > 1e-2


@pytest.mark.parametrize("name", ["tiny_t5", "tiny_bart"])
def test_gradient_checkpointing_gives_the_same_adapter(
    request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(name)
    data = write_jsonl(tmp_path / "data.jsonl", ROWS[:40])
    config = replace(CONFIG, init=InitConfig(gamma=0.1))
    saving = replace(config, train=replace(CONFIG.train, gradient_checkpointing=True))
    plain = fit(str(base), str(data), tmp_path / "plain", config).adapter
    saved = fit(str(base), str(data), tmp_path / "saved", saving).adapter
    assert saved.ranks == plain.ranks
    for path, factors in plain.modules.items():
        expected = factors.delta()
        assert float((saved.modules[path].delta() - expected).norm() / expected.norm()) < 1e-4


def test_a_row_that_fills_up_goes_through_mbart(tmp_path: Path, pair_tokenizer: Any) -> None:
    """mBART looks for the last label that is one: there is none in a row without loss. 3 batches, 2 processes."""
    torch.manual_seed(0)
    config = MBartConfig(
        vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    MBartForConditionalGeneration(config).save_pretrained(tmp_path / "mbart")
    pair_tokenizer.save_pretrained(tmp_path / "mbart")
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[:9])
    session = open_session(
        str(tmp_path / "mbart"), str(data), model=CONFIG.model, rows=CONFIG.data, train=CONFIG.train, listen=silent
    )
    first, second = (
        replace(session, accelerator=SimpleNamespace(process_index=index, num_processes=2, device=torch.device("cpu")))
        for index in (0, 1)
    )
    shares = [[make() for make in one.in_order(session.data.examples)] for one in (first, second)]
    assert [[len(batch["labels"]) for batch in share] for share in shares] == [[4, 1], [4, 1]]
    assert [[loss_tokens(batch) > 0 for batch in share] for share in shares] == [[True, True], [True, False]]
    filler = shares[1][1]
    with torch.no_grad():
        logits = session.model(**{name: filler[name] for name in filler if name != "labels"}).logits
    assert logits.isfinite().all()


def test_wo_in_float32_within_bfloat16(pair_tokenizer: Any) -> None:
    """T5 keeps the feed-forward's last layer in float32 where the rest is in half precision."""
    model = build_t5().bfloat16()
    for path, module in linear_modules(model).items():
        if path.endswith(".wo"):
            module.float()
    batch = make_batch(model, pair_tokenizer)
    exact = build_t5()
    statistics, expected = (
        probe(which, [batch], mean_loss, rank_max=4, config=ProbeConfig(steps=1, mode="exact"))
        for which in (model, exact)
    )
    for path, module in statistics.modules.items():
        wanted = expected.modules[path].compressed
        assert float((module.compressed - wanted).norm() / wanted.norm()) < 0.1, path
    plan = uniform_ranks({path: m.shape for path, m in statistics.modules.items()}, RankConfig(rank=4))
    factors = inject.gora_factors(statistics, plan, gamma=0.1, alpha=16.0)
    wrapped = inject.attach(model, factors, task_type="SEQ_2_SEQ_LM", fan_in_fan_out=False)
    mean_loss(wrapped, batch).backward()  # type: ignore[no-untyped-call]
    assert len(gradients(wrapped)) == 2 * len(factors)
    assert mean_loss(wrapped, batch) < mean_loss(inject.detach(wrapped), batch)


@pytest.mark.parametrize(
    ("targets", "count"), [("attention", 24), ("wi_0,wi_1", 8), (r"decoder\..*EncDecAttention\.[qv]", 4)]
)
def test_targets_by_t5s_names(targets: str, count: int) -> None:
    assert len(find_targets(build_t5(), targets)) == count


def test_a_base_is_loaded_as_its_configuration_says(tiny_t5: Path, tiny_base: Path) -> None:
    assert type(load_model(Base("t5", tiny_t5), ModelConfig())).__name__ == "T5ForConditionalGeneration"
    assert type(load_model(Base("llama", tiny_base), ModelConfig())).__name__ == "LlamaForCausalLM"
