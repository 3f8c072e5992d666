"""Tables over all runs: results, what to mind before comparing, settings that differ, time and memory, the base."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gora_serve.report.chart import WIDTH, box, legend, scale_of, swatch, words
from gora_serve.report.markup import MISSING, Figure, Html, Table, code, exact, join, tag
from gora_serve.report.modules import clipped
from gora_serve.report.numbers import duration, percent, short, size
from gora_serve.report.repeat import settings_of
from gora_serve.report.runs import Run
from gora_serve.training.run_files import GO_ON, INTERRUPTED

STAGES = ("probe", "gamma", "train", "evaluate", "verify")


def named(index: int, run: Run) -> Html:
    """The name of a run with its sign."""
    return tag("span", swatch(index), tag("span", run.label), class_="run")


def results_table(runs: Sequence[Run]) -> Table:
    heads = ("run", "loss, end", "loss, base", "parameters", "of LoRA's", "method", "gamma", "steps", "time", "status")
    return Table(
        "Losses are per token, on the evaluation rows", heads, [_result(index, run) for index, run in enumerate(runs)]
    )


def _result(index: int, run: Run) -> list[object]:
    result, ranks = run.record.part("result"), run.ranks
    parameters, lora = (ranks.whole(name) if ranks else None for name in ("parameters", "lora_parameters"))
    share = parameters / lora if parameters is not None and lora else None
    gamma, seconds = result.number("gamma"), seconds_of(run)
    return [
        named(index, run), exact(run.final_loss, short(run.final_loss)), exact(run.base_loss, short(run.base_loss)),
        exact(parameters, "" if parameters is None else f"{parameters:,}"), exact(share, percent(share)), run.method,
        exact(gamma, short(gamma)), str(len(run.losses)) if run.losses else MISSING,
        exact(seconds, duration(seconds)), status(run),
    ]  # fmt: skip


def status(run: Run) -> Html:
    kind = "good" if run.is_complete else "bad" if run.status == "failed" else "open"
    return tag("span", run.status, class_=f"badge {kind}")


def headline(runs: Sequence[Run]) -> str:
    """The result in a sentence or two."""
    measured = [run for run in runs if run.is_complete and run.final_loss is not None]
    if not measured:
        return "No complete run with evaluation rows: there is no final loss to tell."
    if _have_other_rows(runs):
        return "The runs were evaluated on different rows: there is no lowest loss to tell."
    best = min(measured, key=lambda run: run.final_loss or 0.0)
    start = f", from the base's {short(best.base_loss)}" if best.base_loss is not None else ""
    lead = "Loss on the evaluation rows:" if len(runs) == 1 else f"Lowest loss on the evaluation rows: {best.label},"
    return f"{lead} {short(best.final_loss)}{start}."


def cautions(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before believing a comparison: failures, and inputs that are not the same."""
    found = [_unfinished(run) for run in runs if not run.is_complete]
    found += [f"{run.label}: no evaluation rows, so there is no loss on unseen data." for run in runs
              if run.is_complete and not run.evaluations]  # fmt: skip
    found += [f"{run.label} was resumed: its time is that of all training, and of the last process besides."
              for run in runs if run.is_resumed]  # fmt: skip
    lost = [(run, sum(y is None for _, y in (*run.losses, *run.evaluations))) for run in runs]
    found += [
        f"{run.label}: {count} of the losses {'is' if count == 1 else 'are'} not finite; the curves have a cross there."
        for run, count in lost
        if count
    ]
    if len(runs) < 2:
        return found
    if len({_root(run) for run in runs}) > 1:
        found.append("The runs have different bases: their losses are no measure of the method.")
    if len({run.record.part("data").text("sha256") for run in runs}) > 1:
        found.append("The runs were trained on different data.")
    if _have_other_rows(runs):
        found.append("The runs were evaluated on different rows: their evaluation losses cannot be compared.")
    if len({settings_of(run).get("train.seed") for run in runs}) == 1:
        found.append("All runs have the same seed: small differences can be chance.")
    return found


def _have_other_rows(runs: Sequence[Run]) -> bool:
    """Return whether not all runs were evaluated on the same rows, of those that were."""
    return len({run.record.part("eval_data").text("sha256") for run in runs if run.evaluations}) > 1


def _unfinished(run: Run) -> str:
    error = run.record.part("error")
    what, fault = error.text("what"), error.text("code")
    why = f": {f'{fault}, ' if fault else ''}{what}" if what else ""
    why = f": {GO_ON}" if run.status == INTERRUPTED else why
    return f"{run.label} is {run.status}{why}. What it left so far is shown."


def _root(run: Run) -> str | None:
    return run.record.part("base").part("roots").text("weights")


def settings_table(runs: Sequence[Run]) -> Table | None:
    """The settings in which the runs differ, a column a run; of one run, None."""
    by_run = [settings_of(run) for run in runs]
    by_run = [
        {"base": run.base, "data": run.record.part("data").text("name"), **found}
        for run, found in zip(runs, by_run, strict=True)
    ]
    names = list(dict.fromkeys(name for found in by_run for name in found))
    rows = [
        [name, *(_setting(found.get(name)) for found in by_run)]
        for name in names
        if len({json.dumps(found.get(name), sort_keys=True) for found in by_run}) > 1
    ]
    if not rows:
        return None
    return Table(
        "Settings that are not the same in all runs", ("setting", *(run.label for run in runs)), rows, numeric=False
    )


