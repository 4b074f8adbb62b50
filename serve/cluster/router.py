"""Ray Serve's side of the policy: which box gets a request. Custom routers are alpha in Ray: its version is pinned."""

import asyncio
import contextlib
import math
from collections.abc import Sequence
from itertools import chain

from ray.exceptions import RayError
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from serve.cluster import known
from serve.cluster.policy import Published, View
from serve.cluster.target import Target

SECONDS = 1.0  # that a request is taken to last where nobody has told
ANSWER_SECONDS = 0.1  # that a box may take to say how many requests it has

_NOTHING: known.Told = {
    "machine": "", "ready": {}, "loading": {}, "parked": [], "seconds": {}, "leases": 0, "queue": 0
}  # fmt: skip


class ModelRouter(RequestRouter):  # type: ignore[misc]
    """Tries the boxes one by one, in the policy's order."""

    def initialize_state(self) -> None:
        self._view = View()
        self._boxes: dict[str, RunningReplica] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called whenever a box comes, goes, or tells something new."""
        super().update_replicas(replicas)
        self._boxes = {replica.replica_id.unique_id: replica for replica in replicas}
        for box in known.BOXES.keys() - self._boxes.keys():
            self._forget(box)
        for box, replica in self._boxes.items():
            told: known.Told = {**_NOTHING, **replica.routing_stats}  # which is empty at first
            if told != known.BOXES.get(box):
                known.BOXES[box] = told
                self._view.update(box, _published(told))
        self._view.count_routers(len({told["machine"] for told in known.BOXES.values()}))  # each machine has a door

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._boxes.pop(replica_id.unique_id, None)
        self._forget(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # no rank is another's locality
        target = _target(pending_request)
        if target.box:
            return [[self._boxes[target.box]]] if target.box in self._boxes else [candidate_replicas]
        groups = [[self._boxes[id] for id in ids if id in self._boxes] for ids in self._view.order(target.model)]
        best = await least_busy_first(groups[0]) if groups else []
        return [[box] for box in chain(best, *groups[1:])]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        target, box = _target(pending_request), replica_id.unique_id
        if not target.model:
            return
        seconds = known.BOXES.get(box, _NOTHING)["seconds"].get(target.model) or SECONDS
        sent = self._view.sent(box, target.model, seconds)
        loop = asyncio.get_running_loop()
        # Ray calls from a thread of its own. What is ready now the box says itself, within a second.
        result.add_done_callback(lambda _: loop.call_soon_threadsafe(self._view.ended, sent, False))

    def _forget(self, box: str) -> None:
        known.BOXES.pop(box, None)
        self._view.leave(box)


async def least_busy_first(boxes: Sequence[RunningReplica]) -> Sequence[RunningReplica]:
    """By their numbers of requests, as they say themselves; those that say nothing in time come last."""
    if len(boxes) < 2:
        return boxes
    counts = await asyncio.gather(*(_count(box) for box in boxes))
    return [box for _, box in sorted(zip(counts, boxes, strict=True), key=lambda pair: pair[0])]


async def _count(box: RunningReplica) -> float:
    with contextlib.suppress(TimeoutError, RayError):
        async with asyncio.timeout(ANSWER_SECONDS):
            return int(await box.get_queue_len(deadline_s=ANSWER_SECONDS))
    return math.inf


def _target(request: PendingRequest) -> Target:
    return Target.read(request.metadata.session_id or "")


def _published(told: known.Told) -> Published:
    work = sum(told["ready"].values()) + sum(told["loading"].values())
    return Published(work, told["ready"], told["parked"], told["loading"])
