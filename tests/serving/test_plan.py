"""The engine's command line and environment: computed from tensors, overridden by options, refused when unsafe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gora_serve.adapter.engine_ranks import LARGEST_RANK
from gora_serve.config import ServeConfig
from gora_serve.config import ServeDevice as Device
from gora_serve.errors import BindingError, InputError, MachineError, UsageError
from gora_serve.serving.adapter_names import parse_adapter, require_free
from gora_serve.serving.exposure import MIDDLEWARE
from gora_serve.serving.options import group_options
from gora_serve.serving.plan import ServePlan, plan_server, with_device
from gora_serve.serving.plugin import Declared, load_declared
from gora_serve.serving.room import (
    PROJECTIONS,
    Room,
    rank_bucket,
    require_place,
    require_room,
    target_modules,
)
from gora_serve.serving.served import ServedAdapter, read_served_adapters

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
CPU = ServeConfig(device="cpu")
RANKS_OF = {"a": {Q: 3, DOWN: 5}, "b": {Q: 7}}


def adapter(name: str = "a", rank: int = 8, modules: tuple[str, ...] = (Q, DOWN)) -> ServedAdapter:
    return ServedAdapter(name, Path("/adapters") / name, rank, modules)


def plan(base: Path, *adapters: ServedAdapter, extra: Sequence[str] = (), config: ServeConfig = CPU) -> ServePlan:
    return plan_server(base, adapters, config, extra, environ={})


def values(argv: Sequence[str], flag: str) -> list[str]:
    """The values of the flag's only occurrence."""
    assert [word.partition("=")[0] for word in argv].count(flag) == 1
    return list(group_options(argv[5:])[flag])


def test_ranks_are_those_of_the_tensors(write_adapter: Callable[..., Path]) -> None:
    (read,) = read_served_adapters([("a", write_adapter("a", {Q: 3, DOWN: 17}))])
    assert (read.max_rank, read.modules) == (17, (Q, DOWN))


def test_a_rank_that_no_module_has_counts_too(write_adapter: Callable[..., Path]) -> None:
    """vLLM refuses an adapter whose r, or a value of whose rank_pattern, is above --max-lora-rank."""
    (read,) = read_served_adapters([("a", write_adapter("a", {Q: 3, DOWN: 17}, config={"r": 64}))])
    assert (read.max_rank, read.ranks) == (64, {Q: 3, DOWN: 17})


def test_ranks_that_disagree_with_the_configuration_are_refused(write_adapter: Callable[..., Path]) -> None:
    folder = write_adapter("a", {Q: 3, DOWN: 17}, config={"rank_pattern": {}})
    with pytest.raises(InputError) as caught:
        read_served_adapters([("a", folder)])
    assert caught.value.code == "GS-388"
    assert (caught.value.fields["expected"], caught.value.fields["actual"]) == (17, 3)
    assert Q in caught.value.what


@pytest.mark.parametrize(("rank", "bucket"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (257, 320), (512, 512)])
def test_bucket_is_the_smallest_that_holds_the_rank(rank: int, bucket: int) -> None:
    assert rank_bucket(rank) == bucket


def test_bucket_above_the_largest_is_refused() -> None:
    with pytest.raises(InputError, match="GS-387"):
        rank_bucket(LARGEST_RANK + 1)


def test_command_line(base: Path) -> None:
    made = plan(base, adapter("a", 3), adapter("b", 17))
    assert made.argv[:5] == (sys.executable, "-m", "gora_serve.serving.vllm_cli", "serve", str(base))
    assert values(made.argv, "--max-lora-rank") == ["32"]
    assert values(made.argv, "--max-loras") == ["3"]  # a spare slot on CPU
    assert values(made.argv, "--max-cpu-loras") == ["3"]
    assert values(made.argv, "--enable-lora") == []
    assert values(made.argv, "--lora-target-modules") == ["down_proj", "q_proj"]
    assert [json.loads(text) for text in values(made.argv, "--lora-modules")] == [
        {"name": "a", "path": "/adapters/a"},
        {"name": "b", "path": "/adapters/b"},
    ]
    assert values(made.argv, "--served-model-name") == ["tiny-base"]
    assert made.models == ("tiny-base", "a", "b")
    assert made.url == "http://127.0.0.1:8000"


