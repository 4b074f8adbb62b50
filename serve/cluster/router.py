"""Ray Serve's side of the policy: which box gets a request. Custom routers are alpha in Ray: its version is pinned."""

import asyncio
import contextlib
from itertools import islice

from ray.exceptions import RayError
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from serve.cluster import known
from serve.cluster.policy import Published, View
from serve.cluster.target import Target

SECONDS = 1.0  # that a request is taken to last where nobody has told
ANSWER_SECONDS = 0.1  # that a box may take to say what it has
TRIED = 16  # boxes, by Ray one by one, until it has others chosen


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
            self._hear(box, {**known.NOTHING, **replica.routing_stats})  # which is empty at first
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
        view = self._view
        order = await view.choose(target.model, self._ask) if target.model else view.order("")
        return [[self._boxes[id]] for id in islice(order, TRIED) if id in self._boxes]

    async def _ask(self, boxes: list[str]) -> list[str]:
        answers = await asyncio.gather(*(ask(self._boxes.get(box)) for box in boxes))
        told = dict(zip(boxes, answers, strict=True))
        for box, each in told.items():
            if each and box in self._boxes:  # and has not gone meanwhile
                self._hear(box, each)
        return [box for box, each in told.items() if not each]

    def _hear(self, box: str, told: known.Told) -> None:
        """What a box has published may be older than what it said when it was asked."""
        if box not in known.BOXES or told["change"] > known.BOXES[box]["change"]:
            known.BOXES[box] = told
            self._view.update(box, _published(told))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        target, box = _target(pending_request), replica_id.unique_id
        if not target.model:
            return
        seconds = known.BOXES.get(box, known.NOTHING)["seconds"].get(target.model) or SECONDS
        sent = self._view.sent(box, target.model, seconds)
        loop = asyncio.get_running_loop()
        # Ray calls from a thread of its own.
        result.add_done_callback(lambda _: loop.call_soon_threadsafe(self._view.ended, sent))

    def _forget(self, box: str) -> None:
        known.BOXES.pop(box, None)
        self._view.leave(box)


async def ask(box: RunningReplica | None) -> known.Told | None:
    """What it has to tell now; None where it does not say so in time."""
    with contextlib.suppress(TimeoutError, RayError):
        async with asyncio.timeout(ANSWER_SECONDS):
            told: known.Told | None = box and await box._actor_handle.record_routing_stats.remote()
            return told
    return None


def _target(request: PendingRequest) -> Target:
    return Target.read(request.metadata.session_id or "")


def _published(told: known.Told) -> Published:
    work = sum(told["ready"].values()) + sum(told["loading"].values())
    return Published(work, told["ready"], told["parked"], told["loading"])
