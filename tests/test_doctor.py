"""`palimpsest doctor`: each check's failing side on fakes, what is told of them, and all of it on this machine."""

import gzip
import io
import json
import os
import resource
import socket
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from fakes import make_store
from rich.console import Console
from serving import free_port
from typer.testing import CliRunner

from serve import cli
from serve.doctor import machine, report, software, store
from serve.doctor.finding import Finding, Findings, Status
from serve.engine import cgroups, supervisor
from serve.gateway.connections import MOST
from serve.settings import Settings
from serve.store.digests import RECORD
from serve.store.unpack import MANIFEST

OK, WARNING, PROBLEM = Status.OK, Status.WARNING, Status.PROBLEM
GIB = 2**30


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith("PALIMPSEST_")]:
        monkeypatch.delenv(name)
    folders = {name: tmp_path / name.lower() for name in ("STORE", "STATE", "CACHE")}
    values = folders | {"PORT": free_port()}
    for name, value in values.items():
        monkeypatch.setenv(f"PALIMPSEST_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    return Settings()


def the(findings: Findings) -> Finding:
    (finding,) = findings
    assert bool(finding.advice) == (finding.status is not OK)
    return finding


def said(finding: Finding) -> tuple[Status, str]:
    return finding.status, f"{finding.found} {finding.advice}"


# Software


@pytest.mark.parametrize(
    ("version", "system", "status"),
    [((3, 10, 9), "Linux", PROBLEM), ((3, 13, 0), "Darwin", PROBLEM), ((3, 12, 1), "Linux", OK)],
)
def test_python_is_new_enough_and_on_linux(
    version: tuple[int, ...], system: str, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software.platform, "system", lambda: system)
    assert the(software.python(version)).status is status


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert the(software.libraries()).status is OK
    find = software.find_spec
    monkeypatch.setattr(software, "find_spec", lambda name: None if name == "ts" else find(name))
    status, words = said(the(software.libraries()))
    assert status is PROBLEM
    assert "torchserve missing" in words


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo 'openjdk version \"21.0.2\" 2024' >&2", OK, "21.0.2"),
        ("echo 'java version \"1.8.0_292\"' >&2", PROBLEM, "8.0_292"),
        ("echo 'openjdk version \"11.0.2\" 2019' >&2", PROBLEM, "TorchServe needs 17. Unset JAVA_HOME"),
        ("exit 3", PROBLEM, "exit code 3"),
        ("exec sleep 20", PROBLEM, "does not answer"),
        (None, PROBLEM, "No such file"),
    ],
)
def test_java_is_the_one_that_the_server_would_start(
    script: str | None, status: Status, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(software, "JAVA_SECONDS", 0.5)
    if script:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / "java").chmod(0o755)
    finding = the(software.java())
    assert finding.status is status
    assert words in said(finding)[1]


