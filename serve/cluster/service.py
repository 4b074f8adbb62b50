"""The application as Ray Serve runs it: a box for each place that the machines have, one door on each machine."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import ray
from ray import serve
from ray._private.state import state as ray_state
from ray._private.worker import global_worker
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve._private.common import DeploymentID
from ray.serve.api import RunTarget
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.context import _get_global_client

from serve.cluster import known
from serve.cluster.box import Box
from serve.cluster.node import PLACE
from serve.settings import Settings

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)

NAME = "palimpsest"
ROUTER = "serve.cluster.router.ModelRouter"
STATS_SECONDS = 1.0  # between two times that a box tells routers where its models are
LOOK_SECONDS = 2.0  # between two looks at how many places there are
RAY_SECONDS = 30.0  # for Ray to answer
REQUESTS = 1024  # of one box, that wait or run: it refuses what is too many itself, with its reasons


class Service:
    """The head's part: starts the application, and gives it as many boxes as there are places while it runs."""

    def __init__(self, settings: Settings, address: str, router: str = ROUTER) -> None:
        """Returns once the first boxes serve. Raises RuntimeError where one can't start: its log says why.

        router: the class that chooses a box for each request, by its path.
        """
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        serve.start(proxy_location=ProxyLocation.EveryNode, http_options=_http(settings))
        self._places = _places()
        _deploy(settings, router)
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="places", daemon=True)
        self._watcher.start()

    def end(self) -> None:
        """Lets running requests finish, ends the boxes, and leaves Ray."""
        self._ending.set()
        self._watcher.join()
        serve.shutdown()
        ray.shutdown()

    def _watch(self) -> None:
        while not self._ending.wait(LOOK_SECONDS):
            try:
                self._follow(_places())
            except (RuntimeError, ValueError, RayError) as error:
                logger.error("%s", error)  # and again at the next look

    def _follow(self, places: int) -> None:
        if places != self._places:
            logger.warning("the cluster has %d places for boxes, and had %d", places, self._places)
            _scale(places)
            self._places = places


def update(settings: Settings, address: str) -> None:
    """Replaces the boxes one after another by such that run the code that is installed now; returns once all do.

    Raises RuntimeError where one can't start: its log says why.
    """
    with _connected(address):
        _deploy(settings, ROUTER)


def leave(address: str, machine: str, seconds: float) -> None:
    """Has the boxes and the door of a machine, known by its node's name, end once what runs there has finished.

    Returns at once; the head counts its places no more from its next look. seconds: until it will be gone in any case.
    Raises RuntimeError, OSError where the head is gone.
    """
    with _connected(address):
        (node,) = (node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeName"] == machine)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        global_worker.gcs_client.drain_node(node, reason, "it leaves", int(1000 * (time.time() + seconds)))


def boxes(address: str) -> dict[str, known.Told]:
    """What each box has told, by its name."""
    with _connected(address):
        serve.get_app_handle(NAME).told.remote().result(timeout_s=RAY_SECONDS)
        return dict(known.BOXES)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def application(arguments: dict[str, str]) -> Application:
    """What deploy/ray/serve.yaml imports: one box, unless the file says how many; with the settings that are in the
    environment. arguments: none.
    """
    if arguments:
        raise ValueError(
            f"no args are known here, and there are {sorted(arguments)}: settings are PALIMPSEST_* variables"
        )
    return _boxes(Settings(), 1)


def _deploy(settings: Settings, router: str) -> None:
    """Returns once a box runs at each place. To Ray all that is deployed is new: it replaces boxes that run already."""
    boxes = _boxes(settings, _places(), router)
    serve.run_many([RunTarget(boxes, name=NAME, route_prefix="/", external_scaler_enabled=True)])


def _boxes(settings: Settings, number: int, router: str = ROUTER) -> Application:
    deployment = serve.deployment(
        num_replicas=number,
        ray_actor_options={"num_cpus": 0, "resources": {PLACE: 1}},
        max_ongoing_requests=REQUESTS,
        graceful_shutdown_timeout_s=settings.predict_timeout + settings.stop_timeout,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=10,
        logging_config={"enable_access_log": False},  # each box writes a line of its own for each request
        request_router_config=RequestRouterConfig(
            request_router_class=router,
            request_routing_stats_period_s=STATS_SECONDS,
            request_routing_stats_timeout_s=5,
        ),
    )
    return deployment(Box).bind()


def _scale(places: int) -> None:
    """So many boxes, those that run included. (Ray tells the same by its dashboard, which does not run here.)"""
    controller = _get_global_client()._controller
    ray.get(controller.update_deployment_replicas.remote(DeploymentID(Box.__name__, NAME), places), timeout=RAY_SECONDS)


def _http(settings: Settings) -> HTTPOptions:
    files = {}
    if settings.tls_cert is not None and settings.tls_key is not None:
        files = {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    return HTTPOptions(host=settings.host, port=settings.port, keep_alive_timeout_s=60, **files)


def _places() -> int:
    """On machines that are to stay. At least one: it is waited for until there is."""
    leaving = ray_state.get_draining_nodes()
    staying = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    return max(1, sum(int(node["Resources"].get(PLACE, 0)) for node in staying))
