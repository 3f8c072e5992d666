"""Every default value, once: one frozen dataclass per stage. The command line reads its defaults from here.

`validate` refuses values that make no sense before any work starts; nothing else happens in this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from gora_serve.errors import UsageError

RankRule = Literal["paper", "exact"]
Importance = Literal["sensitivity", "sensitivity-nuclear", "gradient-nuclear"]
ProbeMode = Literal["exact", "sketch", "auto"]
Method = Literal["gora", "lora"]
Dtype = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["none", "nf4"]
Offload = Literal["none", "cpu", "disk"]
ExportDtype = Literal["float32", "bfloat16", "float16"]
ServeDevice = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["text", "json"]
Form = Literal["unit", "padded", "native"]
Canary = Literal["auto", "always", "none"]
TrainedOn = Literal["auto", "stored", "float32", "bfloat16", "float16", "nf4"]
MergeInto = Literal["model", "adapter"]
MergeMethod = Literal["cat", "linear", "svd", "ties", "dare"]
MergeDtype = Literal["auto", "float32", "bfloat16", "float16"]
BaseAs = Literal["auto", "bf16", "nf4"]
Track = Literal["none", "tensorboard", "wandb"]

# They decide no number: a run may be resumed with others.
FREE_SETTINGS = frozenset({"model.offload", "train.save_every", "train.track"})
MOST_STEPS = 10**7
MOST_ROWS = 10**8  # that all steps take together: their order is drawn at once
IMPORTANCES: tuple[Importance, ...] = get_args(Importance)
ROW_FIELDS = ({"prompt", "completion"}, {"messages"}, {"text"})  # of data: one of these sets
LARGEST_LR = 1e37  # what float32 holds, with room for Adam's own factors
TAKES = "gora-serve COMMAND --help says what each option takes, and its default"


def _require(condition: bool, what: str, **fields: object) -> None:
    if not condition:
        raise UsageError(what, code="GS-201", **({"hint": TAKES} | fields))  # type: ignore[arg-type]


def check_rows(rows: int, *, hint: str) -> None:
    """Refuse steps that take more rows, all together, than an order is drawn for. Raises UsageError."""
    expected = f"at most {MOST_ROWS} rows: steps x --batch-size x --grad-accum x processes"
    _require(rows <= MOST_ROWS, "all steps together take too many rows", expected=expected, actual=rows, hint=hint)


@dataclass(frozen=True)
class ModelConfig:
    """Which modules of the base are adapted, the dtype that its weights are loaded in, and where they are kept.

    With `quantize` nf4 the linear layers lie in memory in 4 bits, and `dtype` is what they compute in.
    `offload`: "cpu" or "disk" keep the weights there; the device holds those of one block at a time.
    """

    targets: str = "all-linear"
    dtype: Dtype = "auto"
    quantize: Quantize = "none"
    offload: Offload = "none"


@dataclass(frozen=True)
class DataConfig:
    """How rows become tokens. `max_length` counts prompt and completion together, in tokens.

    For an encoder-decoder it holds for each of the two. columns: where the fields of a row are that are called
    otherwise, as "prompt=question,completion=answer"; other columns are then not looked at.
    """

    max_length: int = 512
    chat_template: bool = True
    batch_size: int = 8
    columns: str | None = None

    @property
    def column_of(self) -> dict[str, str]:
        """Return the column of each field that `columns` names."""
        pairs = (one.partition("=") for one in (self.columns or "").split(","))
        return {field.strip(): column for field, _, column in pairs if field or column}

    def validate(self) -> None:
        _require(self.max_length >= 2, "--max-length must be at least 2", actual=self.max_length)
        _require(self.batch_size >= 1, "--batch-size must be at least 1", actual=self.batch_size)
        named = self.column_of
        once = (self.columns or "").count(",") == len(named) - 1  # a name given twice has one place here
        whole = set(named) in ROW_FIELDS and all(named.values()) and once
        expected = "prompt=COLUMN,completion=COLUMN, or messages=COLUMN, or text=COLUMN"
        _require(
            self.columns is None or whole, "--columns names the fields of a row", expected=expected, actual=self.columns
        )


@dataclass(frozen=True)
class ProbeConfig:
    """The gradient probe: `steps` micro-batches (N of the paper's algorithm 1), and the importance metrics.

    steps "auto" stops before `longest` once the rank plan stands still. The first metric of `importance` decides the
    ranks; the others are recorded beside it. mode "exact" keeps whole gradients, "sketch" what B needs of them and
    a sample of rows, "auto" exact while the gradients fit `memory` (GiB; None: half of what is free). error: the
    relative standard error of a sketch's importances, which sets how many rows are sampled. lr above 0 is GoRA-pro:
    the weights take a step of SGD after each micro-batch, and are put back afterwards.
    """

    steps: int | Literal["auto"] = 64
    mode: ProbeMode = "auto"
    importance: tuple[Importance, ...] = ("sensitivity",)
    memory: float | None = None
    error: float = 0.012
    lr: float = 0.0
    longest: int = 64

    @property
    def most_steps(self) -> int:
        return self.longest if self.steps == "auto" else self.steps

    @property
    def needs_exact(self) -> bool:
        """Whether something is asked for that a sketch cannot give."""
        return self.lr > 0 or any(name != "sensitivity" for name in self.importance)

    def validate(self) -> None:
        fits = self.steps == "auto" or 1 <= self.steps <= MOST_STEPS
        _require(fits, f"--probe-steps must be 'auto' or between 1 and {MOST_STEPS}", actual=self.steps)
        unknown = [name for name in self.importance if name not in IMPORTANCES]
        known = ", ".join(IMPORTANCES)
        _require(bool(self.importance) and not unknown, "unknown --importance", expected=known, actual=unknown)
        finite = self.memory is None or 0 <= self.memory < float("inf")
        _require(finite, "--probe-memory must be finite and not negative", actual=self.memory)
        _require(1e-4 <= self.error < 1, "--probe-error must be at least 0.0001 and less than 1", actual=self.error)
        _require(0 <= self.lr <= LARGEST_LR, f"--probe-lr must be between 0 and {LARGEST_LR:g}", actual=self.lr)
        _require(
            self.mode != "sketch" or not self.needs_exact,
            "--probe sketch cannot give nuclear norms or GoRA-pro (--probe-lr)", hint="--probe exact",
        )  # fmt: skip


@dataclass(frozen=True)
class RankConfig:
    """Reference rank and bounds (paper, appendix B.3: rank_min = rank / 2, rank_max = 4 * rank)."""

    rank: int = 8
    rank_min: int | None = None
    rank_max: int | None = None
    rule: RankRule = "paper"

    @property
    def lowest(self) -> int:
        return max(1, self.rank // 2) if self.rank_min is None else self.rank_min

    @property
    def highest(self) -> int:
        return 4 * self.rank if self.rank_max is None else self.rank_max

    def validate(self) -> None:
        _require(self.rank >= 1, "--rank must be at least 1", actual=self.rank)
        _require(self.lowest >= 0, "--rank-min must not be negative", actual=self.lowest)
        inside = self.lowest <= self.rank <= self.highest
        bounds = f"{self.lowest} <= {self.rank} <= {self.highest}"
        _require(inside, "the ranks must be in order", expected="--rank-min <= --rank <= --rank-max", actual=bounds)


@dataclass(frozen=True)
class InitConfig:
    """Initialisation: alpha of the forward scale, and the step size γ ("auto": searched by forward passes)."""

    alpha: float = 16.0
    gamma: float | Literal["auto"] = "auto"
    search_batches: int = 4

    def validate(self) -> None:
        _require(0 < self.alpha < float("inf"), "--alpha must be positive and finite", actual=self.alpha)
        finite = self.gamma == "auto" or (not isinstance(self.gamma, str) and 0 <= self.gamma < float("inf"))
        _require(finite, "--gamma must be 'auto' or a number that is not negative", actual=self.gamma)
        _require(self.search_batches >= 1, "search_batches must be at least 1", actual=self.search_batches)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: AdamW with the paper's settings (appendix B.3, table 9).

    `lr` is that of A; B learns `lr_ratio` times faster (16 for GoRA, 1 for LoRA where it is None). One of
    `steps` (optimiser steps) and `epochs` is given; both None means one epoch. `save_every`: optimiser steps between
    two checkpoints; None means a tenth of the run. `track`: where the lines of metrics.jsonl go as well.
    """

    method: Method = "gora"
    steps: int | None = None
    epochs: float | None = None
    grad_accum: int = 1
    lr: float = 5e-5
    lr_ratio: float | None = None
    warmup: float = 0.03
    floor: float = 0.1
    weight_decay: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    track: Track = "none"
    seed: int = 42

    @property
    def ratio(self) -> float:
        if self.lr_ratio is not None:
            return self.lr_ratio
        return 16.0 if self.method == "gora" else 1.0

    def count_steps(self, rows: int, batch_size: int, processes: int) -> tuple[int, int]:
        """Return how many optimizer steps so many rows make, and rows a step. A batch holds a row once."""
        per_step = min(batch_size, rows) * self.grad_accum * processes
        wanted = int(round(rows * (self.epochs or 1.0), 6))  # 0.29 * 100 is a little less than 29
        return self.steps or -(-wanted // per_step) or 1, per_step

    def saves_at(self, step: int, steps: int) -> bool:
        """Return whether a checkpoint is due after step `step` of `steps`, 1-based."""
        return step == steps or step % (self.save_every or -(-steps // 10)) == 0

    def validate(self) -> None:
        _require(self.steps is None or self.epochs is None, "give --steps or --epochs, not both")
        fits = self.steps is None or 1 <= self.steps <= MOST_STEPS
        _require(fits, f"--steps must be between 1 and {MOST_STEPS}", actual=self.steps)
        fits = self.epochs is None or 0 < self.epochs < 1e6
        _require(fits, "--epochs must be more than 0 and less than 1000000", actual=self.epochs)
        _require(self.grad_accum >= 1, "--grad-accum must be at least 1", actual=self.grad_accum)
        _require(0 <= self.lr <= LARGEST_LR, f"--lr must be between 0 and {LARGEST_LR:g}", actual=self.lr)
        _require(0 < self.ratio < float("inf"), "--lr-ratio must be positive", actual=self.ratio)
        faster = self.lr * self.ratio
        _require(faster <= LARGEST_LR, f"--lr times --lr-ratio must be at most {LARGEST_LR:g}", actual=faster)
        _require(0 <= self.warmup <= 1, "--warmup must be between 0 and 1", actual=self.warmup)
        _require(0 <= self.floor <= 1, "floor must be between 0 and 1", actual=self.floor)
        _require(0 <= self.weight_decay < float("inf"), "--weight-decay must not be negative", actual=self.weight_decay)
        norm, every, save = self.max_grad_norm, self.eval_every, self.save_every
        _require(norm is None or norm > 0, "--max-grad-norm must be positive", actual=norm)
        _require(every is None or every >= 1, "--eval-every must be at least 1", actual=every)
        _require(save is None or save >= 1, "--save-every must be at least 1", actual=save)
        _require(0 <= self.seed < 2**32, "--seed must be between 0 and 2^32 - 1", actual=self.seed)


@dataclass(frozen=True)
class FitConfig:
    """Everything that `fit` needs beside the base, the data and the output folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    ranks: RankConfig = field(default_factory=RankConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        for part in (self.data, self.probe, self.ranks, self.init, self.train):
            part.validate()
        if self.model.quantize != "none":
            what = "--quantize nf4 packs the weights, which GoRA-pro would have to move"
            _require(not self.probe.lr, what, expected="no --probe-lr", actual=self.probe.lr)
        still = not self.probe.lr or self.model.offload == "none"
        _require(still, "exploratory steps (--probe-lr) move weights, which --offload keeps elsewhere")
        together = self.model.quantize == "none" or self.model.offload == "none"
        _require(together, "--offload moves weights that --quantize packs", expected="one of the two")


@dataclass(frozen=True)
class PlanConfig:
    """What memory is planned for: `fit`'s own settings, and how many processes share the work.

    sharded: each of the processes holds its share of the weights (FSDP2); else each holds all. device: what computes.
    padded: rows of unequal length, as data has them. mixed_precision: as for training.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    ranks: RankConfig = field(default_factory=RankConfig)
    processes: int = 1
    sharded: bool = False
    device: Literal["gpu", "cpu"] = "gpu"
    padded: bool = True
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"

    def validate(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        self.data.validate()
        self.ranks.validate()
        _require(self.processes >= 1, "--processes must be at least 1", actual=self.processes)
        _require(self.processes > 1 or not self.sharded, "--sharded needs several --processes", actual=self.processes)
        packed = self.sharded and self.model.quantize != "none"
        _require(not packed, "weights that --quantize packs are not sharded", hint="--quantize none, or no --sharded")


@dataclass(frozen=True)
class DemoConfig:
    """The demo: settings that two cores can run in minutes on a model of 135M parameters."""

    rank: int = 4
    probe_steps: int = 8
    steps: int = 24
    lr: float = 4e-4
    search_batches: int = 2
    prompts: int = 8
    max_tokens: int = 32


@dataclass(frozen=True)
class ExportConfig:
    """The form of the exported adapter, the dtype of its tensors, and whether it gets a fingerprint of its answers.

    gguf: also as a file for llama.cpp.
    """

    form: Form = "unit"
    dtype: ExportDtype = "float32"
    canary: Canary = "auto"
    gguf: bool = False


@dataclass(frozen=True)
class ConvertConfig:
    """How a foreign adapter becomes plain LoRA. With neither `rank` nor `tolerance` it keeps its numerical rank.

    rank: the parameter budget is LoRA's at this rank, and the largest singular values of all modules get it; what the
    experts of a layer need to be of one rank, as engines want them, comes on top.
    tolerance: the smallest ones are dropped, up to this share of the adapter's Frobenius norm. family: "auto" decides.
    """

    family: str = "auto"
    rank: int | None = None
    tolerance: float | None = None
    form: Form = "unit"
    dtype: ExportDtype = "float32"

    def validate(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        _require(
            self.rank is None or self.tolerance is None, "give --rank or --tolerance", hint="leave one of them out"
        )
        hint = "a whole number such as --rank 16; without --rank, as many as the update has"
        _require(self.rank is None or self.rank >= 1, "--rank must be at least 1", actual=self.rank, hint=hint)
        fits = self.tolerance is None or 0 <= self.tolerance < 1
        hint = "a share of the update's norm, such as --tolerance 0.01"
        _require(fits, "--tolerance must be at least 0 and less than 1", actual=self.tolerance, hint=hint)


@dataclass(frozen=True)
class GapConfig:
    """What `gap` compares, and how much error is too much.

    dtype: what the factors are stored in; engines cast them to the model's dtype. threshold: of |served - dW| / |dW|,
    over all modules. Rounding to bfloat16, which every adapter goes through, costs 0.002 to 0.004; an edited base costs
    more than the update itself: 0.01 lies between. trained_on: what the base's weights lay in while the adapter was
    trained; "stored": as they are stored, which "auto" takes where the adapter says nothing. tasks: of the cost of
    deployment. max_rows: of the data, the first ones.
    """

    family: str = "auto"
    dtype: ExportDtype = "bfloat16"
    threshold: float = 0.01
    trained_on: TrainedOn = "auto"
    tasks: int = 10
    max_rows: int = 64

    def validate(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        fits = 0 <= self.threshold < float("inf")
        _require(fits, "--threshold must be finite and not negative", actual=self.threshold)
        _require(self.tasks >= 1, "--tasks must be at least 1", actual=self.tasks)
        _require(self.max_rows >= 1, "--max-rows must be at least 1", actual=self.max_rows)


@dataclass(frozen=True)
class MergeConfig:
    """How adapters become a model, or one adapter.

    dtype: "auto" keeps the base's for a model, and is float32 for an adapter. base_as: what the updates are added to,
    for adapters that were trained on a base in 4 bits: the weights as they are stored ("bf16", and what "auto" takes),
    or what NF4 makes of them. method, rank, tolerance, parameters and form are an adapter's. parameters: how many there
    may be over all modules.
    """

    family: str = "auto"
    into: MergeInto = "model"
    dtype: MergeDtype = "auto"
    base_as: BaseAs = "auto"
    method: MergeMethod = "cat"
    rank: int | None = None
    tolerance: float | None = None
    parameters: int | None = None
    density: float | None = None
    form: Form = "unit"
    seed: int = 0

    def validate(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        limits = [one for one in (self.rank, self.tolerance, self.parameters) if one is not None]
        _require(len(limits) <= 1, "give one of --rank, --tolerance and --parameters")
        _require(self.rank is None or self.rank >= 1, "--rank must be at least 1", actual=self.rank)
        fits = self.tolerance is None or 0 <= self.tolerance < 1
        _require(fits, "--tolerance must be at least 0 and less than 1", actual=self.tolerance)
        fits = self.parameters is None or self.parameters >= 1
        _require(fits, "--parameters must be at least 1", actual=self.parameters)
        fits = self.density is None or 0 < self.density <= 1
        _require(fits, "--density must be above 0 and at most 1", actual=self.density)
        fits = self.density is None or self.method in ("ties", "dare")
        _require(fits, "--density is for --method ties and dare", actual=self.method)
        of_adapter = limits or self.density is not None or self.method != "cat" or self.form != "unit"
        fits = self.into == "adapter" or not of_adapter
        _require(fits, "--method, --density, --rank, --tolerance, --parameters and --form are for --into adapter")
        _require(self.into == "model" or self.base_as == "auto", "--base-as is for --into model")


@dataclass(frozen=True)
class ServeConfig:
    """How to serve. `device` "auto" is decided by the installed engine; `kv_cache_gib` counts on CPU only."""

    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    max_model_len: int | None = None
    device: ServeDevice = "auto"
    kv_cache_gib: int = 1
    ready_timeout: float = 600.0
    shutdown_timeout: int = 10
    served_name: str | None = None
    store: Path | None = None  # of the verified copies; None is the user's cache
    key_file: Path | None = None
    open_routes: tuple[str, ...] = ()
    log_format: LogFormat = "text"
    log_requests: bool = False
    adapters_dir: Path | None = None  # is watched: its adapters are served as they come and go
    max_adapters: int = 8  # at once, where a directory is watched; or as many as there are at the start
    max_rank: int = 32  # of one that comes: what `fit` makes at most by default; or the largest at the start
    plugin: bool | None = None  # in the engine; None: on CPU
    rank_headroom: int | None = None  # of adapters that come later; None: all that `max_rank` lets in, where they may


@dataclass(frozen=True)
class ReportConfig:
    """Where the page of `report` goes where no place is given."""

    output: Path = Path("report.html")
