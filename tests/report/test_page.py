"""The page: numbers equal those of the runs' files, figures have text alternatives, names are text and never markup."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reading import HOSTILE, Element, read_page, tables
from safetensors.torch import load_file

from gora_serve.cli.fitting import _fit_config
from gora_serve.cli.main import cli
from gora_serve.errors import GoraError
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.locks import locked
from gora_serve.report.page import render, write_report
from gora_serve.report.repeat import lines_of
from gora_serve.report.runs import labels, read_run, read_runs

STYLE = Path(__file__).parent.parent.parent / "gora_serve" / "report" / "style.css"


def page_of(*folders: Path) -> Element:
    return read_page(render(read_runs(folders)))


@pytest.fixture(scope="module")
def page(runs: Path) -> Element:
    return page_of(runs / "gora", runs / "lora", runs / "short")


def content(file: Path) -> Any:
    return json.loads(file.read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# What the page says


def test_results(page: Element, runs: Path) -> None:
    rows = tables(page)["Losses are per token, on the evaluation rows"]
    for name, row in zip(("gora", "lora", "short"), rows, strict=True):
        run, ranks = content(runs / name / "run.json"), content(runs / name / "ranks.json")
        losses = run["result"]["losses"]
        wanted = [losses.get("end"), losses.get("base"), ranks["parameters"]]
        assert row[0] == name
        assert row[1:4] == ["-" if value is None else repr(value) for value in wanted]
        assert float(row[4]) == ranks["parameters"] / ranks["lora_parameters"]
        assert row[9] == "complete"
    lowest = min(("gora", "lora"), key=lambda name: float(rows[("gora", "lora").index(name)][1]))
    assert f"Lowest loss on the evaluation rows: {lowest}," in page.one("header").text


def test_runs_with_other_evaluation_rows_have_no_winner(copied: Callable[..., Path], runs: Path) -> None:
    other = copied("lora", run=lambda value: value["eval_data"].update(sha256="0" * 64))
    page = page_of(runs / "gora", other)
    assert "their evaluation losses cannot be compared" in page.one("aside").text
    assert "different rows: there is no lowest loss to tell" in page.one("header").text
    assert "Lowest loss" not in page.text


def test_losses(page: Element, runs: Path) -> None:
    training = tables(page)["Training loss by step"]
    evaluation = tables(page)["Evaluation loss by step"]
    for column, name in enumerate(("gora", "lora", "short"), 1):
        written = {str(line["step"]): repr(line["loss"]) for line in lines(runs / name) if "loss" in line}
        assert {row[0]: row[column] for row in training if row[column] != "-"} == written
    for column, name in enumerate(("gora", "lora"), 1):
        written = {str(line["step"]): repr(line["eval_loss"]) for line in lines(runs / name) if "eval_loss" in line}
        base = next(line["base_eval_loss"] for line in lines(runs / name) if "base_eval_loss" in line)
        assert {row[0]: row[column] for row in evaluation} == {"base": repr(base), **written}


def test_ranks(page: Element, runs: Path) -> None:
    rows = tables(page)["Ranks by layer and kind of module, gora"]
    ranks = content(runs / "gora" / "ranks.json")["ranks"]
    kinds = [path.removeprefix("model.layers.0.") for path in ranks if ".0." in path]
    found = {
        f"model.layers.{row[0]}.{kind}": int(cell) for row in rows for kind, cell in zip(kinds, row[1:], strict=True)
    }
    assert found == ranks
    drawn = [box.one("title").text for box in figure(page, "ranks-0").all("rect") if box.one("title").text]
    assert sorted(drawn) == sorted(f"{path}: rank {rank}" for path, rank in ranks.items())
    assert "lora: every module has rank 4." in page.text


def test_sizes_of_updates(page: Element, runs: Path) -> None:
    """Against the product of the factors, multiplied out in float64."""
    found = {name: deltas(runs / name / "adapter") for name in ("gora", "lora")}
    rows = {row[0]: row for row in tables(page)["Size of the update against rank: gora"]}
    beside = {row[0]: row for row in tables(page)["Update beside LoRA's: gora / lora"]}
    assert rows.keys() == beside.keys() == found["gora"].keys()
    for path, delta in found["gora"].items():
        norm, other = float(delta.norm()), float(found["lora"][path].norm())
        assert float(rows[path][2]) == pytest.approx(norm, rel=1e-5)
        assert float(rows[path][3]) == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-5)
        assert float(beside[path][4]) == pytest.approx(norm / other, rel=1e-5)


def deltas(adapter: Path) -> dict[str, Any]:
    config, tensors = content(adapter / "adapter_config.json"), load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if ".lora_A." not in key:
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config["alpha_pattern"].get("^" + re.escape(path), config["lora_alpha"])
        scale = alpha / A.shape[0] ** (0.5 if config["use_rslora"] else 1.0)
        found[path] = scale * tensors[key.replace("lora_A", "lora_B")].double() @ A.double()
    return found


def test_search_for_gamma(page: Element, runs: Path) -> None:
    searched = content(runs / "gora" / "gamma.json")
    rows = tables(page)["Values of gamma tried, gora"]
    assert sorted(map(tuple, rows)) == sorted((repr(one["gamma"]), repr(one["loss"])) for one in searched["tried"])
    assert "gamma-2" not in {element.attributes.get("id") for element in page.all("figure")}, "given, not searched"


def test_parameters(page: Element, runs: Path) -> None:
    for name in ("gora", "lora", "short"):
        ranks = content(runs / name / "ranks.json")
        *kinds, total = tables(page)[f"Parameters by kind of module, {name}"]
        assert [total[3], total[4]] == [str(ranks["parameters"]), str(ranks["lora_parameters"])]
        assert sum(int(row[3]) for row in kinds) == ranks["parameters"]


def test_time_and_memory(page: Element, runs: Path) -> None:
    for name, row in zip(("gora", "lora", "short"), tables(page)["Time and memory"], strict=True):
        run, last = content(runs / name / "run.json"), lines(runs / name)
        trained = [line for line in last if "tokens" in line][-1]
        assert row[:3] == [name, repr(run["seconds"]), str(trained["tokens"])]
        assert float(row[3]) == trained["tokens"] / trained["seconds"]
        assert row[4] == str(run["result"]["peak_bytes"]["host"])
    stages = tables(page)["Seconds by stage"][0]
    written = content(runs / "gora" / "run.json")["result"]["seconds_by_stage"]
    assert stages[1:6] == [repr(written[name]) for name in ("probe", "gamma", "train", "evaluate", "verify")]


def test_time_of_a_resumed_run(copied: Callable[..., Path]) -> None:
    """run.json has the seconds of the last process, metrics.jsonl those of all training."""

    def run(value: dict[str, Any]) -> None:
        value |= {"resumed_from": 900, "seconds": 130.0}
        value["result"]["seconds_by_stage"] = {"train": 100.0, "verify": 10.0}

    folder = copied("gora", run=run)
    file = folder / "metrics.jsonl"
    changed = [line | {"seconds": 3600.0} if "tokens" in line else line for line in lines(folder)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in changed))
    page = page_of(folder)
    assert tables(page)["Seconds by stage"][0][1:] == ["0.0", "0.0", "3600.0", "0.0", "10.0", "20.0"]
    assert tables(page)["Time and memory"][0][1] == "3630.0"
    assert "copy was resumed" in page.one("aside").text


def test_a_module_that_the_probe_does_not_know(copied: Callable[..., Path]) -> None:
    """Its shape is that of its factors."""
    folder = copied("gora")
    probe = content(folder / "probe" / "probe.json")
    probe["modules"].pop("model.layers.1.mlp.down_proj")
    (folder / "probe" / "probe.json").write_text(json.dumps(probe))
    assert page_of(folder).text.count("model.layers.1.mlp.down_proj") == page_of(copied("gora", "b")).text.count(
        "model.layers.1.mlp.down_proj"
    )


def test_the_base(page: Element, runs: Path) -> None:
    run = content(runs / "gora" / "run.json")
    base = run["base"]["name"]
    rows = tables(page)[f"Roots of {base}, as gora and lora and short used it"]
    roots = [*run["base"]["roots"].values(), run["memory_root"]]
    assert [row[1:] for row in rows] == [[root, "the same"] for root in roots]
    assert "Unchanged" in page.text


def test_a_base_that_changed_is_said_aloud(copied: Callable[..., Path]) -> None:
    def run(value: dict[str, Any]) -> None:
        value["base_after"]["roots"]["weights"] = "gb1:sha256:" + "0" * 64

    page = page_of(copied("gora", run=run))
    assert "The base CHANGED" in page.text
    assert "Unchanged" not in page.text


@pytest.mark.parametrize("name", ["gora", "lora", "short"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_command_repeats_the_run(runs: Path, name: str, whole: bool) -> None:
    """What the command line makes of the words is what run.json says."""
    run = read_run(runs / name, name)
    program, command, base, *words = shlex.split(" ".join(lines_of(run, whole=whole)))
    assert (program, command, base) == ("gora-serve", "fit", content(runs / name / "run.json")["base"]["name"])
    with cli.commands["fit"].make_context("fit", [base, *words]) as context:
        options = context.params
    recorded = content(runs / name / "run.json")
    config = recorded["config"]
    if whole:  # what settings that were left open came to, by the paper's rules
        config["ranks"] |= {"rank_min": 2, "rank_max": 16}
        config["train"] |= {"lr_ratio": 1.0 if name == "lora" else 16.0, "mixed_precision": "no"}
    assert json.loads(json.dumps(_config(options))) == config
    assert options["data"] == recorded["data"]["given"]
    assert options["eval_data"] == (recorded["eval_data"] or {}).get("given")
    assert options["output"] == runs / name


def test_the_whole_command_names_the_one_epoch_that_nobody_asked_for(copied: Callable[..., Path]) -> None:
    run = read_run(copied("short", run=lambda value: value["config"]["train"].update(steps=None)), "x")
    assert "--epochs 1.0" in lines_of(run, whole=True)


def _config(options: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(_fit_config(options))


# How it says it


def test_the_command_names_the_precision_that_the_environment_gave(copied: Callable[..., Path]) -> None:
    def run(value: dict[str, Any]) -> None:
        assert (value["config"]["train"]["mixed_precision"], value["mixed_precision"]) == (None, "no")
        value["mixed_precision"] = "bf16"

    assert "--mixed-precision bf16" in lines_of(read_run(copied("gora", run=run), "x"), whole=False)


def test_nothing_outside_is_asked_for(page: Element) -> None:
    ids = {element.attributes["id"] for element in page.all() if "id" in element.attributes}
    for element in page.all():
        assert element.name not in {"script", "link", "img", "iframe", "object", "embed", "form", "base", "style-sheet"}
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "action", "data", "poster", "background", "style"}
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#")
                assert (value or "")[1:] in ids
    style = page.one("style").text
    assert not re.search(r"url\(|@import|http|expression|</", style)
    policy = next(meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy")
    assert (policy.attributes["content"] or "").startswith("default-src 'none'")


def test_structure(page: Element) -> None:
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in page.all():
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((element.attributes.get(name) or "").split()) <= set(ids)
    assert page.one("html").attributes["lang"] == "en"
    assert [element.name for element in page.all("h1")] == ["h1"]
    levels = [int(element.name[1]) for element in page.all("h1", "h2", "h3")]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    first = next(page.one("body").all("a"))
    assert (first.attributes["href"], first.attributes["class"]) == ("#main", "skip")


def test_figures_have_a_text_alternative(page: Element) -> None:
    figures = list(page.all("figure"))
    assert len(figures) >= 9
    for one in figures:
        picture = next(svg for svg in one.all("svg") if svg.attributes.get("role") == "img")
        assert len(picture.one("title").text) > 3
        assert len(picture.one("desc").text) > 20
        assert one.one("figcaption").text
        assert one.one("details").one("summary").text
        assert tables(one)
    assert all(
        svg.attributes.get("role") == "img" or svg.attributes.get("aria-hidden") == "true" for svg in page.all("svg")
    )


def test_tables_say_what_their_cells_are(page: Element) -> None:
    for table in page.all("table"):
        assert table.one("caption").text
        assert all(head.attributes.get("scope") == "col" for head in table.one("thead").all("th"))
        for row in table.one("tbody").all("tr"):
            heads = [head.attributes.get("scope") for head in row.all("th")]
            assert heads == ["row"]
            assert len(list(row.all("th", "td"))) == len(list(table.one("thead").all("th")))
    for place in page.all("div"):
        if place.attributes.get("class") == "scroll":
            assert place.attributes["tabindex"] == "0"
            assert place.attributes["role"] == "region"
            assert place.attributes["aria-label"]


def test_names_are_text_and_no_markup(hostile: Path) -> None:
    text = render(read_runs([hostile]))
    page = read_page(text)
    test_nothing_outside_is_asked_for(page)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert HOSTILE.split("\u202e")[0] in page.text
    assert "<script>alert(1)<" in page.one("h1").text


# Runs of all kinds


def test_an_unfinished_run(unfinished: Path, runs: Path) -> None:
    """It is found under the name that the run would have; the torn line is passed over, lost losses are told."""
    page = page_of(unfinished.with_name("failed"), runs / "lora")
    assert "failed.partial is failed: GS-701, the loss is not finite" in page.text
    assert "1 of the losses is not finite" in page.text
    assert "Not proved" in page.text
    assert tables(page)["Training loss by step"][-1][:2] == ["7", "not finite"]
    assert "Size of the update against rank: failed.partial" not in tables(page)


def test_a_run_that_was_killed(copied: Callable[..., Path]) -> None:
    """run.json says that it is running: so it is while a process holds it."""
    folder = copied("gora", "killed.partial", run=lambda value: value.update(status="running"))
    with locked(folder.with_name("killed")):
        assert "killed.partial is running." in page_of(folder).text
    page = page_of(folder)
    assert "killed.partial is interrupted: no process holds it; fit --resume goes on." in page.one("aside").text
    assert tables(page)["Losses are per token, on the evaluation rows"][0][9] == "interrupted"


def test_a_run_that_left_nothing(copied: Callable[..., Path]) -> None:
    folder = copied("gora", run=lambda value: [value.pop(key) for key in ("result", "base_after", "seconds")])
    for name in ("probe", "adapter"):
        shutil.rmtree(folder / name)
    for name in ("ranks.json", "gamma.json", "metrics.jsonl"):
        (folder / name).unlink()
    page = page_of(folder)
    assert list(page.all("figure")) == []
    assert {"Time and memory", "The base", "Repeat it"} < {head.text for head in page.all("h2")}


def test_a_loss_that_is_never_finite(copied: Callable[..., Path]) -> None:
    folder = copied("short")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert tables(page_of(folder))["Training loss by step"] == [["1", "not finite"]]


def test_a_hundred_layers_and_many_steps(deep: Path) -> None:
    page = page_of(deep)
    assert len(tables(page)["Ranks by layer and kind of module, deep.partial"]) == 100
    losses = tables(page)["Training loss by step, 25 of 5000 steps"]
    assert [losses[0], losses[-1]] == [["1", "9.0"], ["5000", repr(9 / 5000)]]
    assert [row[0] for row in tables(page)["Ranks by layer and kind of module, deep.partial"]] == list(
        map(str, range(100))
    )
    drawn = max(len(path.attributes["d"] or "") for path in page.all("path"))
    assert drawn < 5000, "a line is thinned"


def test_different_bases_and_data_are_told(copied: Callable[..., Path], runs: Path) -> None:
    def run(value: dict[str, Any]) -> None:
        for place in (value["base"], value["base_after"]):
            place["roots"]["weights"] = "gb1:sha256:" + "1" * 64
        value["data"]["sha256"] = "2" * 64

    page = page_of(runs / "gora", copied("gora", "other", run=run))
    told = page.one("aside").text
    assert "different bases" in told
    assert "different data" in told
    same = page_of(runs / "gora", runs / "lora").one("aside").text
    assert "different" not in same
    assert "same seed" in same


def test_runs_of_one_name_are_told_apart() -> None:
    assert labels([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    assert labels([Path("a/one"), Path("b/two")]) == ["one", "two"]
    assert labels([Path("run"), Path("a/run")]) == ["run", "a/run"]


def test_ranks_of_zero_and_modules_without_a_layer(copied: Callable[..., Path]) -> None:
    def ranks(value: dict[str, Any]) -> None:
        value["ranks"] |= {"lm_head": 3, "model.layers.1.mlp.down_proj": 0}

    page = page_of(copied("gora", ranks=ranks))
    rows = tables(page)["Ranks by layer and kind of module, copy"]
    assert [row[0] for row in rows] == ["0", "1", "-"]
    assert "0" in rows[1]
    assert any("h0" in (box.attributes["class"] or "") for box in figure(page, "ranks-0").all("rect"))


def test_the_same_runs_give_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_report([runs / "gora", runs / "lora"], tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


# Refusals


BAD: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("run", lambda v: v.update(seconds="long"), "seconds"),
    ("run", lambda v: v.update(base=["x"]), "base"),
    ("run", lambda v: v["base"].update(roots={"weights": 3}), "base.roots.weights"),
    ("run", lambda v: v["result"].update(seconds_by_stage={"train": True}), "result.seconds_by_stage.train"),
    ("run", lambda v: v.update(processes=-1), "processes"),
    ("run", lambda v: v.update(versions={"torch": {}}), "versions.torch"),
    ("run", lambda v: v.update(config={"train": 7}), "config.train"),
    ("ranks", lambda v: v["ranks"].update(x=1.5), "ranks.x"),
    ("ranks", lambda v: v.update(parameters=10**400), "parameters"),
    ("gamma", lambda v: v.update(tried={"a": 1}), "tried"),
    ("gamma", lambda v: v.update(tried=[{"gamma": "x", "loss": 1}]), "tried[0].gamma"),
]


@pytest.mark.parametrize(("file", "edit", "key"), BAD, ids=[f"{file}-{key}" for file, _, key in BAD])
def test_odd_values_are_refused_by_name(
    copied: Callable[..., Path], tmp_path: Path, file: str, edit: Any, key: str
) -> None:
    folder = copied("gora", **{file: edit})
    with pytest.raises(GoraError) as caught:
        write_report([folder], tmp_path / "page.html")
    assert caught.value.code == "GS-3380"
    assert key in caught.value.what
    assert caught.value.fields["file"] == folder / f"{file}.json"
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"step": 1, "loss": NaN}', '{"loss": 1.0}', '{"step": 1, "loss": "1"}']
)
def test_odd_lines_of_metrics_are_refused(copied: Callable[..., Path], line: str) -> None:
    folder = copied("short")
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n')
    with pytest.raises(GoraError, match="line 2") as caught:
        read_run(folder, "run")
    assert caught.value.code in ("GS-3380", "GS-3381")


def test_a_damaged_adapter_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied("gora")
    with (folder / "adapter" / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(GoraError) as caught:
        read_run(folder, "run")
    assert caught.value.code == "GS-102"
    (folder / "adapter" / "gora_manifest.json").unlink()
    seal_folder(folder / "adapter", {})
    assert read_run(folder, "run").updates, "an adapter that was sealed again is read"


# Colors


def themes() -> dict[str, dict[str, str]]:
    """The colors of the light theme, and those of the dark one."""
    blocks = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.S)
    ]
    light, dark, printed = blocks
    assert light.keys() == dark.keys() == printed.keys()
    return {"light": light, "dark": dark, "print": printed}


def contrast(one: str, other: str) -> float:
    """WCAG 2.1: (L1 + 0.05) / (L2 + 0.05)."""

    def luminance(color: str) -> float:
        color = color[1:] if len(color) == 7 else "".join(c * 2 for c in color[1:])
        parts = [int(color[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_colors_can_be_read(theme: str) -> None:
    colors = themes()[theme]
    for back in ("page", "card"):
        assert all(contrast(colors[name], colors[back]) >= 4.5 for name in ("ink", "soft", "accent"))
        series = {name: contrast(colors[name], colors[back]) for name in colors if re.fullmatch(r"s\d", name)}
        assert len(series) == 8
        assert min(series.values()) >= 3, series
    assert all(contrast(colors[name], colors[f"{name}-back"]) >= 4.5 for name in ("good", "bad", "open"))
    shades = [contrast(colors[f"h{index}"], colors["card"]) for index in range(1, 8)]
    assert shades == sorted(shades), "the higher the rank, the further from the page"


def figure(page: Element, name: str) -> Element:
    return next(element for element in page.all("figure") if element.attributes.get("id") == name)
