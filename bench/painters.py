"""The programs that bench/models.py compares, with the same three verbs: the plain script, this server, IOPaint."""

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import torch
from safetensors.torch import load_file

from handlers.lama import network as lama_network
from tests.serving import ROOT, free_port, serving

PATIENCE = 1800  # seconds, for one answer


class Painter(ABC):
    """One of them, running. Each verb returns the bytes of the picture that it made."""

    def __init__(self, name: str, can: set[str], most_pixels: float = math.inf) -> None:
        """can: the verbs that it has. most_pixels: of a picture that it is to erase from."""
        self.name, self.can, self.most_pixels = name, can, most_pixels
        self._stack = ExitStack()

    def click(self, image: Path, points: list[list[int]]) -> bytes:
        """The mask of what the points select, best scored."""
        raise NotImplementedError

    def click_by_id(self, image: Path, points: list[list[int]]) -> bytes:
        """The same for a client that has uploaded the picture and names it from then on."""
        raise NotImplementedError

    def erase(self, image: Path, mask: Path) -> bytes:
        raise NotImplementedError

    def replace(self, image: Path, mask: Path, prompt: str, steps: int, seed: int) -> bytes:
        raise NotImplementedError

    @property
    @abstractmethod
    def process(self) -> int: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Of all its processes so far; of those that have ended, what their parents were told."""
        return sum(sum(times) for times in self._asked(lambda process: process.cpu_times()[:4]))

    def idle_mb(self) -> float:
        """Of all its processes, each page once."""
        return sum(self._asked(lambda process: process.memory_full_info().pss)) / 1e6

    def forget_peaks(self) -> None:
        for process in self.family():
            with suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """Of the process that has taken most since forget_peaks: the one that computes."""
        return max(self._asked(lambda process: _high_water_mark(process.pid))) / 1e6

    def _asked(self, question: Any) -> list[Any]:
        answers = []
        for process in self.family():
            with suppress(psutil.Error, OSError):
                answers.append(question(process))
        return answers


class Plain(Painter):
    """bench/baseline.py, which shows a network the whole picture."""

    def __init__(self, folder: Path, store: Path, bytes_per_pixel: float) -> None:
        most_pixels = 0.6 * psutil.virtual_memory().total / bytes_per_pixel
        super().__init__("plain script", {"click", "erase", "replace"}, most_pixels)
        self._out = folder / "plain.png"
        log = self._stack.enter_context((folder / "plain.log").open("w"))
        self._running = subprocess.Popen(
            [sys.executable, "-m", "bench.baseline", str(store)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        self._stack.callback(self._running.wait)
        self._stack.callback(self._running.kill)
        self._answered()

    @property
    def process(self) -> int:
        return self._running.pid

    def click(self, image: Path, points: list[list[int]]) -> bytes:
        return self._ask(do="click", image=str(image), points=points)

    def erase(self, image: Path, mask: Path) -> bytes:
        return self._ask(do="erase", image=str(image), mask=str(mask))

    def replace(self, image: Path, mask: Path, prompt: str, steps: int, seed: int) -> bytes:
        return self._ask(do="replace", image=str(image), mask=str(mask), prompt=prompt, steps=steps, seed=seed)

    def _ask(self, **request: Any) -> bytes:
        assert self._running.stdin is not None
        print(json.dumps(request | {"out": str(self._out)}), file=self._running.stdin, flush=True)
        self._answered()
        return self._out.read_bytes()

    def _answered(self) -> None:
        assert self._running.stdout is not None
        if not self._running.stdout.readline():
            raise RuntimeError("the plain script has ended: see plain.log")


class Ours(Painter):
    """A server of this tree, or of another one. store: with the archives at its root."""

    def __init__(self, name: str, folder: Path, store: Path, tree: Path | None = None) -> None:
        super().__init__(name, {"click", "click_by_id", "erase", "replace"})
        (folder / name).mkdir()
        self._ids = dict[Path, str]()
        self._server = self._stack.enter_context(serving(folder / name, store, "full", tree=tree))
        self._server.http.timeout = httpx.Timeout(PATIENCE)

    @property
    def process(self) -> int:
        return self._server.process.pid

    def click(self, image: Path, points: list[list[int]]) -> bytes:
        return self._post("segment", {"image": image}, points=json.dumps(points))

    def click_by_id(self, image: Path, points: list[list[int]]) -> bytes:
        http = self._server.http
        if image not in self._ids:
            self._ids[image] = json.loads(_checked(http.post("/v1/images", content=image.read_bytes())))["id"]
        asked = {"image": self._ids[image], "points": points}
        return _checked(http.post("/v1/segment", json=asked, headers={"accept": "image/png"}))

    def erase(self, image: Path, mask: Path) -> bytes:
        return self._post("erase", {"image": image, "mask": mask})

    def replace(self, image: Path, mask: Path, prompt: str, steps: int, seed: int) -> bytes:
        return self._post("replace", {"image": image, "mask": mask}, prompt=prompt, steps=steps, seed=seed)

    def _post(self, route: str, files: dict[str, Path], **fields: Any) -> bytes:
        content = {name: path.read_bytes() for name, path in files.items()}
        answer = self._server.http.post(
            f"/v1/{route}", files=content, data=fields, headers={"accept": "image/png" if route == "segment" else "*/*"}
        )
        return _checked(answer)


class IoPaint(Painter):
    """IOPaint in an environment of its own, with full-size networks: it knows no others. python: that environment's."""

    def __init__(self, python: Path, folder: Path, store: Path) -> None:
        super().__init__("IOPaint", {"click", "erase"})
        home = folder / "iopaint"
        checkpoints = home / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        torch.save(load_file(store / "sam" / "weights.safetensors"), checkpoints / "sam_vit_b_01ec64.pth")
        script = checkpoints / "big-lama.pt"
        _script(store / "lama").save(str(script))
        port = free_port()
        self._log = folder / "iopaint.log"
        log = self._stack.enter_context(self._log.open("w"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._running = subprocess.Popen(
            [str(python), "-c", "from iopaint import entry_point; entry_point()", "start", "--port", str(port),
             "--model", "lama", "--device", device, "--model-dir", str(home), "--enable-interactive-seg",
             "--interactive-seg-model", "vit_b", "--interactive-seg-device", device],
            env=os.environ | {"TORCH_HOME": str(home), "XDG_CACHE_HOME": str(home), "LAMA_MODEL_URL": str(script),
                              "LAMA_MODEL_MD5": hashlib.md5(script.read_bytes()).hexdigest()},
            stdout=log, stderr=log,
        )  # fmt: skip
        self._stack.callback(self._running.wait)
        self._stack.callback(self._running.kill)
        self._http = self._stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=PATIENCE)
        )
        self._wait()

    @property
    def process(self) -> int:
        return self._running.pid

    def click(self, image: Path, points: list[list[int]]) -> bytes:
        clicks = [[*point, 1] for point in points]
        asked = {"name": "InteractiveSeg", "image": _text(image), "clicks": clicks}
        return _checked(self._http.post("/run_plugin_gen_mask", json=asked))

    def erase(self, image: Path, mask: Path) -> bytes:
        """With its page's defaults: from 800 pixels on it crops to the mask and 128 pixels around it."""
        asked = {"image": _text(image), "mask": _text(mask), "hd_strategy": "Crop"}
        return _checked(self._http.post("/inpaint", json=asked))

    def _wait(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self._running.poll() is None:
            with suppress(httpx.TransportError):
                if self._http.get("/model").is_success:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"IOPaint does not start:\n{self._log.read_text()[-2000:]}")


def _script(archive: Path) -> torch.jit.ScriptModule:
    """The archive's LaMa as IOPaint takes it: picture Bx3xHxW and mask Bx1xHxW -> picture, sides multiples of 8."""
    network = lama_network.build(lama_network.load_config(archive / "config.yaml"))
    network.load_state_dict({n: t.float() for n, t in load_file(archive / "weights.safetensors").items()})

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.network(torch.cat((image * (1 - mask), mask), dim=1))

    with torch.inference_mode():
        return torch.jit.trace(Whole().eval(), (torch.rand(1, 3, 64, 96), torch.zeros(1, 1, 64, 96)), check_trace=False)


def _text(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _checked(answer: httpx.Response) -> bytes:
    if answer.is_error:
        raise RuntimeError(f"{answer.request.url}: {answer.status_code} {answer.text[:500]}")
    return answer.content


def _high_water_mark(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
