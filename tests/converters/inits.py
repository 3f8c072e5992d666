"""Adapters whose initialisation edited the base: made and trained with PEFT, with what it leaves to convert them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from proving import EXACT, converted, input_ids, load_on, logits_of, off_by, train
from tiny_models import build_llama
from torch import Tensor

from converters.reading import Inputs

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 6},
    "alpha_pattern": {"up_proj": 3, "0.self_attn.v_proj": 7},
}


@dataclass(frozen=True)
class Run:
    """adapter: trained, as saved. initial: as it was before any step. mutated: the edited base. trained: its logits."""

    adapter: Path
    initial: Path
    mutated: Path
    trained: Tensor


def make_run(
    folder: Path,
    init: Any,
    *,
    build: Callable[[], Any] = build_llama,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Any, LoraConfig], None] | None = None,
    **settings: Any,
) -> Run:
    """Train on a tiny model with this initialisation. `prepare` does what the method does before it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **settings}
    with warnings.catch_warnings():  # PEFT: it cannot convert rsLoRA with patterns. We can.
        warnings.simplefilter("ignore")
        config = LoraConfig(init_lora_weights=init, **options)
    model = build().to(dtype)
    if prepare:
        prepare(model, config)
    peft_model = get_peft_model(model, config)
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
    peft_model.save_pretrained(folder / "initial")
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in peft_model.state_dict().items()
        if "lora_" not in name
    }
    fresh = build().to(dtype)
    fresh.load_state_dict(state)
    fresh.save_pretrained(folder / "mutated")
    train(peft_model)
    peft_model.save_pretrained(folder / "adapter")
    return Run(folder / "adapter", folder / "initial", folder / "mutated", logits_of(peft_model))


def edit_config(adapter: Path, **changes: Any) -> None:
    """Change values of adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def gradient_of(model: Any, seed: int = 7) -> Callable[[], None]:
    """One backward pass on random tokens, for LoRA-GA's estimate."""
    ids = input_ids() if seed == 7 else torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(seed))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    return step


WAYS = ("computed", "init", "mutated", "both")


def inputs_of(run: Run, way: str) -> Inputs:
    return Inputs(
        init_adapter=run.initial if way in ("init", "both") else None,
        mutated_base=run.mutated if way in ("mutated", "both") else None,
    )


def prove_exact_as(
    run: Run, base: Path, folder: Path, family: str, inputs: Inputs | None = None, exact: float = EXACT
) -> Any:
    """As prove_exact, with the family named."""
    done = converted(run.adapter, base, folder / "out", inputs=inputs, family=family)
    off = off_by(logits_of(load_on(base, folder / "out")), run.trained)
    assert off < exact, off
    return done
