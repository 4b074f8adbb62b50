"""Footprints and budgets: what a model is expected to take, and what is remembered of it."""

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import yaml
from fakes import FakeDevice
from serving import ROOT

from contract.commands import VERSION
from serve.residency.memory import HostDevice, Memory, find_device, parse_budget
from serve.residency.model import Taken
from serve.store.catalog import Archive

MIB = 2**20


class CountingDevice(FakeDevice):
    """Reports what the test says a process takes."""

    used: int | None = None

    def used_by(self, pid: int) -> int | None:
        return self.used


def archive(folder: Path, config: str = "", weights: int = 0) -> Archive:
    folder.mkdir(exist_ok=True)
    (folder / "model-config.yaml").write_text(config)
    (folder / "weights.safetensors").write_bytes(bytes(weights))
    return Archive("m", folder, "0123456789ab")


@pytest.mark.parametrize(("text", "expected"), [("8000", 8000 * MIB), ("50%", 500), ("92.5%", 925), ("100%", 1000)])
def test_budgets_are_mib_or_a_share(text: str, expected: int) -> None:
    assert parse_budget(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "-5", "101%", "much", "%", "nan"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_budget(text, 1000)


def test_a_size_is_first_seeded_then_guessed_then_measured(tmp_path: Path) -> None:
    memory = Memory(CountingDevice(), 2**40, tmp_path / "footprints.json")
    seeded = archive(tmp_path / "seeded", "handler:\n  memory_mib: 321\n", weights=5 * MIB)
    assert memory.predict(seeded) == 321 * MIB
    guessed = Archive("n", archive(tmp_path / "guessed", weights=5 * MIB).path, "ba9876543210")
    assert memory.predict(guessed) > 5 * MIB
    memory.device.used = 77 * MIB
    assert memory.measure_load(guessed, 1, 0) == 77 * MIB
    assert memory.predict(guessed) == 77 * MIB


def test_a_request_changes_what_may_run_beside_it_and_not_what_a_load_takes(tmp_path: Path) -> None:
    device, file = CountingDevice(), tmp_path / "state" / "footprints.json"
    memory, first = Memory(device, 2**40, file), archive(tmp_path / "m")
    device.used = 100 * MIB
    memory.measure_load(first, 1, 0)
    for used, peak in ((100, 100), (300, 300), (200, 250), (100, 175), (100, 137.5)):
        device.used = used * MIB
        assert memory.measure(first, 1) == used * MIB
        assert (memory.predict(first), memory.predict_peak(first)) == (100 * MIB, peak * MIB)
    device.used = 500 * MIB
    memory.measure_work(first, 1)
    again = Memory(device, 2**40, file)
    assert (again.predict(first), again.predict_peak(first)) == (100 * MIB, 500 * MIB)


def test_copies_of_an_archive_share_what_was_measured_and_other_content_does_not(tmp_path: Path) -> None:
    device = CountingDevice()
    memory = Memory(device, 2**40, tmp_path / "footprints.json")
    config = "handler: {memory_mib: 5}"
    first = archive(tmp_path / "m", config, weights=MIB)
    device.used = 100 * MIB
    memory.measure_load(first, 1, 0)
    copy = replace(archive(tmp_path / "copy", config, weights=MIB), name="copy", version="other")
    (copy.path / "MAR-INF").mkdir()
    (copy.path / "MAR-INF" / "MANIFEST.json").write_text('{"model": {"modelName": "copy"}}')
    assert memory.is_measured(copy)
    assert memory.predict(copy) == 100 * MIB
    for number, (text, weights) in enumerate([(config, MIB + 1), ("handler: {memory_mib: 6}", MIB)]):
        another = replace(archive(tmp_path / str(number), text, weights), name="another", version=str(number))
        assert not memory.is_measured(another)


def test_footprints_of_earlier_versions_are_understood(tmp_path: Path) -> None:
    first = archive(tmp_path / "m", f"handler: {{commands: {VERSION}}}")
    file = tmp_path / "footprints.json"
    file.write_text(json.dumps({first.engine_name: [32 * MIB, 185 * MIB, 4 * MIB, 28 * MIB], "p.short.1": [7, 9]}))
    device = CountingDevice()
    memory = Memory(device, 100 * MIB, file)
    assert (memory.predict(first), memory.predict_peak(first)) == (32 * MIB, 185 * MIB)
    assert memory.predict_parked(first) == Taken(4 * MIB, 28 * MIB)
    device.used = 33 * MIB
    memory.measure(first, 1)
    assert first.engine_name not in json.loads(file.read_text())
    assert Memory(device, 100 * MIB, file).predict_parked(first) == Taken(4 * MIB, 28 * MIB)


def test_where_the_device_cannot_tell_processes_apart_the_difference_counts(tmp_path: Path) -> None:
    memory = Memory(CountingDevice(), 2**40, tmp_path / "footprints.json")
    assert memory.measure_load(archive(tmp_path / "m"), 1, fallback=42 * MIB) == 42 * MIB


def test_what_others_took_meanwhile_refuses_no_model(tmp_path: Path) -> None:
    memory = Memory(CountingDevice(), 100 * MIB, tmp_path / "footprints.json")
    assert memory.measure_load(archive(tmp_path / "m"), 1, fallback=4000 * MIB) == 100 * MIB


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": ["x", 2]}'])
def test_a_damaged_file_costs_only_what_was_learned(tmp_path: Path, content: str) -> None:
    (tmp_path / "footprints.json").write_text(content)
    memory = Memory(CountingDevice(), 2**40, tmp_path / "footprints.json")
    assert memory.predict(archive(tmp_path / "m", "handler: {memory_mib: 5}")) == 5 * MIB


def test_the_host_counts_a_processes_own_memory() -> None:
    hold = "data = bytearray(b'x') * (64 << 20); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = HostDevice().used_by(process.pid)
        process.communicate(b"\n")
    assert used is not None
    assert 64 * MIB < used < 128 * MIB
    assert HostDevice().used_by(process.pid) is None


def test_what_parking_taught_outlives_the_next_load(tmp_path: Path) -> None:
    device, file = CountingDevice(), tmp_path / "footprints.json"
    memory, model = Memory(device, 2**40, file), archive(tmp_path / "m", f"handler: {{commands: {VERSION}}}")
    device.used = 300 * MIB
    memory.measure_load(model, 1, 0)
    device.used = 40 * MIB
    parked = memory.measure_parked(model, 1, 200 * MIB)
    device.used = 250 * MIB
    assert memory.measure(model, 2) == 250 * MIB
    assert memory.predict_parked(model) == Memory(device, 2**40, file).predict_parked(model) == parked


class TwoGpus:
    """NVML of a machine with two GPUs; `watched` are those that were asked for."""

    NAMES = ("GPU-aaaa", "GPU-bbbb")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(pynvml, "nvmlInit", lambda: None)
        patch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
        patch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", self.handle)
        patch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: self.handle(self.NAMES.index(uuid)))
        patch.setattr(pynvml, "nvmlDeviceGetIndex", lambda index: index)
        patch.setattr(pynvml, "nvmlDeviceGetName", lambda index: f"card {index}")
        patch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "570.86.10")
        patch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda index: SimpleNamespace(total=(index + 1) * MIB))

    def handle(self, index: int) -> int:
        if index > 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return index


