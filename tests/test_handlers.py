"""Each handler alone, without TorchServe: the demo archives on the sample photograph."""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import HandlerClient, encoded, pixels

Open = Callable[[str], HandlerClient]
SIZE = (1499, 1041)
CLICK = {"point_coords": [750, 500], "point_labels": 1, "dilate_kernel_size": 15}
QUICK = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def mask() -> bytes:
    """A rectangle across the dog, as a PNG."""
    array = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    array[300:800, 500:1000] = 255
    return encoded(array)


def assert_only_the_masked_changed(result: np.ndarray, dog: bytes, mask: bytes) -> None:
    before, inside = pixels(dog), pixels(mask) >= 128
    assert result.shape == before.shape
    assert np.array_equal(result[~inside], before[~inside])
    assert (result[inside] != before[inside]).any(axis=1).mean() > 0.9


def test_sam_answers_the_original_payload(open_handler: Open, dog: bytes) -> None:
    reply = open_handler("sam").json(image=dog, gen_args=json.dumps(CLICK))
    assert reply.status == 200
    assert reply.picture.shape == (SIZE[1], SIZE[0])
    assert set(np.unique(reply.picture)) <= {0, 255}
    assert isinstance(reply.fields["score"], float)
    assert reply.fields["warnings"] == []


def test_sam_returns_all_masks_and_the_best_is_the_best_scored(open_handler: Open, dog: bytes) -> None:
    fields = open_handler("sam").json(image=dog, gen_args={"point_coords": [750, 500], "masks": "all"}).fields
    assert len(fields["masks"]) == len(fields["scores"]) == 3
    best = fields["masks"][int(np.argmax(fields["scores"]))]
    assert fields["generated_image"] == best
    assert fields["score"] == max(fields["scores"])


def test_sam_chooses_the_head_it_was_trained_for(open_handler: Open, dog: bytes) -> None:
    sam = open_handler("sam")

    def count(**prompt: Any) -> int:
        return len(sam.json(image=dog, gen_args=prompt | {"masks": "all", "multimask_output": False}).fields["masks"])

    assert count(point_coords=[750, 500]) == 1
    lone, box = ({"point_coords": [750, 500]}, {"box": [400, 200, 1100, 900]})
    assert sam.json(image=dog, gen_args=lone).fields["score"] == max(
        sam.json(image=dog, gen_args=lone | {"masks": "all"}).fields["scores"]
    )
    single = sam.json(image=dog, gen_args=box | {"multimask_output": False})
    assert sam.json(image=dog, gen_args=box).body == single.body


def test_sam_refines_with_the_logits_of_an_earlier_reply(open_handler: Open, dog: bytes) -> None:
    sam = open_handler("sam")
    first = sam.json(image=dog, gen_args={"point_coords": [750, 500], "return_logits": True}).fields
    points = {"point_coords": [[750, 500], [100, 100]], "point_labels": [1, 0]}
    plain = sam.json(image=dog, gen_args=points)
    refined = sam.json(image=dog, gen_args=points | {"mask_input": first["logits"]})
    assert (plain.status, refined.status) == (200, 200)
    assert plain.body != refined.body


def test_sam_dilates_symmetrically(open_handler: Open, dog: bytes) -> None:
    sam = open_handler("sam")
    plain = sam.json(image=dog, gen_args={"point_coords": [750, 500]}).picture
    grown = sam.json(image=dog, gen_args={"point_coords": [750, 500], "dilate_kernel_size": 15}).picture
    assert grown[plain == 255].all()
    assert grown.sum() >= plain.sum()


def test_sam_keeps_requests_apart(open_handler: Open, dog: bytes) -> None:
    sam = open_handler("sam")
    other = encoded(np.full((300, 400, 3), 90, np.uint8))
    alone = sam.json(image=dog, gen_args=CLICK).body
    sam.json(image=other, gen_args={"point_coords": [5, 5]})
    sam.send({"body": b"{}"})
    assert sam.json(image=dog, gen_args=CLICK).body == alone


