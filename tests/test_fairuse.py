"""What one key may have of the server at a time, and how its requests are counted."""

import asyncio
import base64
import io
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import door
import pytest
from door import post, read
from fakes import FakeTorchServe, application, make_store
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from signing import signed

from serve.errors import OverShare
from serve.gateway.access import fairuse, keys
from serve.gateway.access.declared import pixels
from serve.gateway.access.fairuse import FairUse, Limits
from serve.gateway.access.keys import Scope
from serve.memory_file import MemoryFile, Part, whole

HOST = "http://testserver"


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def part(data: bytes, text: bool = False) -> Part:
    file = MemoryFile()
    file.write(data)
    return whole(file, text)


def counted(data: bytes, text: bool = False) -> float:
    with MemoryFile() as file:
        file.write(data)
        return pixels(whole(file, text))


def picture(width: int, height: int, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


# Counting


def test_requests_under_way_are_bounded_and_come_back_however_they_end(clock: Clock) -> None:
    fair = FairUse(Limits(2, 1e6, 100, 100), clock)
    with fair.request("a"), fair.request("a"), fair.request("b"):
        with pytest.raises(OverShare, match=r"2 requests of a .*PALIMPSEST_KEY_REQUESTS.*wait for") as caught:
            fair.request("a").__enter__()
        assert caught.value.retry_after
    with pytest.raises(ZeroDivisionError), fair.request("a"):
        raise ZeroDivisionError
    with fair.request("a"), fair.request("a"):
        pass


def test_a_picture_alone_is_always_taken_and_more_have_to_fit(clock: Clock) -> None:
    fair = FairUse(Limits(9, 1e6, 100, 100), clock)
    with fair.request("a") as one, fair.request("a") as two, fair.request("b") as other:
        one.take(part(picture(1500, 1000)))
        with pytest.raises(OverShare, match=r"1\.5|2 megapixels.*PALIMPSEST_KEY_MEGAPIXELS"):
            two.take(part(picture(10, 10)))
        other.take(part(picture(1000, 1000)))
        one.give_back()
        two.take(part(picture(1000, 900)))
        one.take(part(picture(100, 100)))
    with fair.request("a") as again:
        again.take(part(picture(5000, 100)))
        again.take(part(picture(5000, 100)))  # its own mask


def test_the_rate_is_paid_back_as_time_passes(clock: Clock) -> None:
    fair = FairUse(Limits(9, 1e6, rate=2, burst=4), clock)

    def served() -> bool:
        with suppress(OverShare), fair.request("a"):
            return True
        return False

    assert [served() for _ in range(6)] == [True] * 4 + [False] * 2
    with pytest.raises(OverShare, match="120 times a minute") as caught:
        fair.request("a").__enter__()
    assert caught.value.retry_after == 1
    with fair.request("b"):
        pass
    clock.time += 1
    assert [served() for _ in range(3)] == [True, True, False]
    clock.time += 1000
    assert [served() for _ in range(6)] == [True] * 4 + [False] * 2


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=60),
    st.integers(1, 5),
    st.floats(0.2, 5),
)
def test_never_more_than_the_rate_and_never_less(pauses: list[float], burst: int, rate: float) -> None:
    clock = Clock()
    fair = FairUse(Limits(9, 1, rate, burst), clock)
    tokens, last = float(burst), clock.time  # the bucket as it stands in books
    for pause in pauses:
        clock.time += pause
        tokens, last = min(burst, tokens + (clock.time - last) * rate), clock.time
        if tokens < 1 - 1e-6:
            with pytest.raises(OverShare) as caught:
                fair.request("a").__enter__()
            assert caught.value.retry_after
            assert tokens + caught.value.retry_after * rate > 1 - 1e-6
        elif tokens > 1 + 1e-6:
            with fair.request("a"):
                tokens -= 1
        else:  # rounding decides
            return


