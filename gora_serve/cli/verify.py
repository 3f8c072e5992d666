"""`verify`: the proof of what an adapter, a base or a merged model is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from gora_serve.cli.options import FILE, FOLDER, Weighted, json_option, quick_option, source_options
from gora_serve.config import BaseAs, MergeConfig
from gora_serve.errors import UsageError

SOURCES = {  # of the options of adapters: their names here, and those of `Inputs`
    "init_adapter": "init_adapter", "mutated_base": "mutated_base", "cache": "cache", "allow_pickle": "pickles",
}  # fmt: skip


@click.command(short_help="Prove files, tensors and base, by hashing every byte.")
@click.argument("path", type=FOLDER)
@click.option("--base", help="The base that the adapter must belong to, or that a merged model was made of.")
@click.option(
    "-a", "--adapter", "adapters", multiple=True, type=Weighted(),
    help="PATH is a merged model: it must be --base with this merged into it. Repeatable.",
)  # fmt: skip
@click.option(
    "--base-as", default=MergeConfig.base_as, show_default=True, type=click.Choice(get_args(BaseAs)),
    help="Of a merged model: whether updates were added to the weights as stored (bf16), or to what NF4 makes of them. "
    "auto: as merge.json says, where the manifest of the folder proves it; else bf16.",
)  # fmt: skip
@click.option("--manifest", type=FILE, help="PATH is a base: it must be the one of this manifest, made by hash.")
@click.option(
    "--against", type=click.Choice(["hub"]),
    help="Compare every file of PATH with the digest that the hub reports for its commit, downloading nothing.",
)  # fmt: skip
@click.option("--repo", metavar="ORG/NAME@REV", help="With --against hub: what the folder PATH is a copy of.")
@click.option("--strict", is_flag=True, help="Refuse another configuration or tokenizer of --base, not only weights.")
@quick_option
@source_options
@json_option
def verify(
    path: Path,
    base: str | None,
    adapters: tuple[tuple[str, float], ...],
    base_as: BaseAs,
    manifest: Path | None,
    against: str | None,
    repo: str | None,
    strict: bool,
    quick: bool,
    as_json: bool,
    **source: Any,
) -> int:
    """Prove an adapter (or the adapter of a run) against its own manifest and its base, by hashing every byte.

    The report names its level: L2 is every byte, L0 (--quick) only that files stand as when they were hashed.

    PATH may be a hub id with its revision, ORG/NAME@REV: it is downloaded at that commit and checked. With --against
    hub it is a base or an adapter, as a folder or as an id that is in the cache.

    With --adapter it is a merged model, of gora-serve or of any other tool: every tensor is merged again and compared.
    The answer is bit-exact, within rounding, or which tensors differ. --from, --init-adapter, --mutated-base, --cache
    and --allow-pickle are for these adapters, --base-as for the model.

    Exit status: 0 proved; 1 some bytes differ; 4 the adapter belongs to another base; 5 the hub cannot be asked.
    """
    if manifest and base:
        raise UsageError(
            "give --manifest to verify a base, or --base to verify an adapter",
            code="GS-206",
            hint="leave one of them out",
        )
    if (against and (manifest or base or strict or quick)) or (repo and not against):
        raise UsageError(
            "--against hub takes --repo, and no other proof; --repo is for it alone",
            code="GS-264",
            hint="gora-serve COMMAND --help tells what goes together",
        )
    if against:
        return _verify_against_hub(path, repo, as_json=as_json)
    if adapters:
        if base is None or manifest or strict or quick:
            raise UsageError(
                "a merged model is proved by --base and --adapter, and by nothing else", code="GS-264",
                hint="gora-serve verify MERGED --base BASE -a ADAPTER",
            )  # fmt: skip
        return _verify_merge(path, base, adapters, base_as, source, as_json=as_json)
    if source["family"] != "auto" or any(source[name] for name in SOURCES) or base_as != "auto":
        raise UsageError(
            "--base-as, --from, --init-adapter, --mutated-base, --cache and --allow-pickle go with --adapter",
            code="GS-264", hint="gora-serve verify MERGED --base BASE -a ADAPTER",
        )  # fmt: skip
    if strict and not (base or manifest):
        raise UsageError(
            "--strict compares with a base, and none was given", code="GS-264",
            hint="gora-serve verify ADAPTER --base BASE --strict",
        )  # fmt: skip
    return _verify_bytes(path, base, manifest, strict=strict, quick=quick, as_json=as_json)


def _verify_bytes(
    path: Path, base: str | None, manifest: Path | None, *, strict: bool, quick: bool, as_json: bool
) -> int:
    """Hash an adapter, a merged model, or a base against `manifest`."""
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_adapters import verify_summary
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.cache import QuickCache
    from gora_serve.integrity.verify import find_adapter, is_merged_model, verify_adapter, verify_base, verify_model

    cache = QuickCache() if quick else None
    with watching() as listen:
        if manifest:
            folder = path if path.exists() or "@" not in str(path) else locate_base(str(path)).path
            done = verify_base(folder, manifest, listen=listen, cache=cache)
        elif is_merged_model(path) and base is None:
            done = verify_model(path, cache=cache)
        else:
            located = locate_base(base).path if base else None
            found = find_adapter(locate_adapter(path))
            done = verify_adapter(found, base=located, strict=strict, listen=listen, cache=cache)
    emit(verify_summary(done), as_json=as_json)
    return 0


def _verify_merge(
    path: Path, base: str, adapters: tuple[tuple[str, float], ...], base_as: BaseAs, source: Mapping[str, Any], *,
    as_json: bool,
) -> int:  # fmt: skip
    """Merge again, and compare."""
    from converters.merging import verify_merged
    from converters.reading import Inputs
    from gora_serve.cli.render import answer, say
    from gora_serve.cli.render_merge import refusal, replay_summary
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.reading import naming_inputs
    from gora_serve.training.quantize import nf4_rounder

    with watching() as listen, naming_inputs():
        folders = [(locate_adapter(name), weight) for name, weight in adapters]
        located = locate_base(base)
        merged = locate_base(str(path)).path
        inputs = Inputs(listen=listen, **{field: source[name] for name, field in SOURCES.items()})
        done = verify_merged(merged, folders, located, source["family"], inputs, base_as=base_as, rounder=nf4_rounder)
    for warning in done.warnings:
        say(f"warning: {warning}")
    refused = refusal(done) if done.replay.verdict == "differs" else None
    return answer(replay_summary(done), refused, as_json=as_json)


def _verify_against_hub(path: Path, repo: str | None, *, as_json: bool) -> int:
    from gora_serve.cli.render import answer
    from gora_serve.cli.render_hub import against_hub_summary, refusal
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.against_hub import verify_against_hub

    with watching() as listen:
        compared = verify_against_hub(str(path), repo, listen=listen)
    return answer(against_hub_summary(compared), refusal(compared) if compared.faults else None, as_json=as_json)
