"""docs/vectors.md: the code gives every value of it, and so does a script of shell tools alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gora_serve.integrity.headers import encode_header
from gora_serve.integrity.manifest import hash_model, tensor_digest

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = (REPOSITORY / "docs" / "vectors.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")] for line in DOCUMENT.splitlines() if line.startswith("| ")
]
DIGESTS = [row for row in ROWS if re.fullmatch(r"`[0-9a-f]{64}` *\|?", row[-1])]
ROOTS = [row for row in ROWS if re.match(r"`g[bct]1:", row[-1])]
Tensors = dict[str, tuple[str, list[int], str]]


def code(cell: str) -> str:
    return cell.strip(" |").strip("`")


def test_there_are_enough() -> None:
    assert len(DIGESTS) == 13
    assert len(ROOTS) == 8


@pytest.mark.parametrize("row", DIGESTS, ids=lambda row: row[1].replace(" ", "-"))
def test_digests(row: list[str]) -> None:
    found = re.match(r"(\d+) of", row[0])
    pattern = bytes(range(251))
    data = (pattern * (int(found.group(1)) // 251 + 1))[: int(found.group(1))] if found else b""
    if not found and row[0] != "none":
        data = bytes.fromhex(code(row[0]))
    for step in (len(data) or 1, 1 << 18):
        assert tensor_digest(data[start : start + step] for start in range(0, len(data), step)) == code(row[-1])


def write(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    data = b"".join(bytes.fromhex(text) for _, _, text in tensors.values())
    (folder / file).write_bytes(encode_header([(n, d, s) for n, (d, s, _) in tensors.items()], {}) + data)


@pytest.mark.parametrize("row", [row for row in ROOTS if "gb1" in row[-1]], ids=lambda row: row[0].split(":")[0])
def test_weights_roots(row: list[str], tmp_path: Path) -> None:
    tensors: Tensors = json.loads(code(row[1]))
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    manifest = hash_model(tmp_path)
    assert manifest.roots.weights == code(row[-1])
    assert bool(manifest.aliases) == row[0].startswith("tied")
    (tmp_path / "model.safetensors").unlink()
    if tensors:  # each in a file of its own
        for number, name in enumerate(tensors):
            write(tmp_path, {name: tensors[name]}, f"part-{number}.safetensors")
        placed = {name: f"part-{number}.safetensors" for number, name in enumerate(tensors)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        assert hash_model(tmp_path).roots.weights == code(row[-1])


def test_other_roots(tmp_path: Path) -> None:
    write(tmp_path, {})
    values = {row[0]: (code(row[1]), code(row[-1])) for row in ROOTS}
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text(values[name][0])
    roots = hash_model(tmp_path).roots
    assert (roots.config, roots.tokenizer) == (values["config.json"][1], values["tokenizer.json"][1])


def test_the_script_gives_the_same_values() -> None:
    if any(shutil.which(tool) is None for tool in ("bash", "perl", "xxd", "sha256sum")):
        pytest.skip("needs bash, perl, xxd and sha256sum")
    script = REPOSITORY / "tests" / "golden" / "vectors.sh"
    made = subprocess.run(["bash", script], capture_output=True, text=True, check=True).stdout
    values = re.findall(r"[0-9a-f]{64}", made)
    assert sorted(values) == sorted(re.findall(r"[0-9a-f]{64}", DOCUMENT))