def test_what_was_merely_seen_leaves_nothing_behind(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairuse, "MOST_RESTING", 10)
    fair = FairUse(Limits(2, 1e6, rate=1, burst=5), clock)
    with fair.request("one that stays"):
        for number in range(1000):
            with fair.request(str(number)):
                pass
        assert len(fair) == 11
        with fair.request("one that stays"), pytest.raises(OverShare):
            fair.request("one that stays").__enter__()
    clock.time += 1000
    for number in range(990, 1000):
        with fair.request(str(number)):
            pass
        clock.time += 10
    assert len(fair) <= 11


KINDS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {}, "GIF": {}, "BMP": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pictures_file_declares_is_counted(kind: str, text: bool) -> None:
    data = picture(301, 207, kind, **KINDS[kind])
    assert counted(base64.b64encode(data) if text else data, text) == 301 * 207
    assert counted(b"data:image/x;base64," + base64.b64encode(data), True) == 301 * 207
    for cut in (0, 1, 5, 8):
        assert counted(data[:cut]) == cut


def test_further_forms_of_the_files() -> None:
    lossy, alpha = picture(301, 207, "WEBP", quality=50), io.BytesIO()
    Image.new("RGBA", (301, 207), (1, 2, 3, 4)).save(alpha, "WEBP", quality=50)
    large_metadata = picture(301, 207, "JPEG", exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(60_000))
    upside_down = bytearray(picture(301, 207, "BMP"))
    upside_down[22:26] = (-207).to_bytes(4, "little", signed=True)
    for data in (lossy, alpha.getvalue(), large_metadata, bytes(upside_down)):
        assert counted(data) == 301 * 207


@pytest.mark.parametrize("data", [b"", b"x" * 5000, b'{"image": "x"}', b"\xff\xd8" + b"\xff" * 200_000, b"II*\0" * 99])
def test_all_else_counts_by_its_bytes(data: bytes) -> None:
    assert counted(data) == counted(data, True) == len(data)
    assert pixels("x" * 77) == 77


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.sampled_from([b"\x89PNG", b"GIF8", b"BM", b"RIFF1234WEBPVP8X", b"RIFF1234WEBPVP8L", b"\xff\xd8", b"RIFF"]),
    st.binary(max_size=60),
    st.booleans(),
)
def test_no_beginning_of_a_file_is_an_error(start: bytes, rest: bytes, text: bool) -> None:
    assert counted(start + rest, text) >= 0


# Over HTTP


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keys, "LOOK_EVERY", 0)
    return make_store(tmp_path, "sam")


def key_of(store: Path, name: str, *, aws: bool = False) -> str:
    return keys.add(store / ".state" / "keys.json", name, (Scope.EDIT,), keep=aws)[0]


@pytest.fixture
def tight(store: Path) -> Iterator[tuple[TestClient, dict[str, str], dict[str, str]]]:
    """A server that allows two requests an hour and key, and what two of its clients send."""
    one, two = ({"authorization": f"Bearer {key_of(store, name)}"} for name in ("one", "two"))
    app = application(FakeTorchServe(), store, key_rate=2)
    with TestClient(app, HOST) as client:
        yield client, one, two


REFUSED = ["/predictions/sam", "/v1/segment", "/v1/erase", "/v1/images", "/v1/images/edits", "/endpoints/x/invocations"]


@pytest.mark.parametrize("path", REFUSED)
def test_every_door_says_what_to_do_in_its_own_shape(
    tight: tuple[TestClient, dict[str, str], dict[str, str]], path: str
) -> None:
    client, one, two = tight
    target = {"X-Amzn-SageMaker-Target-Model": "sam"}
    for _ in range(2):
        assert client.post(path, headers=one | target).status_code < 429
    answer = client.post(path, headers=one | target)
    assert answer.status_code == 429
    assert 25 <= int(answer.headers["retry-after"]) <= 30
    assert "one asks more often than 2 times a minute (PALIMPSEST_KEY_RATE): ask less often" in answer.text
    if path.startswith("/endpoints"):
        assert answer.headers["x-amzn-errortype"] == "ThrottlingException"
    elif path != "/v1/images/edits":
        assert answer.json()["error"]["code"] == "over_share"
    assert client.post(path, headers=two | target).status_code < 429
    assert client.get("/v1/models", headers=one).status_code == 200
    assert client.delete("/v1/jobs/x", headers=one).status_code == 404
    assert client.get("/ping").status_code == 200
    assert client.get("/v1/images/img_1", headers=one).status_code == 429


