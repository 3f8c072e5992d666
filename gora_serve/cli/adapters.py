"""`export` and `hash`: the standard adapter, and the manifest of its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from gora_serve.cli.options import (
    FILE,
    FOLDER,
    json_option,
    overwrite_option,
    quick_option,
)
from gora_serve.config import Canary, ExportConfig, ExportDtype, Form
from gora_serve.errors import UsageError


@click.command(short_help="Write a run's adapter as standard LoRA, for PEFT and vLLM.")
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


@click.command("hash", short_help="Hash a base: a root for weights, configuration and tokenizer.")
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