class Nvml:
    """One card, and a driver for CUDA 12.8."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(pynvml, "nvmlInit", lambda: None)
        patch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
        patch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", self.handle)
        patch.setattr(pynvml, "nvmlDeviceGetName", lambda index: "a card")
        patch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda index: SimpleNamespace(total=80 * GIB))
        patch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: b"570.86.10")
        patch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", lambda: 12080)

    def handle(self, index: int) -> int:
        if index:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return index


@pytest.mark.parametrize(
    ("build", "status", "words"),
    [
        ("12.9", OK, "built for CUDA 12.9"),
        ("12.1", OK, "built for CUDA 12.1"),
        ("13.0", PROBLEM, "the driver knows 12.8 Install a driver for CUDA 13.0, or a torch for CUDA 12"),
        (None, PROBLEM, "built for the CPU, and there is a GPU"),
    ],
)
def test_torch_is_built_for_what_the_driver_knows(
    build: str | None, status: Status, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nvml(monkeypatch)
    monkeypatch.setattr(software, "_torch_cuda", lambda: build)
    card, torch = software.gpu()
    assert (card.status, card.found) == (OK, "a card, 80.0 GiB, driver 570.86.10 for CUDA 12.8")
    assert torch.status is status
    assert words in said(torch)[1]


def test_what_torch_was_built_for_is_read_from_its_own_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version.py").write_text("cuda = '12.4'\n")
    monkeypatch.setattr(software, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert software._torch_cuda() == "12.4"


def test_a_gpu_that_is_named_and_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    status, words = said(the(software.gpu()))
    assert status is PROBLEM
    assert "names 7, which is no GPU here" in words


@pytest.mark.parametrize("installed", [True, False])
def test_a_driver_that_does_not_answer_is_told_from_none(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setattr(software, "NVIDIA", (tmp_path / "none", tmp_path) if installed else (tmp_path / "none",))
    assert the(software.gpu()).status is (WARNING if installed else OK)


# The machine


def test_a_port_that_another_has_is_a_problem_and_the_servers_own_is_none(settings: Settings) -> None:
    assert the(machine.ports(settings, runs=False)).status is OK
    with socket.create_server(("127.0.0.1", settings.port)):
        status, words = said(the(machine.ports(settings, runs=False)))
        assert status is PROBLEM
        assert "PALIMPSEST_PORT" in words
        assert the(machine.ports(settings, runs=True)).status is OK


def test_torchserve_needs_ports_of_its_own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(count: int) -> list[int]:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(supervisor, "free_ports", none)
    assert said(the(machine.ports(settings, runs=False)))[0] is PROBLEM


def test_settings_of_torchserve_that_cannot_be_read_are_a_problem(settings: Settings) -> None:
    assert the(machine.config(settings)).status is OK
    gone = settings.model_copy(update={"config": settings.store / "none"})
    assert "PALIMPSEST_CONFIG" in the(machine.config(gone)).advice


def test_folders_are_judged_where_they_will_be(settings: Settings, tmp_path: Path) -> None:
    assert [each.status for each in machine.disks(settings)] == [OK] * 4
    assert not settings.state.exists()
    (tmp_path / "file").touch()
    state, *_ = machine.disks(settings.model_copy(update={"state": tmp_path / "file"}))
    assert said(state)[0] is PROBLEM
    assert "PALIMPSEST_STATE" in state.advice


def test_a_full_disk_is_a_problem_and_little_room_a_warning(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB))
    assert {each.status for each in machine.disks(settings)} == {WARNING}
    monkeypatch.setattr(machine.disk, "trouble", lambda path: "full")
    assert [each.status for each in machine.disks(settings)] == [PROBLEM, WARNING, WARNING, PROBLEM]


def test_a_cache_that_cannot_be_used_or_is_on_the_network_is_a_warning(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    _, _, cache, _ = machine.disks(settings.model_copy(update={"cache": tmp_path / "file" / "cache"}))
    assert said(cache)[0] is WARNING
    assert "no packed archive can be unpacked" in cache.found
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr(machine.psutil, "disk_partitions", lambda all: mounts)
    _, _, cache, _ = machine.disks(settings)
    assert said(cache)[0] is WARNING
    assert "network (nfs4)" in cache.found


def test_without_a_temporary_folder_nothing_starts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.gettempdir", none)
    first, *_ = machine.disks(settings)
    assert said(first)[0] is PROBLEM


def test_memory_files_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    assert the(machine.memory_files()).status is OK

    def forbidden(name: str, flags: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert "memfd_create" in the(machine.memory_files()).advice


@pytest.mark.parametrize(
    ("total", "limit", "budget", "status", "words"),
    [
        (32, None, "92%", OK, "32.0 GiB; "),
        (32, 8, "92%", WARNING, "grants 8.0 GiB; "),
        (32, 8, "92%", WARNING, "PALIMPSEST_MEMORY_BUDGET is 29.4 GiB Set PALIMPSEST_MEMORY_BUDGET to less than 8192"),
        (32, 8, "4000", OK, "of which the control group grants 8.0 GiB"),
        (2, None, "92%", WARNING, "The demo set runs in 4.0 GiB"),
    ],
)
def test_a_budget_must_lie_within_what_the_group_grants(
    settings: Settings, total: int, limit: int | None, budget: str, status: Status, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total * GIB, available=0))
    monkeypatch.setattr(cgroups, "memory_limit", lambda: limit and limit * GIB)
    finding = the(machine.memory(settings.model_copy(update={"memory_budget": budget})))
    assert finding.status is status
    assert words in said(finding)[1]


def test_a_budget_that_is_none_is_a_problem(settings: Settings) -> None:
    status, words = said(the(machine.memory(settings.model_copy(update={"host_budget": "much"}))))
    assert status is PROBLEM
    assert "PALIMPSEST_HOST_BUDGET must be a number of MiB" in words


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_limit_of_a_group_and_its_parents_counts(version: int, tmp_path: Path) -> None:
    kind, file = ("cgroup", "memory.limit_in_bytes") if version == 1 else ("cgroup2", "memory.max")
    controllers = "memory" if version == 1 else ""
    options = "rw,memory" if version == 1 else "rw"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:{controllers}:/a/b\n")
    (tmp_path / "proc/self/mountinfo").write_text(f"31 23 0:27 / /sys/fs/cgroup rw - {kind} none {options}\n")
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    assert cgroups.memory_limit(tmp_path) is None
    (group / file).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert cgroups.memory_limit(tmp_path) is None
    (group.parent / file).write_text(f"{3 * GIB}\n")
    assert cgroups.memory_limit(tmp_path) == 3 * GIB


@pytest.mark.parametrize(("hard", "status"), [(1024, WARNING), (65536, OK), (resource.RLIM_INFINITY, OK)])
def test_few_descriptors_are_few_connections(hard: int, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, hard))
    finding = the(machine.open_files())
    assert finding.status is status
    assert (f"enough for {MOST:,} connections" in finding.found) == (status is OK)


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({}, WARNING), ({"LANG": "C"}, WARNING), ({"LANG": "de_DE.UTF-8"}, OK), ({"LC_CTYPE": "C.utf8"}, OK),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "POSIX"}, WARNING), ({"LC_ALL": "", "LANG": "C.UTF-8"}, OK),
    ],
)  # fmt: skip
def test_names_of_files_need_utf8(variables: dict[str, str], status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert the(machine.locale()).status is status


# Archives


def packed(kind: str, manifest: str = MANIFEST) -> bytes:
    buffer, content = io.BytesIO(), os.urandom(5000)
    if kind == "mar":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(manifest, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            entry = tarfile.TarInfo(manifest)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_archives_that_cannot_be_served_are_named(settings: Settings) -> None:
    make_store(settings.store, "good", "cut")
    (settings.store / "cut" / RECORD).write_text(json.dumps({"checkpoint": {"weights.safetensors": 100}}))
    (settings.store / "cut" / "weights.safetensors").write_bytes(bytes(99))
    for name, content in {
        "fine.mar": packed("mar"), "fine2.tar.gz": packed("tar"), "short.mar": packed("mar")[:-100],
        "short2.tar.gz": packed("tar")[:-1000], "other.mar": packed("mar", "readme"), "text.mar": b"no archive",
        "flipped.tar.gz": gzip.compress(bytes(9000))[:-6] + b"abcdef",
    }.items():  # fmt: skip
        (settings.store / name).write_bytes(content)
    *damaged, last = store.archives(settings)
    named = {each.found.partition(" ")[0]: each for each in damaged}
    assert sorted(named) == ["cut", "flipped", "other", "short", "short2", "text"]
    assert {each.status for each in damaged} == {PROBLEM}
    assert "weights.safetensors missing or cut off" in named["cut"].found
    assert "ends too early" in named["short2"].found
    assert MANIFEST in named["other"].found
    assert "palimpsest archives build --models full cut" in named["cut"].advice
    assert last.status is OK
    assert last.found.startswith("9: cut, ")


def test_an_archive_of_another_version_is_a_warning(settings: Settings) -> None:
    make_store(settings.store, "demo/old")
    (settings.store / "demo" / "old" / RECORD).write_text("{}")
    first, _ = store.archives(settings)
    assert first.status is WARNING
    assert "archives build --models demo old" in first.advice


def test_an_empty_store_is_filled_at_the_start(settings: Settings) -> None:
    assert the(store.archives(settings)).status is OK
    assert the(store.archives(settings.model_copy(update={"models": "full"}))).status is WARNING


# What is told


def test_a_report_hides_the_home_and_holds_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("PALIMPSEST_SECRET", "hunter2")
    findings = [Finding("STATE", OK, "/home/ann/state, /home/anna and /home/ann: 3 GiB free")]
    text = report.as_json(findings)
    assert json.loads(text)["checks"] == [
        {"check": "STATE", "status": "ok", "found": "~/state, /home/anna and ~: 3 GiB free", "advice": ""}
    ]
    assert "hunter2" not in text


def test_the_table_shows_advice_as_it_is_written() -> None:
    told = io.StringIO()
    report.show([Finding("port", PROBLEM, "taken [by x]", "Set another [PORT].")], Console(file=told, width=70))
    assert "taken [by x]" in told.getvalue()
    assert "Set another [PORT]." in told.getvalue()


def test_this_machine_has_no_problem_that_keeps_the_tests_from_running(settings: Settings) -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    checks: list[dict[str, Any]] = json.loads(result.stdout)["checks"]
    assert [each for each in checks if each["status"] == "problem"] == []
    assert result.exit_code == 0
    found = {each["check"]: each["found"] for each in checks}
    assert found["Python"].startswith(".".join(map(str, sys.version_info[:2])))
    assert found["Java"].startswith("17.")
    assert not settings.state.exists()


def test_a_problem_is_an_exit_code(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "Unset JAVA_HOME" in result.stdout
