"""adapter_config.json: what PEFT reads out of it is what went in; foreign and hostile content is refused."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from gora_serve.adapter.peft_config import is_safe_pattern, make_config, pattern_values, read_scales
from gora_serve.errors import GoraError, InputError

FILE = Path("adapter_config.json")
RANKS = {"model.a": 4, "model.b": 16, "model.a.c": 9}


def config_of(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    config = make_config(ranks, scales, base_name="tiny", revision=None, task_type="CAUSAL_LM")
    value: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    return value


def pefts_reading(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Rank and scale as PEFT's LoraModel._create_and_replace and LoraLayer.update_layer compute them."""
    lora = LoraConfig(**{k: v for k, v in config.items() if k not in ("auto_mapping", "peft_type")})
    r = lora.rank_pattern.get(get_pattern_key(list(lora.rank_pattern), path), lora.r)
    alpha = lora.alpha_pattern.get(get_pattern_key(list(lora.alpha_pattern), path), lora.lora_alpha)
    return r, alpha / (math.sqrt(r) if lora.use_rslora else r)


@settings(deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from([f"model.layers.{i}.{n}" for i in (0, 1, 10) for n in ("q", "k")]),
        st.tuples(st.integers(1, 64), st.floats(1e-3, 64)),
        min_size=1,
    )
)
def test_peft_sees_every_rank_and_scale(values: dict[str, tuple[int, float]]) -> None:
    ranks, scales = {p: v[0] for p, v in values.items()}, {p: v[1] for p, v in values.items()}
    config = config_of(ranks, scales)
    for path in values:
        rank, scale = pefts_reading(config, path)
        assert rank == ranks[path]
        assert scale == pytest.approx(scales[path], rel=1e-11)
    assert read_scales(config, ranks, file=FILE) == pytest.approx(scales, rel=1e-11)


def test_rank_stabilized_scales_are_spelled_as_rslora() -> None:
    """GoRA's α/√r with one α: use_rslora, and no alpha_pattern."""
    config = config_of(RANKS, {path: 16 / math.sqrt(rank) for path, rank in RANKS.items()})
    assert config["use_rslora"] is True
    assert config["lora_alpha"] == 16
    assert config["alpha_pattern"] == {}
    assert config["rank_pattern"] == {"^model\\.a": 4, "^model\\.a\\.c": 9, "^model\\.b": 16}
    assert config["r"] == 16


def test_unit_scales_are_spelled_with_alpha_equal_to_the_rank() -> None:
    config = config_of(RANKS, dict.fromkeys(RANKS, 1.0))
    assert config["use_rslora"] is False
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["r"] == config["lora_alpha"] == 16


def test_one_rank_needs_no_pattern() -> None:
    config = config_of({"a": 8, "b": 8}, {"a": 2.0, "b": 2.0})
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_only_pefts_keys_and_no_words_that_vllm_refuses() -> None:
    config = config_of(RANKS, dict.fromkeys(RANKS, 1.0))
    assert set(config) <= set(LoraConfig().to_dict())
    assert config["init_lora_weights"] is True
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(RANKS)
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)


HOSTILE: list[Any] = [
    ({"r": 8, "rank_pattern": {}}, "GS-354"),
    ({"rank_pattern": {"^model\\.a": 5}}, "GS-354"),
    ({"rank_pattern": {"model.a": 4}}, "GS-353"),
    ({"rank_pattern": {"(a+)+$": 4}}, "GS-353"),
    ({"alpha_pattern": {"^model\\.zzz": 4}}, "GS-353"),
    ({"rank_pattern": ["^model\\.a"]}, "GS-353"),
    ({"rank_pattern": "^"}, "GS-353"),
    ({"alpha_pattern": 7}, "GS-353"),
    ({"alpha_pattern": [["x"]]}, "GS-353"),
    ({"alpha_pattern": {"^model\\.a": float("nan")}}, "GS-355"),
    ({"alpha_pattern": {"^model\\.a": float("inf")}}, "GS-355"),
    ({"alpha_pattern": {"^model\\.a": "16"}}, "GS-355"),
    ({"alpha_pattern": {"^model\\.a": True}}, "GS-355"),
    ({"alpha_pattern": {"^model\\.a": 10**400}}, "GS-355"),
    ({"alpha_pattern": {}, "lora_alpha": None}, "GS-355"),
    ({"use_dora": True}, "GS-356"),
    ({"init_lora_weights": "pissa"}, "GS-356"),
    ({"bias": "all"}, "GS-356"),
    ({"peft_type": "LOHA"}, "GS-356"),
    ({"peft_type": None}, "GS-356"),
    ({"use_rslora": "no"}, "GS-356"),
]


@pytest.mark.parametrize(("change", "code"), HOSTILE)
def test_foreign_and_hostile_configs_are_refused(change: dict[str, Any], code: str) -> None:
    config = config_of(RANKS, dict.fromkeys(RANKS, 1.0)) | change
    with pytest.raises(GoraError) as caught:
        read_scales(config, RANKS, file=FILE)
    assert isinstance(caught.value, InputError)
    assert caught.value.code == code
    assert caught.value.fields["file"] == FILE


@pytest.mark.parametrize(
    "key",
    [
        ".?" * 40 + "!",
        "(a|.)?" * 20,
        "(a+)+$",
        "a{30}{30}",
        ".*.*.*.*",
        "(?=a)",
        r"(a)\1",
        "a**",
        "(",
        "[^a]",
        "(" * 99,
    ],
)
def test_patterns_that_could_run_for_ever_or_say_nothing_are_unsafe(key: str) -> None:
    assert not is_safe_pattern(key)


@pytest.mark.parametrize(
    "key",
    [
        "q_proj", "^model", r"^model\.layers\.1\.q_proj", "layers.1.q_proj", r"layers\.\d+\.q_proj", ".*q_proj",
        r"layers\.[0-3]\.(q_proj|k_proj)", r"(?:layers|blocks)\.1\..*", "1?.q_proj", "proj", "q_proj|k_proj$", "",
        r".*\.(1[0-9]|2)\..+",
    ],
)  # fmt: skip
def test_patterns_match_as_peft_matches_them(key: str) -> None:
    paths = ["q_proj", "model.layers.1.q_proj", "model.layers.12.q_proj", "layers.1.k_proj", "x.blocks.1.mlp.up", "1"]
    assert is_safe_pattern(key)
    for path in paths:
        expected = re.match(rf"(.*\.)?({key})$", path) is not None
        assert bool(pattern_values({key: 4}, path)) == expected, path


def test_a_pattern_takes_no_time_whatever_the_path() -> None:
    begun = time.perf_counter()
    assert pattern_values({".*.*.*!": 4, "(a|.)(a|.).*b.*!": 4}, "a" * 500) == []
    assert time.perf_counter() - begun < 0.5
