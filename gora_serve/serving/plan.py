"""From a base, adapters and options to the exact command line and environment of the engine.

Reads headers and configurations only and starts nothing, so `--dry-run` prints the same plan that `engine`
runs. Ranks are those of the tensors, never those of the configuration alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gora_serve.config import ServeConfig
from gora_serve.config import ServeDevice as Device
from gora_serve.errors import BindingError, InputError, MachineError, UsageError
from gora_serve.serving.adapter_names import check_names
from gora_serve.serving.exposure import MIDDLEWARE, guard_environment, url_of
from gora_serve.serving.meter import LOG_REQUESTS
from gora_serve.serving.options import check_options, group_options, single, whole_number
from gora_serve.serving.plugin import ON, RANKS, SWITCH, declare, plugin_environment
from gora_serve.serving.room import SAME_NAMES, Flags, Room, check_lora_options, lora_flags, room_in
from gora_serve.serving.served import ServedAdapter, ServedBase

# Each opens a way to load adapters, code or debug routes that nobody checked, a front end that the guard is not in, or
# logs answers, or lets one be worked on after its request has ended; or has requests answered otherwise than they ask:
# by the base where no model has the name, by another model's folder, by other experts. A name may end in "*".
SCRUBBED = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE", "VLLM_LORA_RESOLVER_*", "VLLM_ALLOW_INSECURE_*",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "VLLM_USE_RUST_FRONTEND", "VLLM_ENABLE_RESPONSES_API_STORE",
    "VLLM_SKIP_MODEL_NAME_VALIDATION", "VLLM_MODEL_REDIRECT_PATH", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
)  # fmt: skip
ENCODER_DECODERS = ("WhisperForConditionalGeneration",)
# Secrets that an engine without a network has no use for: taken away without a word.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Watched:
    """A directory whose adapters are served as they come and go: what they are held to, and what there is room for.

    found: the names that it held when the plan was made, of adapters that may be served.
    """

    folder: Path
    room: Room
    base: ServedBase | None = None
    store: Path | None = None
    strict: bool = False
    found: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServePlan:
    """All that is needed to run the engine. `environment` is what is set for it, `removed` what is taken away.

    `models` lists what /v1/models must show: the base's served name first, then every adapter. `stamps` are those of
    the files that were verified: they must hold when the engine has read them. dtype: as asked for. key_file: where the
    keys are that are not in the environment. watched: the directory of adapters that come and go.
    beside: weight files in the base's folder that are none of the model's; no others may have come. None: not known.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    removed: tuple[str, ...]
    base: Path
    adapters: tuple[ServedAdapter, ...]
    url: str
    models: tuple[str, ...] = ()
    ready_timeout: float = 600.0
    shutdown_timeout: float = 10.0
    stamps: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    dtype: str = "auto"
    key_file: Path | None = None
    watched: Watched | None = None
    beside: tuple[str, ...] | None = None

    @property
    def serves_adapters(self) -> bool:
        return bool(self.adapters) or self.watched is not None

    @property
    def lora_layers(self) -> str:
        """Return whose LoRA layers compute, in words."""
        return "gora-serve's plugin" if self.environment.get(SWITCH) == ON else "vLLM's own"


def plan_server(
    base: Path,
    adapters: Sequence[ServedAdapter],
    config: ServeConfig,
    extra: Sequence[str] = (),
    *,
    watched: Sequence[ServedAdapter] = (),
    environ: Mapping[str, str] | None = None,
) -> ServePlan:
    """Compute the engine's command line. `extra` are vLLM's own options: they come last and replace ours.

    watched: what the directory of `config` holds; the engine is started without these, and with room for them.
    `environ` (default: this process's) is only asked whether there is a key; the key itself is never kept.
    """
    if not (base / "config.json").is_file():
        raise MachineError(
            "not a model folder: it has no config.json",
            code="GS-583",
            hint="give the folder that holds config.json",
            file=base,
        )
    if config.device == "auto":
        raise UsageError(
            "the device must be settled before planning",
            code="GS-286",
            hint="call with_device first",
            expected="cpu or cuda",
        )
    options = group_options(extra)
    served = name_of_base(base, config, options)
    check_names([adapter.name for adapter in adapters], served)
    live = config.adapters_dir is not None
    lora = lora_flags(adapters, watched if live else None, config, options, architecture(base))
    flags = _server_flags(config, served) | lora
    check_options(options, tuple(flags))
    check_lora_options(options, adapters, config, live=live)
    url, guard = listening(config, options, os.environ if environ is None else environ)
    ours = {flag: values for flag, values in flags.items() if flag not in options}
    plugin = plugin_settings((*adapters, *watched) if live else adapters, config, architecture(base))
    drain = whole_number(options, "--shutdown-timeout")
    return ServePlan(
        argv=(*_command(base, config.device), *_words(ours), *extra, *MIDDLEWARE),  # the last one is the outermost
        environment=_environment(config, options) | plugin | guard,
        removed=(*SCRUBBED, *SECRETS, SWITCH, RANKS),
        base=base.resolve(),
        adapters=tuple(adapters),
        url=url,
        models=(served, *(adapter.name for adapter in adapters)),
        ready_timeout=config.ready_timeout,
        shutdown_timeout=float(config.shutdown_timeout if drain is None else drain),
        dtype=single(options, "--dtype") or config.dtype,
        key_file=config.key_file,
        watched=_watched(config.adapters_dir, room_in(lora, options, config.device), watched),
    )


