"""vLLM's own LoRA manager with the plugin: adapters of a small model come and go, and float64 says what is right."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from gora_serve.errors import BindingError
from gora_serve.serving.plugin import RANKS
from gora_serve.vllm_plugin.kernel import has_kernel

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
]
WIDE, INNER, VOCABULARY = 32, 64, 96  # sizes that can be packed; the vocabulary's padding is 32
EMBED, HEAD = "model.embed_tokens", "lm_head"
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
GATE_UP = "model.layers.0.mlp.gate_up_proj"
SHAPES = {
    EMBED: (WIDE, VOCABULARY),
    GATE: (INNER, WIDE),
    UP: (INNER, WIDE),
    DOWN: (WIDE, INNER),
    HEAD: (VOCABULARY, WIDE),
}
SLOTS, LOADED = 3, 4
Adapter = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # A (r, in) and B (out, r), scaled, by module


@pytest.fixture
def plugin(vllm_layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM with the plugin, for one test."""
    from vllm.platforms import current_platform

    from gora_serve.vllm_plugin import hooks
    from gora_serve.vllm_plugin.register import WRAPPER
    from gora_serve.vllm_plugin.sizes import declared

    def replace(kind: type, name: str, make: Any) -> None:
        monkeypatch.setattr(kind, name, make(kind.__dict__[name]))

    monkeypatch.delenv(RANKS, raising=False)
    declared.cache_clear()
    monkeypatch.setattr(hooks, "_replace", replace)
    monkeypatch.setattr(hooks, "_installed", [])
    hooks.install_pools()
    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: WRAPPER))


def make_model(dtype: torch.dtype) -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.models.interfaces import SupportsLoRA
    from vllm.utils.torch_utils import set_default_torch_dtype

    class Model(torch.nn.Module, SupportsLoRA):  # type: ignore[misc]
        embedding_modules: ClassVar = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}
        packed_modules_mapping: ClassVar = {"gate_up_proj": ["gate_proj", "up_proj"]}

        def __init__(self) -> None:
            super().__init__()
            mlp = torch.nn.Module()
            mlp.gate_up_proj = MergedColumnParallelLinear(WIDE, [INNER, INNER], bias=False, prefix=GATE_UP)
            mlp.down_proj = RowParallelLinear(INNER, WIDE, bias=False, prefix=DOWN)
            layer = torch.nn.Module()
            layer.mlp = mlp
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList([layer])
            self.model.embed_tokens = VocabParallelEmbedding(VOCABULARY, WIDE, prefix=EMBED)
            self.lm_head = ParallelLMHead(VOCABULARY, WIDE, prefix=HEAD)
            self.logits_processor, self.config = LogitsProcessor(VOCABULARY), None

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.logits_processor(self.lm_head, hidden_states)

    with set_default_torch_dtype(dtype):
        model = Model()
    torch.manual_seed(0)
    model.weights = {}  # in float64; vLLM may pack its own
    for module in (*model.model.layers[0].mlp.children(), model.model.embed_tokens, model.lm_head):
        model.weights[module.prefix] = module.weight.data.normal_().double()
        module.quant_method.process_weights_after_loading(module)
    return model


