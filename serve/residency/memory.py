"""How much memory there is, and how much each model takes: NVML on a GPU, private memory on a CPU-only machine.

All sizes are bytes.
"""

import json
import os
import platform
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import psutil
import pynvml

from serve.residency.model import Taken
from serve.residency.seed import Seed, read_seed
from serve.state_file import keep
from serve.store.catalog import Archive

_CHECKPOINTS_SINCE = 570  # version of NVIDIA's driver


class Device(Protocol):
    """The memory in which models live."""

    name: str
    gpu: int | None  # its index, as nvidia-smi counts; None for a host
    total: int
    frees_late: bool  # whether memory comes back only some time after its process has ended
    overhead: int  # bytes that a worker takes beside its weights, until they are measured
    parked_worker: int  # bytes that a worker keeps whose weights are parked, until they are measured
    standby_worker: int  # bytes that one holds of it that has set it up for no model yet
    suspends: bool  # whether its driver takes parked workers off it altogether

    def free(self) -> int:
        """Bytes that the device reports as free."""

    def used_by(self, pid: int) -> int | None:
        """Bytes that a worker takes; None where the device cannot tell (another process-id namespace)."""


class CudaDevice:
    """One GPU, seen through NVML, which makes no CUDA context.

    suspends: where the driver should have its process checkpoint, which is on x86-64 alone.
    """

    frees_late = True
    # Measured on an H200, in float16: SAM vit_b 2.2 GB beside its weights, SD-2 1.7, big-lama 1.1; parked 0.66 to 0.76.
    overhead = 2100 << 20
    parked_worker = standby_worker = 720 << 20  # the CUDA context and the kernels in it

    def __init__(self, index: int) -> None:
        """Raises pynvml.NVMLError where there is no such GPU, or no driver."""
        self.gpu: int | None = index
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.name = _text(pynvml.nvmlDeviceGetName(self._handle))
        self.total = int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total)
        self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
        recent = int(self.driver.partition(".")[0]) >= _CHECKPOINTS_SINCE
        self.suspends = platform.machine() == "x86_64" and recent

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
    gpu: int | None = None
    frees_late = False
    overhead = 600 << 20
    suspends = False
    standby_worker = 0
    parked_worker = 100 << 20  # what Python and torch made their own since the fork

    def __init__(self) -> None:
        self.total = psutil.virtual_memory().total

    def free(self) -> int:
        return int(psutil.virtual_memory().available)

    def used_by(self, pid: int) -> int | None:
        """The pages that it alone holds, mapped weights included.

        Not the proportional set size: of what workers share with the zygote each takes less with every further worker
        (240 MiB for the first empty one, 94 for the fifth), and a footprint would depend on who else was there.
        """
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return None
        private = [int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))]
        return sum(private) * 1024 if private else None


def find_device() -> Device:
    """The GPU that CUDA_VISIBLE_DEVICES names first (its index or its UUID), else the first one; else the host.

    The host also where that variable is empty or -1. ValueError where it names what is not there.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named in ("", "-1") or not _has_gpu():
        return HostDevice()
    first = (named or "0").split(",")[0].strip()
    try:
        # TorchServe takes an index only.
        return CudaDevice(int(first) if first.isdecimal() else _index(first))
    except pynvml.NVMLError as error:
        raise ValueError(f"CUDA_VISIBLE_DEVICES names {first}, which is no GPU here: {error}") from None


def _index(uuid: str) -> int:
    return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)))


def _text(told: str | bytes) -> str:
    """NVML's, which older releases of its library hand on as bytes."""
    return told.decode() if isinstance(told, bytes) else told


def _has_gpu() -> bool:
    """Whether a driver is loaded and reports a GPU."""
    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    except pynvml.NVMLError:
        return False


def parse_budget(text: str, total: int) -> int:
    """ "8000" (MiB) or "92%" (of `total`) in bytes; ValueError for anything else."""
    share = text.endswith("%")
    most = 100 if share else 2**40
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1
    # NaN is in no range.
    if not 0 <= number <= most:
        raise ValueError(f"must be a number of MiB such as 8000, or a percentage such as 92%, not {text[:40]!r}")
    return int(total * number / 100) if share else int(number * 2**20)


@dataclass
class Footprint:
    """load: what the model took when it had just been loaded, which decides whether it can be. peak: the most that it
    was seen to take of late, requests included, which decides what may run beside it. parked, host: what it took on
    the device and in host memory when it was parked; 0 where it never was.
    """

    load: int
    peak: int
    parked: int = 0
    host: int = 0


