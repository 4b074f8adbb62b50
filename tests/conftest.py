"""What several test files share: the sample picture, a store of demo archives, a handler outside TorchServe."""

import os

# As in the server: before torch is imported, or a busy machine makes its threads spin against each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import base64
import importlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from fakes import FakeTorchServe
from hypothesis import settings
from PIL import Image
from scheduling import MakeWorld, World
from ts.context import RequestProcessor

from contract.ticket import Ticket
from serve.archives import build
from serve.engine.answer import written
from serve.memory_file import MemoryFile, whole

DATA = Path(__file__).parent / "data"

# The same examples in each run: who changed nothing sees no new failure. `--hypothesis-profile=default` looks for some.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def dog() -> bytes:
    """The sample photograph: a 1499x1041 PNG of a dog on a bench."""
    return (DATA / "dog-on-bench.png").read_bytes()


@pytest.fixture(scope="session")
def dog_mask() -> bytes:
    """Its mask as the original client sends it: a JPEG with 93 grey levels."""
    return (DATA / "dog-on-bench-mask.jpg").read_bytes()


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the demo archives, built once per run."""
    store = tmp_path_factory.mktemp("store")
    build.ensure_demo(store, lambda message: None)
    return store


class HandlerClient:
    """Speaks to a handler as TorchServe's worker does."""

    def __init__(self, name: str, model_dir: Path, kind: Callable[[], Any] | None = None) -> None:
        """kind: a handler of another class than the model's own."""
        module = importlib.import_module(f"handlers.{name}.handler")
        self.handler = (kind or getattr(module, f"{name.capitalize()}Handler"))()
        config = yaml.safe_load((model_dir / "model-config.yaml").read_text())
        self.handler.initialize(
            SimpleNamespace(system_properties={"model_dir": str(model_dir), "gpu_id": None}, model_yaml_config=config)
        )

    def send(self, data: dict[str, Any], accept: str = "", **headers: str) -> "HandlerReply":
        """data: a request as it reaches a handler: {"body": ...}, or multipart fields by name."""
        processor = RequestProcessor({"Accept": accept} | headers)
        context = SimpleNamespace(
            request_processor=[processor],
            set_response_status=lambda code, idx: processor.report_status(code),
            set_response_header=lambda idx, key, value: processor.add_response_property(key, value),
            set_response_content_type=lambda idx, value: processor.add_response_property("content-type", value),
        )
        (body,) = self.handler.handle([data], context)
        return HandlerReply(processor.get_response_status_code(), processor.get_response_headers(), body)

    def ask(
        self,
        fields: dict[str, Any],
        accept: str = "",
        job: MemoryFile | None = None,
        body: bytes | None = None,
        content_type: str = "",
        content: str = "",
        keep: bool = False,
    ) -> "HandlerReply":
        """As the gateway does, with a ticket: for fields, of which bytes lie in a file, or for a body.

        content: what the gateway calls the bytes; they are an upload's.
        """
        with ExitStack() as files:

            def file_of(data: bytes) -> MemoryFile:
                file = files.enter_context(MemoryFile())
                file.write(data)
                file.seal()
                return file

            reply = files.enter_context(MemoryFile())
            parts = {
                name: whole(file_of(value)).named._replace(content=content)
                for name, value in fields.items()
                if isinstance(value, bytes)
            }
            ticket = Ticket(
                reply.file,
                job and job.file,
                None if body is None else file_of(body).file,
                content_type,
                fields={name: value for name, value in fields.items() if name not in parts},
                parts=parts,
                keep=keep,
            )
            command = {"x-palimpsest-command": "answer", "x-palimpsest-key": "the-key"}
            with patch.dict(os.environ, PALIMPSEST_COMMAND_KEY="the-key"):
                said = self.send({"body": ticket.to_json()}, accept, **command)
            if said.status != 200:
                return said
            answer = written(reply, said.body)
            kept = {
                name: [b"".join(part.pieces()) for part in (each if isinstance(each, list) else [each])]
                for name, each in answer.kept.items()
            }
            return HandlerReply(answer.status, answer.headers, b"".join(answer.pieces()), answer.timings, kept)

    def json(self, **fields: Any) -> "HandlerReply":
        """Sends the fields as a JSON body; bytes travel as base64."""
        plain = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in fields.items()}
        return self.send({"body": json.dumps(plain).encode()})


class HandlerReply:
    """timings: of the answer to a ticket. kept: files by the names under which their ids are told."""

    def __init__(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        timings: dict[str, float] | None = None,
        kept: dict[str, list[bytes]] | None = None,
    ) -> None:
        self.status, self.headers, self.body = status, headers, body
        self.timings, self.kept = timings or {}, kept or {}

    @property
    def fields(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    @property
    def error(self) -> dict[str, str]:
        return dict(self.fields["error"])

    @property
    def picture(self) -> np.ndarray:
        """The edited picture or mask, from either form of reply."""
        is_json = self.headers["content-type"] == "application/json"
        return pixels(base64.b64decode(self.fields["generated_image"]) if is_json else self.body)


@pytest.fixture(scope="session")
def open_handler(demo_store: Path) -> Callable[[str], HandlerClient]:
    """Loads a demo handler by name, once per run."""
    opened: dict[str, HandlerClient] = {}

    def open_(name: str) -> HandlerClient:
        if name not in opened:
            opened[name] = HandlerClient(name, demo_store / "demo" / name)
        return opened[name]

    return open_


def pixels(data: bytes) -> np.ndarray:
    """An encoded picture as the array it holds."""
    return np.asarray(Image.open(io.BytesIO(data)))


def encoded(array: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """An array as an encoded picture."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def fake() -> FakeTorchServe:
    return FakeTorchServe()


@pytest.fixture
def anyio_backend() -> str:
    """Of tests that are coroutines."""
    return "asyncio"


@pytest.fixture
def make_world(caplog: pytest.LogCaptureFixture) -> Iterator[MakeWorld]:
    worlds: list[World] = []

    def make(*arguments: Any, **options: Any) -> World:
        worlds.append(World(*arguments, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    assert not [r for r in caplog.get_records("call") if "residency failed" in r.message]