def make_worker(*, sharded: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """What a worker of vLLM has for LoRA, over the model."""
    from vllm.config import get_current_vllm_config
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    model = make_model(torch.float32 if dtype == torch.float16 else dtype)
    worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    worker.lora_config = LoRAConfig(
        max_lora_rank=8, max_loras=SLOTS, max_cpu_loras=LOADED, lora_dtype=dtype, fully_sharded_loras=sharded
    )
    worker._lora_model_cls, worker.embedding_modules = LoRAModel, model.embedding_modules
    worker.max_position_embeddings, worker.vocab_size = None, VOCABULARY
    worker.max_num_seqs, worker.max_num_batched_tokens, worker.device = 16, 64, torch.device("cpu")
    worker.create_lora_manager(model, get_current_vllm_config())
    return worker


def draw(
    chance: random.Random, *, full: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Ranks 0 to 8 in each module, at least one of them in one; all 8 where it is full."""
    ranks = {module: 8 if full else chance.choice([0, 0, 1, 3, 5, 8]) for module in SHAPES}
    ranks[chance.choice([*SHAPES])] = 8
    generator = torch.Generator().manual_seed(chance.randrange(2**31))

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        module: (values(rank, wide), values(out, rank))
        for module, (out, wide) in SHAPES.items()
        if (rank := ranks[module])
    }


def request(folder: Path, number: int, adapter: Adapter, *, inplace: bool = False, scale: float = 0.5) -> Any:
    """Write an adapter as PEFT does, with one alpha for its ranks of 8, and return the request for it."""
    from vllm.lora.request import LoRARequest

    path = folder / f"{number}-{len([*folder.iterdir()])}"
    path.mkdir()
    ranks = {module: a.shape[0] for module, (a, _) in adapter.items()}
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8 * scale, "target_modules": sorted({*ranks}), "bias": "none",
        "rank_pattern": ranks, "alpha_pattern": {module: rank * scale for module, rank in ranks.items()},
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    names = {EMBED: ("lora_embedding_A", "lora_embedding_B")}
    tensors = {}
    for module, (a, b) in adapter.items():
        first, second = names.get(module, ("lora_A.weight", "lora_B.weight"))
        tensors[f"base_model.model.{module}.{first}"] = a
        tensors[f"base_model.model.{module}.{second}"] = b / scale
    save_file(tensors, path / "adapter_model.safetensors")
    return LoRARequest(f"adapter-{number}", number, str(path), load_inplace=inplace)


class Step:
    """A batch: some tokens for each of several requests, each with an adapter's number or 0."""

    def __init__(self, chance: random.Random, numbers: list[int], dtype: torch.dtype = torch.float32) -> None:
        self.counts = [chance.randint(1, 9) for _ in numbers]
        self.numbers = [number for number, count in zip(numbers, self.counts, strict=True) for _ in range(count)]
        self.sampled = numbers
        total = len(self.numbers)
        self.tokens = torch.tensor([chance.randrange(VOCABULARY) for _ in range(total)], dtype=torch.int32)
        self.x, self.h = torch.randn(total, WIDE).to(dtype), torch.randn(total, INNER).to(dtype)
        self.last = torch.tensor(self.counts).cumsum(0) - 1

    def mapping(self) -> Any:
        from vllm.lora.layers import LoRAMapping

        return LoRAMapping(tuple(self.numbers), tuple(self.sampled), is_prefill=True)

    def served(self, manager: Any) -> dict[str, torch.Tensor]:
        layers, model = manager.modules, manager.model
        return {
            EMBED: layers[EMBED](self.tokens),
            GATE_UP: layers[GATE_UP](self.x)[0],
            DOWN: layers[DOWN](self.h)[0],
            HEAD: model.compute_logits(self.x[self.last]),
        }

    def right(self, manager: Any, adapters: Mapping[int, Adapter]) -> dict[str, torch.Tensor]:
        weights = manager.model.weights
        onehot = torch.nn.functional.one_hot(self.tokens.long(), VOCABULARY).double()
        rows = {EMBED: onehot, GATE_UP: self.x.double(), DOWN: self.h.double(), HEAD: self.x[self.last].double()}
        slices = {EMBED: (EMBED,), GATE_UP: (GATE, UP), DOWN: (DOWN,), HEAD: (HEAD,)}
        found = {}
        for name, x in rows.items():
            weight = weights[name][:VOCABULARY] if name in (EMBED, HEAD) else weights[name]
            y = x @ (weight if name == EMBED else weight.t())
            start = 0
            for part in slices[name]:
                out = SHAPES[part][0]
                for row, number in enumerate(self.sampled if name == HEAD else self.numbers):
                    if part in adapters.get(number, {}):
                        a, b = adapters[number][part]
                        y[row, start : start + out] += b.double() @ (a.double() @ x[row])
                start += out
            found[name] = y
        return found


def _of(name: str, told: str) -> str:
    return f"{name}: {told}"


def check(worker: Any, step: Step, adapters: Mapping[int, Adapter]) -> None:
    served, right = step.served(worker._adapter_manager), step.right(worker._adapter_manager, adapters)
    for name, expected in right.items():
        # bfloat16 has 8 bits, and sums of up to 64 products; another adapter's share is as large as the largest value
        atol = 1e-4 if step.x.dtype == torch.float32 else 0.02 * float(expected.abs().max())
        torch.testing.assert_close(served[name].double(), expected, rtol=1e-4, atol=atol, msg=partial(_of, name))


@pytest.mark.parametrize(
    ("dtype", "sharded"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["float32", "fully sharded", "bfloat16"],
)
@pytest.mark.parametrize("seed", range(4))
def test_adapters_that_come_and_go_are_each_their_own_tokens(
    plugin: None, tmp_path: Path, seed: int, dtype: torch.dtype, sharded: bool
) -> None:
    """More adapters than slots and than memory; some are removed, some loaded again in their place with other ranks."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    worker = make_worker(sharded=sharded, dtype=dtype)
    adapters: dict[int, Adapter] = {number: draw(chance, dtype=dtype) for number in range(1, 7)}
    requests = {number: request(tmp_path, number, adapter) for number, adapter in adapters.items()}
    for _ in range(40):
        number = chance.choice([*adapters])
        match chance.choice(["ask", "ask", "ask", "remove", "replace"]):
            case "remove":
                worker.remove_adapter(number)
            case "replace":
                adapters[number] = draw(chance, dtype=dtype)
                worker.add_adapter(request(tmp_path, number, adapters[number], inplace=True))
                requests[number] = request(tmp_path, number, adapters[number])
        active = chance.sample([*adapters], chance.randint(0, SLOTS))
        step = Step(chance, [chance.choice([0, *active]) for _ in range(chance.randint(1, 6))], dtype)
        worker.set_active_adapters({requests[one] for one in active}, step.mapping())
        check(worker, step, adapters)
    packed = {name for name, layer in worker._adapter_manager.modules.items() if is_packed(layer)}
    assert packed == ({GATE_UP, DOWN, HEAD} if dtype == torch.bfloat16 and has_kernel() else set())


def is_packed(layer: Any) -> bool:
    from gora_serve.vllm_plugin.hooks import pool_of

    pool = pool_of(layer)
    return pool is not None and pool.packed


def test_as_many_adapters_as_vllm_holds_may_have_the_largest_rank(plugin: None, tmp_path: Path) -> None:
    """Only those in slots take room: each waits in memory for its turn."""
    chance = random.Random(0)
    worker = make_worker()
    adapters = {number: draw(chance, full=True) for number in range(1, LOADED + 1)}
    requests = {number: request(tmp_path, number, adapter) for number, adapter in adapters.items()}
    for one in requests.values():
        worker.add_adapter(one)
    assert worker.list_adapters() == {*requests}
    for active in ([1, 2, 3], [4, 2, 3], [1, 4, 3], [2, 1, 4]):
        step = Step(chance, [0, *active])
        worker.set_active_adapters({requests[one] for one in active}, step.mapping())
        check(worker, step, adapters)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["as they are", "times their scale"])
def test_values_that_are_not_finite_change_nothing(plugin: None, tmp_path: Path, scale: float) -> None:
    """A version that is refused is not half loaded in the place of the older one."""
    chance = random.Random(1)
    worker = make_worker(dtype=torch.float16)
    good = draw(chance, full=True)
    worker.add_adapter(request(tmp_path, 1, good))
    bad = {module: (a.clone(), b.clone()) for module, (a, b) in draw(chance, full=True).items()}
    bad[DOWN][1][0, 0] = 1e5 if scale > 1 else float("nan")
    with pytest.raises(BindingError, match="not finite") as caught:
        worker.add_adapter(request(tmp_path, 1, bad, inplace=True, scale=scale))
    assert caught.value.code == "GS-4802"
    assert caught.value.fields["tensor"] == DOWN
    with pytest.raises(BindingError, match="not finite"):
        worker.add_adapter(request(tmp_path, 2, bad, scale=scale))
    assert worker.list_adapters() == {1}
    down = worker._adapter_manager.modules[DOWN].lora_a_stacked.pool.part(0, 0)
    assert torch.equal(down[0], good[DOWN][0].half())


def test_plan_counts_what_is_allocated(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan -a` has the bytes of the pools that are made for the same adapters."""
    from gora_serve.serving.plugin import declare, dump_declared
    from gora_serve.serving.slots import AdapterShapes, plan_pools
    from gora_serve.vllm_plugin.hooks import pool_of
    from gora_serve.vllm_plugin.sizes import declared, layer_of, pool_rows

    ranks = [{GATE: 3, DOWN: 8, HEAD: 2}, {UP: 5, DOWN: 1, EMBED: 4}]
    known = declare(ranks, 0)
    monkeypatch.setenv(RANKS, dump_declared(known))
    declared.cache_clear()
    layers = make_worker()._adapter_manager.modules.values()
    declared.cache_clear()
    pools = [pool for layer in layers if (pool := pool_of(layer)) is not None]
    planned = plan_pools(
        [AdapterShapes(str(index), one, SHAPES, 4) for index, one in enumerate(ranks)], SHAPES,
        {path: pool_rows(known, path, SLOTS, 8) for path in SHAPES},
        slots=SLOTS, layers=len({layer_of(path) for path in SHAPES}), width=4, room=0,
    )  # fmt: skip
    assert (planned.bytes, planned.layers) == (sum(pool.nbytes for pool in pools), len(pools))
    assert planned.bytes == sum(one.bytes for one in planned.adapters)


class Runner:
    """Of vLLM's runner what computes the log probabilities of prompts, which takes the rows of each request."""

    def __init__(self, worker: Any, asked: list[int], step: Step) -> None:
        self.lora_config, self.lora_manager = worker.lora_config, worker
        self.model, self.num_prompt_logprobs = worker._adapter_manager.model, dict.fromkeys(asked, 1)
        self._step = step

    def logits(self, hidden_states: torch.Tensor, counts: Mapping[int, int]) -> dict[int, torch.Tensor]:
        starts = [0, *torch.tensor(self._step.counts).cumsum(0).tolist()]
        return {
            one: self.model.compute_logits(hidden_states[starts[one] : starts[one] + counts[one]])
            for one in self.num_prompt_logprobs
        }


@pytest.mark.parametrize("numbers", [[1], [0], [2, 1], [0, 2, 1, 0]])
def test_a_prompts_log_probabilities_are_of_its_own_adapter(plugin: None, tmp_path: Path, numbers: list[int]) -> None:
    from gora_serve.vllm_plugin import hooks

    chance = random.Random(2)
    worker = make_worker()
    adapters = {number: draw(chance, full=True) for number in (1, 2)}
    step = Step(chance, numbers)
    worker.set_active_adapters({request(tmp_path, *one) for one in adapters.items()}, step.mapping())
    counts = {index: max(count - index % 2, 1) for index, count in enumerate(step.counts)}
    runner = Runner(worker, [*counts], step)
    found = hooks._prompt_logprobs(Runner.logits)(
        runner, torch.cat([step.x, torch.randn(3, WIDE)])[: len(step.x)], counts
    )
    head = runner.model.weights[HEAD][:VOCABULARY]
    for index, number in enumerate(numbers):
        start = sum(step.counts[:index])
        x = step.x[start : start + counts[index]].double()
        a, b = (
            part.double()
            for part in adapters.get(number, {HEAD: (torch.zeros(1, WIDE), torch.zeros(VOCABULARY, 1))})[HEAD]
        )
        torch.testing.assert_close(found[index].double(), x @ head.t() + x @ a.t() @ b.t(), rtol=1e-4, atol=1e-4)
    check(worker, step, adapters)  # what is sampled from has its own rows again


def test_what_a_prompt_replaces_of_the_runner_is_there(vllm_layers: None) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert CPUModelRunner._get_prompt_logprobs_dict is GPUModelRunner._get_prompt_logprobs_dict
