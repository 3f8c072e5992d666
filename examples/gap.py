"""PiSSA, LoRA-GA and GoRA on one task, from one seed, over one base: who is right on the base that nobody has edited?

PEFT trains PiSSA and LoRA-GA, gora-serve fits GoRA, and each adapter is saved as its own tool does it. Then all three
go where a server puts them: onto the untouched base, as they are. PiSSA and LoRA-GA took something out of the base
before they trained, so they are wrong there until `gora-serve convert` has had them; GoRA is right at once.

    python examples/gap.py --output gap

Without --base it makes SmolLM2-135M-Instruct in the folder `base`, once (the extra `demo`). Writes the adapters,
gap.json and, with matplotlib (the extra `report`), gap.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from converters.convert import convert
from converters.reading import Inputs
from gora_serve.config import DataConfig, FitConfig, InitConfig, ModelConfig, ProbeConfig, RankConfig, TrainConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.integrity.staging import check_target
from gora_serve.integrity.verify import verify_adapter
from gora_serve.training import inject
from gora_serve.training.data import collate, load_data, schedule
from gora_serve.training.demo_base import make_smollm2
from gora_serve.training.encode import IGNORED
from gora_serve.training.export import export
from gora_serve.training.fit import fit
from gora_serve.training.loop import cosine_with_floor, make_optimizer
from gora_serve.training.loss import mean_loss, scored
from gora_serve.training.models import load_model, load_tokenizer
from gora_serve.training.targets import linear_modules
from gora_serve.training.weights import memory_root

TASK = Path(__file__).parent / "data" / "requests"
NAMES = {"pissa": "PiSSA", "lora_ga": "LoRA-GA", "gora": "GoRA"}
ALPHAS = {"pissa": 1, "lora_ga": 2}  # times the rank, as in PEFT's own examples of the two
RATES = {"pissa": 5e-4, "lora_ga": 5e-4, "gora": 4e-4}  # of A; GoRA's B learns 16 times faster
FLOAT32 = ModelConfig(dtype="float32")
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """The base, the batches of all training steps in their order, and the held-out batches."""

    base: Base
    train: Sequence[Batch]
    test: Sequence[Batch]


@dataclass(frozen=True)
class Answers:
    """What a model says at each token of the held-out completions: log-probabilities (tokens, vocabulary).

    right: what stands there. rows: which row the token belongs to.
    """

    logs: Tensor
    right: Tensor
    rows: Tensor

    @property
    def loss(self) -> float:
        return float(-self.logs.gather(1, self.right.unsqueeze(1)).double().mean())

    def against(self, trained: Answers) -> dict[str, float]:
        """Return the loss, KL(trained || these) in nats, and the agreement on the likeliest next token.

        agreement: the share of tokens where it is the same; answers: of rows, where it is at all of their tokens.
        """
        kl = (trained.logs.exp() * (trained.logs - self.logs)).sum(dim=1).double().mean()
        same = trained.logs.argmax(dim=1) == self.logs.argmax(dim=1)  # (tokens,)
        spoiled = len(set(self.rows[~same].tolist())) / len(set(self.rows.tolist()))
        return {"loss": self.loss, "kl": float(kl), "agreement": float(same.double().mean()), "answers": 1 - spoiled}


@dataclass(frozen=True)
class Trained:
    """An adapter as its own tool saved it, as that tool saved it before training, and the trained model's answers."""

    adapter: Path
    initial: Path | None
    answers: Answers


@torch.inference_mode()
def ask(model: nn.Module, task: Task) -> Answers:
    asked = [scored(model.eval(), batch) for batch in task.test]
    logs = torch.cat([torch.log_softmax(logits.float(), dim=1) for logits, _ in asked])
    counts = torch.cat([(batch["labels"][:, 1:] != IGNORED).sum(dim=1) for batch in task.test])
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    return Answers(logs, torch.cat([right for _, right in asked]), rows)


def with_peft(method: str, task: Task, folder: Path, options: Any) -> Trained:
    """Train with PiSSA or LoRA-GA, as PEFT's documentation does it."""
    model = load_model(task.base, FLOAT32)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=ALPHAS[method] * options.rank,
        target_modules=list(linear_modules(model)),
        init_lora_weights=method,
        lora_ga_config=LoraGAConfig() if method == "lora_ga" else None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    if method == "lora_ga":
        preprocess_loraga(model, config, lambda: backward(model, task.train[: options.probe_steps]))
    model = get_peft_model(model, config)
    save(model, folder / "initial")
    learn(model, task.train, TrainConfig(method="lora", lr=RATES[method]))
    save(model, folder / "adapter")
    return Trained(folder / "adapter", folder / "initial", ask(model, task))


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)