def listening(
    config: ServeConfig, options: Mapping[str, Sequence[str]], environ: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """Return the server's address, and what its guard is told. Raises UsageError (GS-288 and `guard_environment`'s)."""
    host, wanted = single(options, "--host") or config.host, whole_number(options, "--port")
    port = config.port if wanted is None else wanted
    if not 1 <= port <= 65535:
        raise UsageError("not a port", code="GS-288", hint="give another --port", expected="1 to 65535", actual=port)
    return url_of(host, port), guard_environment(host, config.key_file, config.open_routes, environ)


def name_of_base(base: Path, config: ServeConfig, options: Mapping[str, Sequence[str]]) -> str:
    """Return the name that the base is served by."""
    return single(options, "--served-model-name") or config.served_name or base.resolve().name


def _watched(folder: Path | None, room: Room, found: Sequence[ServedAdapter]) -> Watched | None:
    return None if folder is None else Watched(folder.absolute(), room, found=tuple(one.name for one in found))


def with_device(config: ServeConfig, device: Literal["cpu", "cuda"]) -> ServeConfig:
    """Settle "auto"; a device that was asked for stays."""
    return replace(config, device=device) if config.device == "auto" else config


def architecture(base: Path) -> str | None:
    """Return the first of the architectures that the base's config.json names."""
    names = _base_config(base).get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def refuse_encoder_decoder(base: Path) -> None:
    """Raise BindingError (GS-473) for T5, BART and their kin: of encoder-decoders vLLM 0.32 takes adapters for Whisper
    alone (classes of vllm/model_executor/models with SupportsLoRA)."""
    kind = architecture(base)
    if _base_config(base).get("is_encoder_decoder") is True and kind not in ENCODER_DECODERS:
        raise BindingError(
            "vLLM serves no adapters of this encoder-decoder", code="GS-473", file=base / "config.json", actual=kind,
            hint="use the adapter with PEFT: AutoModelForSeq2SeqLM and PeftModel",
        )  # fmt: skip


def _base_config(base: Path) -> dict[str, object]:
    file = base / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as err:
        raise InputError(
            f"cannot read the base's configuration: {err}",
            code="GS-389",
            hint="fetch the base's config.json again",
            file=file,
        ) from err
    return config if isinstance(config, dict) else {}


def _command(base: Path, device: Device) -> tuple[str, ...]:
    # The module behind the `vllm` script: python -m vllm.entrypoints.openai.api_server is deprecated since 0.31.
    module = "gora_serve.serving.vllm_cli" if device == "cpu" else "vllm.entrypoints.cli.main"
    return (sys.executable, "-m", module, "serve", str(base.resolve()))


def _words(flags: Flags) -> list[str]:
    return [word for flag, values in flags.items() for word in (flag, *values)]


def plugin_settings(adapters: Sequence[ServedAdapter], config: ServeConfig, architecture: str | None) -> dict[str, str]:
    """Return what turns the plugin on, with the ranks of every layer where their names are the engine's own."""
    live = config.adapters_dir is not None
    if not uses_plugin(config) or not (adapters or live):
        return {}
    if live and config.rank_headroom is None:
        return plugin_environment(None)  # whatever a directory may bring fits
    modules = [module for adapter in adapters for module in adapter.modules]
    known = architecture in SAME_NAMES and all(one.ranks for one in adapters)
    known = known and not any(".experts." in module for module in modules)
    return plugin_environment(declare([one.ranks for one in adapters], config.rank_headroom or 0) if known else None)


def uses_plugin(config: ServeConfig) -> bool:
    return config.device == "cpu" if config.plugin is None else config.plugin


def _server_flags(config: ServeConfig, served: str) -> Flags:
    flags: Flags = {
        "--served-model-name": (served,),
        "--host": (config.host,),
        "--port": (str(config.port),),
        "--dtype": (config.dtype,),
        "--shutdown-timeout": (str(config.shutdown_timeout),),
    }
    if config.max_model_len is not None:
        flags["--max-model-len"] = (str(config.max_model_len),)
    return flags


def _environment(config: ServeConfig, options: Mapping[str, Sequence[str]]) -> dict[str, str]:
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    environment["VLLM_PLUGINS"] = ""  # no plugin at all; where it is not set, vLLM loads every one that is installed
    if config.log_requests:
        environment[LOG_REQUESTS] = "1"
    if config.device == "cpu" and "--kv-cache-memory-bytes" not in options:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
    return environment
