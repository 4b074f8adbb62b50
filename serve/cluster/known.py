"""What the boxes have told the router of this process. (Ray copies the router's class, but not what it imports.)"""

from typing import TypedDict


class Told(TypedDict):
    """change: greater than what came with anything else that the box has told before. machine: its host name. ready,
    loading: models, by the names that routers know them by, and the seconds of work that their requests will take,
    running or waiting. parked: models. seconds: that one request takes, by model. leases, queue: requests that run and
    that wait.
    """

    change: int
    machine: str
    ready: dict[str, float]
    loading: dict[str, float]
    parked: list[str]
    seconds: dict[str, float]
    leases: int
    queue: int


NOTHING: Told = {
    "change": 0, "machine": "", "ready": {}, "loading": {}, "parked": [], "seconds": {}, "leases": 0, "queue": 0
}  # fmt: skip
"""What a box has told that has told nothing yet."""

BOXES: dict[str, Told] = {}
"""By their names; those that are there at this moment."""
