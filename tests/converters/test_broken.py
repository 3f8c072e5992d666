"""A corpus of broken inputs: each is refused by its own code, with a next step, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from inits import LINEAR, Run, edit_config, make_run
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build_llama
from torch import Tensor

from converters.convert import convert
from converters.reading import Inputs
from gora_serve.config import ConvertConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.bases import Base

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@dataclass
class Bench:
    """Where a case is built: copies of sound runs of plain LoRA and of PiSSA (randomized), and an untouched base."""

    folder: Path
    base: Path
    plain: Run
    pissa: Run
    exact: Run

    def adapter(self, run: Run | None = None) -> Path:
        """A copy to break."""
        return Path(shutil.copytree((run or self.plain).adapter, self.folder / "adapter"))

    def change(self, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]], run: Run | None = None) -> Path:
        """A copy whose tensors are changed."""
        adapter = self.adapter(run)
        save_file(changed(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")
        return adapter

    def configure(self, run: Run | None = None, **changes: Any) -> Path:
        adapter = self.adapter(run)
        edit_config(adapter, **changes)
        return adapter

    def write(self, file: str, content: bytes) -> Path:
        """A copy with one file replaced."""
        adapter = self.adapter()
        (adapter / file).write_bytes(content)
        return adapter

    def saved(self, config: Any) -> Path:
        """A fresh adapter of this configuration, not trained."""
        get_peft_model(build_llama(), config).save_pretrained(self.folder / "adapter")
        return self.folder / "adapter"

    def other_base(self) -> Path:
        """Another model of the same shapes."""
        build_llama(1).save_pretrained(self.folder / "other")
        return self.folder / "other"


@dataclass
class Given:
    """What `convert` is called with. base: of the bench, if none is given."""

    adapter: Path
    base: Path | None = None
    inputs: Inputs = field(default_factory=Inputs)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """name: for people. code: its own. says: what the message names. build: makes it."""

    name: str
    code: str
    says: str
    build: Callable[[Bench], Given | Path]


def first_half(bench: Bench) -> Path:
    data = (bench.plain.adapter / "adapter_model.safetensors").read_bytes()
    return bench.write("adapter_model.safetensors", data[: len(data) // 2])


def a_pickle(bench: Bench) -> Path:
    adapter = bench.adapter()
    torch.save({A: torch.zeros(4, 32)}, adapter / "adapter_model.safetensors")
    return adapter


def bound_to_another(bench: Bench) -> Path:
    """Our own export, made on another base."""
    convert(bench.plain.adapter, Base("other", bench.other_base()), bench.folder / "ours")
    return bench.folder / "ours"


def subtracted(tensors: dict[str, Tensor], initial: Path) -> dict[str, Tensor]:
    """[A; A0] and [B, -B0], as PEFT converts."""
    start = load_file(initial / "adapter_model.safetensors")
    return {
        name: torch.cat([tensor, start[name]]) if "lora_A" in name else torch.cat([tensor, -start[name]], 1)
        for name, tensor in tensors.items()
    }


def converted_twice(bench: Bench) -> Given:
    adapter = bench.change(lambda tensors: subtracted(tensors, bench.pissa.initial), bench.pissa)
    edit_config(adapter, r=8, lora_alpha=16)
    return Given(adapter, inputs=Inputs(init_adapter=bench.pissa.initial))


def another_runs_start(bench: Bench) -> Given:
    """Of the same shapes, but not where this run began: PiSSA's of another base."""
    other = make_run(bench.folder / "run", "pissa", build=lambda: build_llama(3))
    return Given(bench.adapter(bench.pissa), inputs=Inputs(init_adapter=other.initial))


def not_where_it_began(bench: Bench) -> Given:
    """The trained adapter itself in the place of the initial one."""
    return Given(bench.adapter(bench.pissa), inputs=Inputs(init_adapter=bench.pissa.adapter))


def start_of_another_rank(bench: Bench) -> Given:
    other = make_run(bench.folder / "run", "pissa", r=2)
    return Given(bench.adapter(bench.pissa), inputs=Inputs(init_adapter=other.initial))


def start_that_adds_nothing(bench: Bench) -> Given:
    return Given(bench.adapter(bench.pissa), inputs=Inputs(init_adapter=bench.plain.initial))


def start_of_another_svd(bench: Bench) -> Given:
    """The exact SVD's start with the randomized one's edited base."""
    inputs = Inputs(init_adapter=bench.exact.initial, mutated_base=bench.pissa.mutated)
    return Given(bench.adapter(bench.exact), inputs=inputs)


