"""Bad input, one test for each kind: the exit code, what the message names, and that nothing was changed or left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from shell import SMALL, TIMEOUT, Answer, command, environment, fit_words, gora_here, snapshot
from tiny_models import build_llama

LONG = json.dumps({"prompt": "the red apple and the blue river " * 60, "completion": "green"})


class Space:
    """A folder with a base, data and an earlier output. `refuses` runs a command that must not change any of it."""

    def __init__(self, folder: Path, base: Path, data: Path) -> None:
        self.folder, self.base, self.data, self.run = folder, folder / "base", folder / "data.jsonl", folder / "run"
        shutil.copytree(base, self.base)
        shutil.copy(data, self.data)
        self.rows = self.data.read_text().splitlines()
        (folder / "earlier").mkdir()
        (folder / "earlier" / "adapter.bin").write_bytes(b"\x00an earlier output")

    def write(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def fit(self, *more: object, base: object = None, data: object = None, output: object = None) -> tuple[object, ...]:
        return tuple(fit_words(base or self.base, data or self.data, output or self.run, *more))

    def refuses(
        self, words: tuple[object, ...], code: int, gs: str | None, *mentions: object, leaves: tuple[Path, ...] = ()
    ) -> Answer:
        """Run the command and check its refusal. `leaves`: paths that it may add; nothing else may differ."""
        before = snapshot(self.folder)
        answer = gora_here(*words)
        assert (answer.code, answer.gs) == (code, gs), answer.err
        assert answer.out == ""
        for text in mentions:
            assert str(text) in answer.err
        left = [str(path) for path in leaves]
        after = {
            path: value
            for path, value in snapshot(self.folder).items()
            if not any(path == place or path.startswith(f"{place}/") for place in left)
        }
        assert after == before
        assert "Traceback" not in answer.err
        return answer


@pytest.fixture
def space(tmp_path: Path, tiny_base: Path, tiny_data: Path) -> Space:
    return Space(tmp_path, tiny_base, tiny_data)


# Data


def test_missing_data_file(space: Space) -> None:
    answer = space.refuses(space.fit(data=space.folder / "no.jsonl"), 5, "GS-522", "no.jsonl")
    assert answer.field("try")


@pytest.mark.parametrize("name", ["no.txt", "data/no.tsv", "data/no.JSONL", "./no", "a/b/no"])
def test_missing_data_file_is_not_looked_for_on_the_hub(space: Space, name: str) -> None:
    answer = space.refuses(space.fit(data=name), 5, "GS-522")
    assert answer.field("file") == str(Path(name))


@pytest.mark.parametrize(
    ("head", "hint"),
    [
        ("prompt;completion", "commas, not by ';'"), ("question,answer", "--columns prompt=COLUMN,completion=COLUMN"),
        ("prompt,answer", "--columns prompt=COLUMN,completion=COLUMN"),
        ("prompt", "give each row prompt and completion"),
    ],
)  # fmt: skip
def test_columns_of_a_csv(space: Space, head: str, hint: str) -> None:
    file = space.write("rows.csv", head, head)
    assert hint in str(space.refuses(space.fit(data=file), 3, "GS-378").field("try"))


@pytest.mark.parametrize(
    "columns",
    [
        "question", "prompt=question", "prompt=question,completion=", "prompt=a,prompt=b,completion=c", "text=", "",
        "prompt=a,completion=b,text=c", "input=a,output=b", "prompt=a;completion=b",
    ],
)  # fmt: skip
def test_columns_that_name_no_row(space: Space, columns: str) -> None:
    answer = space.refuses((*space.fit(), "--columns", columns), 2, "GS-201")
    assert "prompt=COLUMN,completion=COLUMN" in str(answer.field("expected"))


def test_a_column_that_is_not_there(space: Space) -> None:
    columns = "prompt=question,completion=completion"
    answer = space.refuses((*space.fit(), "--columns", columns), 3, "GS-378", "'question'")
    assert answer.field("file") == f"{space.data}:1"
    assert "'prompt'" in str(answer.field("expected"))


@pytest.mark.parametrize("lines", [(), ("", "   ")])
def test_empty_data_file(space: Space, lines: tuple[str, ...]) -> None:
    file = space.write("empty.jsonl", *lines)
    answer = space.refuses(space.fit(data=file), 3, "GS-372")
    assert answer.field("file") == str(file)


@pytest.mark.parametrize("row", ['{"prompt": "What color?"}', '{"question": "a", "answer": "b"}', "{}"])
def test_row_without_the_needed_fields(space: Space, row: str) -> None:
    file = space.write("rows.jsonl", *space.rows[:2], row, *space.rows[2:])
    answer = space.refuses(space.fit(data=file), 3, "GS-378", "prompt and completion, messages, or text")
    assert answer.field("file") == f"{file}:3"


@pytest.mark.parametrize("row", ['{"prompt": "a", ', "prompt,completion", "[1, 2]", '"text"'])
def test_line_that_is_no_json_object(space: Space, row: str) -> None:
    file = space.write("rows.jsonl", *space.rows[:4], row)
    answer = space.refuses(space.fit(data=file), 3, "GS-377")
    assert answer.field("file") == f"{file}:5"


def test_bad_row_of_the_evaluation_data(space: Space) -> None:
    file = space.write("eval.jsonl", *space.rows[:2], "{}")
    answer = space.refuses(space.fit("--eval-data", file), 3, "GS-378")
    assert answer.field("file") == f"{file}:3"


def test_unknown_kind_of_data_file(space: Space) -> None:
    file = space.write("data.txt", *space.rows)
    space.refuses(space.fit(data=file), 3, "GS-374", file, ".jsonl")


def test_some_prompts_longer_than_the_limit_are_counted(space: Space) -> None:
    file = space.write("long.jsonl", *space.rows[:8], LONG, LONG)
    answer = gora_here(*space.fit(data=file))
    assert answer.code == 0, answer.err
    assert f"data: 8 of 10 rows of {file.name}\n" in answer.out
    assert "  2 rows were left out: the prompt alone reaches --max-length\n" in answer.out
    recorded = json.loads((space.run / "run.json").read_text())["data"]
    assert (recorded["rows"], recorded["used"], recorded["left_out"], recorded["cut"]) == (10, 8, 2, 0)


def test_all_prompts_longer_than_the_limit(space: Space) -> None:
    file = space.write("long.jsonl", LONG, LONG, LONG)
    answer = space.refuses(space.fit(data=file), 3, "GS-373", "all 3 rows", file)
    assert answer.field("try") == "raise --max-length"


def test_a_token_that_the_base_has_no_embedding_for(space: Space) -> None:
    small = space.folder / "small"
    build_llama(vocab_size=200).save_pretrained(small)
    for file in space.base.glob("tok*"):
        shutil.copy(file, small)
    shutil.copy(space.base / "chat_template.jinja", small)
    answer = space.refuses(space.fit(base=small), 3, "GS-392")
    assert answer.field("file") == f"{space.data}:1"
    assert answer.field("expected") == "token ids below 200"
    assert int(answer.field("actual") or 0) >= 200


# Targets and settings


@pytest.mark.parametrize(
    ("targets", "gs"),
    [("nope", "GS-203"), ("q_proj,nope", "GS-203"), (r".*\.nope$", "GS-203"), ("(", "GS-202"), ("[a-", "GS-202")],
)
def test_targets_that_match_nothing(space: Space, targets: str, gs: str) -> None:
    answer = space.refuses(space.fit("--targets", targets), 2, gs, "--targets", targets.rpartition(",")[2])
    if gs == "GS-203":
        assert "q_proj" in (answer.field("expected") or "")
        assert answer.field("try") == "--targets all-linear"


def test_words_among_the_targets(space: Space) -> None:
    answer = space.refuses(space.fit("--targets", "attention,up_proj"), 2, "GS-203")
    assert "attention stands alone" in (answer.field("try") or "")


SETTINGS = [
    "--rank 0", "--rank -1", "--rank-min -1", "--rank-min 5 --rank-max 3", "--rank-min 3", "--rank-max 1",
    "--gamma -1", "--gamma nan", "--gamma inf", "--alpha 0", "--alpha -1", "--alpha nan", "--alpha inf",
    "--lr nan", "--lr inf", "--lr -1", "--lr 1e38", "--lr 1 --lr-ratio 1e38", "--probe-lr 1e38", "--lr-ratio 0",
    "--lr-ratio nan", "--batch-size 0", "--grad-accum 0",
    "--max-length 0", "--max-length 1", "--probe-steps 0", "--probe-error 0", "--probe-error 1", "--probe-memory -1",
    "--probe-memory inf", "--probe-memory nan", "--probe-error 1e-300", "--probe-steps 99999999999", "--steps 10000001",
    "--probe-lr -1", "--probe-lr inf", "--probe sketch --probe-lr 0.1", "--probe sketch --importance gradient-nuclear",
    "--steps 0", "--steps -1", "--epochs 2", "--seed -1",
    "--warmup nan", "--warmup -1", "--warmup 2", "--weight-decay nan", "--weight-decay -1", "--max-grad-norm nan",
    "--max-grad-norm -1", "--max-grad-norm 0", "--eval-every 0", "--eval-every -2",
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_that_make_no_sense(space: Space, settings: str) -> None:
    """Refused before the base is even looked at: it need not exist."""
    named = settings.split()[0]
    answer = space.refuses(space.fit(*settings.split(), base=space.folder / "no" / "base"), 2, "GS-201", named)
    assert "hash" not in answer.err


@pytest.mark.parametrize("epochs", ["0", "-1", "nan", "1e18"])
def test_epochs_that_make_no_sense(space: Space, epochs: str) -> None:
    words = ("fit", space.base, "--data", space.data, "--output", space.run, "--epochs", epochs)
    space.refuses(words, 2, "GS-201", "--epochs must be more than 0 and less than 1000000")


@pytest.mark.parametrize("settings", ["--rank two", "--gamma big", "--importance size", "--dtype int8", "--lrr 1"])
def test_options_that_click_refuses(space: Space, settings: str) -> None:
    space.refuses(space.fit(*settings.split()), 2, None, settings.split()[0], "gora-serve fit --help")


def test_max_length_beyond_the_positions_of_the_base(space: Space) -> None:
    answer = space.refuses(space.fit("--max-length", "257"), 2, "GS-205")
    assert (answer.field("expected"), answer.field("actual")) == ("at most 256", "257")


@pytest.mark.parametrize("rank_max", ["0", "-1"])
def test_probe_without_a_rank(space: Space, rank_max: str) -> None:
    words = ("probe", space.base, "--data", space.data, "--output", space.run, "--rank-max", rank_max)
    space.refuses(words, 2, None, "--rank-max")


# The base


def test_missing_base(space: Space) -> None:
    answer = space.refuses(space.fit(base=space.folder / "no" / "base"), 5, "GS-520", space.folder / "no" / "base")
    assert "hub id" in (answer.field("try") or "")


def test_missing_base_that_might_be_a_hub_id(space: Space) -> None:
    answer = space.refuses(space.fit(base="nobody/no-such-model"), 5, "GS-521")
    assert answer.field("file") == "nobody/no-such-model"
    assert answer.field("try")


def test_base_is_a_file(space: Space) -> None:
    answer = space.refuses(space.fit(base=space.data), 3, "GS-365", space.data)
    assert answer.field("try")


def keep(base: Path, wanted: Callable[[str], bool]) -> None:
    for path in base.iterdir():
        if not wanted(path.name):
            path.unlink()


def test_empty_folder_as_base(space: Space) -> None:
    keep(space.base, lambda name: False)
    answer = space.refuses(space.fit(), 3, "GS-366", "config.json")
    assert answer.field("file") == str(space.base)
    assert answer.field("try")


@pytest.mark.parametrize("action", ["fit", "hash"])
def test_base_with_its_configuration_only(space: Space, action: str) -> None:
    keep(space.base, lambda name: name == "config.json")
    words = space.fit() if action == "fit" else ("hash", space.base)
    answer = space.refuses(words, 3, "GS-322")
    assert answer.field("file") == str(space.base)
    assert answer.field("try")


@pytest.mark.parametrize("action", ["fit", "probe", "hash"])
def test_base_of_pickles(space: Space, action: str) -> None:
    keep(space.base, lambda name: not name.startswith("model"))
    (space.base / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'touch canary'\ntR.")
    words = {
        "fit": space.fit(),
        "probe": ("probe", space.base, "--data", space.data, "--output", space.run),
        "hash": ("hash", space.base),
    }
    answer = space.refuses(words[action], 3, "GS-323", "pytorch_model.bin")
    assert "save_pretrained" in (answer.field("try") or "")


@pytest.mark.parametrize("action", ["fit", "hash"])
def test_truncated_weights(space: Space, action: str) -> None:
    file = space.base / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    answer = space.refuses(space.fit() if action == "fit" else ("hash", space.base), 3, "GS-306")
    assert answer.field("file") == str(file)
    assert answer.field("expected") == f"{len(whole)} bytes"
    assert answer.field("actual") == f"{len(whole) - 100} bytes"
    assert answer.field("try")


def test_missing_shard(space: Space) -> None:
    (space.base / "model-00001-of-00002.safetensors").unlink()
    space.refuses(space.fit(), 5, "GS-504", "model-00001-of-00002.safetensors", space.base)


# Outputs


@pytest.mark.parametrize("action", ["fit", "probe", "export"])
def test_existing_output_folder(space: Space, action: str) -> None:
    output = space.folder / "earlier"
    words = {
        "fit": space.fit(output=output),
        "probe": ("probe", space.base, "--data", space.data, "--output", output),
        "export": ("export", make_adapter_folder(space), "--output", output),
    }
    answer = space.refuses(words[action], 6, "GS-601")
    assert answer.field("file") == str(output)
    assert answer.field("kept") == "nothing was changed"
    assert "--overwrite" in (answer.field("try") or "")


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_output_is_a_file(space: Space, overwrite: tuple[str, ...]) -> None:
    space.refuses(space.fit(*overwrite, output=space.data), 2, None, "--output", space.data)


def test_hash_output_exists(space: Space) -> None:
    answer = space.refuses(("hash", space.base, "--output", space.data), 6, "GS-601", space.data)
    assert "--overwrite" in (answer.field("try") or "")


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_hash_never_writes_into_the_base(space: Space, name: str) -> None:
    words = ("hash", space.base, "--output", space.base / name, "--overwrite")
    space.refuses(words, 2, "GS-208", space.base / name)


def test_leftover_of_an_unfinished_run(space: Space) -> None:
    partial = space.folder / "run.partial"
    partial.mkdir()
    (partial / "run.json").write_text("{}\n")
    answer = space.refuses(space.fit(), 6, "GS-603")
    assert answer.field("file") == str(partial)
    assert answer.field("try")


def test_overwrite_replaces_output_and_leftover_whole(space: Space) -> None:
    for folder in (space.run, space.folder / "run.partial"):
        (folder / "tracking").mkdir(parents=True)
        (folder / "tracking" / "old.txt").write_text("old")
        (folder / "run.json").write_text('{"schema": "gora-serve/run/1"}\n')  # else it would be no folder of ours
    base = snapshot(space.base)
    answer = gora_here(*space.fit("--overwrite"))
    assert answer.code == 0, answer.err
    assert not (space.folder / "run.partial").exists()
    assert not (space.run / "tracking").exists()
    assert json.loads((space.run / "run.json").read_text())["status"] == "complete"
    assert snapshot(space.base) == base
    assert {path.name for path in space.folder.iterdir()} == {"base", "data.jsonl", "earlier", "run"}


def test_failed_overwrite_keeps_the_earlier_run(space: Space) -> None:
    space.run.mkdir()
    (space.run / "metrics.jsonl").write_text("old")
    (space.run / "run.json").write_text('{"schema": "gora-serve/run/1"}\n')
    space.refuses(space.fit("--overwrite", "--lr", "1e30"), 7, "GS-702", leaves=(space.folder / "run.partial",))


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("place", ["base", "base/run", "link/run", "."])
def test_output_is_in_or_around_the_base(space: Space, place: str, overwrite: tuple[str, ...]) -> None:
    (space.folder / "link").symlink_to(space.base)
    output = space.folder / place
    answer = space.refuses(space.fit(*overwrite, output=output), 2, "GS-251", space.base)
    assert answer.field("file") == str(output)
    assert answer.field("kept") == "nothing was changed"


@pytest.mark.parametrize("target", ["earlier", "base", "nothing"])
def test_output_is_a_symlink(space: Space, target: str) -> None:
    link = space.folder / "link"
    link.symlink_to(space.folder / target)
    answer = space.refuses(space.fit("--overwrite", output=link), 2, "GS-252")
    assert answer.field("file") == str(link)


DROP = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: what lets root write where nobody may
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_parent_of_the_output_is_read_only(space: Space) -> None:
    """In a process of its own without root's right to ignore permissions."""
    closed = space.folder / "closed"
    closed.mkdir(mode=0o555)
    probe = [sys.executable, "-c", DROP, sys.executable, "-c", f"open({str(closed / 'x')!r}, 'w')"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        pytest.skip("this user can write into any folder, and cannot give that up")
    before = snapshot(space.folder)
    words = ("probe", space.base, "--data", space.data, "--output", closed / "out", *SMALL[:6])
    done = subprocess.run(
        [sys.executable, "-c", DROP, *command(*words)], env=environment(), capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    answer = Answer(done.returncode, done.stdout, done.stderr)
    assert answer.gs == "GS-505"
    assert str(closed) in (answer.field("file") or "")
    assert answer.field("kept") == "nothing was changed"
    assert snapshot(space.folder) == before


# Training that goes wrong


def poison(base: Path, value: float) -> None:
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][:, 0] = value
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("method", "gs"), [("gora", "GS-701"), ("lora", "GS-702")])
def test_base_that_gives_nan(space: Space, value: float, method: str, gs: str) -> None:
    poison(space.base, value)
    partial = space.folder / "run.partial"
    answer = space.refuses(space.fit("--method", method), 7, gs, "step 1", leaves=(partial,))
    assert answer.field("try")
    assert json.loads((partial / "run.json").read_text())["status"] == "failed"
    assert not (partial / "adapter").exists()


