"""How much memory there is, and how much each model takes: NVML on a GPU, proportional set size on a CPU-only machine.

All sizes are bytes.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import psutil
import pynvml
import yaml

from serve.residency.catalog import Archive

# Of a model that was never measured and names no size: what a worker takes beside its weights.
_UNKNOWN_OVERHEAD = 600 << 20


class Device(Protocol):
    """Where models live."""

    name: str
    total: int
    frees_late: bool  # whether memory comes back only some time after its process has ended

    def free(self) -> int:
        """Bytes that the device reports as free."""

    def used_by(self, pid: int) -> int | None:
        """Bytes that a worker takes; None where the device cannot tell (another process-id namespace)."""


class CudaDevice:
    """One GPU, seen through NVML, which makes no CUDA context."""

    frees_late = True

    def __init__(self, index: int) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(self._handle)
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self.total = int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    def free(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).free)

    def used_by(self, pid: int) -> int | None:
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None


class HostDevice:
    """A machine without a GPU: the same rules, on main memory."""

    name = "CPU"
    frees_late = False

    def __init__(self) -> None:
        self.total = psutil.virtual_memory().total

    def free(self) -> int:
        return int(psutil.virtual_memory().available)

    def used_by(self, pid: int) -> int | None:
        """The proportional set size: a page shared by n processes counts as 1/n of a page."""
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return None
        pss = next((line.split()[1] for line in lines if line.startswith("Pss:")), None)
        return int(pss) * 1024 if pss else None


def find_device() -> Device:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, else the host."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if has_cuda_gpu() and visible.isdecimal():
        return CudaDevice(int(visible))
    return HostDevice()


def has_cuda_gpu() -> bool:
    """Whether a driver is loaded and reports a GPU."""
    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    except pynvml.NVMLError:
        return False


def parse_budget(text: str, total: int) -> int:
    """ "8000" (MiB) or "92%" (of the device) in bytes; ValueError for anything else."""
    share = text.endswith("%")
    number = float(text.removesuffix("%"))
    if not 0 < number <= (100 if share else float("inf")):
        raise ValueError("must be a number of MiB, or a percentage such as 92%")
    return int(total * number / 100) if share else int(number * 2**20)


@dataclass
class Footprint:
    """load: what the model took when it was ready. peak: the most it was seen to take since."""

    load: int
    peak: int


class Memory:
    """The budget, the device and the footprints, which are kept in `file` between runs.

    A footprint belongs to one version of an archive; a replaced one is measured anew.
    """

    MAX_ENTRIES = 2000

    def __init__(self, device: Device, budget: int, file: Path) -> None:
        self.device, self.budget, self._file = device, budget, file
        self._footprints = _read(file)
        self._seeds: dict[str, int] = {}

    def free(self) -> int:
        return self.device.free()

    def predict(self, archive: Archive) -> int:
        """What was measured; else `handler.memory_mib` of its model-config.yaml; else its weights and a margin."""
        known = self._footprints.get(archive.engine_name)
        if known:
            return known.peak
        # The scheduler asks at every decision: the disk is read once.
        if archive.engine_name not in self._seeds:
            seed = _seed(archive.path) or _weights_size(archive.path) + _UNKNOWN_OVERHEAD
            self._seeds = {archive.engine_name: seed, **dict(islice(self._seeds.items(), self.MAX_ENTRIES))}
        return self._seeds[archive.engine_name]

    def footprint(self, archive: Archive) -> Footprint | None:
        return self._footprints.get(archive.engine_name)

    def measure(self, archive: Archive, pid: int, loaded: bool = False, fallback: int = 0) -> int:
        """Looks at a worker and returns its peak so far; loaded: it has just become ready.

        fallback: what to take where the device does not tell processes apart.
        """
        used = self.device.used_by(pid) or fallback or self.predict(archive)
        known = self._footprints.get(archive.engine_name)
        if loaded or known is None:
            self._footprints[archive.engine_name] = Footprint(used, max(used, known.peak if known else 0))
            self._write()
        elif used > known.peak:
            known.peak = used
            self._write()
        return self._footprints[archive.engine_name].peak

    def _write(self) -> None:
        while len(self._footprints) > self.MAX_ENTRIES:
            del self._footprints[next(iter(self._footprints))]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        # A full disk costs only what was learned.
        with contextlib.suppress(OSError):
            new.write_text(json.dumps({name: [f.load, f.peak] for name, f in self._footprints.items()}))
            new.replace(self._file)


def _read(file: Path) -> dict[str, Footprint]:
    try:
        return {name: Footprint(int(load), int(peak)) for name, (load, peak) in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _seed(path: Path) -> int:
    try:
        config: Any = yaml.safe_load((path / "model-config.yaml").read_text())
        return int(config["handler"]["memory_mib"]) * 2**20
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0


def _weights_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
