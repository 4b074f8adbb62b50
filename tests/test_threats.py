"""THREATS.md names defences and the tests that show them; here is that they exist, and what no other test shows."""

import ast
import ipaddress
import re
from urllib.parse import urlsplit

import pytest
from serving import ROOT

PAGE = (ROOT / "THREATS.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.slow
def test_every_test_that_is_named_exists() -> None:
    assert len(NAMED) > 50
    assert [f"{file}::{name}" for file, name in NAMED if name not in functions_of(file)] == []


def test_every_row_names_a_test() -> None:
    doors = PAGE[PAGE.index("## Doors") : PAGE.index("## What is weak")]
    rows = [line for line in doors.splitlines() if line.startswith("| ") and not line.startswith("| attack")]
    assert len(rows) > 35
    assert [row for row in rows if "`test_" not in row] == []


def test_torchserve_listens_on_loopback_alone_and_asks_for_its_tokens() -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)", (ROOT / "config.properties").read_text(), re.M))
    for name in ("inference_address", "management_address", "metrics_address"):
        assert ipaddress.ip_address(str(urlsplit(settings[name]).hostname)).is_loopback
    for name in ("grpc_inference_address", "grpc_management_address"):
        assert ipaddress.ip_address(settings[name]).is_loopback
    assert settings["disable_token_authorization"] == "false"
    assert settings["install_py_dep_per_model"] == "false"
    assert settings["allowed_urls"] == "file:///nothing-is-fetched"
