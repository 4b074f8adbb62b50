"""The original notebook's requests through boto3 and the SageMaker SDK, with nothing but the endpoint changed."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.config import Config
from conftest import DATA, pixels
from serving import ROOT, Server, serving, until
from zoo import write_archive

pytestmark = pytest.mark.torchserve

# The SDK wants older versions of what the server needs (rich, packaging), so it lives in an environment of its own.
SDK_PYTHON = Path(os.environ.get("SAGEMAKER_PYTHON", ROOT / ".venv-sagemaker" / "bin" / "python"))

# The notebook's cells; before them, what its `deploy` call would have returned.
NOTEBOOK = """
import base64, json, sys
import boto3, sagemaker
from sagemaker.predictor import Predictor
from sagemaker.serializers import JSONSerializer
from sagemaker.deserializers import JSONDeserializer

url, picture, folder = sys.argv[1:]
boto = boto3.Session("any", "any", region_name="us-east-1")
runtime = boto.client("sagemaker-runtime", endpoint_url=url)
smsess = sagemaker.Session(boto, sagemaker_client=object(), sagemaker_runtime_client=runtime, default_bucket="any")
predictor = Predictor("torchserve-mme-genai", sagemaker_session=smsess)
img_bytes = base64.b64encode(open(picture, "rb").read()).decode("utf-8")

def show(response, name):
    open(f"{folder}/{name}.png", "wb").write(base64.b64decode(json.loads(response.decode("utf-8"))["generated_image"]))

gen_args = json.dumps(dict(point_coords=[750, 500], point_labels=1, dilate_kernel_size=15))
payload = json.dumps({"image": img_bytes, "gen_args": gen_args}).encode("utf-8")
response = predictor.predict(data=payload, target_model="/sam.tar.gz")
show(response, "mask")
mask = json.loads(response.decode("utf-8"))["generated_image"]

fields = {"image": img_bytes, "mask_image": mask, "prompt": "a hamster on a bench", "gen_args": json.dumps({})}
show(predictor.predict(data=json.dumps(fields).encode("utf-8"), target_model="/lama.tar.gz"), "erased")

gen_args = json.dumps(dict(num_inference_steps=3, guidance_scale=10, seed=1))
fields |= {"negative_prompt": "", "gen_args": gen_args}
show(predictor.predict(data=json.dumps(fields).encode("utf-8"), target_model="/sd.tar.gz"), "replaced")

typed = Predictor(
    "torchserve-mme-genai", smsess, serializer=JSONSerializer(), deserializer=JSONDeserializer()
)
click = {"image": img_bytes, "gen_args": {"point_coords": [750, 500]}}
assert typed.predict(click, target_model="sam.tar.gz", custom_attributes="a=b")["generated_image"]
for name, error in (("sam.tar.gz", runtime.exceptions.ModelError), ("none", runtime.exceptions.ValidationError)):
    try:
        predictor.predict(data=b"{}", target_model=name)
    except error:
        continue
    raise AssertionError(name)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sdks"), demo_store) as running:
        yield running


def runtime_client(server: Server) -> Any:
    return boto3.client(
        "sagemaker-runtime",
        endpoint_url=f"http://127.0.0.1:{server.port}",
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=Config(read_timeout=300, retries={"mode": "standard"}),
    )


@pytest.fixture
def runtime(server: Server) -> Iterator[Any]:
    client = runtime_client(server)
    yield client
    client.close()


def predict(runtime: Any, target_model: str, **fields: Any) -> bytes:
    """As the notebook does it: JSON with base64 pictures, `gen_args` as the text of JSON; returns the picture."""
    plain = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in fields.items()}
    body = json.dumps(plain | {"gen_args": json.dumps(fields["gen_args"])}).encode("utf-8")
    reply = runtime.invoke_endpoint(EndpointName="torchserve-mme-genai", TargetModel=target_model, Body=body)
    return base64.b64decode(json.loads(reply["Body"].read())["generated_image"])


def assert_edited(before: bytes, mask: bytes, *after: bytes) -> None:
    picture, inside = pixels(before), pixels(mask) == 255
    assert inside.shape == picture.shape[:2]
    assert 0 < inside.mean() < 1
    for edited in map(pixels, after):
        assert np.array_equal(edited[~inside], picture[~inside])
        assert not np.array_equal(edited[inside], picture[inside])


