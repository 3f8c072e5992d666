"""Tensor keys and pattern keys, judged by PEFT's own matching."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from tiny_models import LLAMA_PATHS

from gora_serve.adapter.names import parse_key, pattern_key, tensor_key

# Paths that contain or end with one another, and characters that mean something in a regular expression.
AWKWARD = (
    "layers.1.q_proj", "model.layers.1.q_proj", "model.layers.11.q_proj", "model.layers.1.q_proj_extra",
    "vision.model.layers.1.q_proj", "q_proj", "layers1xq_proj", "layers.1xq_proj", "a+b.q_proj", "aab.q_proj",
    "a(b.proj", "h.0.attn.c_attn", "h.0.attn.c_attn.", "$^.x",
)  # fmt: skip

segments = st.text("abq_01+*.[]()^$\\-", min_size=1, max_size=12)


def test_keys_are_pefts() -> None:
    assert tensor_key("model.layers.0.self_attn.q_proj", "A") == (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    )


@given(path=segments, part=st.sampled_from("AB"))
def test_parse_key_is_the_inverse_of_tensor_key(path: str, part: str) -> None:
    assert parse_key(tensor_key(path, part)) == (path, part)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.x.lora_A.default.weight", "base_model.model.x.lora_C.weight", "x.lora_A.weight",
        "base_model.model.x.lora_A.weight.absmax", "base_model.model.x.weight", "base_model.model.x.lora_embedding_A",
        "base_model.model.lora_A.weight", "base_model.model.x.lora_magnitude_vector.weight", "",
    ],
)  # fmt: skip
def test_other_keys_are_no_factors(key: str) -> None:
    assert parse_key(key) is None


@pytest.mark.parametrize("paths", [AWKWARD, LLAMA_PATHS])
def test_each_pattern_key_matches_its_own_path_alone(paths: tuple[str, ...]) -> None:
    """In any order of the patterns PEFT must find each module's own key, and nothing for a module without one."""
    keys = {pattern_key(path): path for path in paths}
    assert len(keys) == len(paths)
    for order in (list(keys), list(keys)[::-1]):
        for path in paths:
            assert keys[get_pattern_key(order, path)] == path
            others = [key for key in order if keys[key] != path]
            assert get_pattern_key(others, path) == path  # PEFT's way to say: no key matches


@given(paths=st.sets(segments, min_size=2, max_size=5))
def test_pattern_keys_never_match_another_path(paths: set[str]) -> None:
    keys = {pattern_key(path): path for path in paths}
    assert all(keys[get_pattern_key(list(keys), path)] == path for path in paths)
