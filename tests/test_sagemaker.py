"""The SageMaker runtime API: over HTTP, and through boto3's own client on a TorchServe that is a function."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.eventstream import EventStreamBuffer
from botocore.exceptions import ClientError
from fakes import OWN_ERROR, RAISED, FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient
from urllib3.response import HTTPResponse

from serve import errors
from serve.gateway import sagemaker
from serve.memory_file import PIECE

INVOCATIONS = "/endpoints/genai/invocations"
STREAM = "/endpoints/genai/invocations-response-stream"
TARGET = "X-Amzn-SageMaker-Target-Model"


@pytest.fixture
def client(fake: FakeTorchServe, tmp_path: Path) -> Iterator[TestClient]:
    make_store(tmp_path, *("sam", "team/own"))
    with gateway(fake, tmp_path, max_request_mib=1) as running:
        yield running


@pytest.fixture
def runtime(client: TestClient) -> Any:
    """boto3's client, whose HTTP requests go to the application without a socket."""

    def send(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        body = request.body.read() if hasattr(request.body, "read") else request.body
        headers = {k: v.decode() if isinstance(v, bytes) else v for k, v in request.headers.items()}
        answer = client.request(request.method, request.url, content=body, headers=headers)
        raw = HTTPResponse(io.BytesIO(answer.content), answer.headers, answer.status_code, preload_content=False)
        return AWSResponse(request.url, answer.status_code, answer.headers, raw)

    boto = boto3.client(
        "sagemaker-runtime",
        endpoint_url="http://testserver",
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
    )
    boto.meta.events.register("before-send.sagemaker-runtime", send)
    return boto


def test_an_answer_carries_sagemakers_headers(client: TestClient) -> None:
    headers = {
        TARGET: "/sam.tar.gz",
        "X-Amzn-SageMaker-Target-Variant": "blue",
        "X-Amzn-SageMaker-Custom-Attributes": "trace=1; user=me",
        "X-Amzn-SageMaker-Inference-Id": "id 1",
        "X-Amzn-SageMaker-Prefix-Aware-Id": "prefix 1",
    }
    answer = client.post(INVOCATIONS, content=b"body", headers=headers)
    assert (answer.status_code, answer.content) == (200, b"png")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-Amzn-Invoked-Production-Variant"] == "blue"
    assert answer.headers["X-Amzn-SageMaker-Custom-Attributes"] == "trace=1; user=me"
    plain = client.post(INVOCATIONS, headers={TARGET: "sam"})
    assert plain.headers["x-Amzn-Invoked-Production-Variant"] == "AllTraffic"
    assert "X-Amzn-SageMaker-Custom-Attributes" not in plain.headers
    assert plain.headers["x-amzn-RequestId"] != answer.headers["x-amzn-RequestId"]


def test_a_handler_sees_the_body_and_the_headers_that_sagemaker_lets_through(
    client: TestClient, fake: FakeTorchServe
) -> None:
    passed = {"content-type": "text/x", "accept": "image/webp", TARGET: "sam", "X-Amzn-SageMaker-Inference-Id": "7"}
    foreign = {"x-palimpsest-command": "park", "cookie": "a=b", "x-amz-date": "20250101T000000Z"}
    client.post(INVOCATIONS, content=b"body", headers=passed | foreign)
    request = fake.calls[-1]
    assert request.content == b"body"
    assert {name: request.headers[name] for name in passed} == passed
    assert not foreign.keys() & request.headers.keys()


@pytest.mark.parametrize(
    ("spelling", "archive"),
    [
        ("sam", "sam"),
        ("sam.tar.gz", "sam"),
        ("/sam.tar.gz", "sam"),
        ("team/own.tar.gz", "team--own"),
        ("/team/own", "team--own"),
    ],
)
def test_the_target_model_names_the_archive(
    client: TestClient, fake: FakeTorchServe, spelling: str, archive: str
) -> None:
    assert client.post(INVOCATIONS, headers={TARGET: spelling}).status_code == 200
    assert fake.paths()[-1] == f"POST /predictions/p.{archive}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "headers", "said"),
    [
        (INVOCATIONS, {}, "TargetModel='sam.tar.gz'"),
        (INVOCATIONS, {TARGET: ""}, TARGET),
        (INVOCATIONS, {TARGET: "s" * 1025}, TARGET),
        (INVOCATIONS, {TARGET: b"sam\xe9"}, TARGET),
        (INVOCATIONS, {TARGET: "../sam"}, "not a model name"),
        (INVOCATIONS, {TARGET: "team/../sam.tar.gz"}, "not a model name"),
        (INVOCATIONS, {TARGET: "nobody.tar.gz"}, "the store holds sam, team/own"),
        (INVOCATIONS, {TARGET: "sam", "X-Amzn-SageMaker-Custom-Attributes": "a" * 1025}, "Custom-Attributes"),
        (INVOCATIONS, {TARGET: "sam", "X-Amzn-SageMaker-Custom-Attributes": b"\xe9"}, "Custom-Attributes"),
        (INVOCATIONS, {TARGET: "sam", "X-Amzn-SageMaker-Inference-Id": "i" * 65}, "Inference-Id"),
        (INVOCATIONS, {TARGET: "sam", "X-Amzn-SageMaker-Target-Variant": "-blue"}, "Target-Variant"),
        (INVOCATIONS, {TARGET: "sam", "X-Amzn-SageMaker-Session-Id": "a b"}, "SessionId"),
        (f"/endpoints/{'e' * 64}/invocations", {TARGET: "sam"}, "name"),
        ("/endpoints/-genai/invocations", {TARGET: "sam"}, "name"),
        ("/endpoints/gen_ai/invocations", {TARGET: "sam"}, "name"),
        (STREAM, {}, "TargetModel="),
        (STREAM, {TARGET: "nobody"}, "the store holds"),
    ],
)
def test_what_is_wrong_with_a_request_is_a_validation_error(
    client: TestClient, fake: FakeTorchServe, path: str, headers: dict[str, Any], said: str
) -> None:
    answer = client.post(path, headers=headers)
    assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (400, "ValidationError")
    assert answer.json().keys() == {"Message"}
    assert said in answer.json()["Message"]
    assert "x-amzn-RequestId" in answer.headers
    assert fake.calls == []