@pytest.mark.parametrize(
    ("mine", "other", "one"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("fd00::1", "fd00::2", True),
        ("fd00::1", "fd00:0:0:1::1", False),
        ("::ffff:10.0.0.9", "10.0.0.9", True),
        ("not:an:address", "10.0.0.9", False),
    ],
)
def test_without_keys_each_address_counts(store: Path, mine: str, other: str, one: bool) -> None:
    app = application(FakeTorchServe(), store, key_rate=2)
    there = TestClient(app, HOST, client=(other, 2))
    with TestClient(app, HOST, client=(mine, 1)) as here:
        there.portal = here.portal
        assert [here.post("/predictions/sam").status_code for _ in range(2)] == [200, 200]
        assert there.post("/predictions/sam").status_code == (429 if one else 200)


def test_pictures_under_way_are_counted_and_given_back(store: Path) -> None:
    fake = FakeTorchServe()
    app = application(fake, store, key_megapixels=1, max_request_mib=4)
    with TestClient(app, HOST) as client:
        share = app.state.services.fair_use.request("testclient")
        with share as held:
            held.take(part(picture(1000, 900)))
            small, large = picture(100, 100), picture(1000, 200)
            assert client.post("/predictions/sam", content=small).status_code == 200
            assert client.post("/predictions/sam", content=bytes(200_000)).status_code == 429
            for _ in range(2):
                assert client.post("/predictions/sam", content=large).status_code == 429
            sent = {"image": ("a.png", large), "points": (None, "[[1, 2]]")}
            assert client.post("/v1/segment", files=sent).json()["error"]["code"] == "over_share"
            name = client.post("/v1/images", content=large).json()["id"]
            answer = client.post("/v1/erase", json={"image": name, "points": [[1, 2]]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "over_share")
        assert client.post("/predictions/sam", content=large).status_code == 200
        assert not app.state.services.fair_use._busy


def test_a_signature_that_does_not_hold_uses_up_nothing_of_the_keys_share(store: Path) -> None:
    secret = key_of(store, "aws", aws=True)
    access = keys.read(store / ".state" / "keys.json")[0].access_key_id
    app = application(FakeTorchServe(), store, key_rate=1)
    with TestClient(app, HOST) as client:
        for key, status in ((secret[:-1] + "x", 401), (secret[:-1] + "y", 401), (secret, 200), (secret, 429)):
            url = f"{HOST}/predictions/sam"
            headers = signed("POST", url, str(access), key, b"body")
            assert client.post(url, content=b"body", headers=headers).status_code == status


@pytest.mark.slow
def test_a_batch_of_one_key_lets_the_click_of_another_before(store: Path) -> None:
    """64 requests of one key, of which one runs; the click comes second."""
    batch, person = (f"Authorization: Bearer {key_of(store, name)}" for name in ("batch", "person"))
    app = application(FakeTorchServe(), store)
    with door.serving(FakeTorchServe(), store, app) as running, ExitStack() as stack:
        services, gate, order = app.state.services, asyncio.Event(), []
        ask = services.workers.ask

        async def waiting(archive: Any, question: Any, file: Any) -> Any:
            order.append(question.headers["x-who"])
            await gate.wait()
            return await ask(archive, question, file)

        services.workers.ask = waiting
        lines = []
        for number in range(64):
            lines.append(stack.enter_context(running.connect()))
            lines[-1].sendall(post("/predictions/sam", b"x", batch, f"X-Who: batch {number}"))
        door.until(lambda: sum(len(m.waiters) for m in services.scheduler.models()) == 63)
        click = stack.enter_context(running.connect())
        click.sendall(post("/predictions/sam", b"x", person, "X-Who: person"))
        door.until(lambda: sum(len(m.waiters) for m in services.scheduler.models()) == 64)
        running.running.servers[0].get_loop().call_soon_threadsafe(gate.set)
        assert read(click).status == 200
        assert [read(line).status for line in lines] == [200] * 64
    assert order[1] == "person"
    assert len(order) == 65
