"""What the router makes of boxes that say something, or do not, and of what comes late."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from serve.cluster import known, router
from serve.cluster.box import Box
from serve.cluster.policy import View
from serve.residency.model import State

pytestmark = pytest.mark.anyio


class Replica:
    """Tells this, raises that, or says nothing."""

    def __init__(self, tells: known.Told | Exception | None) -> None:
        self._tells = tells
        self._actor_handle = SimpleNamespace(record_routing_stats=SimpleNamespace(remote=self._tell))

    async def _tell(self) -> known.Told:
        if isinstance(self._tells, Exception):
            raise self._tells
        if self._tells is None:
            await asyncio.Event().wait()
        assert self._tells is not None
        return self._tells


def told(change: int, **what: Any) -> known.Told:
    return {**known.NOTHING, "change": change, "machine": "m", **what}


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A router as far as Ray has nothing to do with it."""
    monkeypatch.setattr(known, "BOXES", {})
    made: Any = object.__new__(router.ModelRouter)
    made._view, made._boxes = View(), {}
    return made


async def test_a_box_that_does_not_answer_holds_nobody_up() -> None:
    boxes: Any = [
        None,
        Replica(None),
        Replica(ActorDiedError()),
        Replica(ActorUnavailableError("", b"0" * 16)),
        Replica(told(1)),
    ]
    async with asyncio.timeout(5):
        assert [await router.ask(box) for box in boxes] == [None, None, None, None, told(1)]


async def test_what_a_box_says_is_known_and_who_says_nothing_is_named(routes: Any) -> None:
    routes._boxes = {"a": Replica(told(1, ready={"m": 0.0})), "b": Replica(None)}
    assert await routes._ask(["a", "b", "left"]) == ["b", "left"]
    assert {"a": told(1, ready={"m": 0.0})} == known.BOXES
    assert next(routes._view.order("m")) == "a"


async def test_what_was_published_before_a_box_was_asked_does_not_count_when_it_comes_later(routes: Any) -> None:
    routes._boxes = {"a": Replica(told(5, ready={"m": 0.0}))}
    await routes._ask(["a"])
    routes._hear("a", told(4, parked=["m"]))
    assert known.BOXES["a"]["change"] == 5
    routes._hear("a", told(6, parked=["m"]))
    assert known.BOXES["a"]["parked"] == ["m"]


async def test_a_box_that_leaves_while_it_is_asked_stays_away(routes: Any) -> None:
    routes._boxes = {"a": Replica(told(1))}
    asked = asyncio.ensure_future(routes._ask(["a"]))
    await asyncio.sleep(0)
    routes._boxes = {}
    routes._forget("a")
    await asked
    assert not known.BOXES
    assert not list(routes._view.order("m"))


def test_what_a_box_tells_has_another_number_where_it_is_another() -> None:
    model: Any = SimpleNamespace(
        archive=SimpleNamespace(name="m"), state=State.READY, stale=False, leases=0, waiters=[], request_seconds=2.0
    )
    services = SimpleNamespace(scheduler=SimpleNamespace(active=lambda: [model]))
    box: Any = SimpleNamespace(_told={**known.NOTHING}, _server=SimpleNamespace(services=services))
    tell: Any = Box.told
    first, again = tell(box), tell(box)
    model.leases = 1
    assert first == again == told(1, machine=first["machine"], ready={"m": 0.0}, seconds={"m": 2.0})
    assert tell(box) == {**first, "change": 2, "ready": {"m": 2.0}, "leases": 1}
    assert first["change"] == 1  # who holds it keeps what it was