def backward(model: nn.Module, batches: Iterable[Batch]) -> None:
    for batch in batches:
        torch.autograd.backward(mean_loss(model, batch))


def learn(model: nn.Module, batches: Sequence[Batch], config: TrainConfig) -> None:
    """The same loop as fit's, on the same batches: AdamW, a cosine with warm-up and floor."""
    model.train()
    optimizer = make_optimizer(model, config)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cosine_with_floor(
                step, len(batches), warmup=config.warmup, floor=config.floor
            )
        optimizer.zero_grad()
        backward(model, [batch])
        optimizer.step()


def with_gora(task: Task, folder: Path, options: Any) -> Trained:
    """Fit and export, as on the command line."""
    config = FitConfig(
        model=FLOAT32,
        data=DataConfig(max_length=options.max_length, batch_size=options.batch_size),
        probe=ProbeConfig(steps=options.probe_steps),
        ranks=RankConfig(rank=options.rank),
        init=InitConfig(gamma=options.gamma),
        train=TrainConfig(steps=options.steps, lr=RATES["gora"], seed=options.seed),
    )
    run = fit(str(task.base.path), options.data, folder / "run", config)
    adapter = export(run.folder, folder / "adapter").folder
    model = inject.attach(load_model(task.base, FLOAT32), run.adapter.modules, task_type=None, fan_in_fan_out=False)
    return Trained(adapter, None, ask(model, task))


def load(task: Task, adapter: Path) -> Any:
    """What a user of the adapter does: PEFT, on a fresh copy of the base."""
    return PeftModel.from_pretrained(load_model(task.base, FLOAT32), adapter)


