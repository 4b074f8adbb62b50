"""What the demo Stable Diffusion learned: looser versions of what `python -m training.eval_sd` measures."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from conftest import HandlerClient, encoded

from training import shapes

Open = Callable[[str], HandlerClient]
RADIUS = 80  # pixels


@pytest.fixture(scope="module")
def paint(open_handler: Open) -> Callable[..., np.ndarray]:
    """Prompt (and negative prompt, gen_args) -> what is painted in a round hole of a grey field, its square, RGB."""
    field = np.full((shapes.SIZE, shapes.SIZE, 3), 128, np.uint8)
    middle = shapes.SIZE // 2
    hole = cv2.circle(np.zeros((shapes.SIZE, shapes.SIZE), np.uint8), (middle, middle), RADIUS, 255, -1)
    view = slice(middle - RADIUS, middle + RADIUS)

    def paint(prompt: str, negative_prompt: str = "", **gen_args: float) -> np.ndarray:
        reply = open_handler("sd").json(
            image=encoded(field),
            mask_image=encoded(hole),
            prompt=prompt,
            negative_prompt=negative_prompt,
            gen_args={"num_inference_steps": 20, "seed": 5} | gen_args,
        )
        return reply.picture[view, view]

    return paint


def share_of(colour: str, picture: np.ndarray) -> float:
    """Of all colour in the picture, each pixel counted by saturation x value, what is within 20 degrees of this hue."""
    hue, saturation, value = hsv(picture)
    named = np.full((1, 1, 3), shapes.COLOURS[colour], np.uint8)
    away = np.abs(hue - hsv(named)[0])
    weight = saturation * value
    return float(weight[np.minimum(away, 360 - away) < 20].sum() / weight.sum())


def colourfulness(picture: np.ndarray) -> float:
    _, saturation, value = hsv(picture)
    return float((saturation * value).mean())


def hsv(picture: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) to hue in degrees, saturation and value in 0..1, each (H, W)."""
    return np.moveaxis(cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV), 2, 0)


@pytest.mark.slow
def test_the_thing_that_is_named_has_its_shape(paint: Callable[..., np.ndarray]) -> None:
    """What is painted is compared with all things of the vocabulary: its own is mostly among the most alike."""
    rng = np.random.default_rng(0)
    made = {name: shapes.draw(shapes.Thing("blue", name), RADIUS, rng)[1] for name in shapes.THINGS}
    ranks = []
    for name in shapes.THINGS:
        away = np.abs(paint(f"a blue {name}").astype(float) - 128).sum(axis=2)
        alike = {other: np.corrcoef(away.ravel(), opacity.ravel())[0, 1] for other, opacity in made.items()}
        ranks.append(sorted(alike, key=alike.__getitem__, reverse=True).index(name))
    assert np.mean(ranks) < 1.5  # chance is 5.5
    assert ranks.count(0) >= 6  # chance is 1


@pytest.mark.slow
def test_guidance_strengthens_what_the_prompt_names(paint: Callable[..., np.ndarray]) -> None:
    colours = ("red", "green", "blue", "purple")
    without, usual = (
        np.mean([colourfulness(paint(f"a {colour} star", guidance_scale=guidance)) for colour in colours])
        for guidance in (1, 7.5)
    )
    assert usual > 1.3 * without


@pytest.mark.slow
def test_a_colour_in_the_negative_prompt_stays_away(paint: Callable[..., np.ndarray]) -> None:
    unasked = paint("a ball")
    colour = max(shapes.COLOURS, key=lambda name: share_of(name, unasked))
    assert share_of(colour, paint("a ball", negative_prompt=colour)) < share_of(colour, unasked) / 2
