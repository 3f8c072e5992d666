"""A folder's files as OpenSSF Model Signing (OMS) v1.0 states them, unsigned: `model-signing` signs and verifies it.

An in-toto Statement v1 whose predicate lists every file with its SHA-256; the subject's digest is SHA-256 over these
digests in their order. Left out are git's own files and what a hub download adds, which the statement says.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from gora_serve.errors import InputError
from gora_serve.integrity.cache import QuickCache
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.layout import confined
from gora_serve.integrity.manifest import Manifest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
IGNORED = (".cache/huggingface", ".git", ".gitattributes", ".github", ".gitignore")


def oms_statement(folder: Path, manifest: Manifest, *, cache: QuickCache | None = None) -> dict[str, Any]:
    """Return the statement of `folder`; files that `manifest`, just made of it, holds are not hashed again.

    Raises InputError (GS-336) for a link to a folder, and GS-325 for a link that leaves the folder.
    """
    known = {record.path: record.sha256 for record in manifest.files}
    names, links = _files(folder)
    resources = [
        {
            "algorithm": "sha256",
            "digest": known.get(name) or sha256_file(confined(folder, name), cache)[1],
            "name": name,
        }
        for name in names
    ]
    joined = b"".join(bytes.fromhex(resource["digest"]) for resource in resources)
    return {
        "_type": STATEMENT,
        "subject": [{"name": folder.resolve().name, "digest": {"sha256": hashlib.sha256(joined).hexdigest()}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": links,
                "ignore_paths": list(IGNORED),
            },
            "resources": resources,
        },
    }


def _files(folder: Path) -> tuple[list[str], bool]:
    """Return the relative names in model-signing's order (by the parts of the path), and whether one is a link."""
    found: list[PurePosixPath] = []
    links = False
    for place, folders, names in os.walk(folder):
        here = PurePosixPath(Path(place).relative_to(folder).as_posix())
        folders[:] = [name for name in folders if str(here / name) not in IGNORED]
        for name in folders:
            if Path(place, name).is_symlink():
                what = "a link to a folder cannot be stated file by file"
                raise InputError(what, code="GS-336", file=Path(place, name), hint="put a copy of it in its place")
        kept = [here / name for name in names if str(here / name) not in IGNORED]
        links = links or any((folder / path).is_symlink() for path in kept)
        found += kept
    return [str(path) for path in sorted(found)], links
