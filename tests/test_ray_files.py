"""deploy/ray/: what Ray Serve and KubeRay read, by Ray's own schema; and that Ray makes the same boxes of it."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from serving import ROOT, environment, free_port, name_full_set, until
from zoo import write_archive

from serve.cluster import node, service
from serve.settings import Settings

FOLDER = ROOT / "deploy" / "ray"
CONFIG: dict[str, Any] = yaml.safe_load((FOLDER / "serve.yaml").read_text())
MANIFEST: dict[str, Any] = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
CLUSTER = MANIFEST["spec"]["rayClusterConfig"]
START_SECONDS = 240.0


@pytest.mark.parametrize("config", [CONFIG, yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])], ids=["ray", "kuberay"])
def test_ray_reads_it_and_nothing_in_it_is_unknown(config: dict[str, Any]) -> None:
    read = ServeDeploySchema.model_validate(config)
    (application,) = read.applications
    assert (application.name, application.route_prefix) == (service.NAME, "/")
    assert application.import_path == "serve.cluster.service:application"
    (deployment,) = application.deployments
    assert deployment.name == service.Box.__name__
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert config["http_options"].keys() <= type(read.http_options).model_fields.keys()
    assert config["applications"][0].keys() <= type(application).model_fields.keys()
    assert config["applications"][0]["deployments"][0].keys() <= type(deployment).model_fields.keys()


def test_arguments_that_nobody_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="PALIMPSEST_"):
        service.application({"store": "/elsewhere"})


@pytest.fixture(params=["head", "worker"])
def pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    group = CLUSTER["headGroupSpec"] if request.param == "head" else CLUSTER["workerGroupSpecs"][0]
    return dict(group["template"]["spec"])


def test_each_pod_has_what_ray_needs_of_us_and_only_settings_that_exist(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    named = {each["name"]: each["value"] for each in container["env"]}
    assert node.DOOR.items() <= named.items()
    known = {f"PALIMPSEST_{name.upper()}" for name in Settings.model_fields}
    assert {each for each in named if each.startswith("PALIMPSEST_")} <= known
    port = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])["http_options"]["port"]
    assert container["ports"] == [{"name": "serve", "containerPort": port}]


def test_each_pod_is_hardened_and_has_its_keys_from_a_secret(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert "memory" in container["resources"]["limits"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes.keys()
    (mount,) = [each["mountPath"] for each in container["volumeMounts"] if "secret" in volumes[each["name"]]]
    (file,) = [each["value"] for each in container["env"] if each["name"] == "PALIMPSEST_KEYS_FILE"]
    assert Path(file).parent == Path(mount)
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_each_worker_is_a_place_with_a_gpu_and_there_are_as_many_as_boxes() -> None:
    (group,) = CLUSTER["workerGroupSpecs"]
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {node.PLACE: 1}
    assert "resources" not in CLUSTER["headGroupSpec"]["rayStartParams"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    (application,) = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])["applications"]
    assert application["deployments"][0]["num_replicas"] == group["replicas"] == group["maxReplicas"]


def test_the_version_of_ray_is_the_one_that_is_locked() -> None:
    assert f"ray=={CLUSTER['rayVersion']} " in (ROOT / "requirements-cluster.lock").read_text()


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[httpx.Client]:
    """serve.yaml with another port, on a Ray of this machine."""
    store, token, port = tmp_path / "store", tmp_path / "token", free_port()
    write_archive(store, "echo", memory_mib=100)
    name_full_set(store)
    environ = environment(port, tmp_path, store, "full") | {"CUDA_VISIBLE_DEVICES": ""}
    settings = Settings(store=store, state=tmp_path / "state", cache=tmp_path / "cache", port=port, models="full")
    settings.state.mkdir()
    node.new_token(token)
    environ = node.environment(settings, token) | environ
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"http_options": CONFIG["http_options"] | {"port": port}}))
    with (
        node.running(tmp_path / "ray.log", environ, None, free_port(), 2) as head,
        (tmp_path / "serve.log").open("wb") as log,
    ):
        command = [Path(sys.executable).with_name("serve"), "run", config, "--address", head.address]
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                until(lambda: process.poll() is not None or _answers(client), START_SECONDS)
                assert process.poll() is None, (tmp_path / "serve.log").read_text()
                yield client
        finally:
            process.send_signal(signal.SIGINT)  # which it takes for the end of the application, too
            process.wait(60)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.torchserve
@pytest.mark.alone
@pytest.mark.slow
def test_ray_makes_boxes_of_it(deployed: httpx.Client) -> None:
    answer = deployed.post("/predictions/echo", content=b"hello")
    assert (answer.status_code, answer.content) == (200, b"hello")
    # Our entrance and a box's name say that it is as `cluster up` has it.
    upload = deployed.post("/v1/images", content=b"\xff\xd8\xff" + bytes(99), headers={"content-type": "image/jpeg"})
    assert "." in upload.json()["id"]
    assert deployed.get("/nothing").json()["error"]["code"] == "not_found"
    assert len(answer.headers.get_list("x-request-id")) == 1
