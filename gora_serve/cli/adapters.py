"""`export`, `hash` and `verify`: the standard adapter, and the proof of what it and its base are."""

from __future__ import annotations

from pathlib import Path

import click

from gora_serve.cli.options import FILE, FOLDER, json_option, overwrite_option
from gora_serve.config import ExportConfig, ExportDtype, Form
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
@overwrite_option
@json_option
def export(run: Path, output: Path, form: Form, dtype: ExportDtype, overwrite: bool, as_json: bool) -> None:
    """Write the adapter of a finished run as standard LoRA safetensors, which PEFT and vLLM load.

    RUN may also be an adapter that gora-serve exported before, to write it in another form.
    """
    from gora_serve.cli.render import emit, export_summary
    from gora_serve.training.export import export as export_adapter

    done = export_adapter(run, output, ExportConfig(form, dtype), overwrite=overwrite)
    emit(export_summary(done, form, dtype), as_json=as_json)


@click.command("hash")
@click.argument("base")
@click.option("--output", type=FILE, help="Write the manifest, for verify --manifest.")
@overwrite_option
@json_option
def hash_(base: str, output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Hash a base: one root for its weights, one for its configuration, one for its tokenizer.

    The weights root depends on each tensor's name, type, shape and bytes, and on nothing else: the same weights
    in other shards have the same root. --json prints the whole manifest.
    """
    from gora_serve.cli.render import emit, hash_summary, watching
    from gora_serve.integrity.bases import locate_base
    from gora_serve.integrity.files import refuse_existing, write_json
    from gora_serve.integrity.manifest import hash_model

    if output and not overwrite:
        refuse_existing(output)
    with watching() as listen:
        located = locate_base(base)
        if output and output.resolve().is_relative_to(located.path.resolve()):
            hint = "choose a place outside of it"
            raise UsageError("the manifest is never written into the base", code="GS-208", file=output, hint=hint)
        manifest = hash_model(located.path, listen=listen)
    if output:
        write_json(output, manifest.to_json())
    emit(hash_summary(located, manifest, output), as_json=as_json)


@click.command()
@click.argument("path", type=FOLDER)
@click.option("--base", help="The base that the adapter must belong to.")
@click.option("--manifest", type=FILE, help="PATH is a base: it must be the one of this manifest, made by hash.")
@click.option("--strict", is_flag=True, help="Refuse another configuration or tokenizer too, not only other weights.")
@json_option
def verify(path: Path, base: str | None, manifest: Path | None, strict: bool, as_json: bool) -> None:
    """Prove an adapter (or the adapter of a run) against its own manifest and its base, by hashing every byte.

    Exit status: 0 proved; 1 some bytes differ; 4 the adapter belongs to another base.
    """
    from gora_serve.cli.render import emit, verify_summary, watching
    from gora_serve.integrity.bases import locate_base
    from gora_serve.integrity.verify import find_adapter, verify_adapter, verify_base

    if manifest and base:
        raise UsageError("give --manifest to verify a base, or --base to verify an adapter", code="GS-206")
    with watching() as listen:
        if manifest:
            done = verify_base(path, manifest, listen=listen)
        else:
            located = locate_base(base).path if base else None
            done = verify_adapter(find_adapter(path), base=located, strict=strict, listen=listen)
    emit(verify_summary(done), as_json=as_json)