def test_probe_of_a_base_that_gives_nan(space: Space) -> None:
    poison(space.base, float("nan"))
    words = ("probe", space.base, "--data", space.data, "--output", space.run, *SMALL[:6])
    answer = space.refuses(words, 7, "GS-701", "step 1")
    assert answer.field("kept") == "no adapter was written"


def test_loss_that_diverges(space: Space) -> None:
    partial = space.folder / "run.partial"
    answer = space.refuses(space.fit("--lr", "1e30", "--steps", "5"), 7, "GS-702", "training step", leaves=(partial,))
    step = int(answer.err.split("training step ")[1].split()[0])
    assert "--lr" in (answer.field("try") or "")
    record = json.loads((partial / "run.json").read_text())
    assert (record["status"], record["error"]["code"]) == ("failed", "GS-702")
    metrics = [json.loads(line) for line in (partial / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, step))
    space.refuses(("export", partial, "--output", space.folder / "adapter"), 3, "GS-347", partial)


def stop_while_training(space: Space, number: signal.Signals) -> tuple[int, str]:
    """Start a long fit, send the signal after some steps, and return exit code and standard error."""
    words = [*space.fit("--steps", "100000")]
    errors = space.folder.with_name(space.folder.name + ".stderr")
    with errors.open("w") as stream:
        process = subprocess.Popen(
            command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True
        )
        metrics = space.folder / "run.partial" / "metrics.jsonl"
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
                assert process.poll() is None, errors.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            code = process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
    return code, errors.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_fit(space: Space, number: signal.Signals, code: int) -> None:
    before = snapshot(space.folder)
    found, errors = stop_while_training(space, number)
    assert found == code, errors
    assert "Traceback" not in errors
    assert f"stopped by {number.name} after training step" in errors
    assert "--resume" in errors
    assert list((space.folder / "run.partial" / "checkpoints").glob("step-*/gora_manifest.json"))
    assert not space.run.exists()
    partial = str(space.folder / "run.partial")
    assert {path: value for path, value in snapshot(space.folder).items() if not path.startswith(partial)} == before
    assert json.loads((Path(partial) / "run.json").read_text())["status"] == "stopped"
    refused = gora_here("export", partial, "--output", space.folder / "adapter")
    assert (refused.code, refused.gs) == (3, "GS-347")


