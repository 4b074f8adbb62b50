"""What the Stable Diffusion handler computes once only, and what it does not wait for."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HandlerClient, encoded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from handlers.requests.payload import Request
from handlers.sd.settings import PaintSettings
from handlers.weights.kept import Kept

Open = Callable[[str], HandlerClient]
QUICK = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture
def sd(open_handler: Open, monkeypatch: pytest.MonkeyPatch) -> HandlerClient:
    """With nothing kept from earlier tests."""
    client = open_handler("sd")
    monkeypatch.delitem(vars(client.handler.pipeline), "_embeddings", raising=False)
    return client


def ask(sd: HandlerClient, prompt: str = "a red ball", negative: str = "blue", **gen_args: Any) -> dict[str, Any]:
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    hole = np.zeros((256, 256), np.uint8)
    hole[60:180, 80:200] = 255
    reply = sd.json(
        image=encoded(picture),
        mask_image=encoded(hole),
        prompt=prompt,
        negative_prompt=negative,
        gen_args=QUICK | gen_args,
    )
    assert reply.status == 200, reply.body
    return reply.fields


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[Any]]:
    """The positional arguments of each call."""
    seen: list[Any] = []
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.slow
def test_a_text_is_encoded_once(sd: HandlerClient) -> None:
    with calls_of(sd.handler.pipeline.text_encoder) as calls:
        first = ask(sd)
        assert len(calls) == 2
        assert ask(sd) == first
        assert len(calls) == 2
        ask(sd, prompt="a green cup")
        assert len(calls) == 3


def test_what_is_kept_of_a_text_is_what_the_encoder_makes_of_it(sd: HandlerClient) -> None:
    pipeline = sd.handler.pipeline
    with torch.inference_mode():
        for text in ("a red ball", "", "a red ball"):
            assert torch.equal(pipeline.embedded(text), pipeline.encode_prompt([text], "cpu", 1, False)[0])


def test_what_overflowed_is_not_kept(sd: HandlerClient) -> None:
    def overflow(module: nn.Module, inputs: Any, output: Any) -> None:
        output.last_hidden_state.fill_(torch.inf)

    hook = sd.handler.pipeline.text_encoder.register_forward_hook(overflow)
    with torch.inference_mode():
        assert not sd.handler.pipeline.embedded("a cup").isfinite().any()
        hook.remove()
        assert sd.handler.pipeline.embedded("a cup").isfinite().all()


def test_what_is_kept_has_a_bound_and_the_oldest_goes_first() -> None:
    kept = Kept(3 * 40)
    one, two, three, four = (torch.full((10,), float(number)) for number in range(4))
    for key, tensor in ((b"1", one), (b"2", two), (b"3", three)):
        kept.put(key, tensor)
    assert kept.get(b"1") is not None
    kept.put(b"4", four)
    one.fill_(9)
    assert kept.get(b"2") is None
    assert [float(found[0][0]) for key in (b"1", b"3", b"4") if (found := kept.get(key)) is not None] == [0, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "batch", "texts"), [(1.0, 1, 1), (0.0, 1, 1), (1.1, 2, 2)])
def test_the_negative_side_is_computed_only_where_it_has_an_effect(
    sd: HandlerClient, guidance: float, batch: int, texts: int
) -> None:
    pipeline = sd.handler.pipeline
    with calls_of(pipeline.unet) as steps, calls_of(pipeline.text_encoder) as encoded_texts:
        ask(sd, guidance_scale=guidance)
    assert {len(latents) for latents, _ in steps} == {batch}
    assert len(encoded_texts) == texts


@pytest.mark.slow
@pytest.mark.parametrize(("strength", "pictures"), [(1.0, 1), (0.6, 2)])
def test_variants_share_what_the_autoencoder_sees_and_stay_the_pictures_of_their_seeds(
    sd: HandlerClient, strength: float, pictures: int
) -> None:
    with calls_of(sd.handler.pipeline.vae.encoder) as calls:
        together = ask(sd, variants=3, strength=strength)["variants"]
        assert len(calls) == pictures
        alone = [ask(sd, seed=QUICK["seed"] + index, strength=strength)["generated_image"] for index in range(3)]
        assert len(calls) == 4 * pictures  # nothing is left for the next request
    assert together == alone
    assert len(set(alone)) == 3


class BlockingCopies(TorchDispatchMode):
    """Counts the copies to the device that the host waits for. On the `meta` device nothing can be copied back."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func is torch.ops.aten._to_copy.default and not options.get("non_blocking"):
            self.count += args[0].device.type != result.device.type
        return result


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "heun", "dpmpp_2m", "dpmpp_2m_karras"])
def test_no_step_waits_for_the_device(
    sd: HandlerClient, scheduler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device computes nothing: whatever asks for a value that would be there raises."""
    pipeline = copy.deepcopy(sd.handler.pipeline)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.to("meta")
    monkeypatch.setattr(pipeline, "embedded", lambda text: torch.zeros(1, 77, 64, device="meta"))
    arguments = {"num_inference_steps": 6, "seed": 1, "scheduler": scheduler, "strength": strength}
    settings = PaintSettings.parse(Request({"prompt": "x", "gen_args": arguments}))
    waits = []
    with torch.inference_mode(), BlockingCopies() as copies:
        latents: Tensor = sd.handler._denoise(
            pipeline,
            np.zeros((256, 256, 3), np.uint8),
            np.ones((256, 256), bool),
            settings,
            lambda step, steps: waits.append(copies.count),
            None,
        )
    assert latents.device.type == "meta"
    assert len(waits) >= 4
    assert waits[-1] == waits[0]
