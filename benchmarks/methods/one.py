"""One row: one method on one task with one seed and one learning rate.

    echo '{"method": "gora", "task": "snips", "seed": 0, "lr": 2e-4}' | python benchmarks/methods/one.py BASE

Reads what is asked for, one JSON object a line, and answers each with a line of JSON: the row, or {"error": ...}.
With --alone for a single row, nothing is kept for the next, so that memory is the method's own. With --keep DIR the
adapters of rows that are `served` stay in a folder of DIR (initial, trained and converted), for others to score.
Every method sees the same rows in the same order, with the same steps, warm-up, schedule, weight decay and batch size,
in float32 with faster products (on CUDA in TF32, else in bfloat16); only what `methods.py` names is its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import commit, processor

from converters.convert import convert
from converters.reading import Inputs
from gora_serve.config import TrainConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.bases import locate_base
from gora_serve.training.loop import cosine_with_floor, evaluate, make_optimizer
from gora_serve.training.loss import mean_loss
from gora_serve.training.session import LazyBatch, Session, peak_bytes
from methods.bench import Bench, kept_name
from methods.graph import train_recorded
from methods.methods import Method, methods
from methods.tasks import TASKS, Row, credits_of

START = 2  # the step after which time is taken: the first are slower


@dataclass(frozen=True)
class Wanted:
    """What is asked for. split: "valid" for the choice of a learning rate, "test" for the table. served: also the
    adapter as it was saved and after conversion: its bytes, and its score on the base, but for adapters that are kept.
    """

    method: str
    task: str
    seed: int
    lr: float
    split: str = "test"
    steps: int = 120
    rows: int = 300
    served: bool = False


def run(bench: Bench, wanted: Wanted) -> dict[str, Any]:
    task, method = TASKS[wanted.task], methods(wanted.steps, bench.probes)[wanted.method]
    config = TrainConfig(steps=wanted.steps, lr=wanted.lr, lr_ratio=method.ratio, seed=wanted.seed)
    bench.loaded(quantize=method.quantize)
    held_out = bench.rows(wanted.task, wanted.split)
    rows = task.rows(wanted.split, min(wanted.rows, task.scored))
    clock = time.perf_counter()
    session, model, noted, batches = bench.prepared(method, wanted.task, wanted.seed, wanted.steps)
    seconds = {"prepare": time.perf_counter() - clock}
    with bench.folder(kept_name(wanted.method, wanted.task, wanted.seed, wanted.lr)) as folder:
        if method.initial and wanted.served:
            model.save_pretrained(folder / "initial")  # type: ignore[operator]
        clock = time.perf_counter()
        loss, seconds["step"] = train(model, batches, session, config, method)
        seconds["train"] = time.perf_counter() - clock
        peak = peak_bytes(session.accelerator.device)
        in_order = replace(session, batch_size=task.at_once).in_order(held_out.examples[: wanted.rows])
        clock = time.perf_counter()
        row = {
            **asdict(wanted),
            "score": None,
            "eval_loss": evaluate(model, in_order, accelerator=session.accelerator),
            "train_loss": loss,
            "parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
            "seconds": seconds,
            "peak_bytes": peak["device"] or peak["host"],
            "noted": noted,
            "device": device(session),
            "commit": commit(),
        }
        if wanted.served:
            model.save_pretrained(folder / "trained")  # type: ignore[operator]
        if wanted.split == "test":
            if hasattr(model, "merge_adapter") and not method.quantize:
                model.merge_adapter()  # the same function, in fewer kernels
            row["credits"] = credits_of(model, session.tokenizer, task, rows)
            row["score"] = statistics.fmean(row["credits"])
        del model, session
        if wanted.served:
            row["served"] = served(bench, folder, method, wanted, rows)
        seconds["evaluate"] = time.perf_counter() - clock
    return row


def train(
    model: nn.Module, batches: list[LazyBatch], session: Session, config: TrainConfig, method: Method
) -> tuple[float, float]:
    """Take a step for each batch; return the mean loss of the last tenth, and the mean seconds of a step after the
    first few."""
    model.train()
    optimizer = make_optimizer(model, config)
    rates = [
        cosine_with_floor(step, len(batches), warmup=config.warmup, floor=config.floor) for step in range(len(batches))
    ]

    def extra() -> torch.Tensor | None:
        return orthogonality(model) if method.adapts else None

    on_cuda = session.accelerator.device.type == "cuda"
    loop = train_recorded if on_cuda else partial(train_by_step, autocast=session.accelerator.autocast)
    ends: list[float] = []

    def after_step(step: int) -> None:
        if method.adapts:
            model.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]
        if on_cuda and step in (START, len(batches) - 1):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    losses = loop(model, batches, optimizer, rates, extra=extra, after_step=after_step)
    last = losses[-max(1, len(losses) // 10) :]
    return statistics.fmean(last), (ends[-1] - ends[START]) / (len(ends) - 1 - START)


def train_by_step(
    model: nn.Module,
    batches: Sequence[LazyBatch],
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    *,
    extra: Callable[[], torch.Tensor | None],
    after_step: Callable[[int], None],
    autocast: Callable[[], AbstractContextManager[None]],
) -> list[float]:
    """`train_recorded` on any device."""
    losses = []
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        with autocast():
            loss = mean_loss(model, batch())
        term = extra()
        (loss if term is None else loss + term).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after_step(step)
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def orthogonality(model: nn.Module, weight: float = 0.5) -> torch.Tensor:
    """AdaLoRA's regularisation (Zhang et al. 2023, eq. 4) as PEFT adds it to a model's own loss: the mean over the
    factors of |P P^T - I|, of weight 0.5."""
    terms = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            terms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
    return weight * torch.stack(terms).mean()


def served(bench: Bench, folder: Path, method: Method, wanted: Wanted, rows: list[Row]) -> dict[str, float]:
    """Return the scores of the saved adapter on the base as it is, unconverted and as `convert` writes it; and the
    bytes of base and adapters. Of adapters that are kept no scores."""
    inputs = Inputs(init_adapter=folder / "initial") if method.initial else Inputs()
    convert(folder / "trained", locate_base(bench.base), folder / "converted", inputs=inputs, overwrite=True)
    make_plain(folder / "trained")
    kinds = {"unconverted": folder / "trained", "converted": folder / "converted"}
    scores = {} if bench.keep else {kind: loaded_score(bench, of, wanted, rows) for kind, of in kinds.items()}
    files = {"base": Path(bench.base), "trained": folder / "trained", "converted": folder / "converted"}
    return scores | {f"{name}_bytes": stored(of) for name, of in files.items()}


def make_plain(adapter: Path) -> None:
    """Name no initialisation in an adapter's configuration: PEFT repeats it, and vLLM refuses some."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"init_lora_weights": True, "corda_config": None, "lora_ga_config": None}))


