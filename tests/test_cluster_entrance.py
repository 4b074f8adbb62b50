"""What stands before Ray's proxies, around an application that answers as they do."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serve.cluster.entrance import TARGET, Entrance

BOX = [(b"content-type", b"image/png"), (b"x-content-type-options", b"nosniff"), (b"x-request-id", b"theirs")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
RAYS = [(b"content-type", b"text/plain"), (b"x-request-id", b"rays")]
Scope = dict[str, Any]


def ask(
    status: int, headers: list[tuple[bytes, bytes]], *pieces: bytes, ends: bool = True, path: str = "/predictions/sam",
    on_scope: Callable[[Scope], None] = lambda scope: None, **sent: str,
) -> httpx.Response:  # fmt: skip
    """Through the entrance. pieces: of the answer's body. ends: whether the answer does."""

    async def proxy(scope: Scope, receive: Any, send: Any) -> None:
        on_scope(scope)
        if status:
            await send(
                {"type": "http.response.start", "status": status, "headers": [*headers, (b"x-request-id", b"r")]}
            )
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if ends:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(Entrance(proxy), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.post(path, headers=sent)

    return asyncio.run(run())


@pytest.mark.parametrize("status", [200, 404, 500, 503])
def test_a_boxs_answer_is_as_it_is(status: int) -> None:
    answer = ask(status, BOX, b"a", b"b", **{"x-request-id": "mine"})
    assert (answer.status_code, answer.content) == (status, b"ab")
    assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("status", [0, 404, 408, 429, 500, 503])
def test_what_ray_answers_is_said_in_our_words(status: int) -> None:
    answer = ask(status, RAYS, b"Internal Server Error", **{"x-request-id": "mine"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert answer.headers["retry-after"] == "5"
    assert answer.headers.get_list("x-request-id") == ["mine"]
    sagemaker = ask(status, RAYS, path="/endpoints/x/invocations")
    assert sagemaker.status_code == 503
    assert sagemaker.headers["x-amzn-errortype"].startswith("ServiceUnavailable")


def test_events_that_break_off_end_with_an_error() -> None:
    answer = ask(200, EVENTS, b"event: progress\ndata: {}\n\n", ends=False)
    *_, last, _ = answer.text.split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert "error" not in ask(200, EVENTS, b"event: progress\ndata: {}\n\n").text


def test_the_router_is_told_what_the_path_says_and_nothing_else() -> None:
    seen: list[Scope] = []
    ask(200, BOX, on_scope=seen.append, **{TARGET.decode(): "@elsewhere", "x-request-id": "odd \x01 id"})
    headers = [header for header in seen[0]["headers"] if header[0] in (TARGET, b"x-request-id")]
    assert headers[0] == (TARGET, b"sam")
    assert len(headers) == 2
    assert b"odd" not in headers[1][1]


def test_who_balances_the_load_asks_ray_itself() -> None:
    assert ask(200, RAYS, b"success", path="/-/healthz").text == "success"