def another_model_as_mutated(bench: Bench) -> Given:
    return Given(bench.adapter(bench.pissa), inputs=Inputs(mutated_base=bench.other_base()))


def merged_as_mutated(bench: Bench) -> Given:
    """A model that was trained further, in the adapter's modules alone."""
    model = build_llama()
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in LINEAR:
            parameter.data += 0.01 * torch.randn(parameter.shape)
    model.save_pretrained(bench.folder / "trained")
    return Given(bench.adapter(bench.pissa), inputs=Inputs(mutated_base=bench.folder / "trained"))


def smaller_base(bench: Bench) -> Given:
    build_llama(intermediate_size=48).save_pretrained(bench.folder / "small")
    return Given(bench.adapter(), base=bench.folder / "small")


def without_its_peft_type(bench: Bench) -> Path:
    return bench.change(lambda tensors: {name.replace("lora_", "atom_"): one for name, one in tensors.items()})


def half_a_record(bench: Bench) -> Path:
    """Our own export, whose header does not say which base it belongs to."""
    convert(bench.plain.adapter, Base("base", bench.base), bench.folder / "ours")
    file = bench.folder / "ours" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"gora_serve": json.dumps({"schema": "gora-serve/adapter/1"})})
    return bench.folder / "ours"


CASES = [
    # The files
    Case("nothing at the path", "GS-540", "nowhere", lambda bench: bench.folder / "nowhere"),
    Case("an empty folder", "GS-3101", "an empty folder", lambda bench: bench.folder / "empty"),
    Case("a Git LFS pointer", "GS-303", "git lfs pull", lambda bench: bench.write(
        "adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345678\n")),
    Case("a truncated file", "GS-306", "adapter_model.safetensors", first_half),
    Case("an empty file", "GS-301", "adapter_model.safetensors", lambda bench: bench.write(
        "adapter_model.safetensors", b"")),
    Case("a pickle under another name", "GS-302", "adapter_model.safetensors", a_pickle),
    Case("a configuration that is no JSON", "GS-319", "adapter_config.json", lambda bench: bench.write(
        "adapter_config.json", b'{"r": 4,')),
    Case("a configuration that is no object", "GS-3107", "adapter_config.json", lambda bench: bench.write(
        "adapter_config.json", b"[4]")),
    Case("a key of the configuration twice", "GS-309", "adapter_config.json", lambda bench: bench.write(
        "adapter_config.json", b'{"r": 4, "r": 8}')),
    Case("our own header, malformed", "GS-363", "adapter_model.safetensors", half_a_record),
    # The tensors
    Case("half of a pair is missing", "GS-3108", "q_proj", lambda bench: bench.change(
        lambda tensors: {name: one for name, one in tensors.items() if name != B})),
    Case("a tensor that LoRA does not have", "GS-3104", "q_proj.lora_C", lambda bench: bench.change(
        lambda tensors: tensors | {A.replace("lora_A", "lora_C"): torch.zeros(2)})),
    Case("tensors of no family", "GS-3200", "atom_", without_its_peft_type),
    Case("A and B that do not fit", "GS-3207", "A (4, 32), B (32, 3)", lambda bench: bench.change(
        lambda tensors: tensors | {B: tensors[B][:, :3].contiguous()})),
    Case("NaN", "GS-3105", "q_proj", lambda bench: bench.change(
        lambda tensors: tensors | {A: tensors[A] * float("nan")})),
    Case("an adapter before training", "GS-3106", "adapter_model.safetensors", lambda bench: bench.saved(
        LoraConfig(target_modules=LINEAR))),
    # The configuration
    Case("rank against the configuration", "GS-3103", "r 8", lambda bench: bench.configure(r=8)),
    Case("a hostile rank_pattern", "GS-3102", "(a+)+", lambda bench: bench.configure(rank_pattern={"(a+)+$": 4})),
    Case("alpha that is no number", "GS-355", "many", lambda bench: bench.configure(lora_alpha="many")),
    Case("tensors and peft_type of two families", "GS-3203", "peft_type LOHA", lambda bench: bench.configure(
        peft_type="LOHA")),
    Case("an initialisation that is not known", "GS-3204", "newest", lambda bench: bench.configure(
        init_lora_weights="newest")),
    Case("a variant of LoRA that is no LoRA", "GS-3205", "use_qalora", lambda bench: bench.configure(use_qalora=True)),
    Case("DoRA on PiSSA", "GS-3206", "pissa", lambda bench: bench.saved(
        LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights="pissa"))),
    Case("a family that is never LoRA", "GS-3156", "OFT", lambda bench: bench.saved(
        OFTConfig(target_modules=["q_proj"], oft_block_size=4))),
    # The base
    Case("a module that the base does not have", "GS-404", "layers.0.self_attn.r_proj", lambda bench: bench.change(
        lambda tensors: {name.replace("0.self_attn.q_proj", "0.self_attn.r_proj"): tensors[name] for name in tensors})),
    Case("a base of other shapes", "GS-405", "mlp", smaller_base),
    Case("an adapter that is bound to another base", "GS-401", "other weights", bound_to_another),
    Case("another base of the same shapes, of PiSSA", "GS-440", "none of this base's", lambda bench: Given(
        bench.adapter(bench.exact), base=bench.other_base())),
    # The initial update
    Case("PiSSA by a random SVD, alone", "GS-232", "--mutated-base", lambda bench: bench.adapter(bench.pissa)),
    Case("PiSSA that says true", "GS-3202", "cosine", lambda bench: bench.configure(
        bench.pissa, init_lora_weights=True, base_model_name_or_path="gone")),
    Case("converted a second time", "GS-3201", "converted already", converted_twice),
    Case("an initial adapter of another run", "GS-431", "did not grow out of", another_runs_start),
    Case("an initial adapter after training", "GS-433", "no part of this base", not_where_it_began),
    Case("an initial adapter of another rank", "GS-430", "rank 2", start_of_another_rank),
    Case("an initial adapter that adds nothing", "GS-438", "adds nothing", start_that_adds_nothing),
    Case("initial adapter and edited base of two runs", "GS-432", "W0 - W_res", start_of_another_svd),
    Case("a mutated base that is the base", "GS-434", "nothing was taken out", lambda bench: Given(
        bench.adapter(bench.pissa), inputs=Inputs(mutated_base=bench.base))),
    Case("another model as mutated base", "GS-435", "other", another_model_as_mutated),
    Case("a trained model as mutated base", "GS-436", "trained", merged_as_mutated),
    # The call
    Case("full rank without a rank", "GS-231", "--tolerance", lambda bench: bench.saved(
        LoraConfig(target_modules=["q_proj"], use_dora=True))),
    Case("a family that does not exist", "GS-234", "lorra", lambda bench: Given(
        bench.adapter(), settings={"family": "lorra"})),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return (
        make_run(folder / "plain", True),
        make_run(folder / "random", "pissa_niter_1"),
        make_run(folder / "exact", "pissa"),
    )