def test_no_spare_slot_on_a_gpu(base: Path) -> None:
    made = plan(base, adapter("a"), adapter("b"), config=ServeConfig(device="cuda"))
    assert made.argv[:5] == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(base))
    assert values(made.argv, "--max-loras") == ["2"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in made.environment


def test_base_alone_has_no_lora_flags(base: Path) -> None:
    assert not [word for word in plan(base).argv if word.startswith("--") and "lora" in word]


LIVE = ServeConfig(device="cpu", adapters_dir=Path("live"))


def live(base: Path, *fixed: ServedAdapter, watched: Sequence[ServedAdapter] = (), extra: Sequence[str] = (),
         config: ServeConfig = LIVE) -> ServePlan:  # fmt: skip
    return plan_server(base, fixed, config, extra, watched=watched, environ={})


def test_a_watched_directory_has_headroom(base: Path) -> None:
    made = live(base)
    assert values(made.argv, "--enable-lora") == []
    assert values(made.argv, "--max-lora-rank") == ["32"]
    assert values(made.argv, "--max-loras") == ["10"]  # eight, one for a version that replaces another, one stays empty
    assert set(values(made.argv, "--lora-target-modules")) == set(PROJECTIONS)
    assert not [word for word in made.argv if word.startswith("--lora-modules")]
    assert made.models == ("tiny-base",)
    assert made.watched is not None
    assert made.watched.room == Room(8, 32, PROJECTIONS)
    assert made.watched.folder.is_absolute()
    assert live(base, config=replace(LIVE, device="cuda")).watched == made.watched


def test_what_lies_in_the_directory_counts(base: Path) -> None:
    names = [f"a{index}" for index in range(9)]
    made = live(base, adapter("fixed"), watched=[adapter(name, 100) for name in names])
    assert made.watched is not None
    assert made.watched.room == Room(10, 128, PROJECTIONS)
    assert made.watched.found == tuple(names)
    assert made.models == ("tiny-base", "fixed"), "the others come while it runs"
    head = live(base, watched=[adapter(modules=("lm_head",))])
    assert head.watched is not None
    assert head.watched.room.targets is None, "vLLM wraps everything then"


def test_engine_options_set_the_room(base: Path) -> None:
    extra = ["--max-loras", "5", "--max-lora-rank", "16", "--lora-target-modules", "qkv_proj", "o_proj"]
    made = live(base, extra=extra)
    assert made.watched is not None
    assert made.watched.room == Room(3, 16, frozenset({"qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"}))
    for few in ("1", "2"):
        with pytest.raises(UsageError, match="GS-285"):
            live(base, extra=["--max-loras", few])


@pytest.mark.parametrize(
    "extra",
    [["--api-server-count", "2"], ["-asc", "2"], ["--data-parallel-size=2"], ["-dp", "4"],
     ["--data_parallel_rank", "0"], ["-dpe"], ["--data-parallel-hybrid-lb"], ["--data-parallel-size-local", "1"]],
)  # fmt: skip
def test_one_engine_behind_one_server(base: Path, extra: list[str]) -> None:
    with pytest.raises(BindingError, match="GS-4606"):
        live(base, extra=extra)
    plan(base, adapter(), extra=extra)  # without a directory


def test_several_engines_that_are_one(base: Path) -> None:
    live(base, extra=["--api-server-count", "1", "-dp", "1", "-tp", "2", "-pp", "2"])


def test_what_a_running_engine_has_room_for() -> None:
    room = Room(2, 16, frozenset({"q_proj"}))
    require_room(adapter(rank=16, modules=(Q,)), room)
    require_room(adapter(rank=1, modules=(Q, DOWN, "lm_head")), Room(2, 16, None))
    with pytest.raises(BindingError, match="GS-4601") as caught:
        require_room(adapter(rank=17, modules=(Q,)), room)
    assert "--max-rank 32" in str(caught.value)
    with pytest.raises(BindingError, match="GS-4602") as caught:
        require_room(adapter(rank=1), room)
    assert "--lora-target-modules down_proj q_proj" in str(caught.value)


def test_names_and_places_that_are_free() -> None:
    require_free("b", ["base", "a"])
    with pytest.raises(UsageError, match="GS-282"):
        require_free("BASE", ["base", "a"])
    require_place(adapter(), 1, Room(2, 16, None))
    with pytest.raises(BindingError, match="GS-4603"):
        require_place(adapter(), 2, Room(2, 16, None))


def test_environment(base: Path) -> None:
    made = plan(base, config=ServeConfig(device="cpu", kv_cache_gib=3))
    assert made.environment == {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "GORA_SERVE_GUARD": "loopback",
        "GORA_SERVE_OPEN_ROUTES": "",
    }
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in made.removed
    assert {"VLLM_SKIP_MODEL_NAME_VALIDATION", "VLLM_MODEL_REDIRECT_PATH"} <= set(made.removed), "another would answer"


@pytest.mark.parametrize(
    ("device", "plugin", "on"),
    [("cpu", None, True), ("cpu", False, False), ("cuda", None, False), ("cuda", True, True)],
)
def test_the_plugin_is_on_where_it_is_asked_for(base: Path, device: Device, plugin: bool | None, on: bool) -> None:
    """By default on CPU; what this process's environment says of it does not reach the engine."""
    made = plan(base, adapter(), config=ServeConfig(device=device, plugin=plugin))
    assert made.environment["VLLM_PLUGINS"] == ("gora_serve" if on else "")
    assert (made.environment.get("GORA_SERVE_PLUGIN") == "1") == on
    assert {"GORA_SERVE_PLUGIN", "GORA_SERVE_LORA_RANKS"} <= set(made.removed)


def test_the_plugin_is_told_the_ranks_of_every_module(base: Path, write_adapter: Callable[..., Path]) -> None:
    served = read_served_adapters([(name, write_adapter(name, ranks)) for name, ranks in RANKS_OF.items()])
    made = plan(base, *served, config=ServeConfig(device="cpu", rank_headroom=12))
    told = load_declared(made.environment["GORA_SERVE_LORA_RANKS"])
    assert told == Declared(2, 12, {Q: (7, 10), DOWN: (5, 5)})
    assert values(made.argv, "--max-lora-rank") == ["16"]  # that of the headroom
    (base / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]}))
    assert "GORA_SERVE_LORA_RANKS" not in plan(base, *served).environment, "the engine may name modules otherwise"