# Folders that are not what the command reads


def make_adapter_folder(space: Space) -> Path:
    """A small adapter as export writes it, bound to nothing."""
    import torch

    from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
    from gora_serve.adapter.format import write_adapter
    from gora_serve.integrity.binding import seal_folder
    from gora_serve.integrity.record import binding_json

    folder = space.folder / "adapter"
    folder.mkdir()
    factors = LoraFactors(torch.ones(2, 32), torch.ones(32, 2), 1.0)
    root = write_adapter(folder, Adapter({"model.layers.0.self_attn.q_proj": factors}, BaseId("tiny")), "unit")
    seal_folder(folder, {"adapter_root": root, "binding": binding_json("tiny", None, None)})
    return folder


@pytest.mark.parametrize("what", ["base", "earlier", "data.jsonl"])
def test_export_of_what_is_no_run(space: Space, what: str) -> None:
    words = ("export", space.folder / what, "--output", space.folder / "out")
    answer = space.refuses(words, *((2, None) if what == "data.jsonl" else (3, "GS-346")))
    assert str(space.folder / what) in answer.err


def test_export_of_a_base_names_what_it_takes(space: Space) -> None:
    answer = space.refuses(("export", space.base, "--output", space.folder / "out"), 3, "GS-346")
    assert "export takes a run folder of fit" in (answer.field("try") or "")