def test_the_longest_permitted_values_are_taken(client: TestClient) -> None:
    headers = {
        TARGET: "sam",
        "X-Amzn-SageMaker-Custom-Attributes": "a" * 1024,
        "X-Amzn-SageMaker-Inference-Id": "i" * 64,
    }
    assert client.post(f"/endpoints/{'e' * 63}/invocations", headers=headers).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (errors.ModelNotReady("loading", retry_after=5), 429, "ModelNotReadyException", "5"),
        (errors.QueueFull("full", retry_after=2), 503, "ServiceUnavailable", "2"),
        (errors.EngineUnavailable("restarting"), 503, "ServiceUnavailable", "5"),
        (errors.WorkerDied("died"), 503, "ServiceUnavailable", "1"),
        (errors.ModelLoadFailed("no weights"), 424, "ModelError", None),
        (errors.OutOfMemory("too large"), 424, "ModelError", None),
        (errors.DeadlineExceeded("late"), 424, "ModelError", None),
        (errors.PalimpsestError("odd"), 500, "InternalFailure", None),
    ],
)
@pytest.mark.parametrize("path", [INVOCATIONS, STREAM])
def test_our_errors_become_sagemakers(
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    error: errors.PalimpsestError,
    status: int,
    kind: str,
    retry_after: str | None,
) -> None:
    monkeypatch.setattr(client.app.state.services.scheduler, "lease", _raising(error))
    answer = client.post(path, headers={TARGET: "sam"})
    assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (status, kind)
    assert answer.headers.get("Retry-After") == retry_after
    assert error.message in answer.json()["Message"]
    if kind == "ModelError":
        assert answer.json()["OriginalStatusCode"] == error.status
        assert answer.json()["OriginalMessage"] == error.message


def test_an_unexpected_error_is_an_internal_failure_and_keeps_its_text(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.app.state.services.scheduler, "lease", _raising(OSError("/secret/path")))
    answer = client.post(INVOCATIONS, headers={TARGET: "sam"})
    assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (500, "InternalFailure")
    assert "secret" not in answer.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "reply", "status", "kind"),
    [
        ("POST /models", httpx.Response(507, json=OWN_ERROR), 424, "ModelError"),
        ("POST /models", httpx.Response(500, json=OWN_ERROR), 424, "ModelError"),
        ("POST /predictions/p.sam", httpx.Response(507, json=OWN_ERROR), 424, "ModelError"),
        ("POST /predictions/p.sam", httpx.Response(503, json=OWN_ERROR), 503, "ServiceUnavailable"),
        ("POST /predictions/p.sam", httpx.Response(503, json=RAISED), 424, "ModelError"),
    ],
)
def test_torchserves_errors_become_sagemakers(
    client: TestClient, fake: FakeTorchServe, call: str, reply: httpx.Response, status: int, kind: str
) -> None:
    fake.replies[call] = reply
    answer = client.post(INVOCATIONS, headers={TARGET: "sam"})
    assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (status, kind)


@pytest.mark.parametrize("status", [400, 413, 500, 507])
def test_a_handlers_error_is_a_model_error_with_its_words(runtime: Any, fake: FakeTorchServe, status: int) -> None:
    body = {"error": {"code": "bad_request", "message": "image is missing", "field": "image"}}
    fake.replies["POST /predictions/p.sam"] = httpx.Response(status, json=body)
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        runtime.invoke_endpoint(EndpointName="genai", TargetModel="sam.tar.gz", Body=b"{}")
    response = caught.value.response
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert response["OriginalStatusCode"] == status
    assert json.loads(response["OriginalMessage"]) == body
    assert response["LogStreamArn"].startswith("arn:")
    assert "image is missing" in response["Error"]["Message"]


