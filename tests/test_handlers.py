"""Each handler alone, without TorchServe: the demo archives on the sample photograph."""

import base64
import copy
import importlib
import inspect
import io
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HandlerClient, HandlerReply, encoded, pixels
from PIL import Image
from torch import nn

from handlers.editing import imaging
from handlers.editing.geometry import bounding_box
from handlers.sam import network as sam_network
from serve.memory_file import MemoryFile
from training import shapes

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


@pytest.mark.parametrize("name", ["sam", "lama", "sd"])
def test_a_handler_file_holds_one_class(name: str) -> None:
    """TorchServe takes the only class that handler.py defines, and fails where there are two."""
    module = importlib.import_module(f"handlers.{name}.handler")
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    assert len(own) == 1


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


@pytest.mark.slow
def test_sam_shapes_its_masks_at_full_resolution(open_handler: Open, dog: bytes) -> None:
    def mask(**shaping: Any) -> np.ndarray:
        return open_handler("sam").json(image=dog, gen_args={"point_coords": [750, 500]} | shaping).picture > 0

    plain = mask()
    assert np.array_equal(mask(dilate=9), imaging.grow(plain, 9))
    assert np.array_equal(mask(erode=4), imaging.shrink(plain, 4))
    assert np.array_equal(mask(fill_holes=True), imaging.fill_holes(plain))
    assert np.array_equal(mask(smooth=6), imaging.smooth(plain, 6))
    assert np.array_equal(mask(invert=True), ~plain)
    in_order = imaging.grow(imaging.shrink(imaging.fill_holes(imaging.smooth(plain, 3)), 2), 5)
    assert np.array_equal(mask(dilate=5, erode=2, fill_holes=True, smooth=3, invert=True), ~in_order)


def test_sam_measures_the_mask_that_it_sends(open_handler: Open, dog: bytes) -> None:
    gen_args = {"point_coords": [750, 500], "dilate": 5, "masks": "all"}
    reply = open_handler("sam").json(image=dog, gen_args=gen_args)
    fields, mask = reply.fields, reply.picture > 0
    box = bounding_box(mask)
    assert fields["area"] == mask.sum()
    assert fields["box"] == [box.left, box.top, box.right, box.bottom]
    assert fields["area"] in fields["areas"]
    assert fields["box"] in fields["boxes"]
    assert len(fields["areas"]) == len(fields["boxes"]) == len(fields["masks"])


def test_sam_keeps_requests_apart(open_handler: Open, dog: bytes) -> None:
    sam = open_handler("sam")
    other = encoded(np.full((300, 400, 3), 90, np.uint8))
    alone = sam.json(image=dog, gen_args=CLICK).body
    sam.json(image=other, gen_args={"point_coords": [5, 5]})
    sam.send({"body": b"{}"})
    assert sam.json(image=dog, gen_args=CLICK).body == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gen_args", "field", "words"),
    [
        ({}, "gen_args", "point_coords"),
        ({"point_coords": [1500, 5]}, "gen_args.point_coords", r"\[0\] = \[1500, 5\] lies outside the 1499x1041"),
        ({"point_coords": [[5, 5], [5, -1]]}, "gen_args.point_coords", r"point_coords\[1\]"),
        ({"point_coords": [float("nan"), 5]}, "gen_args.point_coords", "must be finite"),
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
        ({"point_coords": [5, 5], "dilate": -1}, "gen_args.dilate", "0 to 255"),
        ({"point_coords": [5, 5], "erode": 1.5}, "gen_args.erode", "0 to 255"),
        ({"point_coords": [5, 5], "smooth": 65}, "gen_args.smooth", "0 to 64"),
        ({"point_coords": [5, 5], "fill_holes": 1}, "gen_args.fill_holes", "true or false"),
        ({"point_coords": [5, 5], "invert": "yes"}, "gen_args.invert", "true or false"),
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


@pytest.mark.slow
def test_lama_erases_and_ignores_what_the_example_sends_besides(open_handler: Open, dog: bytes, mask: bytes) -> None:
    reply = open_handler("lama").json(image=dog, mask_image=mask, prompt="a hamster", gen_args="{}")
    assert reply.status == 200
    assert_only_the_masked_changed(reply.picture, dog, mask)


@pytest.mark.slow
def test_lama_takes_the_mask_as_jpeg(open_handler: Open, dog: bytes, dog_mask: bytes) -> None:
    result = open_handler("lama").json(image=dog, mask_image=dog_mask).picture
    outside = pixels(dog_mask).max(axis=2) < 128
    assert np.array_equal(result[outside], pixels(dog)[outside])


@pytest.mark.parametrize("name", ["lama", "sd"])
def test_the_picture_with_a_hole_is_its_own_mask(open_handler: Open, name: str) -> None:
    picture = np.full((40, 60, 3), 200, np.uint8)
    picture[10:20, 20:40] = (250, 30, 30)
    hole = np.zeros((40, 60), bool)
    hole[8:22, 18:42] = True
    request = {"image": encoded(picture), "prompt": "x", "gen_args": QUICK}
    holed = encoded(np.dstack([picture, np.where(hole, 0, 255).astype(np.uint8)]))
    result = open_handler(name).json(mask_image=holed, **request).picture
    assert np.array_equal(result[~hole], picture[~hole])
    assert (result[10:20, 20:40] != picture[10:20, 20:40]).any()
    other = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8)
    other = encoded(np.dstack([other, np.where(hole, 0, 255).astype(np.uint8)]))
    reply = open_handler(name).json(mask_image=other, **request)
    assert (reply.status, reply.error["field"]) == (400, "mask_image")
    assert "a mask is white" in reply.error["message"]