def _setting(value: object) -> str:
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value)


def time_figure(runs: Sequence[Run]) -> Figure | None:
    """Seconds by stage, one bar a run."""
    timed = [(run, stages_of(run)) for run in runs if run.record.number("seconds")]
    if not timed:
        return None
    longest = max(sum(stages.values()) for _, stages in timed)
    x = scale_of([0.0, longest], 0.0, WIDTH - 90, zero=True)
    parts = []
    for row, (run, stages) in enumerate(timed):
        y, start = row * 40.0, 0.0
        parts.append(words(clipped(run.label), 0, y + 12))
        for index, (stage, seconds) in enumerate(stages.items()):
            parts.append(
                box(
                    x(start),
                    y + 17,
                    x(start + seconds) - x(start),
                    14,
                    f"bar s{index}",
                    f"{run.label}, {stage}: {duration(seconds)}",
                )
            )
            start += seconds
        parts.append(words(duration(start), x(start) + 5, y + 28))
    names = [*STAGES, "rest"]
    shown = [(index, name) for index, name in enumerate(names) if any(stages[name] for _, stages in timed)]
    says = "The whole run by stage; rest: loading the model, hashing the base, writing. " + " ".join(
        f"{run.label}: {duration(sum(stages.values()))}, of it training {duration(stages['train'])}."
        for run, stages in timed
    )
    rows = [[run.label, *(exact(stages[name], duration(stages[name])) for name in names)] for run, stages in timed]
    table = Table("Seconds by stage", ("run", *names), rows)
    return Figure("time", "Time", says, (WIDTH, 40.0 * len(timed)), join(parts), table, bars_legend(shown))


def bars_legend(names: Sequence[tuple[int, str]]) -> Html:
    return Html(legend(names, line=False).replace('class="legend"', 'class="legend bars"'))


def seconds_of(run: Run) -> float | None:
    """Seconds of the whole run, as `stages_of` has them; None where it does not say so."""
    whole = run.record.number("seconds")
    return sum(stages_of(run).values()) if whole is not None and run.is_resumed else whole


def stages_of(run: Run) -> dict[str, float]:
    """Seconds of every stage, and the rest of the run's. Of a resumed run, run.json has those of the last process;
    metrics.jsonl has those of training in all of them.
    """
    known = run.record.part("result").part("seconds_by_stage").numbers()
    if not known and run.seconds is not None:
        known = {"train": run.seconds}
    stages = {name: known.get(name, 0.0) for name in STAGES}
    rest = max(0.0, (run.record.number("seconds") or 0.0) - sum(stages.values()))
    if run.is_resumed:
        stages["train"] = max(stages["train"], run.seconds or 0.0)
    return {**stages, "rest": rest}


def cost_table(runs: Sequence[Run]) -> Table:
    heads = (
        "run",
        "time",
        "tokens trained on",
        "tokens/s",
        "most memory, host",
        "most memory, device",
        "device",
        "processes",
    )
    return Table("Time and memory", heads, [_cost(index, run) for index, run in enumerate(runs)])


def _cost(index: int, run: Run) -> list[object]:
    seconds, peak = seconds_of(run), run.record.part("result").part("peak_bytes")
    host, device = peak.whole("host"), peak.whole("device")
    speed = run.tokens / run.seconds if run.tokens is not None and run.seconds else None
    return [
        named(index, run), exact(seconds, duration(seconds)),
        exact(run.tokens, "" if run.tokens is None else f"{run.tokens:,}"), exact(speed, short(speed, 3)),
        exact(host, size(host)), exact(device, size(device)),
        run.record.text("device") or MISSING, str(run.record.whole("processes") or MISSING),
    ]  # fmt: skip


def base_verdict(run: Run) -> tuple[str, str]:
    """Return the class and the words that say whether the base is proved to be as it was."""
    pairs = roots_of(run)
    if any(after is not None and after != before for _, before, after in pairs):
        return "bad", "The base CHANGED: roots before and after differ."
    if not run.is_complete or any(after is None for _, before, after in pairs if before is not None):
        return "open", "Not proved: the run did not reach the check after training."
    return "good", "Unchanged: files and memory were hashed before and after training."


def roots_of(run: Run) -> list[tuple[str, str | None, str | None]]:
    """Return (part of the base, root before, root after)."""
    base, after = run.record.part("base").part("roots"), run.record.part("base_after")
    found = [(name, base.text(name), after.part("roots").text(name)) for name in ("weights", "config", "tokenizer")]
    return [*found, ("weights in memory", run.record.text("memory_root"), after.text("memory_root"))]


def roots_table(runs: Sequence[Run]) -> Table:
    """The roots of the base of these runs, which all have the same ones."""
    rows = []
    for name, before, after in roots_of(runs[0]):
        same = "the same" if before is not None and before == after else code(after) if after else MISSING
        rows.append([name, code(before) if before else MISSING, same])
    caption = f"Roots of {runs[0].base}, as {' and '.join(run.label for run in runs)} used it"
    return Table(caption, ("part", "before", "after"), rows, numeric=False)


def adapters_table(runs: Sequence[Run]) -> Table | None:
    """The roots of the trained adapters, each of which agrees with its seal."""
    rows = [[named(index, run), code(run.adapter_root)] for index, run in enumerate(runs) if run.adapter_root]
    return (
        Table("Roots of the trained adapters; their seals hold", ("run", "root"), rows, numeric=False) if rows else None
    )