@pytest.fixture
def bench(tmp_path: Path, tiny_base: Path, runs: tuple[Run, Run, Run]) -> Bench:
    (tmp_path / "bench" / "empty").mkdir(parents=True)
    return Bench(tmp_path / "bench", tiny_base, *runs)


def test_the_bench_is_sound(tmp_path: Path, bench: Bench) -> None:
    """Unbroken, its adapters convert: what is refused below is refused for what was broken."""
    convert(bench.adapter(), Base("base", bench.base), tmp_path / "plain")
    convert(bench.exact.adapter, Base("base", bench.base), tmp_path / "exact")
    inputs = Inputs(init_adapter=bench.pissa.initial, mutated_base=bench.pissa.mutated)
    convert(bench.pissa.adapter, Base("base", bench.base), tmp_path / "pissa", inputs=inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_broken_inputs_are_refused_whole(tmp_path: Path, bench: Bench, case: Case) -> None:
    built = case.build(bench)
    given = built if isinstance(built, Given) else Given(built)
    (tmp_path / "place").mkdir()
    base = given.base or bench.base
    before = set(bench.folder.rglob("*"))
    with pytest.raises(GoraError) as refused:
        convert(
            given.adapter, Base("base", base), tmp_path / "place" / "out", ConvertConfig(**given.settings), given.inputs
        )
    error, text = refused.value, str(refused.value)
    assert error.code == case.code, text
    assert case.says in text
    assert {"file", "tensor", "expected"} & error.fields.keys()
    assert "try" in error.fields, text
    assert list((tmp_path / "place").iterdir()) == []
    assert set(bench.folder.rglob("*")) == before


def test_no_two_cases_share_a_code() -> None:
    codes = [case.code for case in CASES]
    assert sorted(set(codes)) == sorted(codes)
    assert len({case.name for case in CASES}) == len(CASES)
