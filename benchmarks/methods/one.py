"""One row: one method on one task with one seed and one learning rate.

    echo '{"method": "gora", "task": "snips", "seed": 0, "lr": 2e-4}' | python benchmarks/methods/one.py BASE

Reads what is asked for, one JSON object a line, and answers each with a line of JSON: the row, or {"error": ...}.
Every method sees the same rows in the same order, with the same steps, warm-up, schedule, weight decay and batch size,
in float32 (on CUDA with TF32 products); only what `methods.py` names is its own.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import commit, processor

from gora_serve.config import DataConfig, ModelConfig, TrainConfig
from gora_serve.errors import GoraError
from gora_serve.training.data import schedule
from gora_serve.training.loop import cosine_with_floor, evaluate, make_optimizer
from gora_serve.training.loss import mean_loss
from gora_serve.training.session import LazyBatch, Session, open_session, peak_bytes
from methods.methods import ESTIMATE, Method, methods
from methods.tasks import TASKS, Row, Task, score


@dataclass(frozen=True)
class Wanted:
    """What is asked for. split: "valid" for the choice of a learning rate, "test" for the table. served: also the score
    of the adapter served as it is on the base, and after conversion."""

    method: str
    task: str
    seed: int
    lr: float
    split: str = "test"
    steps: int = 120
    batch_size: int = 8
    rows: int = 300
    served: bool = False


def run(base: str, wanted: Wanted) -> dict[str, Any]:
    task, method = TASKS[wanted.task], methods(wanted.steps)[wanted.method]
    config = TrainConfig(steps=wanted.steps, lr=wanted.lr, lr_ratio=method.ratio, seed=wanted.seed)
    clock = time.perf_counter()
    session = open(base, task, method, wanted, config)
    held_out = session.load(str(task.file(wanted.split)), DataConfig(max_length=512, batch_size=wanted.batch_size))
    rows = task.rows(wanted.split, wanted.rows)
    seconds = {"load": time.perf_counter() - clock}
    clock = time.perf_counter()
    order = schedule(len(session.data.examples), wanted.batch_size, batches=wanted.steps + ESTIMATE, seed=wanted.seed)
    batches = session.batches(session.data.examples, order)
    model, noted = method.start(session, batches[wanted.steps :])
    model = model.to(session.accelerator.device)
    seconds["prepare"] = time.perf_counter() - clock
    with tempfile.TemporaryDirectory() as folder:
        if method.initial and wanted.served:
            model.save_pretrained(Path(folder) / "initial")  # type: ignore[operator]
        clock = time.perf_counter()
        loss, seconds["step"] = train(model, batches[: wanted.steps], session, config, method)
        seconds["train"] = time.perf_counter() - clock
        peak = peak_bytes(session.accelerator.device)
        few = held_out.examples[: wanted.rows]
        row = {
            **asdict(wanted),
            "score": score(model, session.tokenizer, task, rows) if wanted.split == "test" else None,
            "eval_loss": evaluate(model, session.in_order(few), accelerator=session.accelerator),
            "train_loss": loss,
            "parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "peak_bytes": peak["device"] or peak["host"],
            "noted": noted,
            "device": device(session),
            "commit": commit(),
        }
        if wanted.served:
            row["served"] = served(base, model, Path(folder), method, session, task, rows)
    return row


def open(base: str, task: Task, method: Method, wanted: Wanted, config: TrainConfig) -> Session:
    kind = ModelConfig(dtype="float32", quantize="nf4" if method.quantize else "none")
    rows = DataConfig(max_length=512, batch_size=wanted.batch_size)
    return open_session(base, str(task.file("train")), model=kind, rows=rows, train=config, listen=lambda _: None)


def train(
    model: nn.Module, batches: list[LazyBatch], session: Session, config: TrainConfig, method: Method
) -> tuple[float, float]:
    """Take a step for each batch; return the mean loss of the last tenth, and the median seconds of a step."""
    model.train()
    optimizer = make_optimizer(model, config)
    losses, seconds = [], []
    clock = time.perf_counter()
    for step, batch in enumerate(batches):
        factor = cosine_with_floor(step, len(batches), warmup=config.warmup, floor=config.floor)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        loss = mean_loss(model, batch())
        (loss + orthogonality(model) if method.adapts else loss).backward()
        optimizer.step()
        if method.adapts:
            model.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device
        seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
    return statistics.fmean(losses[-max(1, len(losses) // 10) :]), statistics.median(seconds)


def orthogonality(model: nn.Module, weight: float = 0.5) -> torch.Tensor:
    """AdaLoRA's regularisation (Zhang et al. 2023, eq. 4) as PEFT adds it to a model's own loss: the mean over the
    factors of |P P^T - I|, of weight 0.5."""
    terms = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            terms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
    return weight * torch.stack(terms).mean()


def served(
    base: str, model: Any, folder: Path, method: Method, session: Session, task: Task, rows: list[Row]
) -> dict[str, float]:
    """Return the scores of the saved adapter on the base as it is: unconverted, and converted by the command."""
    model.save_pretrained(folder / "trained")
    extra = ["--init-adapter", str(folder / "initial")] if method.initial else []
    command = ["convert", str(folder / "trained"), "--base", base, "--output", str(folder / "converted"), *extra]
    subprocess.run([sys.executable, "-m", "gora_serve", *command], check=True, capture_output=True)
    return {
        "unconverted": loaded_score(base, folder / "trained", session, task, rows),
        "converted": loaded_score(base, folder / "converted", session, task, rows),
    }


def loaded_score(base: str, adapter: Path, session: Session, task: Task, rows: list[Row]) -> float:
    """Return the score of an adapter's files over a fresh base. PEFT repeats no initialisation: the config is plain."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"init_lora_weights": True, "corda_config": None, "lora_ga_config": None}))
    fresh: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(fresh, str(adapter)).to(session.accelerator.device)
    file.write_text(json.dumps(config))
    return score(model, session.tokenizer, task, rows)


def device(session: Session) -> str:
    kind = session.accelerator.device
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else f"CPU, {processor()}"


def answer(base: str, line: str) -> dict[str, Any]:
    """Return the row that a line asks for, or what went wrong: the others are to be made all the same."""
    try:
        return run(base, Wanted(**json.loads(line)))
    except (RuntimeError, ValueError, TypeError, OSError, subprocess.CalledProcessError, GoraError) as err:
        traceback.print_exc()
        return {"error": f"{type(err).__name__}: {err}"}


def main(base: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high")  # TF32 where there is CUDA; nothing on a CPU
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    for line in sys.stdin:
        print(json.dumps(answer(base, line)), file=answers, flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main(sys.argv[1])
