"""The image-edit call of the OpenAI API with the demo models in a real TorchServe, and what docs/openai.md shows."""

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, encoded, pixels
from openai import OpenAI
from PIL import Image
from serving import Server, blocks, serving

pytestmark = pytest.mark.torchserve

PROMPT = "a red ball"
BOX = (600, 300, 700, 400)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("openai"), demo_store) as running:
        yield running


@pytest.fixture(scope="module")
def hole(dog: bytes) -> np.ndarray:
    hole = np.zeros(pixels(dog).shape[:2], bool)
    left, top, right, bottom = BOX
    hole[top:bottom, left:right] = True
    return hole


def test_a_stream_shows_drafts_and_ends_as_replace_does(server: Server, dog: bytes, hole: np.ndarray) -> None:
    mask = encoded(np.dstack([pixels(dog)[..., :3], np.where(hole, 0, 255).astype(np.uint8)]))
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        stream = client.images.edit(
            image=dog, mask=mask, prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 3, "steps": 40}
        )
        *drafts, last = stream
    assert [draft.partial_image_index for draft in drafts] == [0, 1]
    for draft in drafts:
        left, top, right, bottom = draft.model_extra["box"]
        assert left <= BOX[0] < BOX[2] <= right
        assert top <= BOX[1] < BOX[3] <= bottom
        assert Image.open(io.BytesIO(base64.b64decode(draft.b64_json))).mode == "RGBA"
    files = {"image": dog, "mask": encoded(hole.astype(np.uint8) * 255)}
    data = {"prompt": PROMPT, "seed": "3", "steps": "40"}
    same = server.http.post("/v1/replace", files=files, data=data, headers={"accept": "image/png"})
    assert (last.type, last.size) == ("image_edit.completed", "1499x1041")
    assert base64.b64decode(last.b64_json) == same.content


def test_what_the_documentation_shows_works(server: Server, tmp_path: Path, dog: bytes, dog_mask: bytes) -> None:
    (block,) = blocks("docs/openai.md", "python")
    (tmp_path / "tests").symlink_to(DATA.parent)
    code = block.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    before, after = pixels(dog), pixels((tmp_path / "edited.png").read_bytes())
    inside = pixels(dog_mask) >= 128
    assert (before[~inside] == after[~inside]).all()
    assert (before[inside] != after[inside]).any()
