"""One server of the cluster, as Ray Serve runs it: a replica with a device, TorchServe and state folder of its own."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve import startup
from serve.cluster import places
from serve.cluster.known import NOTHING, Told
from serve.cluster.target import Target, routed
from serve.embedded import Embedded
from serve.errors import EngineUnavailable
from serve.residency.model import AWAY, STARTING, Model, State
from serve.settings import Settings

FETCH_SECONDS = 30.0  # for a picture that another box keeps


@serve.ingress()
class Box:
    """Has the settings of its machine, which are in the environment of what Ray runs there."""

    def __init__(self) -> None:
        self._claim = contextlib.ExitStack()
        settings = Settings()
        place = self._claim.enter_context(places.claimed(settings.state))
        if gpus := places.gpus():
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place.number % len(gpus)]
        name = serve.get_replica_context().replica_id.unique_id
        self._server = Embedded(settings.model_copy(update={"state": place.state}), peers=Others(name))
        self._told: Told = {**NOTHING}
        sys.setswitchinterval(startup.TURN)

    def __serve_build_asgi_app__(self) -> Embedded:
        """Ray runs its lifespan, and drains the replica before that ends."""
        return self._server

    def record_routing_stats(self) -> Told:
        """What routers are told of it: once a second where anything has changed, and when they ask."""
        return self.told()

    def told(self) -> Told:
        models = self._server.services.scheduler.active()
        told: Told = {
            "change": self._told["change"],
            "machine": socket.gethostname(),
            "ready": _work(m for m in models if m.state is State.READY and not m.stale),
            "loading": _work(m for m in models if m.state in STARTING),
            "parked": [_name(m) for m in models if m.state in AWAY],
            "seconds": {_name(m): m.request_seconds for m in models},
            "leases": sum(m.leases for m in models),
            "queue": sum(len(m.waiters) for m in models),
        }
        if told != self._told:
            self._told = {**told, "change": told["change"] + 1}
        return self._told

    async def picture(self, name: str) -> bytes | None:
        """What is kept here under the name."""
        found = self._server.services.images.find(name)
        if found is None:
            return None
        with found as file:
            return await asyncio.to_thread(file.read)

    async def check_health(self) -> None:
        """Raises where the server can serve nobody and does not come back by itself."""
        if not self._server.runs:
            raise EngineUnavailable("the server has ended")


def _name(model: Model) -> str:
    return routed(model.archive.name)


def _work(models: Iterable[Model]) -> dict[str, float]:
    return {_name(m): (m.leases + len(m.waiters)) * m.request_seconds for m in models}


class Others:
    """The other boxes, by Ray. box: this one's name."""

    def __init__(self, box: str) -> None:
        self.box = box

    async def picture(self, box: str, name: str) -> bytes | None:
        handle = serve.get_deployment_handle(Box.__name__, app_name=serve.get_replica_context().app_name)
        with contextlib.suppress(TimeoutError, RayError, RayServeException):
            async with asyncio.timeout(FETCH_SECONDS):
                picture: bytes | None = await handle.options(session_id=str(Target(box=box))).picture.remote(name)
                return picture
        return None
