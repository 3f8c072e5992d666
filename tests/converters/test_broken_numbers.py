"""Numbers and shapes that cannot be, in every family, and settings that are no numbers: refused before any is computed.

Through the command line, so that the exit status is seen too: a bug of ours would be 70.
"""

from __future__ import annotations

import io
import json
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_llama
from torch import Tensor

from gora_serve.cli.main import main

Q = "model.layers.0.self_attn.q_proj"  # (32, 32) in the tiny base
KEY = f"base_model.model.{Q}"
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]
MEMORY = 8 * 2**30  # of this process: a bomb is an error, not a dead machine


def rows(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def peft(kind: str, **config: Any) -> dict[str, Any]:
    return {"peft_type": kind, "r": 4, "target_modules": ["q_proj"], **config}


@dataclass(frozen=True)
class Form:
    """A sound adapter of one module. others: more files, as JSON. extra: what `convert` is told."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    file: str = "adapter_model.safetensors"
    others: Mapping[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


def lora(**config: Any) -> Form:
    tensors = {f"{KEY}.lora_A.weight": rows(4, 32), f"{KEY}.lora_B.weight": rows(32, 4)}
    return Form(tensors, peft("LORA", lora_alpha=8, init_lora_weights=True, **config))


def lokr(w1: Tensor, w2: Tensor) -> Form:
    return Form({f"{KEY}.lokr_w1": w1, f"{KEY}.lokr_w2": w2}, peft("LOKR", alpha=8))


GORA = {"use_gora": True, "lora_scaler": 8, "lora_rank": 4, "gora_init_method": "compress"}
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
KOHYA = "lora_te_model_layers_0_self_attn_q_proj"
FORMS: dict[str, Form] = {
    "lora": lora(),
    "adalora": Form(
        {f"{KEY}.lora_A": rows(4, 32), f"{KEY}.lora_B": rows(32, 4), f"{KEY}.lora_E": rows(4, 1)},
        peft("ADALORA", init_r=4, lora_alpha=8),
    ),
    "dora": Form(
        {**lora().tensors, f"{KEY}.lora_magnitude_vector": rows(32).abs() + 1},
        {**peft("LORA", lora_alpha=8, use_dora=True)}, extra=("--rank", "4"),
    ),
    "loha": Form(
        {f"{KEY}.hada_w{i}_{part}": rows(*shape) for i in (1, 2) for part, shape in (("a", (32, 2)), ("b", (2, 32)))},
        peft("LOHA", r=2, alpha=4),
    ),
    "lokr": lokr(rows(4, 4), rows(8, 8)),
    "vera": Form(
        {
            f"{KEY}.vera_lambda_b": rows(32), f"{KEY}.vera_lambda_d": rows(4),
            "base_model.vera_A": rows(4, 32), "base_model.vera_B": rows(32, 4),
        },
        peft("VERA", projection_prng_key=0),
    ),
    "miss": Form({f"{KEY}.miss_block": rows(4, 32)}, peft("MISS")),
    "hra": Form({f"{KEY}.hra_u": rows(32, 4)}, peft("HRA")),
    "gora": Form(
        {f"{Q}.weight_a": rows(4, 32), f"{Q}.weight_b": rows(32, 4)}, None, others={"config.json": GORA}
    ),
    "mlx": Form({f"{Q}.lora_a": rows(32, 4), f"{Q}.lora_b": rows(4, 32)}, MLX, "adapters.safetensors"),
    "torchtune": Form(
        {"layers.0.attn.q_proj.lora_a.weight": rows(4, 32), "layers.0.attn.q_proj.lora_b.weight": rows(32, 4)},
        {"r": 4, "lora_alpha": 8},
    ),
    "kohya": Form(
        {
            f"{KOHYA}.lora_down.weight": rows(4, 32), f"{KOHYA}.lora_up.weight": rows(32, 4),
            f"{KOHYA}.alpha": torch.tensor(4.0),
        },
        None,
    ),
    "tokens": Form(
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows(2, 32)},
        peft("TRAINABLE_TOKENS", token_indices=[1, 2]),
    ),
    "saved": Form(
        {**lora().tensors, "base_model.model.lm_head.weight": rows(384, 32)},
        lora(modules_to_save=["lm_head"]).config,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """name: of the form, and what is broken. exit: its status. says: what the message names beside file or tensor."""

    name: str
    code: str
    says: str = ""
    change: Change = dict
    config: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        return FORMS[self.name.partition(":")[0]]

    @property
    def exit(self) -> int:
        return int(self.code[3])


def every(change: Callable[[Tensor], Tensor], part: str = "") -> Change:
    """Change each tensor whose name has this part."""
    return lambda tensors: {name: change(one) if part in name else one for name, one in tensors.items()}


def cases_of_types() -> Iterator[Case]:
    types = {"complex": torch.complex64, "bool": torch.bool, "int8": torch.int8, "f8": torch.float8_e4m3fn}
    for name in [name for name in FORMS if name != "saved"]:
        for word, dtype in types.items() if name in ("lora", "adalora") else [("int8", torch.int8)]:
            part = "magnitude" if name == "dora" else ""
            yield Case(f"{name}: {word}", "GS-3140", "F16, BF16, F32, F64", every(lambda one, d=dtype: one.to(d), part))
    for word in ("f8", "complex"):
        yield Case(f"saved: {word}", "GS-3119", "lm_head", every(lambda one, d=types[word]: one.to(d), "lm_head"))


def cases_of_shapes() -> Iterator[Case]:
    pairs = {
        "lora": ("lora_A", "lora_B"), "gora": ("weight_a", "weight_b"), "mlx": ("lora_b", "lora_a"),
        "torchtune": ("lora_a", "lora_b"), "kohya": ("lora_down", "lora_up"),
    }  # fmt: skip
    for name, (A, B) in pairs.items():
        yield Case(f"{name}: misfit", "GS-3207", B if name != "mlx" else A, every(lambda one: one[:, :3], B))
        yield Case(f"{name}: a number", "GS-3207" if name != "kohya" else "GS-3183", "()", every(torch.sum, A))
        yield Case(
            f"{name}: rank 0", "GS-3207", "r of at least 1",
            lambda tensors, A=A, B=B: {
                key: one[:0] if A in key else one[:, :0] if B in key else one for key, one in tensors.items()
            },
            config={"r": 0} if name in ("lora", "torchtune") else {},
        )  # fmt: skip
    yield Case("adalora: E of one", "GS-3141", "lora_E", every(lambda one: one[:1], "lora_E"))
    yield Case("adalora: E of three", "GS-3141", "(4, 1)", every(lambda one: one[:3], "lora_E"))
    yield Case("adalora: B misfits", "GS-3207", "lora_B", every(lambda one: one[:, :1], "lora_B"))
    yield Case("loha: w2_a misfits", "GS-3141", "hada_w2_a", every(lambda one: one[:5], "w2_a"))
    yield Case(
        "loha: a bomb",
        "GS-405",
        "(24000, 24000)",
        every(lambda one: torch.ones(24_000, 160) if one.shape[0] == 32 else torch.ones(160, 24_000)),
        {"r": 160},
    )
    yield Case("lokr: one dimension", "GS-3141", "lokr_w1", every(torch.flatten, "w1"))
    yield Case("lokr: a bomb", "GS-405", "(1000000, 1000000)", every(lambda one: torch.ones(1000, 1000)))
    yield Case(
        "vera: a bomb",
        "GS-3153",
        "1000000000",
        lambda tensors: {name: one for name, one in tensors.items() if "lambda" in name},
        {"r": 10**9},
    )
    yield Case(
        "vera: a key beyond 64 bits",
        "GS-3153",
        "10000000",
        lambda tensors: {name: one for name, one in tensors.items() if "lambda" in name},
        {"projection_prng_key": 10**30},
    )
    yield Case(
        "vera: one projection",
        "GS-3150",
        "vera_B",
        lambda tensors: {name: one for name, one in tensors.items() if "vera_B" not in name},
    )
    yield Case("vera: a number for d", "GS-3152", "vera_lambda_d", every(torch.sum, "lambda_d"))
    yield Case("miss: no columns", "GS-452", "(4, 0)", every(lambda one: one[:, :0]))
    yield Case("miss: no rows", "GS-452", "(0, 32)", lambda tensors: {name: torch.ones(0, 32) for name in tensors})
    yield Case("hra: of another width", "GS-405", "(32, 31)", every(lambda one: one[:31]))
    yield Case("hra: more reflections than inputs", "GS-3141", "hra_u", every(lambda one: rows(32, 99)))
    yield Case(
        "dora: of another base", "GS-405", "(32, 48)", lambda tensors: tensors | {f"{KEY}.lora_A.weight": rows(4, 48)}
    )
    yield Case("tokens: a number", "GS-3116", "rows ()", every(torch.sum))


def cases_of_numbers() -> Iterator[Case]:
    for name in [name for name in FORMS if name not in ("saved", "kohya")]:
        extra = ("--rank", "4") if name == "dora" else ()
        yield Case(
            f"{name}: NaN",
            "GS-3105",
            "q_proj" if name != "tokens" else "embed_tokens",
            every(lambda one: one * float("nan")),
            extra=extra,
        )
    yield Case("lora: beyond squares", "GS-3105", "too large", every(lambda one: one.double() * 1e150))
    yield Case(
        "lora: below float16", "GS-3144", "float16", every(lambda one: one * 1e-12), extra=("--dtype", "float16")
    )
    yield Case("lora: beyond float16", "GS-358", "q_proj", every(lambda one: one * 1e6), extra=("--dtype", "float16"))
    yield Case("lora: a switch in words", "GS-356", "use_rslora", config={"use_rslora": "false"})
    yield Case("hra: a switch in words", "GS-356", "apply_GS", config={"apply_GS": "false"})
    yield Case(
        "gora: a switch in words",
        "GS-356",
        "gora_dynamic",
        others={"config.json": {**GORA, "gora_dynamic_scaling": "no"}},
    )
    yield Case("gora: a rank below any", "GS-3174", "lora_rank", others={"config.json": {**GORA, "lora_rank": 1e-320}})
    for word, value in {"1e308": 1e308, "of 400 digits": 10**400}.items():
        yield Case(f"mlx: scale {word}", "GS-3180", "scale", config={"lora_parameters": {"rank": 4, "scale": value}})
    yield Case(
        "kohya: alpha beyond float32",
        "GS-3184",
        "alpha",
        every(lambda one: torch.tensor(1e300, dtype=torch.float64), "alpha"),
    )
    yield Case("adalora: alpha of 400 digits", "GS-3113", "1000", config={"lora_alpha": 10**400})
    yield Case(
        "lora: LORAGA, alpha of 400 digits",
        "GS-355",
        "1000",
        config={"peft_type": "LORAGA", "lora_alpha": 10**400},
    )
    yield Case("lokr: r that is none", "GS-3143", "many", config={"r": "many"})
    for key in (".?" * 40 + "!", "(a|.)?" * 20):
        yield Case(f"lora: a pattern for ever {key[:6]}", "GS-3102", key[:20], config={"rank_pattern": {key: 4}})
    yield Case("loha: read as KaSA", "GS-3151", "hada_w1", extra=("--from", "kasa"))


CASES = [*cases_of_types(), *cases_of_shapes(), *cases_of_numbers()]


def write(folder: Path, case: Case) -> Path:
    form = case.form
    folder.mkdir()
    tensors = {name: one.contiguous().clone() for name, one in case.change(dict(form.tensors)).items()}
    save_file(tensors, folder / form.file, {"format": "pt"})
    if form.config is not None or case.config:
        (folder / "adapter_config.json").write_text(json.dumps({**(form.config or {}), **case.config}))
    for name, value in {**form.others, **case.others}.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def gora(*words: object) -> Answer:
    """Run a command in this process, through the entry point that turns errors into exit codes."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Answer(code, out.getvalue(), err.getvalue())


@contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def no_json(word: str) -> float:
    raise AssertionError(f"{word} is no JSON")


def refused(answer: Answer, case: Case) -> None:
    assert answer.code == case.exit, answer.err
    assert f"error[{case.code}]" in answer.err, answer.err
    assert case.says in answer.err
    assert "  file: " in answer.err, answer.err
    assert "  try: " in answer.err, answer.err


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_are_sound(tmp_path: Path, tiny_base: Path, name: str) -> None:
    """Unbroken, they convert: what is refused below is refused for what was broken."""
    case = Case(name, "GS-000")
    adapter = write(tmp_path / "adapter", case)
    answer = gora("convert", adapter, "--base", tiny_base, "--output", tmp_path / "out", *case.form.extra)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_they_are_refused_whole(tmp_path: Path, tiny_base: Path, case: Case) -> None:
    adapter = write(tmp_path / "adapter", case)
    (tmp_path / "place").mkdir()
    words = ("--base", tiny_base, *(case.extra or case.form.extra))
    with little_memory():
        answer = gora("convert", adapter, "--output", tmp_path / "place" / "out", *words)
    refused(answer, case)
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.code in ("GS-3105", "GS-405", "GS-3140") and "--dtype" not in case.extra],
    ids=lambda case: case.name.replace(" ", "-"),
)  # fmt: skip
def test_gap_refuses_them_by_the_same_code(tmp_path: Path, tiny_base: Path, case: Case) -> None:
    answer = gora("gap", write(tmp_path / "adapter", case), "--base", tiny_base, "--json")
    refused(answer, case)
    json.loads(answer.out, parse_constant=no_json)


