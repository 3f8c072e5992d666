"""`export`, `hash` and `verify`: the standard adapter, and the proof of what it and its base are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from gora_serve.cli.options import (
    FILE,
    FOLDER,
    Weighted,
    json_option,
    overwrite_option,
    quick_option,
    source_options,
)
from gora_serve.config import BaseAs, Canary, ExportConfig, ExportDtype, Form, MergeConfig
from gora_serve.errors import UsageError


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--output", required=True, type=FOLDER, metavar="DIR", help="Folder of the adapter.")
@click.option(
    "--form", default=ExportConfig.form, show_default=True, type=click.Choice(["unit", "padded", "native"]),
    help="unit: scale folded in. padded: one rank, for any engine. native: rsLoRA and patterns, to train on.",
)  # fmt: skip
@click.option(
    "--dtype", default=ExportConfig.dtype, show_default=True, type=click.Choice(["float32", "bfloat16", "float16"])
)
@click.option(
    "--canary", default=ExportConfig.canary, show_default=True, type=click.Choice(["auto", "always", "none"]),
    help="Put a fingerprint of its answers into the manifest, which serve holds the engine to. auto: where the base is"
    " a folder here, of up to 2^30 parameters.",
)  # fmt: skip
@click.option(
    "--gguf", is_flag=True, default=ExportConfig.gguf, help="Write adapter_model.gguf too, for llama.cpp's --lora."
)
@click.option(
    "--base", metavar="BASE", help="With --gguf: where the base's config.json is.  [default: as the adapter says]"
)
@click.option(
    "--push", metavar="ORG/NAME", help="Then upload it to this repository of the Hugging Face hub, in one commit."
)
@click.option("--public", is_flag=True, help="With --push: a repository that is made is public.  [default: private]")
@overwrite_option
@json_option
def export(
    run: Path,
    output: Path,
    form: Form,
    dtype: ExportDtype,
    canary: Canary,
    gguf: bool,
    base: str | None,
    push: str | None,
    public: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the adapter of a finished run as standard LoRA safetensors, which PEFT and vLLM load.

    RUN may also be an adapter that gora-serve exported or converted before, to write it in another form. With --gguf
    the folder holds it for llama.cpp as well, with the scale folded in, read back and compared.

    --push uploads adapter, manifest and model card, and then compares what the hub says of the commit with the files
    here. The token is HF_TOKEN's, or that of `hf auth login`.
    """
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_adapters import export_summary
    from gora_serve.cli.render_hub import with_push
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.push import push_folder, push_target
    from gora_serve.training.export import export as export_adapter

    if public and push is None:
        raise UsageError(
            "--public says how to push: it needs --push",
            code="GS-264",
            hint="gora-serve COMMAND --help tells what goes together",
        )
    if base is not None and not gguf:
        raise UsageError(
            "--base says which base --gguf is for: it needs --gguf", code="GS-264",
            hint="gora-serve COMMAND --help tells what goes together",
        )  # fmt: skip
    target = push_target(push) if push is not None else None
    with watching():
        done = export_adapter(run, output, ExportConfig(form, dtype, canary, gguf), base=base, overwrite=overwrite)
    summary = export_summary(done, form, dtype)
    if target:
        with watching():
            summary = with_push(summary, push_folder(done.folder, target, public=public))
    emit(summary, as_json=as_json)


@click.command("hash")
@click.argument("base")
@click.option("--output", type=FILE, help="Write the manifest, for verify --manifest.")
@click.option("--oms", type=FILE, help="Write a statement of all files in OpenSSF Model Signing's form, to be signed.")
@quick_option
@overwrite_option
@json_option
def hash_(base: str, output: Path | None, oms: Path | None, quick: bool, overwrite: bool, as_json: bool) -> None:
    """Hash a base: one root for its weights, one for its configuration, one for its tokenizer.

    The weights root depends on each tensor's name, type, shape and bytes, and on nothing else: the same weights
    in other shards have the same root. --json prints the whole manifest.
    """
    from gora_serve.cli.render import emit, say
    from gora_serve.cli.render_adapters import hash_summary
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_base
    from gora_serve.integrity.cache import QuickCache
    from gora_serve.integrity.file_targets import check_file
    from gora_serve.integrity.files import make_parents, refuse_existing, write_json
    from gora_serve.integrity.known import remember_manifest
    from gora_serve.integrity.levels import Level
    from gora_serve.integrity.manifest import hash_model, make_manifest
    from gora_serve.integrity.oms import oms_statement
    from gora_serve.integrity.verify import other_files

    cache = QuickCache() if quick else None
    outputs = [path for path in (output, oms) if path]
    if output and oms and output.resolve() == oms.resolve():
        hint = "give --oms a file of its own"
        raise UsageError("--output and --oms name the same file", code="GS-208", file=oms, hint=hint)
    for path in outputs if not overwrite else ():
        refuse_existing(path)  # before a base is fetched
    with watching() as listen:
        located = locate_base(base)
        for path in outputs:
            if path.resolve().is_relative_to(located.path.resolve()):
                hint = "choose a place outside of it"
                raise UsageError("the manifest is never written into the base", code="GS-208", file=path, hint=hint)
            check_file(path, "manifest" if path == output else "statement", overwrite=overwrite)
        of_folder = make_manifest if outputs or as_json else hash_model
        manifest = of_folder(located.path, listen=listen, cache=cache)
        remember_manifest(manifest)
        for warning in other_files(located.path):
            say(f"warning: {warning}")
        statement = oms_statement(located.path, manifest, cache=cache) if oms else None
    if located.revision:
        manifest = replace(manifest, source={"repo_id": located.name, "revision": located.revision})
    if output:
        write_json(make_parents(output), manifest.to_json(), overwrite=overwrite)
    if oms:
        write_json(make_parents(oms), statement, overwrite=overwrite)
    emit(hash_summary(located, manifest, outputs, cache.level if cache else Level.BYTES), as_json=as_json)


