"""The statement for model-signing: a golden one, its own root, and what is left out. Equality with what model-signing
1.1.1 makes of the same folder, signing and verifying was tried by hand with that package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import base_tensors, save_base

from gora_serve.errors import InputError
from gora_serve.integrity.manifest import make_manifest
from gora_serve.integrity.oms import oms_statement

FILES = {"config.json": "{}", "sub/a": "a", "sub-b": "b", "z.txt": "", ".gitattributes": "x", ".git/config": "x",
         ".cache/huggingface/download/x.metadata": "x", ".github/x": "x"}  # fmt: skip


def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    for name, text in FILES.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # a safetensors file without tensors: the header's length, and "{}" filled up with blanks
    (place / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    return place


# The subject is that of sha256sum over the concatenated digests, and of model-signing 1.1.1.
GOLDEN = """
{
  "_type": "https://in-toto.io/Statement/v1",
  "subject": [
    {
      "name": "model",
      "digest": {
        "sha256": "a20884a57d20f5234b8bb4abd07b88849329143f5fc4a7ccc94e59d3ffb3d431"
      }
    }
  ],
  "predicateType": "https://model_signing/signature/v1.0",
  "predicate": {
    "serialization": {
      "method": "files",
      "hash_type": "sha256",
      "allow_symlinks": false,
      "ignore_paths": [".cache/huggingface", ".git", ".gitattributes", ".github", ".gitignore"]
    },
    "resources": [
      {"algorithm": "sha256", "name": "config.json",
       "digest": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
      {"algorithm": "sha256", "name": "model.safetensors",
       "digest": "9bbcbf73561f6bc5d0a17ea6a2081feed2d1304e87602d8c502d9a5c4bd85576"},
      {"algorithm": "sha256", "name": "sub/a",
       "digest": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"},
      {"algorithm": "sha256", "name": "sub-b",
       "digest": "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"},
      {"algorithm": "sha256", "name": "z.txt",
       "digest": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    ]
  }
}
"""


def test_golden_statement(tmp_path: Path) -> None:
    place = folder(tmp_path)
    statement = oms_statement(place, make_manifest(place))
    assert statement == json.loads(GOLDEN)


def test_links_are_followed_and_said(tmp_path: Path) -> None:
    place = save_base(tmp_path / "m", base_tensors())
    before = oms_statement(place, make_manifest(place))
    (place / "model.safetensors").rename(place / "moved")
    (place / "model.safetensors").symlink_to("moved")
    after = oms_statement(place, make_manifest(place))
    assert after["predicate"]["serialization"]["allow_symlinks"] is True
    names = [resource["name"] for resource in after["predicate"]["resources"]]
    assert names == ["config.json", "model.safetensors", "moved"]
    assert before["predicate"]["resources"] == after["predicate"]["resources"][:2]


def test_links_to_folders_and_out_of_the_model_are_refused(tmp_path: Path) -> None:
    place = save_base(tmp_path / "m", base_tensors())
    manifest = make_manifest(place)
    (place / "out").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="GS-325"):
        oms_statement(place, manifest)
    (place / "out").unlink()
    (place / "folder").symlink_to(tmp_path)
    with pytest.raises(InputError, match="GS-336"):
        oms_statement(place, manifest)