def test_messages_stay_within_sagemakers_limit(client: TestClient, fake: FakeTorchServe) -> None:
    fake.replies["POST /predictions/p.sam"] = httpx.Response(500, content=b"\xff" + b"x" * 9000)
    answer = client.post(INVOCATIONS, headers={TARGET: "sam"}).json()
    assert len(answer["Message"]) <= 2048
    assert answer["Message"].endswith(sagemaker.LOG_STREAM)
    assert len(answer["OriginalMessage"]) == 2048


def test_a_body_over_the_limit_is_a_validation_error(client: TestClient) -> None:
    answer = client.post(INVOCATIONS, content=bytes(2**20 + 1), headers={TARGET: "sam"})
    assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (400, "ValidationError")
    assert "1 MiB" in answer.json()["Message"]


def test_boto3_gets_the_answer(runtime: Any) -> None:
    answer = runtime.invoke_endpoint(
        EndpointName="genai", TargetModel="/sam.tar.gz", Body=b"x", CustomAttributes="a=b", TargetVariant="blue"
    )
    assert answer["Body"].read() == b"png"
    assert (answer["ContentType"], answer["CustomAttributes"]) == ("image/png", "a=b")
    assert answer["InvokedProductionVariant"] == "blue"
    assert answer["ResponseMetadata"]["RequestId"]


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (errors.ModelNotReady("loading", retry_after=5), "ModelNotReadyException"),
        (errors.ModelNotFound("none"), "ValidationError"),
        (errors.ModelLoadFailed("no weights"), "ModelError"),
        (errors.EngineUnavailable("restarting"), "ServiceUnavailable"),
        (errors.PalimpsestError("odd"), "InternalFailure"),
    ],
)
def test_boto3_raises_the_exception_of_that_name(
    client: TestClient, runtime: Any, monkeypatch: pytest.MonkeyPatch, error: errors.PalimpsestError, name: str
) -> None:
    monkeypatch.setattr(client.app.state.services.scheduler, "lease", _raising(error))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # botocore's pause between its tries
    with pytest.raises(getattr(runtime.exceptions, name), match=error.message) as caught:
        runtime.invoke_endpoint(EndpointName="genai", TargetModel="sam", Body=b"")
    assert isinstance(caught.value, ClientError)


@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 1])
def test_boto3_reads_a_streamed_answer(runtime: Any, fake: FakeTorchServe, size: int) -> None:
    body = bytes(i % 251 for i in range(size))
    fake.replies["POST /predictions/p.sam"] = httpx.Response(200, content=body, headers={"content-type": "image/x"})
    answer = runtime.invoke_endpoint_with_response_stream(
        EndpointName="genai", InferenceComponentName="sam", Body=b"x", Accept="image/x", CustomAttributes="a=b"
    )
    parts = [event["PayloadPart"]["Bytes"] for event in answer["Body"]]
    assert b"".join(parts) == body
    assert len(parts) == -(-size // PIECE)
    assert (answer["ContentType"], answer["CustomAttributes"]) == ("image/x", "a=b")
    assert fake.calls[-1].headers["accept"] == "image/x"


def test_the_stream_takes_a_target_model_and_says_what_it_is(client: TestClient) -> None:
    answer = client.post(STREAM, headers={TARGET: "/sam.tar.gz"})
    assert answer.headers["content-type"] == "application/vnd.amazon.eventstream"
    assert answer.headers["X-Amzn-SageMaker-Content-Type"] == "image/png"
    assert answer.headers["x-Amzn-Invoked-Production-Variant"] == "AllTraffic"
    buffer = EventStreamBuffer()
    buffer.add_data(answer.content)
    assert [message.payload for message in buffer] == [b"png"]


def test_a_streamed_requests_error_is_no_stream(runtime: Any, fake: FakeTorchServe) -> None:
    fake.replies["POST /predictions/p.sam"] = httpx.Response(400, json={"error": {}})
    with pytest.raises(runtime.exceptions.ModelError):
        runtime.invoke_endpoint_with_response_stream(EndpointName="genai", InferenceComponentName="sam", Body=b"x")


def test_openapi_describes_both_operations(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/endpoints/{name}/invocations", "/endpoints/{name}/invocations-response-stream"):
        operation = paths[path]["post"]
        assert {"200", "400", "424", "429", "500", "503"} <= operation["responses"].keys()
        parameters = {p["name"]: p for p in operation["parameters"]}
        assert parameters[TARGET]["description"]


def _raising(error: Exception) -> Any:
    def lease(*_: Any, **__: Any) -> Any:
        raise error

    return lease
