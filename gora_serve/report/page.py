"""The page: sections in their order, one HTML file with its own style, no script and no address outside of itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import gora_serve
from gora_serve.errors import UsageError
from gora_serve.integrity.file_targets import check_file
from gora_serve.integrity.files import write_stream
from gora_serve.report import curves, modules, overview, repeat
from gora_serve.report.gaps import GapFile, gap_figure, gap_tables, read_gap, verdict
from gora_serve.report.markup import Figure, Html, Table, escape, folded, join, tag
from gora_serve.report.runs import Run, find_run, read_runs

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    body: Html

    def html(self) -> Html:
        return tag("section", tag("h2", self.title, id=self.name), self.body, aria_labelledby=self.name)


def write_report(
    folders: Sequence[Path], output: Path, *, gaps: Sequence[Path] = (), overwrite: bool = False
) -> list[Run]:
    """Read runs and gap files and write the page; return the runs. The same inputs give the same bytes.

    Raises UsageError for an output that lies in a run (GS-243), OutputError where it exists, and as `read_runs` and
    `read_gap`. Nothing is written then.
    """
    check_output(output, [find_run(folder) for folder in folders], gaps)
    check_file(output, "page", overwrite=overwrite)
    runs = read_runs(folders)
    page = render(runs, [read_gap(file) for file in gaps])
    with write_stream(output, overwrite=overwrite) as stream:
        stream.write(page.encode("utf-8"))
    return runs


def check_output(output: Path, folders: Iterable[Path], gaps: Iterable[Path]) -> None:
    """Raise UsageError (GS-243) for an output that is, or lies in, what the page is made from."""
    place = output.resolve()
    for folder in folders:
        if folder.resolve() in (place, *place.parents):
            raise UsageError(
                "the page would lie in a run", code="GS-243", file=output, hint="choose a place outside of it"
            )
    if place in [file.resolve() for file in gaps] or output.is_dir():
        raise UsageError(
            "the page would replace another thing than a page",
            code="GS-243",
            file=output,
            hint="name a file, page.html",
        )


def render(runs: Sequence[Run], gaps: Sequence[GapFile] = ()) -> str:
    """Return the page as text."""
    sections = [section for section in _sections(runs, gaps) if section.body]
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Html(POLICY)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} - gora-serve"),
        Html(f"<style>{_style()}</style>"),
    )
    body = tag(
        "body",
        tag("a", "Skip to the results", href="#main", class_="skip"),
        _header(title, runs, sections),
        tag("main", *(section.html() for section in sections), id="main"),
        tag("footer", tag("p", f"Made by gora-serve {gora_serve.__version__} from the files of the runs.")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _style() -> str:
    return files("gora_serve.report").joinpath("style.css").read_text(encoding="utf-8")


def _header(title: str, runs: Sequence[Run], sections: Sequence[Section]) -> Html:
    bases = list(dict.fromkeys(run.base for run in runs))
    on = f"on {bases[0]}" if len(bases) == 1 else f"on {len(bases)} bases"
    links = (tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections)
    return tag(
        "header",
        tag("p", "gora-serve report", class_="eyebrow"),
        tag("h1", title),
        tag("p", on, class_="on"),
        tag("p", overview.headline(runs), class_="lead"),
        tag("nav", tag("ul", *links), aria_label="Sections"),
    )


def _sections(runs: Sequence[Run], gaps: Sequence[GapFile]) -> list[Section]:
    return [
        Section("results", "Results", _results(runs)),
        Section("loss", "Loss", _grid([curves.evaluation_figure(runs), curves.training_figure(runs)])),
        Section("ranks", "Ranks and updates", _modules(runs)),
        Section("gamma", "First step", _gamma(runs)),
        Section("parameters", "Parameters", _grid(
            modules.parameters_figure(run, index, f"parameters-{index}") for index, run in enumerate(runs)
        )),
        Section("cost", "Time and memory", join([
            overview.cost_table(runs).html(), _grid([overview.time_figure(runs)])
        ])),
        Section("gap", "Training/inference gap", _gaps(gaps)),
        Section("base", "The base", _base(runs)),
        Section("repeat", "Repeat it", _repeat(runs)),
    ]  # fmt: skip


def _results(runs: Sequence[Run]) -> Html:
    cautions = overview.cautions(runs)
    listed = tag("ul", *(tag("li", one) for one in cautions))
    noted = (
        tag("aside", tag("h3", "Before you compare" if len(runs) > 1 else "To know"), listed, class_="mind")
        if cautions
        else Html()
    )
    settings = overview.settings_table(runs) if len(runs) > 1 else None
    differ = folded("Settings that differ", settings.html()) if settings else Html()
    return join([overview.results_table(runs).html(), noted, differ])


def _grid(figures: Iterable[Figure | None]) -> Html:
    drawn = [figure.html() for figure in figures if figure is not None]
    return tag("div", *drawn, class_="figures") if drawn else Html()


def _modules(runs: Sequence[Run]) -> Html:
    lora = [run for run in runs if run.method == "lora" and run.updates]
    figures: list[Figure | None] = []
    for index, run in enumerate(runs):
        figures += [modules.ranks_figure(run, f"ranks-{index}"), modules.updates_figure(run, f"updates-{index}")]
        if len(lora) == 1 and run.method == "gora":
            figures.append(modules.against_lora(run, lora[0], f"beside-lora-{index}"))
    return join([*map(_one_rank, runs), _grid(figures)])


def _one_rank(run: Run) -> Html:
    if not modules.has_one_rank(run):
        return Html()
    return tag("p", f"{run.label}: every module has rank {next(iter(run.module_ranks.values()))}.")


def _gamma(runs: Sequence[Run]) -> Html:
    found = _grid(curves.gamma_figure(run, index, f"gamma-{index}") for index, run in enumerate(runs))
    what = "Gamma sets the size of the first step, which the compressed gradient makes before any training."
    return join([tag("p", what), found]) if found else found


def _gaps(gaps: Sequence[GapFile]) -> Html:
    parts = []
    for index, one in enumerate(gaps):
        base = one.record.text("base") or "the base"
        says = tag(
            "p", tag("strong", verdict(one)), f" {one.adapter} ({one.record.text('family') or 'unknown'}) on {base}."
        )
        parts.append(tag("article", says, _grid([gap_figure(one, f"gap-{index}")]), gap_tables(one)))
    return join(parts)


def _base(runs: Sequence[Run]) -> Html:
    """Runs whose roots are the same share a table."""
    groups: dict[object, list[tuple[int, Run]]] = {}
    for index, run in enumerate(runs):
        key = (run.base, tuple(overview.roots_of(run)), overview.base_verdict(run))
        groups.setdefault(key, []).append((index, run))
    parts = []
    for group in groups.values():
        kind, says = overview.base_verdict(group[0][1])
        title = tag("h3", *(overview.named(index, run) for index, run in group), class_="several")
        verdict = tag("p", tag("span", says, class_=f"badge {kind}"))
        parts.append(tag("article", title, verdict, overview.roots_table([run for _, run in group]).html()))
    adapters = overview.adapters_table(runs)
    return join([*parts, adapters.html() if adapters else ""])


def _repeat(runs: Sequence[Run]) -> Html:
    return join(_command(index, run) for index, run in enumerate(runs))


def _command(index: int, run: Run) -> Html:
    rest = repeat.without_option(run)
    said = (
        [f"Set from Python, without an option: {', '.join(f'{name} = {value}' for name, value in rest.items())}."]
        if rest
        else []
    )
    if run.record.whole("resumed_from") is not None:
        said.append(f"Resumed from step {run.record.whole('resumed_from')}; an unbroken run gives the same adapter.")
    data = [_data_row(name, run) for name in ("data", "eval_data") if run.record.part(name).value]
    heads = ("file", "rows used", "SHA-256")
    versions = [[name, version] for name, version in run.record.part("versions").texts().items()]
    return tag(
        "article",
        tag("h3", overview.named(index, run)),
        _code(repeat.lines_of(run, whole=False), f"Command of {run.label}"),
        *(tag("p", one) for one in said),
        folded("Every setting spelled out", _code(repeat.lines_of(run, whole=True), f"Whole command of {run.label}")),
        folded("Data and versions", Table(f"Data of {run.label}", heads, data, numeric=False).html(),
               Table(f"Versions of {run.label}", ("package", "version"), versions, numeric=False).html()),
    )  # fmt: skip


def _code(lines: Sequence[str], says: str) -> Html:
    text = Html(" \\\n    ").join(escape(line) for line in lines)
    return tag("pre", tag("code", Html(text)), role="region", aria_label=says)


def _data_row(name: str, run: Run) -> list[object]:
    data = run.record.part(name)
    used, rows = data.whole("used"), data.whole("rows")
    return [
        data.text("given") or data.text("name") or name,
        f"{used} of {rows}",
        tag("code", data.text("sha256") or ""),
    ]
