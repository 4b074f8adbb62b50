"""What a router knows of a request: the model or the box that it is for, by path and headers alone."""

from pathlib import Path

import pytest
from fakes import FakeTorchServe, application
from hypothesis import given
from hypothesis import strategies as st

from serve.cluster.target import LONGEST, Target, routed, target_of

SAM = Target("sam")


@pytest.mark.parametrize(
    ("path", "target"),
    {
        "/predictions/sam": SAM, "/predictions/sam/": SAM, "/predictions/sam/1.0": SAM, "/predictions/demo/sam": SAM,
        "/predictions/sam.tar.gz": SAM, "/predictions/team/own": Target("team/own"), "/predictions//sam": SAM,
        "/explanations/sam": SAM, "/v2/models/sam/infer": SAM, "/v1/models/sam:predict": SAM,
        "/models/sam/invoke": SAM, "/models/sam": SAM, "/v1/models/sam/load": SAM,
        "/v1/models/team/own/pin": Target("team/own"),
        "/v1/models/sam": SAM, "/v1/segment": SAM, "/v1/erase": Target("lama"), "/v1/replace": Target("sd"),
        "/v1/images/edits": Target("sd"), "/v1/images/img_ab12.b7": Target(box="b7"),
        "/v1/jobs/ab12.b7": Target(box="b7"),
        "/v1/images/img_ab12": Target(), "/v1/images": Target(), "/v1/jobs/ab12": Target(), "/v1/models": Target(),
        "/models": Target(), "/": Target(), "/ping": Target(), "/metrics": Target(), "/predictions": Target(),
        "/predictions/": Target(), "/endpoints/x/invocations": Target(), "/web/1/page.js": Target(),
    }.items(),
)  # fmt: skip
def test_the_path_says_it(path: str, target: Target) -> None:
    assert target_of(path, []) == target


def test_headers_say_it_where_the_path_does_not() -> None:
    sagemaker = [(b"x-amzn-sagemaker-target-model", b"/team/own.tar.gz")]
    assert target_of("/endpoints/any/invocations", sagemaker) == Target("team/own")
    assert target_of("/endpoints/any/invocations-response-stream", sagemaker) == Target("team/own")
    named = [(b"x-palimpsest-model", b"demo/own"), (b"x-palimpsest-model", b"second")]
    assert target_of("/v1/segment", named) == Target("own")
    # Of those that name their model in the path it means nothing.
    assert target_of("/predictions/sam", named + sagemaker) == SAM
    assert target_of("/v1/images", named) == Target()


@given(st.text(max_size=400), st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=400)), max_size=3))
def test_nothing_that_is_sent_breaks_it(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    for each in (path, f"/predictions/{path}", f"/v1/images/{path}", f"/endpoints/{path}"):
        target = target_of(each, [*headers, (b"x-amzn-sagemaker-target-model", path.encode("utf-8", "replace"))])
        assert len(target.model) <= LONGEST
        assert Target.read(str(target)) == target or target.model.startswith("@")


def test_every_route_about_a_model_is_one_that_it_knows(tmp_path: Path) -> None:
    """A new one belongs into serve/cluster/target.py, too."""
    app = application(FakeTorchServe(), tmp_path)
    for path in app.openapi()["paths"]:
        for name in ("model", "name"):
            if f"{{{name}}}" in path and not path.startswith("/endpoints"):
                assert target_of(path.replace(f"{{{name}}}", "own"), []) == Target("own"), path
    assert routed("demo/sam") == routed("/sam.mar") == "sam"
