"""Servers behind one address: an id says who keeps what it names, and any of them can be asked about it."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import FakeDevice, FakeHost, FakeTorchServe, make_store
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from serve.cluster.target import Target, target_of
from serve.gateway.app import create_app
from serve.gateway.peers import marked, unmarked
from serve.residency.memory import Memory
from serve.settings import Settings
from serve.store.catalog import Catalog

IMAGE = b"\xff\xd8\xff" + bytes(1000)


class Peers:
    """others: the applications by their names; one that is gone is not in it."""

    def __init__(self, box: str, others: dict[str, Any]) -> None:
        self.box, self._others = box, others
        self.asked = 0

    async def picture(self, box: str, name: str) -> bytes | None:
        self.asked += 1
        found = self._others[box].app.state.services.images.find(name) if box in self._others else None
        if found is None:
            return None
        with found as file:
            return bytes(file.read())


@pytest.fixture
def boxes(tmp_path: Path) -> Iterator[dict[str, TestClient]]:
    store = make_store(tmp_path / "store", "sam", "lama", ours=True)
    clients: dict[str, TestClient] = {}
    with ExitStack() as stack:
        for box in ("b1", "b2"):
            settings = Settings(store=store, state=tmp_path / box, cache=tmp_path / "cache")
            memory = Memory(FakeDevice(), 2**40, tmp_path / f"{box}.json")
            peers = Peers(box, clients)
            app = create_app(
                settings,
                Catalog(store, settings.cache, demo=False),
                cast(Any, FakeHost(FakeTorchServe())),
                memory,
                peers,
            )
            app.state.peers = peers
            clients[box] = stack.enter_context(TestClient(app, raise_server_exceptions=False))
        yield clients


def upload(client: TestClient) -> str:
    answer = client.post("/v1/images", content=IMAGE, headers={"content-type": "image/jpeg"})
    assert answer.status_code == 201
    return str(answer.json()["id"])


def knows(client: TestClient, name: str) -> bool:
    """Whether the server finds the picture; what is wrong with it then is the fake engine's."""
    answer = client.post("/v1/segment", json={"image": name, "points": [[1, 1]]})
    return not (answer.status_code == 404 and answer.json()["error"]["code"] == "image_not_found")


def test_an_id_says_who_keeps_it_and_all_find_it(boxes: dict[str, TestClient]) -> None:
    name = upload(boxes["b1"])
    assert name.endswith(".b1")
    assert target_of(f"/v1/images/{name}", []) == Target(box="b1")
    assert knows(boxes["b1"], name)
    assert knows(boxes["b2"], name)
    peers = boxes["b2"].app.state.peers  # type: ignore[attr-defined]
    assert peers.asked == 1
    assert knows(boxes["b2"], name)  # which has it, too, from now on
    assert peers.asked == 1


def test_what_is_lost_with_its_box_is_said_to_be_gone(boxes: dict[str, TestClient]) -> None:
    name = upload(boxes["b1"])
    del boxes["b1"]
    answer = boxes["b2"].post("/v1/segment", json={"image": name, "points": [[1, 1]]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "image_not_found")
    assert answer.json()["error"]["field"] == "image"
    assert "upload it again" in answer.json()["error"]["message"]
    for odd in (f"{name[:-3]}.b9", f"{name}.b1", f"{name[:-3]}.B1", f"{name[:-3]}.", "img_.b1", "img_"):
        assert not knows(boxes["b2"], odd), odd


def test_a_job_says_where_it_runs(boxes: dict[str, TestClient]) -> None:
    fields = {"image": upload(boxes["b1"]), "points": [[1, 1]]}
    events = boxes["b1"].post("/v1/segment", json=fields, headers={"accept": "text/event-stream"}).text
    found = re.match(r'event: job\ndata: \{"job": ?"([0-9a-f]{32}\.b1)"\}', events)
    assert found
    assert target_of(f"/v1/jobs/{found[1]}", []) == Target(box="b1")


@given(st.text(alphabet="abcdef0123456789_", min_size=1), st.from_regex("[a-z0-9]{0,12}", fullmatch=True))
def test_a_mark_comes_off_again(name: str, box: str) -> None:
    assert unmarked(marked(name, box)) == (name, box)