def test_a_users_option_replaces_ours_and_comes_last(base: Path) -> None:
    extra = ["--max_loras=7", "--dtype", "bfloat16", "--port", "9001", "-tp", "2", "--served-model-name", "base"]
    made = plan(base, adapter(), extra=extra)
    outer = made.argv[-len(MIDDLEWARE) :]
    assert made.argv[-len(extra) - len(outer) :] == (*extra, *outer)  # the last middleware is the outermost
    assert outer == MIDDLEWARE
    assert [word.rpartition(".")[2] for word in outer[1::2]] == ["StatusRoute", "Guard", "Meter"]
    assert "--max-loras" not in made.argv
    assert made.argv.count("--dtype") == 1
    assert values(made.argv, "--max-cpu-loras") == ["7"]
    assert (made.url, made.models) == ("http://127.0.0.1:9001", ("base", "a"))


@pytest.mark.parametrize(
    "extra",
    [
        ["--api-key", "secret"], ["--api_key=secret"], ["--api-k", "secret"], ["--lora-modules", "x=/tmp"],
        ["--config", "f.yaml"], ["--uds", "/tmp/s"], ["--ssl-keyfile", "k"], ["stray"], ["--max-lora", "3"],
        ["--port", "many"], ["--lora-modules.name=e", "--lora-modules.path=/x"], ["--lora_modules.name", "e"],
        ["--load-form", "dummy"], ["--lora-target-mod", "o_proj"], ["--api-server-c", "2"], ["-as", "2"],
        ["--data-parallel-siz=2"], ["--lora-mod.name=e"], ["--default-mm-loras", '{"audio": "/x"}'],
        ["--default_mm_loras.audio=/x"],
    ],
)  # fmt: skip
def test_options_that_would_undo_a_check_are_refused(base: Path, extra: list[str]) -> None:
    with pytest.raises(UsageError, match="GS-284") as caught:
        plan(base, adapter(), extra=extra)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("extra", "seconds"), [((), 10.0), (("--shutdown-timeout", "0"), 0.0)])
