"""A second click on a picture costs no second embedding."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HandlerClient, encoded
from PIL import Image
from test_parking import KEY, state_after

from contract.pictures import name_of
from handlers.pictures import decoding
from handlers.requests.errors import NotFinite
from handlers.sam.embeddings import Embeddings, Sight, key_of

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


@pytest.mark.slow
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


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each picture that was decoded."""
    seen: list[int] = []
    decode = decoding.decode_picture
    monkeypatch.setattr(decoding, "decode_picture", lambda data: seen.append(1) or decode(data))
    return seen


def test_a_known_file_is_not_decoded_again(sam: HandlerClient, runs: list[int], decoded: list[int]) -> None:
    animated = io.BytesIO()
    frames = [Image.fromarray(np.full((60, 80, 3), shade, np.uint8)) for shade in (90, 200)]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    first = sam.json(image=animated.getvalue(), gen_args=CLICK)
    again = sam.json(image=animated.getvalue(), gen_args=CLICK)
    assert (len(runs), len(decoded)) == (1, 1)
    assert again.body == first.body
    assert "several frames" in again.fields["warnings"][0]
    assert sam.json(image=animated.getvalue(), gen_args={"point_coords": [81, 5]}).status == 400


def test_a_known_upload_is_not_read_and_one_that_was_forgotten_is(
    sam: HandlerClient, runs: list[int], decoded: list[int]
) -> None:
    name, fields = name_of(hashlib.sha256(picture(0)).digest()), {"image": picture(0), "gen_args": CLICK}
    first = sam.ask(fields, content=name)
    # Whatever lies there now is not looked at.
    assert sam.ask(fields | {"image": b"no picture"}, content=name).body == first.body
    # The same file without a name is known, too.
    assert sam.ask(fields).body == first.body
    assert (len(runs), len(decoded)) == (1, 1)
    sam.handler.embeddings = Embeddings()  # as after a restart
    assert sam.ask(fields, content=name).body == first.body
    assert (len(runs), len(decoded)) == (2, 2)
    other = {"image": picture(1), "gen_args": CLICK}
    assert sam.ask(other, content=name_of(hashlib.sha256(picture(1)).digest())).body == sam.ask(other).body
    assert len(runs) == 3


def test_one_picture_in_two_sizes_has_a_mask_of_each(sam: HandlerClient, runs: list[int]) -> None:
    """The encoder sees the same; the clicks and masks are each file's own."""
    small, large = (np.full((height, 2 * height, 3), 120, np.uint8) for height in (64, 128))
    for _ in range(2):
        for shown in (small, large):
            assert sam.json(image=encoded(shown), gen_args=CLICK).picture.shape == shown.shape[:2]
    assert len(runs) == 1


def test_what_is_known_of_an_evicted_picture_is_not_used(sam: HandlerClient, runs: list[int]) -> None:
    sam.handler.embeddings = Embeddings(max_bytes=sam.handler._embedded(np.zeros((128, 128, 3), np.uint8)).nbytes)
    alone = [sam.json(image=picture(seed), gen_args=CLICK).body for seed in range(2)]
    assert sam.json(image=picture(0), gen_args=CLICK).body == alone[0]
    assert len(runs) == 4  # the first for its size


def test_a_parked_model_keeps_them(sam: HandlerClient, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_COMMAND_KEY", KEY)
    first = sam.json(image=picture(0), gen_args=CLICK)
    for each in ("park", "wake"):
        state_after(sam.handler, each)
    assert sam.json(image=picture(0), gen_args=CLICK).body == first.body
    assert len(runs) == 1


def test_only_the_masks_that_are_asked_for_are_upsampled(sam: HandlerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    upsample = sam.handler.model.postprocess_masks

    def counted(masks: torch.Tensor, *sizes: tuple[int, int]) -> torch.Tensor:
        seen.append(masks.shape[1])
        return upsample(masks, *sizes)

    monkeypatch.setattr(sam.handler.model, "postprocess_masks", counted)
    for masks, count in (("best", 1), ("all", 3)):
        seen.clear()
        sam.json(image=picture(0), gen_args=CLICK | {"masks": masks})
        assert sum(seen) == count


def test_a_reply_says_what_it_took_and_whether_the_picture_was_known(sam: HandlerClient) -> None:
    fields = {"image": picture(0), "gen_args": CLICK}
    assert sam.ask(fields).timings.keys() == {"decode", "embed", "mask", "model", "encode"}
    known = sam.ask(fields, accept="image/png").timings
    assert known.keys() == {"decode", "recall", "mask", "model", "encode"}
    assert all(0 <= seconds < 60 for seconds in known.values())
    # Behind a TorchServe without the gateway.
    assert "recall;dur=" in sam.json(**fields).headers["server-timing"]


def test_the_longest_unused_go_first() -> None:
    kept = Embeddings(max_bytes=3 * 400)
    for name in (b"a", b"b", b"c"):
        kept.put(name, torch.zeros(100))
    assert kept.get(b"a") is not None
    kept.put(b"d", torch.zeros(100))
    assert [name for name in (b"a", b"b", b"c", b"d") if kept.get(name) is not None] == [b"a", b"c", b"d"]


def test_as_many_files_are_remembered_as_documented() -> None:
    kept = Embeddings(max_files=3)
    kept.put(b"", torch.zeros(1))
    for name in "abc":
        kept.remember(name, Sight((1, 1), (1, 1), b"", ()))
    assert kept.sight("a")
    kept.remember("d", Sight((1, 1), (1, 1), b"", ()))
    assert [name for name in "abcd" if kept.sight(name)] == ["a", "c", "d"]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    kept = Embeddings(max_bytes=10)
    kept.put(b"a", torch.zeros(100))
    assert kept.get(b"a") is None


@pytest.mark.parametrize("change", [lambda a: a[::-1], lambda a: a.reshape(8, 4, 3), lambda a: a + np.uint8(1)])
def test_other_pixels_or_another_shape_are_another_picture(change: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    assert key_of(change(pixels)) != key_of(pixels)
    assert key_of(pixels.copy()) == key_of(pixels)
