"""What the engine told of an adapter that it refused, in the words of the error that it raised."""

from __future__ import annotations

import json

from gora_serve.errors import BindingError
from gora_serve.serving.loading import refused


def test_the_engines_own_error_is_told() -> None:
    raised = BindingError(
        "the adapter x does not fit into the buffers of the engine", code="GS-4801",
        tensor="model.layers.8.self_attn.qkv_proj", expected="rank <= 0", actual=4,
        hint="start again with --rank-headroom 5",
    )  # fmt: skip
    failed = f"Exception: Call to add_lora method failed: Worker failed with error '{raised}', please check the stack"
    told = refused(json.dumps({"error": failed}))
    assert told.code == "GS-7600"
    assert "GS-4801, the adapter x does not fit into the buffers" in told.what
    assert told.fields == {name: str(value) for name, value in raised.fields.items()}


def test_anything_else_is_told_as_it_is() -> None:
    told = refused('{"error": "out of memory"}')
    assert told.fields["actual"] == '{"error": "out of memory"}'