@pytest.mark.parametrize(
    ("gen_args", "field", "words"),
    [
        ({}, "gen_args", "point_coords"),
        ({"point_coords": [1500, 5]}, "gen_args.point_coords", r"\[0\] = \[1500, 5\] lies outside the 1499x1041"),
        ({"point_coords": [[5, 5], [5, -1]]}, "gen_args.point_coords", r"point_coords\[1\]"),
        ({"point_coords": [float("nan"), 5]}, "gen_args.point_coords", "must be"),
        ({"point_coords": ["12", 5]}, "gen_args.point_coords", "must be"),
        ({"point_coords": "12"}, "gen_args.point_coords", "must be"),
        ({"point_coords": [[5, 5]] * 3, "point_labels": 1}, "gen_args.point_labels", "1 labels for 3 points"),
        ({"point_coords": [5, 5], "point_labels": 2}, "gen_args.point_labels", "must be 1"),
        ({"point_coords": [5, 5], "point_labels": -1}, "gen_args.point_labels", "must be 1"),
        ({"point_coords": [5, 5], "point_labels": True}, "gen_args.point_labels", "must be 1"),
        ({"point_labels": 1}, "gen_args.point_coords", "must be"),
        ({"box": [10, 10, 5, 20]}, "gen_args.box", "left < right"),
        ({"box": [1, 2, 3]}, "gen_args.box", "four"),
        ({"point_coords": [5, 5], "dilate_kernel_size": -1}, "gen_args.dilate_kernel_size", "0 to"),
        ({"point_coords": [5, 5], "mask_input": "AAAA"}, "gen_args.mask_input", "earlier reply"),
        ({"point_coords": [5, 5], "masks": "some"}, "gen_args.masks", "best, all"),
    ],
)
def test_sam_names_what_is_wrong(open_handler: Open, dog: bytes, gen_args: Any, field: str, words: str) -> None:
    reply = open_handler("sam").json(image=dog, gen_args=gen_args)
    assert reply.status == 400
    assert reply.error["field"] == field
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(reply.error["message"])


def test_lama_erases_and_ignores_what_the_example_sends_besides(open_handler: Open, dog: bytes, mask: bytes) -> None:
    reply = open_handler("lama").json(image=dog, mask_image=mask, prompt="a hamster", gen_args="{}")
    assert reply.status == 200
    assert_only_the_masked_changed(reply.picture, dog, mask)


def test_lama_takes_the_mask_as_jpeg(open_handler: Open, dog: bytes, dog_mask: bytes) -> None:
    result = open_handler("lama").json(image=dog, mask_image=dog_mask).picture
    outside = pixels(dog_mask).max(axis=2) < 128
    assert np.array_equal(result[outside], pixels(dog)[outside])


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (7, 5), (40, 40), (283, 530)])
@pytest.mark.parametrize("name", ["lama", "sd"])
def test_every_size_goes_in_and_comes_out(open_handler: Open, name: str, size: tuple[int, int]) -> None:
    width, height = size
    picture = np.full((height, width, 3), 90, np.uint8)
    hole = np.zeros((height, width), np.uint8)
    hole[height // 2 :, width // 2 :] = 255
    reply = open_handler(name).json(image=encoded(picture), mask_image=encoded(hole), prompt="x", gen_args=QUICK)
    assert reply.status == 200
    assert reply.picture.shape == (height, width, 3)
    assert (reply.picture[hole == 0] == 90).all()


def test_sd_replaces_within_the_mask_only(open_handler: Open, dog: bytes, mask: bytes) -> None:
    reply = open_handler("sd").json(image=dog, mask_image=mask, prompt="a red ball", gen_args=QUICK)
    assert reply.status == 200
    assert_only_the_masked_changed(reply.picture, dog, mask)


def test_sd_repeats_itself_with_the_seed_that_it_reports(open_handler: Open, dog: bytes, mask: bytes) -> None:
    sd = open_handler("sd")
    request: dict[str, Any] = {"image": dog, "mask_image": mask, "prompt": "a red ball"}
    first = sd.json(**request, gen_args={"num_inference_steps": 2})
    again = sd.json(**request, gen_args={"num_inference_steps": 2, "seed": first.fields["seed"]})
    other = sd.json(**request, gen_args={"num_inference_steps": 2, "seed": first.fields["seed"] ^ 1})
    assert again.body == first.body
    assert other.body != first.body


@pytest.mark.parametrize(("box", "size"), [((1300, 100, 620, 900), (1920, 1080)), ((50, 400, 700, 620), (768, 1024))])
def test_sd_works_for_boxes_that_broke_the_original(
    open_handler: Open, box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    left, top, width, height = box
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    hole = np.zeros((size[1], size[0]), np.uint8)
    hole[top : top + height, left : left + width] = 254
    reply = open_handler("sd").json(image=encoded(picture), mask_image=encoded(hole), prompt="", gen_args=QUICK)
    assert reply.status == 200
    assert np.array_equal(reply.picture[hole == 0], picture[hole == 0])


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "unipc"])
def test_sd_knows_the_usual_schedulers(open_handler: Open, dog: bytes, mask: bytes, scheduler: str) -> None:
    gen_args = QUICK | {"scheduler": scheduler}
    sd = open_handler("sd")
    replies = [sd.json(image=dog, mask_image=mask, prompt="a cup", gen_args=gen_args) for _ in range(2)]
    assert replies[0].status == 200
    assert replies[0].body == replies[1].body