@pytest.mark.parametrize("init", ["pissa", "olora", True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_of_nan_is_refused(tmp_path: Path, tiny_base: Path, init: Any, value: float) -> None:
    build_llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.weight"] = torch.full((32, 32), value)
    save_file(tensors, file, {"format": "pt"})
    case = Case("lora", "GS-3142", "q_proj", config={"init_lora_weights": init})
    adapter = write(tmp_path / "adapter", case)
    for command in (("convert", adapter, "--output", tmp_path / "out"), ("gap", adapter, "--json")):
        answer = gora(*command, "--base", tmp_path / "base")
        refused(answer, case)
        assert command[0] == "convert" or json.loads(answer.out, parse_constant=no_json)
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_a_type_that_torch_lacks(tmp_path: Path, tiny_base: Path) -> None:
    """F6 packs four numbers into three bytes: the header is sound, and nothing reads it."""
    header = {
        f"{KEY}.lora_A.weight": {"dtype": "F6_E2M3", "shape": [4, 32], "data_offsets": [0, 96]},
        f"{KEY}.lora_B.weight": {"dtype": "F6_E2M3", "shape": [32, 4], "data_offsets": [96, 192]},
    }
    text = json.dumps(header).encode()
    adapter = write(tmp_path / "adapter", Case("lora", "GS-3140", "F6_E2M3"))
    (adapter / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(192))
    answer = gora("convert", adapter, "--base", tiny_base, "--output", tmp_path / "out")
    refused(answer, Case("lora", "GS-3140", "F6_E2M3"))


def test_huge_numbers_are_no_part_of_the_base(tmp_path: Path, tiny_base: Path) -> None:
    """Cosines of what overflows in float32 are numbers still."""
    case = Case("lora", "GS-000", change=every(lambda one: one * 1e30))
    answer = gora("convert", write(tmp_path / "adapter", case), "--base", tiny_base, "--output", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "nan" not in answer.out


def test_a_quantized_base_that_plain_lora_does_not_need(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({name: one.to(torch.int8) if "proj" in name else one for name, one in load_file(file).items()}, file)
    case = Case("lora", "GS-3117", "--from lora")
    adapter = write(tmp_path / "adapter", case)
    refused(gora("convert", adapter, "--base", tmp_path / "base", "--output", tmp_path / "out"), case)
    answer = gora("convert", adapter, "--base", tmp_path / "base", "--output", tmp_path / "out", "--from", "lora")
    assert answer.code == 0, answer.err
