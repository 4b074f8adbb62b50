"""What a model may change and what not, through the handlers' whole path, with stand-ins for the networks."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from conftest import HandlerClient, encoded, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from handlers.lama import network as lama_network
from handlers.pictures import decoding, encoding
from handlers.pictures.picture import Picture
from handlers.pictures.png import write_png

Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(HxWx3 uint8, HxW bool) -> HxWx3 uint8"""

NATIVE = 64


class Editor:
    """The LaMa or the SD handler whose network is a plain function; everything around it is the product's own."""

    def __init__(self, client: HandlerClient, name: str, patch: pytest.MonkeyPatch) -> None:
        self.client, self.name, self.runs = client, name, 0
        self.paint: Paint = lambda rgb, mask: rgb
        if name == "lama":
            patch.setattr(lama_network, "inpaint", self._lama)
            patch.setattr(client.handler, "config", {"native_side": NATIVE})
        else:
            vae = SimpleNamespace(
                dtype=torch.float32,
                config=SimpleNamespace(scaling_factor=1),
                decode=lambda x: SimpleNamespace(sample=x),
            )
            tokenizer = client.handler.pipeline.tokenizer
            patch.setattr(client.handler, "pipeline", _Pipeline(self._sd, vae, tokenizer))
            patch.setattr(client.handler, "native", NATIVE)
            patch.setattr(client.handler, "seamless", False)
            patch.setattr(client.handler, "cell", 4)

    def edit(self, image: bytes, mask: np.ndarray, accept: str = "image/png", **gen_args: Any) -> Picture:
        hole = encoded(mask.astype(np.uint8) * 255)
        data = {"image": image, "mask_image": hole, "prompt": b"", "gen_args": gen_args | self._quick()}
        reply = self.client.send(data, accept)
        assert reply.status == 200, reply.body
        return decoding.decode_picture(reply.body)

    def _quick(self) -> dict[str, int]:
        return {"num_inference_steps": 1} if self.name == "sd" else {}

    def _lama(self, network: Any, image: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        rgb = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        painted = self.paint(rgb, hole[0, 0].numpy() > 0)
        return torch.from_numpy(painted.copy()).permute(2, 0, 1)[None].float() / 255

    def _sd(self, image: Image.Image, mask_image: Image.Image, **_: Any) -> Any:
        self.runs += 1
        painted = self.paint(np.asarray(image), np.asarray(mask_image))
        return SimpleNamespace(images=torch.from_numpy(painted.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1)


class _Pipeline:
    scheduler: Any = None

    def __init__(self, call: Callable[..., Any], vae: Any, tokenizer: Any) -> None:
        self._call, self.vae, self.tokenizer = call, vae, tokenizer

    def embedded(self, text: str) -> torch.Tensor:
        return torch.zeros(1, 1, 1)

    def seeing_once(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __call__(self, **arguments: Any) -> Any:
        return self._call(**arguments)


@pytest.fixture(scope="module", params=["lama", "sd"])
def editor(request: pytest.FixtureRequest, open_handler: Callable[[str], HandlerClient]) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        yield Editor(open_handler(request.param), request.param, patch)


@pytest.fixture
def lama(open_handler: Callable[[str], HandlerClient]) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        yield Editor(open_handler("lama"), "lama", patch)


@pytest.fixture
def seamless(open_handler: Callable[[str], HandlerClient]) -> Iterator[Editor]:
    """SD, whose paint is toned to meet what is around it."""
    with pytest.MonkeyPatch.context() as patch:
        editor = Editor(open_handler("sd"), "sd", patch)
        patch.setattr(editor.client.handler, "seamless", True)
        yield editor


def identity(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return rgb


def negative(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return 255 - rgb


sides = st.integers(1, 3 * NATIVE)
CHANNELS_AND_DEPTHS = [(c, d) for c in (1, 2, 3, 4) for d in (np.uint8, np.uint16)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A picture of any kind, HxW or HxWxC of 8 or 16 bits, and a mask: rectangles, specks, or everything."""
    height, width = draw(sides), draw(sides)
    channels, dtype = draw(st.sampled_from(CHANNELS_AND_DEPTHS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    array = rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)
    mask = rng.random((height, width)) < draw(st.sampled_from([0, 0, 0.01, 1]))
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : draw(st.integers(top + 1, height)), left : draw(st.integers(left + 1, width))] = True
    return array[..., 0] if channels == 1 else array, mask


def joined(picture: Picture) -> np.ndarray:
    return picture.samples if picture.alpha is None else np.dstack([picture.samples, picture.alpha])


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(requests(), st.integers(0, 5))
def test_a_model_that_changes_nothing_gives_the_input_bit_for_bit(
    editor: Editor, request_: tuple[np.ndarray, np.ndarray], feather: int
) -> None:
    array, mask = request_
    editor.paint = identity
    result = joined(editor.edit(write_png(array), mask, feather=feather))
    assert result.dtype == array.dtype
    assert np.array_equal(result, array)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(requests(), st.integers(0, 5))
def test_whatever_a_model_does_the_outside_stays(
    editor: Editor, request_: tuple[np.ndarray, np.ndarray], feather: int
) -> None:
    array, mask = request_
    editor.paint = negative
    result = editor.edit(write_png(array), mask, feather=feather)
    assert np.array_equal(joined(result)[~mask], array[~mask])
    if result.alpha is not None:
        assert np.array_equal(result.alpha, array[..., -1])


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_at_scale_one_the_paint_lands_on_its_pixel(editor: Editor, data: st.DataObject) -> None:
    """A model that works pixel by pixel commutes with every crop: one pixel of shift would show."""
    height, width = data.draw(st.integers(NATIVE, 3 * NATIVE)), data.draw(st.integers(NATIVE, 3 * NATIVE))
    rgb = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = np.zeros((height, width), bool)
    # SD takes up to 80 % of its native size unscaled, LaMa three quarters.
    mask[top : top + data.draw(st.integers(1, NATIVE * 5 // 8)), left : left + data.draw(st.integers(1, 40))] = True
    editor.paint = negative
    result = editor.edit(write_png(rgb), mask).samples
    assert np.array_equal(result, np.where(mask[..., None], 255 - rgb, rgb))


def test_scaled_paint_is_not_shifted_and_keeps_nothing_of_the_object(editor: Editor) -> None:
    ramp = np.broadcast_to(np.linspace(0, 200, 300)[None, :, None], (300, 300, 3)).round().astype(np.uint8).copy()
    scene = ramp.copy()
    scene[60:240, 60:240] = np.random.default_rng(0).integers(0, 256, (180, 180, 3))
    mask = np.zeros((300, 300), bool)
    mask[50:250, 50:250] = True
    editor.paint = lambda rgb, hole: plane(rgb, hole)
    difference = editor.edit(write_png(scene), mask).samples.astype(float) - ramp
    # One pixel of shift would be 0.67 grey levels on average.
    assert abs(difference[mask].mean()) < 0.35
    assert np.abs(difference[mask]).max() <= 3


def test_rounds_of_edits_leave_the_rest_bit_exact(editor: Editor) -> None:
    rng = np.random.default_rng(3)
    original = rng.integers(0, 256, (150, 200, 4), np.uint8)
    data, touched = write_png(original), np.zeros((150, 200), bool)
    editor.paint = negative
    for _ in range(5):
        top, left = rng.integers(0, 100), rng.integers(0, 150)
        mask = np.zeros((150, 200), bool)
        mask[top : top + 40, left : left + 40] = True
        touched |= mask
        data = encoding.encode_picture(editor.edit(data, mask), "image/png")
    assert np.array_equal(pixels(data)[~touched], original[~touched])


def test_five_jpeg_rounds_do_not_decay(editor: Editor) -> None:
    photo = cv2.GaussianBlur(np.random.default_rng(4).integers(0, 256, (128, 160, 3), np.uint8), (0, 0), 3)
    first = data = encoded(photo, "JPEG", quality=80)
    mask = np.zeros((128, 160), bool)
    mask[40:60, 40:60] = True
    editor.paint = negative
    for _ in range(5):
        hole = encoded(mask.astype(np.uint8) * 255)
        request = {"image": data, "mask_image": hole, "prompt": b"", "gen_args": editor._quick()}
        reply = editor.client.send(request, "image/*")
        assert reply.headers["content-type"] == "image/jpeg"
        data = reply.body
    # Blocks of 16 x 16 that touch the mask are coded with it.
    outside = ~cv2.dilate(mask.astype(np.uint8), np.ones((33, 33), np.uint8)).astype(bool)
    difference = np.abs(pixels(data).astype(int) - pixels(first))[outside]
    assert difference.mean() < 0.5
    assert difference.max() <= 8


def test_feathering_fades_inside_the_mask_only(editor: Editor) -> None:
    grey = np.full((100, 100, 3), 50, np.uint8)
    mask = np.zeros((100, 100), bool)
    mask[30:70, 30:70] = True
    editor.paint = lambda rgb, hole: np.full_like(rgb, 250)
    row = editor.edit(write_png(grey), mask, feather=3).samples[50, :, 0]
    assert row[25:37].tolist() == [50, 50, 50, 50, 50, 100, 150, 200, 250, 250, 250, 250]
    # A picture's border is not the mask's edge.
    mask[:, 50:] = True
    assert (editor.edit(write_png(grey), mask, feather=3).samples[50, 60:, 0] == 250).all()


def test_grey_gets_grey_paint_and_sixteen_bits_full_range(editor: Editor) -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:20, 10:20] = True
    editor.paint = lambda rgb, hole: np.full_like(rgb, 255)
    deep = editor.edit(write_png(np.full((40, 40), 1000, np.uint16)), mask).samples
    assert deep.shape == (40, 40)
    assert set(deep[mask]) == {65535}
    assert set(deep[~mask]) == {1000}


# --- paint in tones that meet what is around it ---


@pytest.mark.parametrize("side", [NATIVE, 3 * NATIVE])
def test_seamless_paint_changes_nothing_outside_nor_where_the_model_changes_nothing(
    seamless: Editor, side: int
) -> None:
    rgb = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 3 :] = True
    for everything in (mask, np.ones_like(mask)):
        seamless.paint = identity
        assert np.array_equal(seamless.edit(write_png(rgb), everything).samples, rgb)
    seamless.paint = negative
    for feather in (0, 3):
        painted = seamless.edit(write_png(rgb), mask, feather=feather).samples
        assert np.array_equal(painted[~mask], rgb[~mask])
        assert not np.array_equal(painted[mask], rgb[mask])


def test_seamless_paint_keeps_its_contrasts_and_loses_its_tone(seamless: Editor) -> None:
    ramp = np.broadcast_to(np.linspace(40, 120, NATIVE)[:, None, None], (NATIVE, NATIVE, 3)).round().astype(np.uint8)
    mask, thing = np.zeros((NATIVE, NATIVE), bool), np.zeros((NATIVE, NATIVE, 1), np.uint8)
    mask[16:48, 16:48], thing[24:40, 24:40] = True, 50
    seamless.paint = lambda rgb, hole: rgb + np.uint8(30) + thing
    assert np.array_equal(seamless.edit(write_png(ramp), mask).samples, ramp + thing)


def test_seamless_paint_stays_as_it_is_in_thin_strokes(seamless: Editor) -> None:
    """The network sees cells: around a stroke it paints what it paints within, and not what is there."""
    grey, mask = np.full((NATIVE, NATIVE, 3), 50, np.uint8), np.zeros((NATIVE, NATIVE), bool)
    mask[4:36, 4:36] = mask[19:21, 36:60] = True
    seamless.paint = lambda rgb, hole: np.full_like(rgb, 250)
    painted = seamless.edit(write_png(grey), mask).samples
    assert (painted[4:36, 4:36] == 50).all()
    assert (painted[19:21, 44:60] == 250).all()


def test_seamless_paint_stays_as_it_is_where_nothing_is_known(seamless: Editor) -> None:
    rgb = np.full((NATIVE, NATIVE, 3), 50, np.uint8)
    seamless.paint = negative
    assert (seamless.edit(write_png(rgb), np.ones((NATIVE, NATIVE), bool)).samples == 205).all()


# --- large pictures, seams ---


def plane(rgb: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """An ideal network for gradients: continues the known pixels by the plane that fits them best."""
    y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]]
    terms = np.stack([np.ones_like(x), x, y], axis=-1).astype(float)
    fit, *_ = np.linalg.lstsq(terms[~hole], rgb[~hole].astype(float), rcond=None)
    return np.where(hole[..., None], (terms @ fit).round().clip(0, 255), rgb).astype(np.uint8)


def periodic(period: int) -> Paint:
    """An ideal network for a texture: continues it from the nearest known pixel a whole number of periods away."""

    def paint(rgb: np.ndarray, hole: np.ndarray) -> np.ndarray:
        result, unknown = rgb.copy(), hole.copy()
        for distance in range(period, max(rgb.shape), period):
            for axis, step in ((0, distance), (0, -distance), (1, distance), (1, -distance)):
                known, source = np.roll(~hole, step, axis), np.roll(rgb, step, axis)
                edge = [slice(None)] * 2
                edge[axis] = slice(0, step) if step > 0 else slice(step, None)
                known[tuple(edge)] = False
                take = unknown & known
                result[take] = source[take]
                unknown &= ~take
        return result

    return paint


def blobs(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(12):
        centre = int(rng.integers(0, width)), int(rng.integers(0, height))
        cv2.circle(mask, centre, int(rng.integers(1, 6)), 1, -1)
    cv2.line(mask, (5, height // 2), (width - 5, height // 2 + 20), 1, 2)
    return mask.astype(bool)


def jumps(picture: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(picture.astype(int), axis=1)).max(axis=2)


def test_no_seam_on_a_gradient(lama: Editor) -> None:
    y, x = np.mgrid[:250, :400]
    clean = np.stack([x * 0.5, y * 0.8, 240 - x * 0.3], axis=-1).round().astype(np.uint8)
    mask = blobs(250, 400)
    scene = clean.copy()
    scene[mask] = (255, 0, 255)
    lama.paint = plane
    result = lama.edit(write_png(scene), mask).samples
    assert np.abs(result.astype(int) - clean).max() <= 1
    # The steps across the mask's edge are those of the surroundings, plus rounding.
    assert jumps(result).max() <= jumps(clean).max() + 1


def test_no_seam_on_a_texture(lama: Editor) -> None:
    tile = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)
    clean = np.tile(tile, (32, 50, 1))
    mask = blobs(*clean.shape[:2])
    scene = clean.copy()
    scene[mask] = 0
    lama.paint = periodic(8)
    assert np.array_equal(lama.edit(write_png(scene), mask).samples, clean)


def test_specks_share_runs(lama: Editor) -> None:
    mask = np.random.default_rng(5).random((180, 180)) < 0.03
    lama.runs = 0
    lama.edit(write_png(np.zeros((180, 180, 3), np.uint8)), mask)
    assert mask.sum() > 900
    assert lama.runs <= 25


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3000, 4000), pytest.param((5776, 8656), marks=pytest.mark.full)])
def test_large_pictures_take_bounded_memory(lama: Editor, size: tuple[int, int]) -> None:
    """At most five pictures' worth beside the network's own, which depends on the crop's size only."""
    height, width = size
    array = np.random.default_rng(6).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    data = encoded(cv2.resize(array, (width, height)), "JPEG")
    mask = cv2.resize(blobs(250, 400).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    lama.client.handler.config = {"native_side": 1024}
    lama.paint = negative
    before = psutil.Process().memory_info().rss
    with peak_memory() as peak:
        lama.edit(data, mask, "image/*")
    assert peak.rss - before < 5 * 3 * width * height + 150_000_000


class peak_memory:
    """Watches this process's resident memory from a thread."""

    def __enter__(self) -> "peak_memory":
        self.rss, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.005):
            self.rss = max(self.rss, process.memory_info().rss)