@pytest.mark.slow
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


def test_the_demos_unet_computes_with_one_thread_and_all_else_with_the_usual(
    open_handler: Open, dog: bytes, mask: bytes
) -> None:
    pipeline, used, usual = open_handler("sd").handler.pipeline, [], torch.get_num_threads()
    hooks = [
        part.register_forward_pre_hook(lambda *_: used.append(torch.get_num_threads()))
        for part in (pipeline.vae.encoder, pipeline.unet.conv_in, pipeline.vae.decoder)
    ]
    answer = open_handler("sd").json(image=dog, mask_image=mask, prompt="x", gen_args={"num_inference_steps": 1})
    for hook in hooks:
        hook.remove()
    assert answer.status == 200
    assert used == [usual, 1, usual]


@pytest.mark.slow
def test_sd_replaces_within_the_mask_only(open_handler: Open, dog: bytes, mask: bytes) -> None:
    reply = open_handler("sd").json(image=dog, mask_image=mask, prompt="a red ball", gen_args=QUICK)
    assert reply.status == 200
    assert_only_the_masked_changed(reply.picture, dog, mask)


@pytest.mark.slow
@pytest.mark.parametrize(("colour", "degrees"), [("red", 0), ("yellow", 55), ("green", 125), ("blue", 230)])
def test_sd_paints_the_colour_that_the_prompt_names(open_handler: Open, colour: str, degrees: int) -> None:
    grey = np.random.default_rng(0).integers(100, 150, (256, 256, 1), np.uint8).repeat(3, axis=2)
    hole = np.zeros((256, 256), np.uint8)
    hole[70:190, 60:200] = 255
    reply = open_handler("sd").json(
        image=encoded(grey),
        mask_image=encoded(hole),
        prompt=f"a {colour} ball",
        gen_args={"num_inference_steps": 15, "seed": 1},
    )
    hue, saturation, value = np.moveaxis(np.array(Image.fromarray(reply.picture).convert("HSV")), 2, 0)[:, hole > 0]
    away = np.abs((hue * (360 / 255) - degrees + 180) % 360 - 180)
    weight = saturation.astype(float) * value
    assert weight[away < 40].sum() > 0.5 * weight.sum()


@pytest.mark.slow
def test_sd_repeats_itself_with_the_seed_that_it_reports(open_handler: Open, dog: bytes, mask: bytes) -> None:
    sd = open_handler("sd")
    request: dict[str, Any] = {"image": dog, "mask_image": mask, "prompt": "a red ball"}
    first = sd.json(**request, gen_args={"num_inference_steps": 2})
    again = sd.json(**request, gen_args={"num_inference_steps": 2, "seed": first.fields["seed"]})
    other = sd.json(**request, gen_args={"num_inference_steps": 2, "seed": first.fields["seed"] ^ 1})
    assert again.body == first.body
    assert other.body != first.body


