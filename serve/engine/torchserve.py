"""The only module that speaks to TorchServe: register, unregister, predict.

TorchServe's own errors become exceptions of serve.errors; what a handler answered passes through as it is.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from contract import commands
from contract.ticket import File
from serve import disk
from serve.budget import Budget
from serve.engine.answer import Answer, written
from serve.engine.handlerlog import LOG, HandlerLog
from serve.engine.question import Question
from serve.engine.said import Said
from serve.errors import (
    DeadlineExceeded,
    DiskFull,
    EngineUnavailable,
    ModelLoadFailed,
    NotReached,
    OutOfMemory,
    PalimpsestError,
)
from serve.logs import record
from serve.memory_file import PIECE, MemoryFile
from serve.settings import MAX_PREDICT_TIMEOUT

# Hop-by-hop headers belong to one connection; the tokens, and what tells workers what to do, to us.
_DROPPED = {
    "connection", "content-length", "host", "keep-alive", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "authorization", "accept-encoding", "expect", "cookie", "x-api-key", "traceparent", "tracestate",
}  # fmt: skip


_ERROR_BYTES = 2**16  # of a reply, enough for any error of TorchServe's
# Of bodies that are in TorchServe at once; it keeps each several times, and has 1 GiB for all.
THROUGH_JAVA = 256 * 2**20
_WAIT_FOR_JAVA = 60.0  # seconds

CONNECT_TIMEOUT = 5.0
METRICS_TIMEOUT = 1.0


@dataclass(frozen=True)
class Endpoint:
    """The address of one running TorchServe, its two tokens, and the key that its workers' commands need."""

    inference: str
    management: str
    inference_token: str
    management_token: str
    metrics: str = ""
    command_key: str = ""

    @classmethod
    def read(cls, inference: str, management: str, metrics: str, key_file: Path, command_key: str) -> "Endpoint":
        """key_file: the key_file.json that TorchServe wrote into its working directory."""
        keys = json.loads(key_file.read_text())
        return cls(inference, management, keys["inference"]["key"], keys["management"]["key"], metrics, command_key)


