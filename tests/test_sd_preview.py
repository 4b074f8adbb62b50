"""Drafts of a picture that is still being painted."""

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import HandlerClient, encoded, pixels
from PIL import Image
from torch import Tensor

from contract import progress
from contract.progress import Preview
from handlers.editing.geometry import Box, Fit
from handlers.pictures.picture import Picture
from handlers.requests.jobs import SharedProgress
from handlers.requests.payload import Request
from handlers.sd import preview
from handlers.sd.description import SCHEDULER
from handlers.sd.settings import PaintSettings
from serve.memory_file import MemoryFile

Open = Callable[[str], HandlerClient]
Shown = list[tuple[tuple[int, int, int, int], np.ndarray]]


@pytest.fixture(autouse=True)
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "INTERVAL", 0)


def paint(
    sd: HandlerClient, picture: np.ndarray, hole: np.ndarray, watch: bool = True, **gen_args: Any
) -> tuple[np.ndarray, Shown]:
    """The picture, and the drafts that were shown: box and RGBA."""
    shown: Shown = []
    settings = PaintSettings.parse(Request({"prompt": "a red ball", "gen_args": {"seed": 3} | gen_args}), 3)
    show = (lambda box, png: shown.append((box, pixels(png)))) if watch else None
    with torch.inference_mode():
        return sd.handler.replace(Picture(picture), hole, settings, show=show).samples, shown