class Memory:
    """The budgets of device and host, the device and the footprints, which are kept in `file` between runs.

    A footprint belongs to what is in an archive: copies under other names share it, a replaced one is measured anew.
    """

    MAX_ENTRIES = 2000

    def __init__(self, device: Device, budget: int, file: Path, host_budget: int = 0, suspend: bool = False) -> None:
        """suspend: whether parked models may be suspended where the device can do that."""
        self.device, self.budget, self.host_budget, self._file = device, budget, host_budget, file
        self.suspends = suspend and device.suspends
        self._unsuspendable: set[str] = set()
        self._footprints = _read(file)
        self._seeds: dict[tuple[str, str], Seed] = {}

    def free(self) -> int:
        return self.device.free()

    def predict(self, archive: Archive) -> int:
        """What was measured at its load; else `handler.memory_mib` of its model-config.yaml; else its weights and a
        margin.
        """
        known = self.footprint(archive)
        return known.load if known else self._unmeasured(self._seed(archive))

    def is_measured(self, archive: Archive) -> bool:
        return self.footprint(archive) is not None

    def predict_peak(self, archive: Archive) -> int:
        """0 where it was never measured."""
        known = self.footprint(archive)
        return known.peak if known else 0

    def predict_parked(self, archive: Archive) -> Taken | None:
        """What was measured, else a guess; None where its handler takes no commands, or parking would free nothing."""
        seed = self._seed(archive)
        known = self.footprint(archive) or Footprint(self._unmeasured(seed), 0)
        parked = Taken(known.parked or self.device.parked_worker, known.host or seed.weights)
        return parked if seed.takes_commands and parked.device < known.load else None

    def predict_suspended(self, archive: Archive) -> Taken | None:
        """None also where the model could not be suspended before: each try costs it its worker."""
        seed = self._seed(archive)
        can = self.suspends and seed.takes_commands and seed.content not in self._unsuspendable
        return self.suspended(archive) if can else None

    def suspended(self, archive: Archive) -> Taken:
        """What its model takes then: beside the weights, host memory has what the parked worker kept of the device."""
        known = self.footprint(archive) or Footprint(0, 0)
        host = known.host or self._seed(archive).weights
        return Taken(0, host + (known.parked or self.device.parked_worker), suspended=True)

    def cannot_suspend(self, archive: Archive) -> None:
        """Notes that it failed, so that it is not tried again before the next start."""
        if len(self._unsuspendable) < self.MAX_ENTRIES:
            self._unsuspendable.add(self._seed(archive).content)

    def takes_commands(self, archive: Archive) -> bool:
        """Whether the archive says that its handler knows the commands of contract/commands.py."""
        return self._seed(archive).takes_commands

    def response_timeout(self, archive: Archive) -> int:
        """Seconds after which TorchServe ends the archive's worker over a request, by the archive's own word."""
        return self._seed(archive).response_timeout

    def startup_timeout(self, archive: Archive) -> int:
        """Seconds after which TorchServe ends the archive's worker over its load."""
        return self._seed(archive).startup_timeout

    def footprint(self, archive: Archive) -> Footprint | None:
        known = self._footprints.get(self._seed(archive).content)
        # As files of earlier versions have it.
        return known or self._footprints.get(archive.engine_name)

    def measure_load(self, archive: Archive, pid: int, fallback: int) -> int:
        """Looks at a worker whose model has just been loaded and returns the bytes that it takes.

        fallback: what the device has lost meanwhile, for where it does not tell processes apart. Others may have had
        their share in that, so it does not count as more than the budget, and refuses no model.
        """
        used = self.device.used_by(pid) or min(fallback, self.budget) or self.predict(archive)
        footprint = self._footprint(archive, Footprint(used, used))
        footprint.load, footprint.peak = used, max(used, footprint.peak)
        self._write()
        return used

    def measure(self, archive: Archive, pid: int) -> int:
        """Looks at a worker between two requests, or beside the first moments of one, and returns what it takes.

        One request larger than all others is half forgotten with every look.
        """
        used = self.device.used_by(pid) or self.predict(archive)
        footprint = self._footprint(archive, Footprint(used, used))
        peak = max(used, (footprint.peak + used) // 2)
        if peak != footprint.peak:
            footprint.peak = peak
            self._write()
        return used

    def measure_work(self, archive: Archive, pid: int) -> None:
        """Looks at a worker in the middle of a request."""
        used = self.device.used_by(pid)
        known = self.footprint(archive)
        if used and known and used > known.peak:
            known.peak = used
            self._write()

    def measure_parked(self, archive: Archive, pid: int, host: int) -> Taken:
        """Looks at a worker that has just been parked. host: what it says it holds in host memory.

        On a CPU-only machine it holds nothing: the weights are in the page cache, which counts as much.
        """
        load = self.predict(archive)
        footprint = self._footprint(archive, Footprint(load, load))
        footprint.parked = self.device.used_by(pid) or self.device.parked_worker
        footprint.host = host or self._seed(archive).weights
        self._write()
        return Taken(footprint.parked, footprint.host)

    def _footprint(self, archive: Archive, new: Footprint) -> Footprint:
        """What is known of the archive, else `new`, by the name under which it is kept from now on."""
        known = self.footprint(archive) or new
        self._footprints.pop(archive.engine_name, None)
        return self._footprints.setdefault(self._seed(archive).content, known)

    def _unmeasured(self, seed: Seed) -> int:
        return seed.load or seed.weights + self.device.overhead

    def _seed(self, archive: Archive) -> Seed:
        """The scheduler asks at every decision: the disk is read once."""
        key = archive.engine_name, archive.identity
        if key not in self._seeds:
            seed = read_seed(archive)
            self._seeds = {key: seed, **dict(islice(self._seeds.items(), self.MAX_ENTRIES))}
        return self._seeds[key]

    def _write(self) -> None:
        while len(self._footprints) > self.MAX_ENTRIES:
            del self._footprints[next(iter(self._footprints))]
        keep(self._file, {name: astuple(footprint) for name, footprint in self._footprints.items()})


def _read(file: Path) -> dict[str, Footprint]:
    try:
        return {name: Footprint(*map(int, sizes)) for name, sizes in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