def test_export_of_a_partial_folder_that_is_not_there(space: Space) -> None:
    words = ("export", space.folder / "run.partial", "--output", space.folder / "out")
    assert "check the path" in str(space.refuses(words, 5, "GS-503").field("try"))
    space.run.mkdir()
    assert space.refuses(words, 5, "GS-503").field("try") == f"this one is finished: {space.run}"


def test_a_weight_that_is_no_number(space: Space) -> None:
    words = ("merge", space.base, "-a", f"{space.folder / 'earlier'}:abc", "--output", space.folder / "out")
    answer = space.refuses(words, 2, None, "is no number: 'abc'")
    assert str(space.folder / "earlier") in answer.err


def test_verify_of_what_is_no_adapter(space: Space) -> None:
    answer = space.refuses(("verify", space.base), 3, "GS-346", space.base)
    assert "--manifest" in (answer.field("try") or "")


def test_verify_without_a_manifest(space: Space) -> None:
    folder = make_adapter_folder(space)
    assert gora_here("verify", folder).code == 0
    (folder / "gora_manifest.json").unlink()
    answer = space.refuses(("verify", folder), 3, "GS-332", "gora_manifest.json")
    assert answer.field("file") == str(folder)
    assert answer.field("try")


def test_verify_with_two_things_to_compare(space: Space) -> None:
    words = ("verify", space.base, "--base", space.base, "--manifest", space.data)
    space.refuses(words, 2, "GS-206", "--manifest", "--base")


