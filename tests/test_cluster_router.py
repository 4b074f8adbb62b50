"""What the router asks boxes of about the same worth."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from serve.cluster import router

pytestmark = pytest.mark.anyio


class Box:
    """Says so many requests, raises that, or says nothing."""

    def __init__(self, name: str, says: int | Exception | None) -> None:
        self.name, self._says, self.asked = name, says, 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        if isinstance(self._says, Exception):
            raise self._says
        if self._says is None:
            await asyncio.Event().wait()
        assert isinstance(self._says, int)
        return self._says


async def order(*boxes: Box) -> str:
    replicas: Any = boxes
    ordered: Any = await router.least_busy_first(replicas)
    return "".join(box.name for box in ordered)


async def test_the_box_with_the_fewest_requests_is_first_and_of_equals_the_one_that_was() -> None:
    assert await order(Box("a", 2), Box("b", 0), Box("c", 1)) == "bca"
    assert await order(Box("a", 1), Box("b", 1), Box("c", 1)) == "abc"


async def test_a_box_that_does_not_answer_is_last_and_holds_nobody_up() -> None:
    dead, away = ActorDiedError(), ActorUnavailableError("", b"0" * 16)
    async with asyncio.timeout(5):
        assert await order(Box("a", None), Box("b", dead), Box("c", 9), Box("d", away), Box("e", 3)) == "ecabd"


async def test_one_alone_is_not_asked() -> None:
    box = Box("a", 0)
    assert await order(box) == "a"
    assert not box.asked