def test_seconds_of_running_requests(base: Path, extra: Sequence[str], seconds: float) -> None:
    assert plan(base, adapter(), extra=list(extra)).shutdown_timeout == seconds


@pytest.mark.parametrize(
    "extra",
    [
        ["--max-loras", "2"], ["--max-lora-rank", "8"], ["--lora-target-modules", "qkv_proj", "o_proj"],
        ["--max-logprobs", "5"],
    ],
)  # fmt: skip
def test_options_that_would_answer_wrongly_are_refused(base: Path, extra: list[str]) -> None:
    with pytest.raises(UsageError, match="GS-285"):
        plan(base, adapter("a", 9), adapter("b"), extra=extra)


def test_packed_parents_cover_their_projections(base: Path) -> None:
    made = plan(base, adapter(), extra=["--lora-target-modules", "qkv_proj", "down_proj"])
    assert values(made.argv, "--lora-target-modules") == ["qkv_proj", "down_proj"]


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("SomethingElseForCausalLM", (Q,)),
        (None, (Q,)),
        ("LlamaForCausalLM", (Q, "lm_head")),
        ("LlamaForCausalLM", ("model.layers.0.mlp.experts.3.gate_proj",)),
    ],
)
def test_target_modules_are_left_out_where_vllm_might_drop_one(
    architecture: str | None, modules: tuple[str, ...]
) -> None:
    assert target_modules([adapter(modules=modules)], architecture) is None


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "../a", "a" * 65, "é", "a\n"])
def test_adapter_names_that_are_refused(base: Path, name: str) -> None:
    with pytest.raises(UsageError, match="GS-281"):
        plan(base, adapter(name))


def test_names_are_unique_and_not_the_bases(base: Path) -> None:
    for adapters in ([adapter("a"), adapter("a")], [adapter("tiny-base")]):
        with pytest.raises(UsageError, match="GS-282"):
            plan(base, *adapters)


def test_parse_adapter() -> None:
    assert parse_adapter("snips=runs/a=b") == ("snips", Path("runs/a=b"))
    for text in ("snips", "snips=", "=dir", "a b=dir"):
        with pytest.raises(UsageError, match="GS-281"):
            parse_adapter(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org", ""])
def test_an_open_server_needs_a_key(base: Path, host: str) -> None:
    config = ServeConfig(host=host, device="cpu")
    with pytest.raises(UsageError, match="GS-283"):
        plan_server(base, [], config, environ={})
    with pytest.raises(UsageError, match="GS-283"):
        plan_server(base, [], CPU, ["--host", host or "0.0.0.0"], environ={})
    made = plan_server(base, [], config, environ={"VLLM_API_KEY": "secret-0123456789"})
    assert "secret" not in repr(made)


@pytest.mark.parametrize(("host", "url"), [("localhost", "http://localhost:8000"), ("::1", "http://[::1]:8000")])
def test_loopback_needs_none(base: Path, host: str, url: str) -> None:
    assert plan_server(base, [], ServeConfig(host=host, device="cpu"), environ={}).url == url


def test_an_unspecified_host_is_reached_on_loopback(base: Path) -> None:
    config = ServeConfig(host="0.0.0.0", device="cpu")
    assert plan_server(base, [], config, environ={"VLLM_API_KEY": "k" * 16}).url == "http://127.0.0.1:8000"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="GS-583"):
        plan(tmp_path)


def test_the_device_is_settled_first(base: Path) -> None:
    with pytest.raises(UsageError, match="GS-286"):
        plan(base, config=ServeConfig())
    assert with_device(ServeConfig(), "cuda").device == "cuda"
    assert with_device(CPU, "cuda").device == "cpu"
