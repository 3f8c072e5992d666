"""How every family is proved: train with the real library, convert the files, load on a fresh base, compare logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters.convert import convert
from converters.merge_receipt import MergedModel
from converters.merging import merge_model, verify_merged
from converters.reading import Inputs
from converters.receipt import Converted
from gora_serve.config import ConvertConfig, MergeConfig
from gora_serve.integrity.bases import Base

EXACT = 1e-5  # logits, float32


def input_ids(vocabulary: int = 96) -> Tensor:
    return torch.randint(3, vocabulary, (4, 12), generator=torch.Generator().manual_seed(7))


def logits_of(model: Any, **inputs: Any) -> Tensor:
    """Logits in eval mode, float64-free: what a user sees."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**(inputs or {"input_ids": input_ids()})).logits
    return logits.float()


def train(model: Any, *, steps: int = 6, lr: float = 5e-3, **inputs: Any) -> Any:
    """Take a few AdamW steps on random tokens: enough for every trainable tensor to move. Returns the model."""
    torch.manual_seed(3)
    inputs = inputs or {"input_ids": input_ids(), "labels": input_ids()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    return model


def copy_embeddings_to_head(folder: Path) -> Path:
    """Store the head of a tied model too, as some tools do, and return the folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    return folder


def load_on(base: Path, adapter: Path, *, auto: Any = None) -> Any:
    """Load the adapter with PEFT on a fresh copy of the base, read from its files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = (auto or AutoModelForCausalLM).from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter)


def converted(adapter: Path, base: Path, output: Path, *, inputs: Inputs | None = None, **settings: Any) -> Converted:
    """Run the conversion. `settings` are ConvertConfig's."""
    return convert(adapter, Base(str(base), base), output, replace(ConvertConfig(), **settings), inputs)


def off_by(one: Tensor, other: Tensor) -> float:
    """The largest difference of two sets of logits."""
    return float((one - other).abs().max())


def prove_exact(
    adapter: Path, base: Path, output: Path, trained: Tensor, *, inputs: Inputs | None = None, **settings: Any
) -> Converted:
    """Convert, load on a fresh base, and assert that the logits are the trained model's; also that training counted."""
    done = converted(adapter, base, output, inputs=inputs, **settings)
    from transformers import AutoModelForCausalLM

    untrained = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype="auto"))
    assert off_by(untrained, trained) > 1000 * EXACT, "the adapter does nothing: this test could not fail"
    assert off_by(logits_of(load_on(base, output)), trained) < EXACT
    prove_merged(adapter, base, output.with_name(f"{output.name}-merged"), trained, inputs=inputs,
                 family=settings.get("family", "auto"))  # fmt: skip
    return done


def merged(
    adapter: Path, base: Path, output: Path, *, inputs: Inputs | None = None, weight: float = 1.0, **settings: Any
) -> MergedModel:
    """Run the merge of one adapter. `settings` are MergeConfig's."""
    config = replace(MergeConfig(), **settings)
    return merge_model([(adapter, weight)], Base(str(base), base), output, config, inputs)


def prove_merged(
    adapter: Path,
    base: Path,
    output: Path,
    trained: Tensor,
    *,
    inputs: Inputs | None = None,
    auto: Any = None,
    exact: float = EXACT,
    ask: Callable[[Any], Tensor] = logits_of,
    **settings: Any,
) -> MergedModel:
    """Merge, load the model alone, and assert that the logits are the trained model's; and that a replay agrees."""
    from transformers import AutoModelForCausalLM

    done = merged(adapter, base, output, inputs=inputs, **settings)
    model, loading = (auto or AutoModelForCausalLM).from_pretrained(output, dtype="auto", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert off_by(ask(model), trained) < exact * max(1.0, float(trained.abs().max()))  # W0 + dW is rounded to float32
    check = verify_merged(output, [(adapter, 1.0)], Base(str(base), base), done.config.family, inputs)
    assert check.replay.verdict == "exact"
    return done
