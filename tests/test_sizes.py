"""Every handler on pictures of any size and ratio of sides, with stand-ins for the networks alone."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HandlerClient, encoded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_exactness import Editor, joined, negative

from handlers.pictures import decoding

LONGEST = 3000

sides = st.integers(1, LONGEST)
slim = st.integers(1, 4)
sizes = st.one_of(
    st.tuples(sides, slim), st.tuples(slim, sides), st.tuples(slim, st.just(LONGEST)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)), st.tuples(sides, sides),
)  # fmt: skip
"""(height, width); large ones are rare, for the time that they take."""


def picture_of(height: int, width: int, channels: int) -> np.ndarray:
    """HxW or HxWxC uint8, of no symmetry."""
    y, x = np.ogrid[:height, :width]
    planes = [(x * (3 + 2 * c) + y * (5 + 4 * c) + 40 * c).astype(np.uint8) for c in range(channels)]
    return planes[0] if channels == 1 else np.dstack(planes)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Of a picture of any size: one pixel, a rectangle anywhere, or all."""
    height, width = draw(sizes)
    mask = np.zeros((height, width), bool)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
    mask[top : draw(st.sampled_from([top + 1, bottom])), left : draw(st.sampled_from([left + 1, right]))] = True
    return mask if draw(st.integers(0, 5)) else np.ones_like(mask)


def full(height: int, width: int) -> np.ndarray:
    return np.ones((height, width), bool)


@pytest.fixture(scope="module", params=["lama", "sd"])
def editor(request: pytest.FixtureRequest, open_handler: Callable[[str], HandlerClient]) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        editor = Editor(open_handler(request.param), request.param, patch)
        editor.paint = negative
        if request.param == "lama":
            patch.setattr(editor.client.handler, "config", {"native_side": 256})
        yield editor


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(masks(), st.integers(1, 4))
@example(full(1, 1), 3)
@example(full(1, LONGEST), 3)
@example(full(LONGEST, 1), 1)
@example(full(1, 2049), 4)
@example(full(2, LONGEST), 2)
def test_an_edit_is_as_large_as_the_picture_and_changes_no_more_than_the_mask(
    editor: Editor, mask: np.ndarray, channels: int
) -> None:
    picture, runs = picture_of(*mask.shape, channels), editor.runs
    edited = editor.edit(encoded(picture, "TIFF"), mask)
    assert edited.size == (mask.shape[1], mask.shape[0])
    np.testing.assert_array_equal(joined(edited)[~mask], picture[~mask])
    assert editor.runs > runs


@pytest.fixture(scope="module")
def sam(open_handler: Callable[[str], HandlerClient]) -> Iterator[HandlerClient]:
    """SAM whose encoder sees nothing; all around it is its own, the prompt's and the mask's networks included."""
    client = open_handler("sam")
    encoder = client.handler.model.image_encoder
    with pytest.MonkeyPatch.context() as patch:
        shape = client.handler.model.prompt_encoder.image_embedding_size
        channels = client.handler.model.prompt_encoder.embed_dim
        side = encoder.img_size

        def embed(pixels: torch.Tensor) -> torch.Tensor:
            assert pixels.shape == (1, 3, side, side)
            return torch.zeros(1, channels, *shape)

        patch.setattr(encoder, "forward", embed)
        yield client


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(sizes, st.data())
@example((1, 1), None)
@example((1, 2049), None)
@example((2049, 1), None)
@example((LONGEST, 2), None)
def test_a_selection_is_as_large_as_the_picture(sam: HandlerClient, size: tuple[int, int], data: Any) -> None:
    height, width = size
    x = 0.5 if data is None else data.draw(st.floats(0, width))
    y = 0.5 if data is None else data.draw(st.floats(0, height))
    prompt = {"point_coords": [x, y]} if data is None or data.draw(st.booleans()) else {"box": [0, 0, width, height]}
    reply = sam.send({"image": encoded(picture_of(height, width, 3), "TIFF"), "gen_args": prompt}, "image/png")
    assert reply.status == 200, reply.body
    assert decoding.decode_picture(reply.body).size == (width, height)
