"""The only module that speaks to TorchServe: register, unregister, predict.

TorchServe's own errors become exceptions of serve.errors; what a handler answered passes through as it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import httpx

from serve.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    ModelLoadFailed,
    NotReached,
    OutOfMemory,
    PalimpsestError,
)

# Hop-by-hop headers belong to one connection, the tokens to us.
_DROPPED = {
    "connection", "content-length", "host", "keep-alive", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "authorization", "accept-encoding", "expect",
}  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    """Where one running TorchServe listens, and its two tokens."""

    inference: str
    management: str
    inference_token: str
    management_token: str

    @classmethod
    def read(cls, inference: str, management: str, key_file: Path) -> "Endpoint":
        """key_file: the key_file.json that TorchServe wrote into its working directory."""
        keys = json.loads(key_file.read_text())
        return cls(inference, management, keys["inference"]["key"], keys["management"]["key"])


@dataclass(frozen=True)
class Answer:
    """What a handler replied."""

    status: int
    headers: dict[str, str]
    body: bytes


class TorchServe:
    """A client of one TorchServe.

    Every method raises EngineUnavailable where TorchServe cannot be reached and DeadlineExceeded where it does not
    answer in time. transport: stands in for the network in tests.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        load_timeout: float,
        predict_timeout: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._endpoint, self._load_timeout, self._predict_timeout = endpoint, load_timeout, predict_timeout
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._http = httpx.AsyncClient(transport=transport, limits=limits, trust_env=False, timeout=10)

    async def close(self) -> None:
        await self._http.aclose()

    async def alive(self) -> bool:
        """Whether TorchServe answers at all; its ping is 500 as soon as one model of many is unwell."""
        try:
            response = await self._send("GET", f"{self._endpoint.inference}/ping", self._endpoint.inference_token, 5)
        except PalimpsestError:
            return False
        return response.status_code in (200, 500)

    async def register(self, name: str, archive: Path) -> None:
        """Starts a worker for the archive folder and returns once its model is loaded and warm.

        Raises OutOfMemory or ModelLoadFailed; nothing of the failed registration is left behind.
        """
        # The query string, not a body: TorchServe sets maxBatchDelay to -10000 for a body.
        query = {"model_name": name, "url": str(archive), "initial_workers": "1", "synchronous": "true"}
        try:
            response = await self._manage("POST", "/models", self._load_timeout, params=query)
        except BaseException:
            await self._unregister_quietly(name)
            raise
        if response.status_code == 200:
            return
        await self._unregister_quietly(name)
        if response.status_code == 507:
            raise OutOfMemory(f"there is not enough memory to load {name!r}")
        raise ModelLoadFailed(f"{name!r} cannot be loaded: {_message(response)}; model_log.log has the handler's words")

    async def unregister(self, name: str) -> None:
        """Kills the model's worker; no request of that model may be running, for it would hang for ever."""
        response = await self._manage("DELETE", f"/models/{name}", 60)
        if response.status_code not in (200, 404):
            raise EngineUnavailable(f"TorchServe cannot unload {name!r}: {_message(response)}")

    async def predict(self, name: str, headers: dict[str, str], body: bytes) -> Answer:
        """Passes one request to the model's handler; NotReached where the model is not loaded."""
        response = await self._send(
            "POST",
            f"{self._endpoint.inference}/predictions/{name}",
            self._endpoint.inference_token,
            self._predict_timeout,
            headers={key: value for key, value in headers.items() if key.lower() not in _DROPPED},
            content=body,
        )
        _raise_own_error(name, response)
        passed = {key: value for key, value in response.headers.items() if key.lower().startswith("x-palimpsest-")}
        content_type = response.headers.get("content-type", "application/octet-stream")
        return Answer(response.status_code, {"content-type": content_type, **passed}, response.content)

    async def _unregister_quietly(self, name: str) -> None:
        """A failed register can leave a registration without a worker behind, which would answer the next one 409."""
        for _ in range(5):
            try:
                response = await self._manage("DELETE", f"/models/{name}", 60)
            except PalimpsestError:
                return
            if response.status_code == 404:
                return

    async def _manage(
        self, method: str, path: str, timeout: float, params: dict[str, str] | None = None
    ) -> httpx.Response:
        url = f"{self._endpoint.management}{path}"
        return await self._send(method, url, self._endpoint.management_token, timeout, params=params)

    async def _send(
        self,
        method: str,
        url: str,
        token: str,
        timeout: float,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        params: dict[str, str] | None = None,
    ) -> httpx.Response:
        try:
            return await self._http.request(
                method,
                url,
                params=params,
                content=content,
                headers={**(headers or {}), "authorization": f"Bearer {token}"},
                timeout=httpx.Timeout(timeout, connect=5),
            )
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"TorchServe did not answer within {timeout:g} s") from error
        except httpx.ConnectError as error:
            raise NotReached("TorchServe cannot be reached: try again in a few seconds") from error
        except httpx.TransportError as error:
            raise EngineUnavailable("TorchServe ended while it had this request: try again") from error


def _raise_own_error(name: str, response: httpx.Response) -> None:
    """Raises for an error that TorchServe itself made: it has the fields code, type and message."""
    if response.status_code < 400:
        return
    try:
        body = response.json()
    except ValueError:
        body = None
    if not (isinstance(body, dict) and {"code", "type", "message"} <= body.keys()):
        return
    if response.status_code == 404:
        raise NotReached(f"{name!r} is not loaded any more: try again")
    if response.status_code == 507:
        raise OutOfMemory("not enough memory for this request")
    raise EngineUnavailable(f"the worker of {name!r} could not answer: try again")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"]).splitlines()[0][:300]
    except (ValueError, KeyError, TypeError, IndexError):
        return f"TorchServe answered {response.status_code}"
