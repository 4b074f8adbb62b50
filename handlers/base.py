"""The life cycle that every model shares: device, load, warm up, request -> reply.

Not TorchServe's BaseHandler: importing that changes the matmul precision of the process and touches CUDA.
"""

import json
import logging
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from handlers.payload import BadRequest, Reply, Request

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Handler:
    """One model in one worker. A model's handler overrides load, predict and warm_up.

    device: where the weights live; from TorchServe's gpu_id, the CPU where it names none.
    dtype: of the weights and activations; `handler.dtype` in model-config.yaml, where "auto" is float16 on CUDA
        and float32 elsewhere.
    config: the `handler` section of model-config.yaml.
    """

    device: torch.device
    dtype: torch.dtype
    config: Mapping[str, Any]

    def load(self, model_dir: Path) -> None:
        """Reads the checkpoint files in the archive's folder and puts the network onto self.device."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Answers one request of typical size, so that the first client does not pay for it."""
        raise NotImplementedError

    def predict(self, request: Request) -> Reply:
        """Answers one request; raises BadRequest for what the client got wrong."""
        raise NotImplementedError

    def initialize(self, context: Any) -> None:
        """Called once by TorchServe; the model counts as ready when this returns."""
        properties = context.system_properties
        self.config = (context.model_yaml_config or {}).get("handler", {})
        self.device = device_of(properties.get("gpu_id"))
        self.dtype = dtype_of(self.config.get("dtype", "auto"), self.device)
        with torch.inference_mode():
            self.load(Path(properties["model_dir"]))
            self.warm_up()

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Called by TorchServe for each request (batchSize is 1); errors leave as status and JSON, never as text."""
        try:
            with torch.inference_mode():
                reply = self.predict(Request.parse(data[0]))
            body, content_type, headers = reply.encode(_header(context, "accept"))
            for name, value in headers.items():
                context.set_response_header(0, name, value)
        except Exception as error:
            status, body = self._error(error)
            context.set_response_status(code=status, idx=0)
            content_type = "application/json"
        context.set_response_content_type(0, content_type)
        return [body]

    def _error(self, error: Exception) -> tuple[int, bytes]:
        if isinstance(error, BadRequest):
            return error.status, error_body("bad_request", error.message, error.field)
        # The frames, not the message: an exception's text may quote what the client sent.
        logger.error("%s in predict\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return 507, error_body("out_of_memory", "not enough memory for this request: send a smaller picture")
        if isinstance(error, torch.AcceleratorError):
            # Such an error sticks to the CUDA context: every later request would fail. TorchServe starts a new worker.
            os._exit(1)
        return 500, error_body("internal", "the model failed on this request; the server's log says where")


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


def error_body(code: str, message: str, field: str | None = None) -> bytes:
    """The one shape of every error: {"error": {"code", "message", "field"?}}."""
    error = {"code": code, "message": message} | ({"field": field} if field else {})
    return json.dumps({"error": error}).encode()


def _header(context: Any, name: str) -> str:
    """A request header by its lower-case name; TorchServe keeps the client's spelling."""
    headers = context.request_processor[0].get_request_properties()
    return next((value for key, value in headers.items() if key.lower() == name and isinstance(value, str)), "")
