"""A second click on a picture costs no second embedding."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HandlerClient, encoded

from handlers.requests.errors import NotFinite
from handlers.sam.embeddings import Embeddings, key_of

CLICK = {"point_coords": [40, 30]}


@pytest.fixture
def sam(demo_store: Path) -> HandlerClient:
    return HandlerClient("sam", demo_store / "demo" / "sam")


@pytest.fixture
def runs(sam: HandlerClient) -> Iterator[list[int]]:
    """One entry for each run of the image encoder."""
    seen: list[int] = []
    hook = sam.handler.model.image_encoder.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()


def picture(seed: int, height: int = 60) -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 256, (height, 80, 3), np.uint8))


def test_a_known_picture_is_not_embedded_again(sam: HandlerClient, runs: list[int]) -> None:
    first = sam.json(image=picture(0), gen_args=CLICK)
    again = sam.json(image=picture(0), gen_args=CLICK)
    other_click = sam.json(image=picture(0), gen_args={"box": [5, 5, 60, 50]})
    assert len(runs) == 1
    assert again.body == first.body
    assert other_click.status == 200
    # In another file format it is the same picture.
    grey = np.zeros((60, 80), np.uint8)
    sam.json(image=encoded(grey), gen_args=CLICK)
    sam.json(image=encoded(grey, "TIFF"), gen_args=CLICK)
    assert len(runs) == 2


def test_several_people_on_several_pictures_keep_theirs(sam: HandlerClient, runs: list[int]) -> None:
    alone = [sam.json(image=picture(seed), gen_args=CLICK).body for seed in range(5)]
    assert [sam.json(image=picture(seed), gen_args=CLICK).body for seed in range(5)] == alone
    assert len(runs) == 5


def test_what_failed_is_not_kept(sam: HandlerClient, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(shown: object) -> torch.Tensor:
        raise NotFinite

    with monkeypatch.context() as patch:
        patch.setattr(sam.handler, "_embedded", overflow)
        assert sam.json(image=picture(0), gen_args=CLICK).status == 500
    assert sam.json(image=picture(0), gen_args=CLICK).status == 200
    assert len(runs) == 1


def test_the_longest_unused_go_first() -> None:
    kept = Embeddings(max_bytes=3 * 400)
    for name in (b"a", b"b", b"c"):
        kept.put(name, torch.zeros(100))
    assert kept.get(b"a") is not None
    kept.put(b"d", torch.zeros(100))
    assert [name for name in (b"a", b"b", b"c", b"d") if kept.get(name) is not None] == [b"a", b"c", b"d"]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    kept = Embeddings(max_bytes=10)
    kept.put(b"a", torch.zeros(100))
    assert kept.get(b"a") is None


@pytest.mark.parametrize("change", [lambda a: a[::-1], lambda a: a.reshape(8, 4, 3), lambda a: a + np.uint8(1)])
def test_other_pixels_or_another_shape_are_another_picture(change: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    assert key_of(change(pixels)) != key_of(pixels)
    assert key_of(pixels.copy()) == key_of(pixels)
