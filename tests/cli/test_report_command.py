"""`report` as users call it: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from edited_base import train_pissa
from shell import environment, fit_words, gora, gora_here, snapshot


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    assert gora_here(*fit_words(tiny_base, tiny_data, folder, "--gamma", "0.1")).code == 0
    return folder


@pytest.fixture(scope="module")
def gap(run: Path, tiny_base: Path) -> Path:
    """What gap says of the run's own adapter, exported."""
    adapter = run.parent / "adapter"
    assert gora_here("export", run, "--output", adapter).code == 0
    answer = gora_here("gap", adapter, "--base", tiny_base, "--json")
    assert answer.code == 0
    file = run.parent / "gap.json"
    file.write_text(answer.out)
    return file


def test_a_page(run: Path, tmp_path: Path) -> None:
    before = snapshot(run)
    answer = gora_here("report", run, "--output", tmp_path / "page.html")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == f"wrote {tmp_path / 'page.html'}: 1 run\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert snapshot(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_as_json_and_without_a_name(run: Path, tmp_path: Path) -> None:
    answer = gora("report", run, "--json", cwd=tmp_path)
    assert json.loads(answer.out) == {"report": "report.html", "runs": [{"run": str(run), "status": "complete"}]}
    first = (tmp_path / "report.html").read_bytes()
    answer = gora("report", run, "--overwrite", cwd=tmp_path, env=environment(PYTHONHASHSEED="7", TZ="Asia/Tokyo"))
    assert answer.code == 0
    assert (tmp_path / "report.html").read_bytes() == first, "the same bytes in every process"


def test_with_a_gap(run: Path, gap: Path, tmp_path: Path) -> None:
    answer = gora_here("report", run, "--gap", gap, "--output", tmp_path / "page.html")
    assert answer.code == 0
    page = (tmp_path / "page.html").read_text()
    told = json.loads(gap.read_text())
    assert "Right as it is: plain LoRA on this base." in page
    assert f'<data value="{told["total"]["stored_of_update"]!r}">' in page
    assert f'<data value="{told["deployment"][0]["stored"]}">' in page
    row = page.split('<th scope="row">a base per task</th>')[1].split("</tr>")[0]
    assert row.split("</td><td>")[1:3] == ["-", "-"], "it has no ranks"


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_data: Path) -> Path:
    """What gap says of an adapter of PiSSA, which is wrong on the base, with the models' answers."""
    folder = tmp_path_factory.mktemp("pissa")
    edited = train_pissa(folder, tiny_base)
    words = ("--data", tiny_data, "--max-rows", "5", "--max-length", "96", "--json")
    answer = gora_here("gap", edited.adapter, "--base", tiny_base, *words)
    assert answer.code == 1
    file = folder / "gap.json"
    file.write_text(answer.out)
    return file


def test_with_a_gap_that_is_one(run: Path, wrong: Path, tmp_path: Path) -> None:
    answer = gora_here("report", run, "--gap", wrong, "--output", tmp_path / "page.html")
    assert answer.code == 0
    page, told = (tmp_path / "page.html").read_text(), json.loads(wrong.read_text())
    assert 'id="gap-0"' in page
    assert "Not compressed, as stored: " in page
    assert f"the error is {told['total']['unconverted_of_update']:.2%} of the update" in page
    for name in ("unconverted_of_update", "base_rounding_of_update", "stored_of_update", "stored_plain_of_update"):
        assert page.count(f'<data value="{told["total"][name]!r}">') == 2, "in the figure's table, and in the total"
    for outcome in told["comparison"]["outcomes"].values():
        assert all(f'<data value="{outcome[key]!r}">' in page for key in ("loss", "kl", "agreement"))
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        parts = [one for path, one in told["modules"].items() if path.endswith(kind)]
        error, whole = (sum(one[key] ** 2 for one in parts) ** 0.5 for key in ("unconverted", "update"))
        row = page.split(f'<th scope="row">{kind}</th><td>2</td>')[-1]
        assert float(row.split('<data value="')[1].split('"')[0]) == pytest.approx(error / whole)


def test_several_runs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    answer = gora_here("report", run, tmp_path / "other", "--output", tmp_path / "page.html")
    assert answer.out.endswith(": 2 runs\n")
    assert "2 runs compared" in (tmp_path / "page.html").read_text()


def test_refusals(run: Path, gap: Path, tmp_path: Path) -> None:
    page, earlier = tmp_path / "page.html", tmp_path / "earlier.html"
    earlier.write_text("earlier")
    before = snapshot(run.parent, tmp_path)
    for words, code, gs in [
        ((tmp_path / "none",), 2, "GS-240"),
        ((run.parent,), 2, "GS-240"),
        ((run, f"{run}/../run"), 2, "GS-241"),
        ([run] * 25, 2, "GS-242"),
        ((run, "--output", run / "page.html"), 2, "GS-243"),
        ((run, "--gap", gap, "--output", gap, "--overwrite"), 2, "GS-243"),
        ((run, "--gap", run / "run.json"), 3, "GS-379"),
        ((run, "--gap", tmp_path / "none.json"), 5, "GS-501"),
        ((run, "--output", earlier), 6, "GS-601"),
        ((run, "--output", tmp_path / "no" / "page.html"), 5, "GS-505"),
    ]:
        words = words if "--output" in words else (*words, "--output", page)
        answer = gora_here("report", *words)
        assert (answer.code, answer.gs, answer.out) == (code, gs, ""), (words, answer.err)
        assert answer.field("try")
    assert snapshot(run.parent, tmp_path) == before
    assert gora_here("report").code == 2


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"modules": {}}, "modules"), ({"engine_loads_it": None}, "engine_loads_it"), ({"modules": 3}, "modules"),
        ({"deployment": [{"stored": "much"}]}, "deployment[0].stored"), ({"family": 7}, "family"),
    ],
)  # fmt: skip
def test_odd_gap_files(run: Path, gap: Path, tmp_path: Path, change: dict[str, object], key: str) -> None:
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(json.loads(gap.read_text()) | change))
    answer = gora_here("report", run, "--gap", file, "--output", tmp_path / "page.html")
    assert (answer.code, answer.gs, answer.field("file")) == (3, "GS-3380", str(file)), answer.err
    assert key in answer.err
    assert not (tmp_path / "page.html").exists()
