"""Adapters over a residual model: official PiSSA, MiLoRA, CorDA's own repository, LLaMA-Factory's pissa_init.

The configuration says `true`, as for plain LoRA; the base it names is the residual model, W0 less the initial part.
That model, its `pissa_init` sub-folder, or one beside the adapter, is found by itself and named in the method.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from converters.fresh import check_either
from converters.initial import Rules, read_without_initial
from converters.reading import Inputs, Reading
from converters.source import Source


def read(source: Source, inputs: Inputs) -> Reading:
    """Read an adapter over a residual model. Raises UsageError (GS-232) where neither P0 nor W_res is found."""
    base = inputs.need_base("an adapter over a residual model")
    rules = Rules("residual", check=partial(check_either, base), mutated=base_beside(source, inputs))
    return read_without_initial(source, inputs, rules)


def base_beside(source: Source, inputs: Inputs) -> Path | None:
    """Return the model folder that the configuration names, if it is there and is not the untouched base."""
    name = source.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    base = inputs.need_base("an adapter over a residual model")
    for folder in (Path(name), source.folder / name):
        try:
            if (folder / "config.json").is_file() and folder.resolve() != base.folder.resolve():
                return folder
        except OSError:  # no path at all, or one that may not be searched
            continue
    return None
