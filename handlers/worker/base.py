"""The life cycle that every model shares: device, load, warm up, request -> reply, park, wake.

Not TorchServe's BaseHandler: importing that changes the matmul precision of the process and touches CUDA.
"""

import hmac
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contract import commands
from contract.errors import error_object
from contract.timings import HEADER, server_timing
from handlers.requests.errors import RequestError
from handlers.requests.payload import Reply, Request
from handlers.requests.reply import Encoded
from handlers.weights.mapped_file import FileChanged
from handlers.weights.tensors import DtypeOf, Weights, open_weights
from handlers.worker import marking, suspension, tickets
from handlers.worker.heap import Heap

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Refused(RequestError):
    """What the gateway asked can't be done."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message, status=status)
        self.code = code


class Handler:
    """One model in one worker. A model's handler overrides load, predict and warm_up.

    Besides requests it takes commands (contract/commands.py). ANSWER and CONVERT take a ticket, and answer what was
    written into the gateway's memory; the others answer
    {"state": "ready"|"parked"|"suspended", "phases": {...}, "device_bytes": n, "host_bytes": n}.

    device: where the weights live; from TorchServe's gpu_id, the CPU where it names none.
    dtype: of the weights and activations; `handler.dtype` in model-config.yaml, where "auto" is float16 on CUDA
        and float32 elsewhere.
    config: the `handler` section of model-config.yaml.
    phases: the seconds from the worker's launch to its readiness: fork (until this process began), import (until
        TorchServe called initialize), build (networks without weights), read, copy (see Weights), warm_up.
    """

    device: torch.device
    dtype: torch.dtype
    config: Mapping[str, Any]
    phases: Mapping[str, float]

    def load(self, model_dir: Path) -> None:
        """Builds the network from the archive's folder, with weights from `read_weights`, on self.device."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Answers one request of usual size: a GPU loads and chooses its kernels then. Not called on a CPU."""
        raise NotImplementedError

    def predict(self, request: Request) -> Reply:
        """Answers one request; raises BadRequest for what the client got wrong."""
        raise NotImplementedError

    def initialize(self, context: Any) -> None:
        """Called once by TorchServe; the model counts as ready when this returns."""
        called = time.monotonic()
        marking.install()
        self._weights: list[Weights] = []
        self._parked = self._suspended = False
        properties = context.system_properties
        self.config = (context.model_yaml_config or {}).get("handler", {})
        self.device = device_of(properties.get("gpu_id"))
        self.dtype = dtype_of(self.config.get("dtype", "auto"), self.device)
        with torch.inference_mode():
            self.load(Path(properties["model_dir"]))
            loaded = time.monotonic()
            # On a CPU it takes at least as long as it saves the first client, who mostly waits for it: 12 to 90 ms of
            # a demo model's first answer, but 6 s for SD-2 even at 64 x 64 pixels.
            if self.device.type == "cuda":
                self.warm_up()
        self._heap = Heap()
        read, copy = (sum(weights.seconds[phase] for weights in self._weights) for phase in ("read", "copy"))
        self.phases = _start_phases(called) | {
            "build": loaded - called - read - copy,
            "read": read,
            "copy": copy,
            "warm_up": time.monotonic() - loaded,
        }

    def read_weights(self, path: Path, dtype_of: DtypeOf) -> Mapping[str, Tensor]:
        """A safetensors file's tensors on self.device, to be used as they are; parking and waking then handle them."""
        self._weights.append(open_weights(path, self.device, dtype_of))
        return self._weights[-1].tensors

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Called by TorchServe for each request (batchSize is 1); errors leave as status and JSON, never as text."""
        with marking.of_request(_header(context, commands.REQUEST)):
            body, content_type = self._handled(data[0], context)
        # Here: an error's frames hold what the request was computed with.
        self._heap.trim_if_grown()
        context.set_response_content_type(0, content_type)
        return [body]

    def _handled(self, fields: Mapping[str, Any], context: Any) -> tuple[bytes, str]:
        command = _header(context, commands.COMMAND)
        try:
            with torch.inference_mode():
                if command:
                    return self._obey(command, fields, context), "application/json"
                return self._answer(fields, context)
        except Exception as error:
            status, body = self._error(error)
            context.set_response_status(code=status, idx=0)
            return body, "application/json"

    def _answer(self, fields: Mapping[str, Any], context: Any) -> tuple[bytes, str]:
        request = Request.parse(fields)
        reply = self._reply(request, self._predicted, context)
        for name, value in {**reply.headers, HEADER: server_timing(request.timings.seconds)}.items():
            context.set_response_header(0, name, value)
        return reply.body(), reply.content_type

    def _reply(self, request: Request, make: Callable[[Request], Reply], context: Any, keep: bool = False) -> Encoded:
        with request.timings.stage("model"):
            reply = make(request)
        with request.timings.stage("encode"):
            return reply.encoded(_header(context, "accept"), keep)

    def _predicted(self, request: Request) -> Reply:
        if self._parked:
            raise Refused(503, "parked", "the model is parked: wake it first")
        return self.predict(request)

    def _answer_ticket(self, body: Any, make: Callable[[Request], Reply], context: Any) -> bytes:
        try:
            opened = tickets.Opened(body)
        except tickets.Unusable as error:
            raise Refused(500, "internal", str(error)) from None
        with opened:
            request = Request(opened.fields(), opened.job)
            return opened.write(self._reply(request, make, context, opened.keep), request.timings).to_json()

    def _obey(self, command: str, data: Mapping[str, Any], context: Any) -> bytes:
        key, expected = _header(context, commands.KEY), os.environ.get(commands.KEY_VARIABLE, "")
        if not expected or not hmac.compare_digest(key.encode(), expected.encode()):
            raise Refused(403, "forbidden", "commands are the gateway's alone")
        answers = {commands.ANSWER: self._predicted, commands.CONVERT: _as_it_is}
        if command in answers:
            return self._answer_ticket(data.get("body"), answers[command], context)
        ways = {
            commands.PARK: self._park,
            commands.WAKE: self._wake,
            commands.SUSPEND: self._suspend,
            commands.RESUME: self._resume,
            commands.STATUS: lambda: None,
        }
        if command not in ways:
            known = ", ".join((*answers, *ways))
            raise Refused(400, "bad_request", f"{commands.COMMAND} must be one of {known}")
        ways[command]()
        status = {
            "state": "suspended" if self._suspended else "parked" if self._parked else "ready",
            "phases": {name: round(seconds, 6) for name, seconds in self.phases.items()},
            "device_bytes": sum(weights.device_bytes for weights in self._weights),
            "host_bytes": sum(weights.host_bytes for weights in self._weights),
        }
        return json.dumps(status).encode()

    def _park(self) -> None:
        if self._parked:
            return
        try:
            for weights in self._weights:
                weights.save()
        except (MemoryError, RuntimeError):
            raise Refused(507, "out_of_memory", "not enough host memory to park the model: it stays ready") from None
        self._drop()

    def _wake(self) -> None:
        if not self._parked:
            return
        if self._suspended:
            raise Refused(409, "suspended", "the model is suspended: resume it first")
        try:
            for weights in self._weights:
                weights.restore()
        except FileChanged as error:
            self._drop()
            raise Refused(409, "weights_changed", str(error)) from None
        except torch.AcceleratorError:
            raise
        except (MemoryError, RuntimeError):
            self._drop()
            raise Refused(507, "out_of_memory", "not enough memory to wake the model: it stays parked") from None
        self._parked = False

    def _suspend(self) -> None:
        if not self._parked:
            raise Refused(409, "not_parked", "only a parked model can be suspended: park it first")
        if not self._suspended:
            # Before it is tried: where that fails nothing may be asked of the GPU either.
            self._suspended = True
            self._ask_driver(suspension.suspend)

    def _resume(self) -> None:
        if self._suspended:
            self._ask_driver(suspension.resume)
            self._suspended = False

    @staticmethod
    def _ask_driver(action: Callable[[], None]) -> None:
        try:
            action()
        except suspension.Failed as error:
            raise Refused(500, "suspension_failed", f"{error}: this worker is to be ended") from None

    def _drop(self) -> None:
        self._parked = True
        for weights in self._weights:
            weights.drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._heap.trim()

    def _error(self, error: Exception) -> tuple[int, bytes]:
        if isinstance(error, RequestError):
            return error.status, _error_body(error.code, error.message, error.field)
        # The frames, not the message: an exception's text may quote what the client sent.
        logger.error("%s in predict\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return 507, _error_body("out_of_memory", "not enough memory for this request: send a smaller picture")
        if isinstance(error, torch.AcceleratorError):
            # Such an error sticks to the CUDA context: every later request would fail. TorchServe starts a new worker.
            os._exit(1)
        return 500, _error_body("internal", "the model failed on this request; the server's log says where")


def device_of(gpu_id: int | str | None) -> torch.device:
    """TorchServe's gpu_id (None or -1 where it has no GPU to give) as a device."""
    if gpu_id is None or int(gpu_id) < 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(gpu_id))


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """ "auto", "float32", "float16" or "bfloat16" as a dtype; ValueError for any other name."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"handler.dtype in model-config.yaml must be auto, {', '.join(_DTYPES)}; it is {name!r}")
    return _DTYPES[name]


def _error_body(code: str, message: str, field: str | None = None) -> bytes:
    return json.dumps(error_object(code, message, field)).encode()


def _as_it_is(request: Request) -> Reply:
    return Reply(request.picture("image"), warnings=request.warnings)


def _header(context: Any, name: str) -> str:
    """A request header by its lower-case name; TorchServe keeps the client's spelling."""
    headers = context.request_processor[0].get_request_properties()
    return next((value for key, value in headers.items() if key.lower() == name and isinstance(value, str)), "")


def _start_phases(called: float) -> dict[str, float]:
    """fork and import, where `called` is when TorchServe called initialize (time.monotonic()).

    The launcher leaves the time at which it began in PALIMPSEST_WORKER_STARTED; a worker without one was its own start.
    """
    # Field 22 of the process's stat: its start, in ticks since boot (to a hundredth of a second).
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    born = time.monotonic() - age
    launched = float(os.environ.get("PALIMPSEST_WORKER_STARTED", born))
    return {"fork": max(0.0, born - launched), "import": called - max(born, launched)}