@pytest.mark.parametrize(
    ("gen_args", "field"),
    [
        ({"num_inference_steps": 0}, "gen_args.num_inference_steps"),
        ({"num_inference_steps": 1, "strength": 0.5}, "gen_args.strength"),
        ({"strength": 0}, "gen_args.strength"),
        ({"guidance_scale": -1}, "gen_args.guidance_scale"),
        ({"seed": 1.5}, "gen_args.seed"),
        ({"seed": "1"}, "gen_args.seed"),
        ({"seed": True}, "gen_args.seed"),
        ({"seed": 2**64}, "gen_args.seed"),
        ({"scheduler": "fastest"}, "gen_args.scheduler"),
    ],
)
def test_sd_names_what_is_wrong(open_handler: Open, dog: bytes, mask: bytes, gen_args: Any, field: str) -> None:
    reply = open_handler("sd").json(image=dog, mask_image=mask, prompt="x", gen_args=gen_args)
    assert (reply.status, reply.error["field"]) == (400, field)


def test_sd_says_what_had_no_effect(open_handler: Open, dog: bytes, mask: bytes) -> None:
    reply = open_handler("sd").json(
        image=dog,
        mask_image=mask,
        prompt="red " * 200,
        negative_prompt="blue",
        gen_args=QUICK | {"guidance_scale": 1, "stepz": 3},
    )
    warnings = " | ".join(reply.fields["warnings"])
    assert "this had no effect: red" in warnings
    assert "negative_prompt had no effect" in warnings
    assert "stepz" in warnings


@pytest.mark.parametrize("name", ["lama", "sd"])
def test_masks_are_checked(open_handler: Open, dog: bytes, name: str) -> None:
    handler = open_handler(name)
    small = encoded(np.full((384, 512), 255, np.uint8))
    reply = handler.json(image=dog, mask_image=small, prompt="x")
    assert reply.status == 400
    assert "512x384" in reply.error["message"]
    assert "1499x1041" in reply.error["message"]
    empty = encoded(np.zeros((SIZE[1], SIZE[0]), np.uint8))
    assert "empty" in handler.json(image=dog, mask_image=empty, prompt="x").error["message"]


@pytest.mark.parametrize("name", ["sam", "lama", "sd"])
def test_multipart_in_and_a_picture_out(open_handler: Open, dog: bytes, mask: bytes, name: str) -> None:
    parts = {"image": dog, "mask_image": mask, "prompt": b"x", "gen_args": json.dumps(CLICK | QUICK).encode()}
    for kind, signature in [("image/png", b"\x89PNG"), ("image/webp", b"RIFF")]:
        reply = open_handler(name).send(parts, accept=kind)
        assert reply.status == 200
        expected = (b"\x89PNG", "image/png") if name == "sam" else (signature, kind)
        assert (reply.body[:4], reply.headers["content-type"]) == expected
        assert reply.picture.shape[:2] == (SIZE[1], SIZE[0])
    assert ("X-Palimpsest-Seed" in reply.headers) == (name == "sd")


@pytest.mark.parametrize("name", ["sam", "lama", "sd"])
@pytest.mark.parametrize("body", [b"{", b"[]", b'{"image": "nonsense"}', b"\x89PNG\r\n"])
def test_nonsense_is_a_400_and_harms_nobody(
    open_handler: Open, dog: bytes, mask: bytes, name: str, body: bytes
) -> None:
    handler = open_handler(name)
    assert handler.send({"body": body}).status == 400
    assert handler.json(image=dog, mask_image=mask, prompt="x", gen_args=CLICK | QUICK).status == 200


def test_nothing_of_a_payload_is_logged(
    open_handler: Open, dog: bytes, mask: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sd, wish = open_handler("sd"), "a secret wish"

    def fail(*_: object) -> None:
        raise RuntimeError(wish)

    monkeypatch.setattr(sd.handler, "_paint", fail)
    reply = sd.json(image=dog, mask_image=mask, prompt=wish)
    assert reply.status == 500
    assert "RuntimeError in predict" in caplog.text
    assert "secret" not in caplog.text + reply.body.decode()
    assert base64.b64encode(dog[:60]).decode() not in caplog.text


def test_out_of_memory_is_507(open_handler: Open, dog: bytes, mask: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    lama = open_handler("lama")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(lama.handler, "_inpaint", fail)
    reply = lama.json(image=dog, mask_image=mask)
    assert (reply.status, reply.error["code"]) == (507, "out_of_memory")