def test_the_notebook_through_boto3(runtime: Any, dog: bytes) -> None:
    click = {"point_coords": [750, 500], "point_labels": 1, "dilate_kernel_size": 15}
    mask = predict(runtime, "/sam.tar.gz", image=dog, gen_args=click)
    both = {"image": dog, "mask_image": mask, "prompt": "a hamster on a bench"}
    erased = predict(runtime, "/lama.tar.gz", **both, gen_args={})
    wish = {"num_inference_steps": 3, "guidance_scale": 10, "seed": 1}
    replaced = predict(runtime, "/sd.tar.gz", **both, negative_prompt="", gen_args=wish)
    assert_edited(dog, mask, erased, replaced)


@pytest.mark.skipif(not SDK_PYTHON.exists(), reason="no environment with the SageMaker SDK (SAGEMAKER_PYTHON)")
def test_the_notebook_through_the_sagemaker_sdk(server: Server, tmp_path: Path, dog: bytes) -> None:
    url = f"http://127.0.0.1:{server.port}"
    quiet = {"SAGEMAKER_SUPPRESS_V2_WARNING": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    command = [str(SDK_PYTHON), "-c", NOTEBOOK, url, str(DATA / "dog-on-bench.png"), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    mask, erased, replaced = ((tmp_path / f"{name}.png").read_bytes() for name in ("mask", "erased", "replaced"))
    assert_edited(dog, mask, erased, replaced)


def test_a_picture_comes_back_as_the_accept_header_asks_also_streamed(runtime: Any, dog: bytes) -> None:
    click = json.dumps({"image": base64.b64encode(dog).decode(), "gen_args": '{"point_coords": [750, 500]}'})
    call = {
        "EndpointName": "any",
        "ContentType": "application/json",
        "Accept": "image/png",
        "CustomAttributes": "trace=1",
        "Body": click.encode(),
    }
    whole = runtime.invoke_endpoint(TargetModel="sam.tar.gz", TargetVariant="blue", **call)
    streamed = runtime.invoke_endpoint_with_response_stream(InferenceComponentName="sam", **call)
    mask = whole["Body"].read()
    assert set(np.unique(pixels(mask))) == {0, 255}
    assert b"".join(event["PayloadPart"]["Bytes"] for event in streamed["Body"]) == mask
    assert (whole["ContentType"], streamed["ContentType"]) == ("image/png", "image/png")
    assert (whole["CustomAttributes"], streamed["CustomAttributes"]) == ("trace=1", "trace=1")
    assert (whole["InvokedProductionVariant"], streamed["InvokedProductionVariant"]) == ("blue", "AllTraffic")


def test_errors_are_boto3s_typed_exceptions(runtime: Any) -> None:
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        runtime.invoke_endpoint(EndpointName="any", TargetModel="sam.tar.gz", Body=b"{}")
    assert caught.value.response["OriginalStatusCode"] == 400
    assert json.loads(caught.value.response["OriginalMessage"])["error"]["field"] == "image"
    with pytest.raises(runtime.exceptions.ValidationError, match="nobody"):
        runtime.invoke_endpoint(EndpointName="any", TargetModel="nobody.tar.gz", Body=b"{}")
    with pytest.raises(runtime.exceptions.ValidationError, match="TargetModel"):
        runtime.invoke_endpoint(EndpointName="any", Body=b"{}")


def test_a_model_that_still_loads_is_not_ready_and_the_load_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    handler = write_archive(tmp_path / "store", "gated") / "handler.py"
    handler.write_text(f"open({str(gate)!r}).read()\n{handler.read_text()}")
    monkeypatch.setenv("PALIMPSEST_QUEUE_TIMEOUT", "0.25")
    with serving(tmp_path, tmp_path / "store", "full", cpu_only=True) as server:
        runtime = runtime_client(server)
        call = {"EndpointName": "any", "TargetModel": "gated", "Body": b"the same"}
        with pytest.raises(runtime.exceptions.ModelNotReadyException) as caught:
            runtime.invoke_endpoint(**call)
        assert caught.value.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"].isdecimal()
        gate.write_text("")
        until(lambda: "gated" in server.http.get("/v1/state").json()["ready"])
        assert runtime.invoke_endpoint(**call)["Body"].read() == b"the same"
        runtime.close()
