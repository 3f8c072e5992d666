"""What people see of adapters that were merged into one: the method, ranks and errors by kind of module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gora_serve.cli.render import Summary
from gora_serve.cli.render_convert import error_cause, module_table, rank_span
from gora_serve.errors import counted

if TYPE_CHECKING:
    from gora_serve.deploy.combine_files import MergedAdapter


def adapter_summary(done: MergedAdapter) -> Summary:
    """A merged adapter; as JSON it is merge.json with the folder that it lies in."""
    kept = [module.rank for module in done.modules.values() if module.rank]
    left = len(done.modules) - len(kept)
    receipt = done.receipt
    lines = [
        f"{one['adapter']} ({one['family']}), weight {one['applied_weight']:g}" for one in receipt["adapters"]
    ]  # fmt: skip
    lines.append(f"wrote {done.folder}, by {receipt['method']}")
    lines.append(f"{counted(len(kept), 'module')}, ranks {rank_span(kept)}, {receipt['parameters']:,} parameters")
    lines += [f"left out: {counted(left, 'module')} whose update is zero, or below what is kept"] if left else []
    lines += [f"carried whole: {', '.join(receipt['carried'])}"] if receipt["carried"] else []
    cause = error_cause(done.error, done.truncated)
    lines.append(f"error of the written update, over all modules: {done.error:.2e} ({cause})")
    lines.append(f"adapter root {done.root}")
    value = {"adapter": str(done.folder), "warnings": list(done.warnings), **receipt}
    return Summary(value, lines, [module_table(done.modules)])
