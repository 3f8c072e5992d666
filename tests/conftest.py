"""Tiny bases, data and adapters that the rooms' tests share. Nothing here needs a network or a GPU."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

# Before any library reads them: no network, and no cache in the user's home.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="gora-serve-tests-")
os.environ["GORA_SERVE_CACHE"] = tempfile.mkdtemp(prefix="gora-serve-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of started processes: none spins while another works
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; tables are as wide as it says
# A run in a script's background has SIGINT ignored, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hub_server import Hub, running_hub
from tiny_models import (
    LLAMA_PATHS,
    MakeAdapter,
    build_bart,
    build_gpt2,
    build_llama,
    build_pair_tokenizer,
    build_t5,
    build_tokenizer,
    color_rows,
    llama_shapes,
    write_jsonl,
)

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors

torch.set_num_threads(1)  # bit-identical runs, and no fight over few cores


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A Llama folder with two shards, an index, a tokenizer and a chat template. Copy it before you edit it."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    build_llama().save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-gpt2"
    build_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair_tokenizer() -> Any:
    return build_pair_tokenizer()


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory, pair_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-t5"
    build_t5().save_pretrained(folder)
    pair_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory: pytest.TempPathFactory, pair_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-bart"
    build_bart().save_pretrained(folder)
    pair_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "colors.jsonl", color_rows())


@pytest.fixture(scope="session")
def make_adapter() -> MakeAdapter:
    """Make an Adapter with these ranks: random A and B, another scale for each module unless one is given."""

    def make(
        ranks: Mapping[str, int],
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        scales: Mapping[str, float] | float | None = None,
        seed: int = 0,
        **fields: Any,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for index, (path, rank) in enumerate(ranks.items()):
            out_features, in_features = (shapes or {}).get(path, (24, 32))
            A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            B = torch.randn(out_features, rank, generator=generator) / rank**0.5
            scale = scales.get(path, 1.0) if isinstance(scales, Mapping) else scales
            modules[path] = LoraFactors(A, B, 0.5 + 0.25 * index if scale is None else scale)
        return Adapter(modules, fields.pop("base", BaseId("tiny")), **fields)

    return make


@pytest.fixture(scope="session")
def tiny_adapter(make_adapter: MakeAdapter) -> Adapter:
    """An adapter for tiny_base with ranks 1, 3 and 8; the last down_proj has rank 0, that is, it is absent."""
    ranks = {path: (1, 3, 8)[index % 3] for index, path in enumerate(LLAMA_PATHS[:-1])}
    return make_adapter(ranks, shapes=llama_shapes())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many KiB, where this machine allows it."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        place = tmp_path / f"disk-{kib}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine that huggingface_hub talks to, with a cache of its own; no other machine can be reached."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with running_hub() as server:
        home = tmp_path / "hub-home"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in hub_environment(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: real(_local(host), *more, **named))
        close_session()
        yield server
        close_session()


def _local(host: Any) -> Any:
    assert host in ("127.0.0.1", b"127.0.0.1", "localhost"), f"{host} would have been contacted"
    return host


def hub_environment(server: Hub, folder: Path) -> dict[str, str]:
    """What a process needs to talk to this hub, with its cache and login below `folder`."""
    return {
        "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hub-home"), "GORA_SERVE_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