def stored(folder: Path) -> int:
    """Return the bytes of a folder's tensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def loaded_score(bench: Bench, adapter: Path, wanted: Wanted, rows: list[Row]) -> float:
    """Return the score of an adapter's files over a fresh base."""
    from peft import PeftModel

    session = bench.session(wanted.task, wanted.seed)
    model: Any = PeftModel.from_pretrained(session.model, str(adapter))  # type: ignore[arg-type]
    model.merge_adapter()
    return statistics.fmean(credits_of(model, session.tokenizer, TASKS[wanted.task], rows))


def device(session: Session) -> str:
    place = session.accelerator.device
    return torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {processor()}"


def answer(bench: Bench, line: str) -> dict[str, Any]:
    """Return the row that a line asks for, or what went wrong: the others are to be made all the same."""
    try:
        return run(bench, Wanted(**json.loads(line)))
    except (RuntimeError, ValueError, TypeError, OSError, KeyError, GoraError) as err:
        traceback.print_exc()
        return {"error": f"{type(err).__name__}: {err}"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    bench = Bench(asked.base, alone=asked.alone, keep=asked.keep)
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high")  # TF32 where there is CUDA; nothing on a CPU
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    for line in sys.stdin:
        print(json.dumps(answer(bench, line)), file=answers, flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