def halve(sd: HandlerClient, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Gives the handler a copy of its networks in half precision; the copy's parts, by name."""
    pipeline = copy.deepcopy(sd.handler.pipeline).to(dtype)
    monkeypatch.setattr(sd.handler, "pipeline", pipeline)
    monkeypatch.setattr(sd.handler, "dtype", dtype)
    return dict(pipeline.components)


@pytest.mark.slow
def test_sd_paints_one_picture_for_one_seed_in_every_precision(
    open_handler: Open, dog: bytes, mask: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd = open_handler("sd")
    request: dict[str, Any] = {"image": dog, "mask_image": mask, "prompt": "a red ball"}
    hole = pixels(mask) > 0

    def paint(seed: int) -> np.ndarray:
        return sd.json(**request, gen_args={"num_inference_steps": 5, "seed": seed}).picture[hole].astype(int)

    expected = paint(7)
    halve(sd, torch.float16, monkeypatch)
    assert np.abs(paint(7) - expected).mean() < 2  # of grey levels: weights and sums were rounded
    assert np.abs(paint(8) - expected).mean() > 10


@pytest.mark.slow
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


@pytest.mark.slow
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
        ({"variants": 5}, "gen_args.variants"),
        ({"variants": 0}, "gen_args.variants"),
        ({"feather": -1}, "gen_args.feather"),
        ({"output_format": "bmp"}, "gen_args.output_format"),
        ({"embed_parameters": 1}, "gen_args.embed_parameters"),
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
    assert "does not know" not in warnings


def test_sd_names_what_the_demo_does_not_know(open_handler: Open, dog: bytes, mask: bytes) -> None:
    reply = open_handler("sd").json(image=dog, mask_image=mask, prompt="a red hamster", gen_args=QUICK)
    (warning,) = reply.fields["warnings"]
    known, words = warning.split(". It knows these words: ")
    assert known == "prompt: this model does not know hamster"
    taught = {*shapes.COLOURS, *shapes.THINGS, *shapes.MATERIALS, "empty", "background", "nothing"} - {"plain"}
    assert set(words.split(", ")) == taught


@pytest.mark.slow
def test_sd_variants_are_single_requests_with_the_next_seeds(open_handler: Open, dog: bytes, mask: bytes) -> None:
    sd, request = open_handler("sd"), {"image": dog, "mask_image": mask, "prompt": "a red ball"}
    fields = sd.json(**request, gen_args=QUICK | {"variants": 3}).fields
    assert fields["seeds"] == [7, 8, 9]
    assert fields["seed"] == 7
    singles = [
        sd.json(**request, gen_args=QUICK | {"seed": seed}).fields["generated_image"] for seed in fields["seeds"]
    ]
    assert fields["variants"] == singles
    assert len(set(singles)) == 3


@pytest.mark.slow
def test_an_archive_has_a_guidance_of_its_own(open_handler: Open, dog: bytes, mask: bytes) -> None:
    request = {"image": dog, "mask_image": mask, "prompt": "a red ball"}
    gen_args = {"num_inference_steps": 1, "seed": 7}
    own = open_handler("sd").json(**request, gen_args=gen_args).fields
    assert own["parameters"]["guidance_scale"] == 3.0
    same = open_handler("sd").json(**request, gen_args=gen_args | {"guidance_scale": 3}).fields
    assert same["generated_image"] == own["generated_image"]


@pytest.mark.slow
def test_sd_says_what_it_used(open_handler: Open, dog: bytes, mask: bytes) -> None:
    parts = {"image": dog, "mask_image": mask, "prompt": "a \u2665".encode(), "negative_prompt": b"blue"}
    gen_args = QUICK | {"guidance_scale": 3, "embed_parameters": True}
    reply = open_handler("sd").send(parts | {"gen_args": json.dumps(gen_args).encode()}, "image/png")
    used = {
        "num_inference_steps": 2, "guidance_scale": 3.0, "strength": 1.0, "seed": 7, "scheduler": "ddim", "feather": 0,
    }  # fmt: skip
    assert json.loads(reply.headers["X-Palimpsest-Parameters"]) == used
    text = Image.open(io.BytesIO(reply.body)).text  # type: ignore[attr-defined]
    assert json.loads(text["parameters"]) == used | {"prompt": "a \u2665", "negative_prompt": "blue"}
    again = open_handler("sd").json(
        image=dog, mask_image=mask, prompt="a \u2665", negative_prompt="blue", gen_args=used
    )
    assert np.array_equal(again.picture, reply.picture)


# Progress and cancellation


@pytest.mark.slow
def test_sd_tells_its_steps_and_stops_within_one(open_handler: Open, dog: bytes, mask: bytes) -> None:
    sd, shared = open_handler("sd"), MemoryFile()
    request = {"image": dog, "mask_image": mask, "prompt": "a red ball"}
    gen_args = {"num_inference_steps": 6, "seed": 7, "variants": 2, "guidance_scale": 1}

    def ask() -> HandlerReply:
        os.pwrite(shared.descriptor, bytes(12), 0)
        return sd.ask(request | {"gen_args": gen_args}, job=shared)

    def job() -> tuple[int, int, int]:
        return struct.unpack("<III", shared.read(0, 12))

    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            os.pwrite(shared.descriptor, struct.pack("<III", *job()[:2], 1), 0)

    complete = ask()
    assert (complete.status, job()) == (200, (12, 12, 0))
    with hooked(sd.handler.pipeline.unet, count):
        reply = ask()
    assert (reply.status, reply.error["code"]) == (499, "cancelled")
    assert (calls, job()) == (9, (9, 12, 1))
    # The next request finds nothing of it.
    assert ask().body == complete.body
    shared.close()


def test_lama_tells_its_crops_and_stops_within_one(
    open_handler: Open, dog: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lama = open_handler("lama")
    monkeypatch.setattr(lama.handler, "config", {"native_side": 256})
    corners = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    corners[:20, :20] = corners[-20:, -20:] = 255
    parts = {"image": dog, "mask_image": encoded(corners)}
    for cancelled, status, steps in ((0, 200, 2), (1, 499, 0)):
        with MemoryFile() as shared:
            shared.write(struct.pack("<III", 0, 0, cancelled))
            assert lama.ask(parts, job=shared).status == status
            assert struct.unpack("<III", shared.read()) == (steps, 2, cancelled)


@pytest.mark.slow
def test_lama_says_where_the_best_quality_has_no_effect(open_handler: Open, dog: bytes, mask: bytes) -> None:
    lama = open_handler("lama")
    best = lama.json(image=dog, mask_image=mask, gen_args={"quality": "best"})
    assert best.status == 200
    assert "gen_args.quality had no effect" in " ".join(best.fields["warnings"])
    assert np.array_equal(best.picture, lama.json(image=dog, mask_image=mask, gen_args={"quality": "standard"}).picture)
    refused = lama.json(image=dog, mask_image=mask, gen_args={"quality": "draft"})
    assert (refused.status, refused.error["field"]) == (400, "gen_args.quality")
    # Nothing could be refined with weights of inference mode.
    assert not any(parameter.is_inference() for parameter in lama.handler.network.parameters())


@contextmanager
def hooked(module: nn.Module, before: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


# Overflow in half precision


def overflow(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
    """A forward hook for a layer whose numbers are too large for half precision."""
    return output * torch.nan if output.dtype == torch.bfloat16 else None


def break_down(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output * torch.inf


@pytest.mark.slow
def test_lama_overflow_is_computed_again_in_float32(
    open_handler: Open, dog: bytes, mask: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lama = open_handler("lama")
    expected = lama.json(image=dog, mask_image=mask)
    half = copy.deepcopy(lama.handler.network).to(torch.bfloat16)
    monkeypatch.setattr(lama.handler, "network", half)
    monkeypatch.setattr(lama.handler, "dtype", torch.bfloat16)
    half.generator.register_forward_hook(overflow)
    reply = lama.json(image=dog, mask_image=mask)
    assert reply.status == 200
    assert np.abs(reply.picture.astype(int) - expected.picture).mean() < 2  # the weights were rounded
    half.generator.register_forward_hook(break_down)
    reply = lama.json(image=dog, mask_image=mask)
    assert (reply.status, reply.error["code"]) == (500, "not_finite")


def test_sam_overflow_is_computed_again_in_float32(
    open_handler: Open, dog: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam = open_handler("sam")
    expected = sam.json(image=dog, gen_args=CLICK).picture > 0
    demo = Path(sam_network.__file__).parent / "demo"
    half = sam_network.load(demo / "network.yaml", demo / "weights.safetensors", torch.bfloat16)
    monkeypatch.setattr(sam.handler, "model", half)
    monkeypatch.setattr(sam.handler, "dtype", torch.bfloat16)
    half.image_encoder.neck.register_forward_hook(overflow)
    found = sam.json(image=dog, gen_args=CLICK).picture > 0
    assert (found & expected).sum() / (found | expected).sum() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("part", "layer", "unet_calls"), [("vae", "decoder", 2), ("unet", "conv_out", 4)])
def test_sd_overflow_is_computed_again_in_float32(
    open_handler: Open, dog: bytes, mask: bytes, monkeypatch: pytest.MonkeyPatch, part: str, layer: str, unet_calls: int
) -> None:
    sd = open_handler("sd")
    request = {"image": dog, "mask_image": mask, "prompt": "a red ball", "gen_args": QUICK | {"guidance_scale": 1}}
    expected = sd.json(**request).picture
    halves = halve(sd, torch.bfloat16, monkeypatch)
    getattr(halves[part], layer).register_forward_hook(overflow)
    calls = []
    halves["unet"].conv_in.register_forward_hook(lambda *_: calls.append(1))
    reply = sd.json(**request)
    assert reply.status == 200
    # The autoencoder alone is tried first: the steps are the expensive part.
    assert len(calls) == unet_calls
    assert np.abs(reply.picture.astype(int) - expected)[pixels(mask) > 0].mean() < 20
    getattr(halves[part], layer).register_forward_hook(break_down)
    reply = sd.json(**request)
    assert (reply.status, reply.error["code"]) == (500, "not_finite")


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("size", [(1, 2049), (2049, 1), (1, 1), (3, 4000), (32767, 2)])
def test_sam_takes_any_ratio_of_sides(open_handler: Open, size: tuple[int, int]) -> None:
    image = encoded(np.full((size[1], size[0], 3), 90, np.uint8))
    reply = open_handler("sam").json(image=image, gen_args={"point_coords": [0, 0]})
    assert reply.picture.shape[:2] == size[::-1]
