"""The application as Ray Serve runs it: a box for each place that the machines have, one door on each machine."""

import logging
import threading

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.api import RunTarget
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig

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
REQUESTS = 1024  # of one box, that wait or run: it refuses what is too many itself, with its reasons


class Service:
    """The head's part: starts the application, and gives it as many boxes as there are places while it runs."""

    def __init__(self, settings: Settings, address: str, router: str = ROUTER) -> None:
        """Returns once the first boxes serve. Raises RuntimeError where one can't start: its log says why.

        router: the class that chooses a box for each request, by its path.
        """
        self._settings, self._router = settings, router
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        serve.start(proxy_location=ProxyLocation.EveryNode, http_options=_http(settings))
        self._places = _places()
        self._deploy(wait=True)
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
            except (RuntimeError, RayError) as error:
                logger.error("%s", error)  # and again at the next look

    def _follow(self, places: int) -> None:
        if places != self._places:
            logger.warning("the cluster has %d places for boxes, and had %d", places, self._places)
            self._places = places
            self._deploy(wait=False)

    def _deploy(self, wait: bool) -> None:
        """wait: until the boxes serve, for which one that is never to have a place would be waited for, too."""
        boxes = _boxes(self._settings, self._places, self._router)
        serve.run_many([RunTarget(boxes, name=NAME, route_prefix="/")], wait_for_applications_running=wait)


def application(arguments: dict[str, str]) -> Application:
    """What deploy/ray/serve.yaml imports: one box, unless the file says how many; with the settings that are in the
    environment. arguments: none.
    """
    if arguments:
        raise ValueError(
            f"no args are known here, and there are {sorted(arguments)}: settings are PALIMPSEST_* variables"
        )
    return _boxes(Settings(), 1)


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


def _http(settings: Settings) -> HTTPOptions:
    files = {}
    if settings.tls_cert is not None and settings.tls_key is not None:
        files = {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    return HTTPOptions(host=settings.host, port=settings.port, keep_alive_timeout_s=60, **files)


def _places() -> int:
    """At least one: it is waited for until there is."""
    return max(1, int(ray.cluster_resources().get(PLACE, 0)))


def boxes(address: str) -> dict[str, known.Told]:
    """What each box has told, by its name."""
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        serve.get_app_handle(NAME).told.remote().result(timeout_s=30)
        return dict(known.BOXES)
    finally:
        ray.shutdown()