@click.command()
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
@click.option("--strict", is_flag=True, help="Refuse another configuration or tokenizer too, not only other weights.")
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
    family: str,
    init_adapter: Path | None,
    mutated_base: Path | None,
    cache: Path | None,
    allow_pickle: bool,
    as_json: bool,
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
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_adapters import verify_summary
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.cache import QuickCache
    from gora_serve.integrity.verify import find_adapter, is_merged_model, verify_adapter, verify_base, verify_model

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
        return _against_hub(path, repo, as_json=as_json)
    given = {"init_adapter": init_adapter, "mutated_base": mutated_base, "cache": cache, "pickles": allow_pickle}
    if adapters:
        if base is None or manifest or strict or quick:
            raise UsageError(
                "a merged model is proved by --base and --adapter, and by nothing else", code="GS-264",
                hint="gora-serve verify MERGED --base BASE -a ADAPTER",
            )  # fmt: skip
        return _verify_merge(path, base, adapters, family, given, base_as, as_json=as_json)
    if family != "auto" or any(given.values()) or base_as != "auto":
        raise UsageError(
            "--base-as, --from, --init-adapter, --mutated-base, --cache and --allow-pickle go with --adapter",
            code="GS-264", hint="gora-serve verify MERGED --base BASE -a ADAPTER",
        )  # fmt: skip
    quick_cache = QuickCache() if quick else None
    with watching() as listen:
        if manifest:
            folder = path if path.exists() or "@" not in str(path) else locate_base(str(path)).path
            done = verify_base(folder, manifest, listen=listen, cache=quick_cache)
        elif is_merged_model(path) and base is None:
            done = verify_model(path, cache=quick_cache)
        else:
            located = locate_base(base).path if base else None
            found = find_adapter(locate_adapter(path))
            done = verify_adapter(found, base=located, strict=strict, listen=listen, cache=quick_cache)
    emit(verify_summary(done), as_json=as_json)
    return 0


def _verify_merge(
    path: Path, base: str, adapters: tuple[tuple[str, float], ...], family: str, given: Mapping[str, Any],
    base_as: BaseAs, *, as_json: bool,
) -> int:  # fmt: skip
    from converters.merging import verify_merged
    from converters.reading import Inputs
    from gora_serve.cli.render import answer, say
    from gora_serve.cli.render_merge import refusal, replay_summary
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.reading import naming_inputs
    from gora_serve.integrity.verify import adapter_of_run
    from gora_serve.training.quantize import nf4_rounder

    with watching() as listen, naming_inputs():
        folders = [(adapter_of_run(locate_adapter(name)), weight) for name, weight in adapters]
        located = locate_base(base)
        merged = locate_base(str(path)).path
        inputs = Inputs(listen=listen, **given)
        done = verify_merged(merged, folders, located, family, inputs, base_as=base_as, rounder=nf4_rounder)
    for warning in done.warnings:
        say(f"warning: {warning}")
    refused = refusal(done) if done.replay.verdict == "differs" else None
    return answer(replay_summary(done), refused, as_json=as_json)


def _against_hub(path: Path, repo: str | None, *, as_json: bool) -> int:
    from gora_serve.cli.render import answer
    from gora_serve.cli.render_hub import against_hub_summary, refusal
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.against_hub import verify_against_hub

    with watching() as listen:
        compared = verify_against_hub(str(path), repo, listen=listen)
    return answer(against_hub_summary(compared), refusal(compared) if compared.faults else None, as_json=as_json)