@pytest.mark.parametrize(
    ("change", "code", "gs"),
    [
        (lambda folder: (folder / "extra.py").write_text("x"), 1, "GS-104"),
        (lambda folder: (folder / "adapter_config.json").unlink(), 1, "GS-103"),
        (lambda folder: (folder / "gora_manifest.json").write_text("{}"), 3, "GS-333"),
        (lambda folder: (folder / "gora_manifest.json").write_text("{"), 3, "GS-319"),
    ],
)
def test_verify_of_a_changed_folder(space: Space, change: Callable[[Path], Any], code: int, gs: str) -> None:
    folder = make_adapter_folder(space)
    change(folder)
    answer = space.refuses(("verify", folder), code, gs)
    assert str(folder) in (answer.field("file") or "")


@pytest.mark.parametrize("name", ["run.partial", "nothing"])
def test_ranks_of_what_is_no_probe(space: Space, name: str) -> None:
    answer = space.refuses(("ranks", space.folder / name), 5, "GS-501", "probe.json")
    assert str(space.folder / name) in (answer.field("file") or "")


@pytest.fixture
def ranks_file(space: Space) -> Iterator[Callable[[Any], Path]]:
    def write(ranks: Any) -> Path:
        return space.write("ranks.json", json.dumps({"schema": "gora-serve/ranks/1", "rank": 2, "ranks": ranks}))

    return write