def as_plain_lora(adapter: Path, copy: Path) -> Path:
    """Copy the adapter with `init_lora_weights: true`, so that it is added to the base and the base is left alone.

    A server must do so, because the base is not this adapter's alone; vLLM refuses the word "pissa", and its users
    change it to this.
    """
    shutil.copytree(adapter, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": True}))
    return copy


def edits_the_base(task: Task, adapter: Path) -> bool:
    """Tell whether loading the adapter with PEFT changes the weights of the base in memory."""
    before = memory_root(load_model(task.base, FLOAT32))
    return memory_root(inject.detach(load(task, adapter))) != before


def beside(task: Task, first: Path, second: Path) -> Answers:
    """Return the answers of the first adapter once PEFT has loaded the second onto the same base."""
    model = load(task, first)
    model.load_adapter(str(second), adapter_name="second")
    model.set_adapter("default")
    return ask(model, task)


def compare(task: Task, method: str, trained: Trained, folder: Path) -> dict[str, Any]:
    """Put the adapter onto the untouched base, as it is and converted, and return what became of its answers."""
    edits = edits_the_base(task, trained.adapter)
    plain = as_plain_lora(trained.adapter, folder / "as_it_is") if edits else trained.adapter
    found: dict[str, Any] = {
        "trained": {"loss": trained.answers.loss},
        "as_it_is": ask(load(task, plain), task).against(trained.answers),
        "peft_edits_the_base": edits,
    }
    served = trained.adapter
    if method != "gora":
        needed = trained.initial if method == "lora_ga" else None  # PiSSA's can be computed again
        done = convert(trained.adapter, task.base, folder / "converted", inputs=Inputs(init_adapter=needed))
        served = done.folder
        found |= {"family": done.detection.family, "converted": ask(load(task, served), task).against(trained.answers)}
    verify_adapter(served, base=task.base.path)
    ranks = [layer.r["default"] for layer in inject.lora_layers(load(task, served)).values()]
    size = (served / "adapter_model.safetensors").stat().st_size
    return found | {"ranks": [min(ranks), max(ranks)], "bytes": size}


def table(base_loss: float, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the loss on held-out rows, and how many of the trained model's answers are left, one line a method."""
    lines = [
        f"held-out loss of the base: {base_loss:.3f}", "",
        f"{'':8}  {'as trained':>10}  {'on the untouched base, as it is':>31}  {'converted':>17}",
    ]  # fmt: skip
    for method, result in results.items():
        as_it_is, converted = (_cell(result.get(name)) for name in ("as_it_is", "converted"))
        lines.append(f"{NAMES[method]:8}  {result['trained']['loss']:10.3f}  {as_it_is:>31}  {converted:>17}")
    return "\n".join([*lines, "", "loss (share of the answers that are, token by token, the trained model's)"])


def _cell(outcome: Mapping[str, float] | None) -> str:
    return f"{outcome['loss']:.3f} ({outcome['answers']:.0%})" if outcome else "not needed"


def draw(base_loss: float, results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw the losses as bars, on a logarithmic scale: as trained, on the untouched base as it is, and converted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {"trained": ("as trained", "tab:gray"), "as_it_is": ("on the untouched base, as it is", "tab:red"),
            "converted": ("on the untouched base, converted", "tab:blue")}  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8.0, 4.2))
    for offset, (kind, (label, color)) in enumerate(bars.items()):
        there = [(at, result[kind]) for at, result in enumerate(results.values()) if kind in result]
        drawn = axes.bar([at + 0.27 * (offset - 1) for at, _ in there], [one["loss"] for _, one in there], 0.25,
                         label=label, color=color)  # fmt: skip
        texts = [f"{one['loss']:.2f}" + (f"\n{one['answers']:.0%}" if "answers" in one else "") for _, one in there]
        axes.bar_label(drawn, texts, padding=2, fontsize="small")
    axes.axhline(base_loss, color="black", linewidth=1, linestyle=":", label="the base without an adapter")
    axes.set_xticks(range(len(results)), [NAMES[method] for method in results])
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_yscale("log")
    losses = [one["loss"] for result in results.values() for one in (result["trained"], result["as_it_is"])]
    axes.set_ylim(min(losses) / 2, 4 * max(base_loss, *losses))
    axes.set_title("One task, one seed, one base. In per cent: answers left of the trained model's", fontsize="medium")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def prepare(options: Any) -> Task:
    """Return base and batches. Raises GoraError before the work that takes time."""
    base = locate_base(str(options.base or make_smollm2(Path("base"))))
    tokenizer = load_tokenizer(base)
    rows = DataConfig(max_length=options.max_length, batch_size=options.batch_size)

    def batches(data: str, steps: int | None, limit: int | None = None) -> list[Batch]:
        examples = load_data(data, tokenizer, rows).examples[:limit]
        starts = range(0, len(examples), rows.batch_size)
        indices: Sequence[Sequence[int]] = [range(len(examples))[start : start + rows.batch_size] for start in starts]
        if steps is not None:  # the order of fit
            indices = schedule(len(examples), rows.batch_size, batches=steps, seed=options.seed)
        return [collate([examples[i] for i in chosen], tokenizer.pad_token_id) for chosen in indices]

    train = batches(options.data, options.steps)
    return Task(base, train, batches(options.eval_data, None, options.eval_rows))


def run(options: Any) -> None:
    check_target(options.output, protect=[Path(options.base or "base")])
    task = prepare(options)
    options.output.mkdir(parents=True)
    base_loss = ask(load_model(task.base, FLOAT32), task).loss
    adapters, results = {}, {}
    for method in NAMES:
        started = time.perf_counter()
        folder = options.output / method
        trained = with_gora(task, folder, options) if method == "gora" else with_peft(method, task, folder, options)
        adapters[method], results[method] = trained, compare(task, method, trained, folder)
        print(f"{NAMES[method]}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    gora, pissa = adapters["gora"], adapters["pissa"]
    shared = beside(task, gora.adapter, pissa.adapter).against(gora.answers)
    settings = {name: value for name, value in vars(options).items() if name not in ("base", "output")}
    record = {"base": task.base.path.name, "base_loss": base_loss, "settings": settings, "methods": results,
              "gora_after_peft_loaded_pissa_onto_its_base": shared}  # fmt: skip
    (options.output / "gap.json").write_text(json.dumps(record, indent=2) + "\n")
    print(table(base_loss, results))
    print(f"GoRA once PEFT has loaded PiSSA's adapter onto the same base: {_cell(shared)}")
    if find_spec("matplotlib"):
        draw(base_loss, results, options.output / "gap.png")
    else:
        print("no picture without matplotlib: pip install 'gora-serve[report]'", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to be made")
    parser.add_argument("--base", help="model folder or hub id; without it SmolLM2-135M-Instruct, made in `base`")
    parser.add_argument("--data", default=str(TASK / "train.jsonl"), help="rows of prompt and completion")
    parser.add_argument("--eval-data", default=str(TASK / "test.jsonl"), help="held-out rows")
    parser.add_argument("--eval-rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--probe-steps", type=int, default=4, help="batches of the gradient, for LoRA-GA and GoRA")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--gamma", type=float, default=0.3, help="size of GoRA's first step")
    parser.add_argument("--seed", type=int, default=42)
    try:
        run(parser.parse_args(arguments))
    except GoraError as err:  # its text says what to do
        print(err, file=sys.stderr)
        sys.exit(err.exit_code)


if __name__ == "__main__":
    main()