@pytest.mark.parametrize(
    ("visible", "gpu"), [(None, 0), ("0", 0), ("1", 1), ("1,0", 1), ("GPU-bbbb", 1), ("", None), ("-1", None)]
)
def test_the_device_is_the_first_that_is_visible(
    visible: str | None, gpu: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    TwoGpus(monkeypatch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = find_device()
    assert device.gpu == gpu
    assert device.name == ("CPU" if gpu is None else f"card {gpu}")


@pytest.mark.parametrize(
    ("driver", "machine", "suspends"),
    [
        ("570.86.10", "x86_64", True),
        (b"580.95", "x86_64", True),
        ("565.57.01", "x86_64", False),
        ("580", "arm64", False),
    ],
)
def test_a_driver_suspends_since_a_version_of_its_own(
    driver: str | bytes, machine: str, suspends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    TwoGpus(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: driver)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert find_device().suspends is suspends


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    TwoGpus(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES names 7, which is no GPU here"):
        find_device()


@pytest.mark.parametrize(("said", "ours"), [(VERSION, True), ("true", False), (1, False), (VERSION + 1, False)])
def test_a_handler_of_another_version_is_one_of_another_make(tmp_path: Path, said: object, ours: bool) -> None:
    memory = Memory(FakeDevice(), 100 * MIB, tmp_path / "footprints.json")
    assert memory.takes_commands(archive(tmp_path / "m", f"handler: {{commands: {said}}}")) is ours


def test_the_models_here_are_of_this_version() -> None:
    files = [file for folder in ("handlers", "docs") for file in (ROOT / folder).rglob("model-config.yaml")]
    assert len(files) > 3
    assert {yaml.safe_load(file.read_text())["handler"]["commands"] for file in files} == {VERSION}