class TorchServe:
    """A client of one TorchServe; made inside the event loop that uses it.

    Every method raises NotReached where TorchServe cannot be reached, EngineUnavailable where the connection breaks
    and DeadlineExceeded where it does not answer in time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        load_timeout: float,
        session: aiohttp.ClientSession | None = None,
        logs: Path = Path(),
        home: Path = Path(),
    ) -> None:
        """session: stands in for the network in tests. logs: the folder of TorchServe's log files. home: the one that
        it lives in, where workers have their sockets and temporary files.
        """
        self._logs, self._home = logs, home
        self._endpoint, self._load_timeout = endpoint, load_timeout
        self._through_java = Budget(THROUGH_JAVA, _WAIT_FOR_JAVA, "too many bodies go through TorchServe")
        # aiohttp: a third faster than httpx for megabytes, by bench/http_clients.py. No limit: the scheduler has one.
        self._http = session or aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )

    async def close(self) -> None:
        await self._http.close()

    async def alive(self) -> bool:
        """Whether TorchServe answers at all; its ping is 500 as soon as one model of many is unwell."""
        try:
            response = await self._send("GET", f"{self._endpoint.inference}/ping", self._endpoint.inference_token, 5)
        except PalimpsestError:
            return False
        return response.status in (200, 500)

    async def metrics(self) -> str:
        """TorchServe's own metrics in Prometheus' text format."""
        url = f"{self._endpoint.metrics}/metrics"
        answer = await self._send("GET", url, self._endpoint.inference_token, METRICS_TIMEOUT)
        return answer.body.decode(errors="replace") if answer.status == 200 else ""

    async def register(self, name: str, archive: Path) -> None:
        """Starts a worker for the archive folder and returns once its model is loaded and warm.

        Raises OutOfMemory, DiskFull or ModelLoadFailed; nothing of the failed registration is left behind.
        """
        # The query string, not a body: TorchServe sets maxBatchDelay to -10000 for a body.
        log = HandlerLog(self._logs / LOG, name)
        query = {
            "model_name": name,
            "url": str(archive),
            "initial_workers": "1",
            "synchronous": "true",
            # For an archive without a model-config.yaml; one with it has its own, or TorchServe's 120 s.
            "response_timeout": str(MAX_PREDICT_TIMEOUT),
        }
        try:
            response = await self._manage("POST", "/models", self._load_timeout, params=query)
        except BaseException:
            await self._unregister_quietly(name)
            raise
        if response.status == 200:
            return
        await self._unregister_quietly(name)
        if response.status == 507:
            raise OutOfMemory(f"there is not enough memory to load {name!r}")
        reason = await log.reason(archive) or response.message
        if trouble := disk.trouble(self._home):
            where = f"the disk of {self._home.parent} is {trouble}"
            raise DiskFull(f"{name!r} cannot be loaded, and {where}: make room there ({reason})")
        raise ModelLoadFailed(f"{name!r} cannot be loaded: {reason}; {LOG} has the handler's words")

    async def unregister(self, name: str) -> None:
        """Kills the model's worker; no request of that model may be running, for it would hang for ever."""
        response = await self._manage("DELETE", f"/models/{name}", 60)
        if response.status not in (200, 404):
            raise EngineUnavailable(f"TorchServe cannot unload {name!r}: {response.message}")

    async def answer(self, name: str, question: Question, reply: MemoryFile, job: File | None) -> Answer:
        """Has a handler of ours answer; the bytes go by its side. reply: empty; the answer's from here on.

        job: where the handler tells its progress. Raises NotReached where the model is not loaded. No time limit.
        """
        headers = _passed(question.headers) | {
            "content-type": "application/json",
            commands.COMMAND: question.command,
            commands.KEY: self._endpoint.command_key,
        }
        if request := record.current():
            headers[commands.REQUEST] = request.id
        said = await self._ask(name, headers, _all_of(question.ticket(reply.file, job).to_json()))
        if said.status == 200:
            return written(reply, said.body)
        reply.write(said.body)
        return Answer(said.status, {"content-type": said.headers.get("content-type", "application/json")}, reply)

    async def predict(self, name: str, question: Question, reply: MemoryFile) -> Answer:
        """Passes one request through TorchServe to a handler of any make. Otherwise as `answer`."""
        size = question.length
        headers = _passed(question.headers) | {"content-length": str(size)}
        await self._through_java.reserve(size)
        try:
            said = await self._ask(name, headers, question.pieces(), reply)
        finally:
            self._through_java.release(min(size, self._through_java.total))
        own = {key: value for key, value in said.headers.items() if key.startswith(commands.PREFIX)}
        content_type = said.headers.get("content-type", "application/octet-stream")
        return Answer(said.status, {"content-type": content_type, **own}, reply)

    async def command(self, name: str, command: str) -> dict[str, Any]:
        """Tells a model of ours to park, wake or report its status, and returns the status. No time limit.

        Raises OutOfMemory, NotReached where it is not loaded, EngineUnavailable where it refuses or fails.
        """
        headers = {commands.COMMAND: command, commands.KEY: self._endpoint.command_key}
        response = await self._ask(name, headers)
        fields = response.fields
        if response.status == 507:
            raise OutOfMemory(f"there is not enough memory to {command} {name!r}")
        if response.status != 200 or "state" not in fields:
            error = fields.get("error", {})
            raise EngineUnavailable(f"{name!r} did not {command}: {error.get('message', response.status)}")
        return fields

    async def _unregister_quietly(self, name: str) -> None:
        """A failed register can leave a registration without a worker behind, which would answer the next one 409."""
        for _ in range(5):
            try:
                response = await self._manage("DELETE", f"/models/{name}", 60)
            except PalimpsestError:
                return
            if response.status == 404:
                return

    async def _ask(
        self,
        name: str,
        headers: dict[str, str],
        body: AsyncIterator[bytes] | None = None,
        reply: MemoryFile | None = None,
    ) -> Said:
        """What the model's handler answers; raises for what TorchServe itself answers in its place.

        reply: takes the body, of which only the beginning is returned.
        """
        url = f"{self._endpoint.inference}/predictions/{name}"
        token = self._endpoint.inference_token
        said = await self._send("POST", url, token, None, headers=headers, content=body, reply=reply)
        said.raise_own_error(name)
        return said

    async def _manage(self, method: str, path: str, timeout: float, params: dict[str, str] | None = None) -> Said:
        url = f"{self._endpoint.management}{path}"
        return await self._send(method, url, self._endpoint.management_token, timeout, params=params)

    async def _send(
        self,
        method: str,
        url: str,
        token: str,
        timeout: float | None,
        headers: dict[str, str] | None = None,
        content: AsyncIterator[bytes] | None = None,
        params: dict[str, str] | None = None,
        reply: MemoryFile | None = None,
    ) -> Said:
        try:
            async with self._http.request(
                method,
                url,
                params=params,
                data=content,
                headers={**(headers or {}), "authorization": f"Bearer {token}"},
                timeout=aiohttp.ClientTimeout(total=timeout, connect=CONNECT_TIMEOUT),
            ) as response:
                answer_headers = {key.lower(): value for key, value in response.headers.items()}
                if reply is None:
                    return Said(response.status, answer_headers, await response.read())
                async for piece in response.content.iter_chunked(PIECE):
                    reply.write(piece)
                return Said(response.status, answer_headers, reply.read(0, min(reply.size, _ERROR_BYTES)))
        except aiohttp.ClientConnectorError as error:
            raise NotReached("TorchServe cannot be reached: try again in a few seconds") from error
        except TimeoutError as error:
            raise DeadlineExceeded(f"TorchServe did not answer within {timeout or CONNECT_TIMEOUT:g} s") from error
        except aiohttp.ClientError as error:
            raise EngineUnavailable("TorchServe ended while it had this request: try again") from error


def _passed(headers: dict[str, str]) -> dict[str, str]:
    lower = {key.lower(): value for key, value in headers.items()}
    passed = {key: text for key, text in lower.items() if key not in _DROPPED and not key.startswith(commands.PREFIX)}
    request = record.current()
    return passed if request is None else passed | _named(request)


def _named(request: record.Record) -> dict[str, str]:
    """What handlers of any make are told of the request and its trace: not what the client has sent, but what holds."""
    own = {record.HEADER: request.id}
    return own | {"traceparent": request.traceparent} if request.traceparent else own


async def _all_of(body: bytes) -> AsyncIterator[bytes]:
    yield body