def scene(height: int = 256, width: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """A soft picture and a round hole in its middle."""
    noise = np.random.default_rng(2).integers(60, 190, (4, 4, 3), np.uint8)
    picture = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    hole = cv2.circle(np.zeros((height, width), np.uint8), (width // 2, height // 2), min(height, width) // 3, 1, -1)
    return picture, hole.astype(bool)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULER.choices)
def test_drafts_change_no_picture_and_end_like_it(
    open_handler: Open, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_handler("sd").handler, "seamless", False)  # drafts are in the network's own tones
    arguments = {"num_inference_steps": 8, "scheduler": scheduler}
    alone, none = paint(open_handler("sd"), *scene(), watch=False, **arguments)
    watched, shown = paint(open_handler("sd"), *scene(), **arguments)
    assert np.array_equal(watched, alone)
    assert not none
    assert len(shown) >= 8
    box, draft = shown[-1]
    assert box == (0, 0, 256, 256)
    assert draft.shape == (32, 32, 4)
    inside = draft[..., 3] == 255
    truth = cv2.resize(alone, (32, 32), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(draft[..., :3] - truth)[inside].mean() < 12  # of grey levels: the map's and the last step's
    assert np.abs(truth[inside] - 128).mean() > 24


@pytest.mark.slow
def test_the_first_draft_is_not_noise(open_handler: Open) -> None:
    """It is what the network expects, which is smooth from the start; the latents themselves are noise still."""
    _, shown = paint(open_handler("sd"), *scene(), num_inference_steps=8)
    first = shown[0][1][8:24, 8:24, :3].astype(float)
    assert np.abs(np.diff(first, axis=0)).mean() < 15  # of noise: 50 and more


def test_nothing_outside_the_mask_is_shown(open_handler: Open) -> None:
    picture, hole = scene()
    _, shown = paint(open_handler("sd"), picture, hole, num_inference_steps=2)
    draft = shown[0][1]
    share = cv2.resize(hole.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(draft[..., 3] - 255 * share).max() <= 1
    assert (draft[share == 0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(200, 340), (256, 256), (700, 500), (90, 60)])
def test_a_draft_says_where_it_belongs(open_handler: Open, height: int, width: int) -> None:
    """Drawn there, its opaque part is where the hole is: cropped, scaled or at the picture's edge."""
    picture = scene(height, width)[0]
    hole = np.zeros((height, width), bool)
    hole[height // 2 :, width // 3 : width // 3 + width // 4] = True
    _, shown = paint(open_handler("sd"), picture, hole, num_inference_steps=1)
    (left, top, right, bottom), draft = shown[0]
    drawn = cv2.resize(draft[..., 3], (right - left, bottom - top), interpolation=cv2.INTER_NEAREST) >= 128
    canvas = np.zeros((max(height, bottom), max(width, right)), bool)
    canvas[top:bottom, left:right] = drawn
    wrong = canvas[:height, :width] != hole
    cell = (right - left) / draft.shape[1]
    outline = cv2.morphologyEx(hole.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    near = cv2.distanceTransform(1 - outline, cv2.DIST_L2, 5) <= cell + 2
    assert not wrong[~near].any()


class OnGpu:
    """Stands in for preview.Sent: the tensor arrives when it is told to."""

    all: "list[OnGpu]"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.came = tensor.float(), False
        OnGpu.all.append(self)

    def has_arrived(self) -> bool:
        return self.came


@pytest.mark.slow
def test_what_has_not_come_from_the_device_is_not_waited_for(
    open_handler: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "Sent", OnGpu)
    OnGpu.all = []
    shown: Shown = []
    sd = open_handler("sd")
    settings = PaintSettings.parse(Request({"prompt": "x", "gen_args": {"num_inference_steps": 6, "seed": 1}}))

    def report(step: int, steps: int) -> None:
        OnGpu.all[0].came = step >= 3

    with torch.inference_mode():
        sd.handler.replace(Picture(scene()[0]), scene()[1], settings, report, lambda box, png: shown.append((box, png)))
    assert len(shown) == 1  # of the first, once it had come; the one after it has not


def test_a_draft_that_overflowed_is_not_shown() -> None:
    shown: list[bytes] = []
    box = Box(0, 0, 64, 64)
    place = preview.Place(box, Fit.square(box, 64), np.ones((64, 64), bool))
    drafts = preview.Drafts(preview.STABLE_DIFFUSION, 8, place, lambda box, png: shown.append(png))
    drafts._coming = preview.Sent(torch.full((4, 8, 8), torch.nan))
    drafts._show_what_has_come()
    assert not shown
    drafts._coming = preview.Sent(torch.zeros((4, 8, 8)))
    drafts._show_what_has_come()
    assert (np.asarray(Image.open(io.BytesIO(shown[0])))[..., :3] == 128).all()


@pytest.mark.slow
@pytest.mark.parametrize("watched", [True, False])
def test_a_worker_shows_drafts_to_whoever_left_room_for_them(open_handler: Open, watched: bool) -> None:
    picture, hole = scene()
    fields = {
        "image": encoded(picture),
        "mask_image": encoded(hole.astype(np.uint8) * 255),
        "prompt": "a cup",
        "gen_args": {"num_inference_steps": 3, "variants": 2},
    }
    with MemoryFile() as job:
        job.write(bytes(progress.SIZE_WITH_PREVIEW if watched else progress.SIZE))
        assert open_handler("sd").ask(fields, job=job).status == 200
        newest = Preview.read(job.read())
        assert progress.Progress.read(job.read())[:2] == (6, 6)
    assert (newest is not None) == watched
    if newest is not None:
        assert (newest.number, newest.variant, newest.box) == (6, 1, (0, 0, 256, 256))
        assert pixels(newest.picture).shape == (32, 32, 4)


def test_a_preview_that_is_being_written_is_not_read() -> None:
    memory = bytearray(progress.SIZE_WITH_PREVIEW)
    assert Preview.read(memory) is None
    job = SharedProgress(memory)
    job.show(0, (1, 2, 3, 4), b"first")
    assert Preview.read(memory) == (1, 0, (1, 2, 3, 4), b"first")
    before = bytes(memory)
    job.show(1, (1, 2, 3, 4), b"other")
    torn = memory[: memory.index(b"other") + 2] + before[memory.index(b"other") + 2 :]
    assert Preview.read(torn) is None
    job.show(1, (0, 0, 1, 1), bytes(progress.MAX_PREVIEW + 1))  # too large
    assert Preview.read(memory) == (2, 1, (1, 2, 3, 4), b"other")
    assert progress.Progress.read(memory) == (0, 0, False)