@pytest.mark.parametrize(
    ("ranks", "code", "gs", "named"),
    [
        ({"model.layers.0.self_attn.q_proj": 33}, 3, "GS-342", "model.layers.0.self_attn.q_proj"),
        ({"model.layers.0.self_attn.q_proj": -1}, 3, "GS-342", "model.layers.0.self_attn.q_proj"),
        ({"model.layers.0.self_attn.q_proj": 1.5}, 3, "GS-342", "model.layers.0.self_attn.q_proj"),
        ({"model.layers.0.self_attn.q_proj": 0}, 3, "GS-342", "every rank is 0"),
        ({"model.layers.7.self_attn.q_proj": 1}, 4, "GS-410", "model.layers.7.self_attn.q_proj"),
        ([1, 2], 3, "GS-342", "not an object"),
    ],
)
def test_ranks_file_that_does_not_fit(
    space: Space, ranks_file: Callable[[Any], Path], ranks: Any, code: int, gs: str, named: str
) -> None:
    file = ranks_file(ranks)
    answer = space.refuses(space.fit("--ranks", file), code, gs, named)
    assert answer.field("file") == str(file)


def test_errors_as_json(space: Space) -> None:
    """With --json the same fields are on standard output, as one JSON document."""
    answer = gora_here(*space.fit("--json", data=space.folder / "no.jsonl"))
    told = json.loads(answer.out)
    assert told["exit_code"] == answer.code == 5
    assert told["error"]["code"] == answer.gs == "GS-522"
    assert told["error"]["file"] == str(space.folder / "no.jsonl")


def test_a_model_folder_is_never_overwritten(space: Space) -> None:
    """Not even one that this run does not read."""
    model = space.folder / "model"
    shutil.copytree(space.base, model)
    answer = space.refuses(space.fit("--overwrite", output=model), 2, "GS-256")
    assert answer.field("file") == str(model)
