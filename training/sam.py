"""Train the demo SAM: `python -m training.sam FOLDER`. Stop it at will; the same command goes on from where it was.

The recipe is SAM's (Kirillov et al. 2023, section 5 and appendix A): many prompts for each encoded picture, the first a
click or a box, the next on what was wrong, with the previous logits; the best of three masks learns; the score learns
the IoU. The picture size grows in stages. The same seed on the same machine gives the same weights.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from handlers.sam import network
from training.eval_sam import HeldOut
from training.muon import Muon
from training.sam_prompts import Prompted, PromptedScenes, correction

CONFIG = Path(network.__file__).parent / "demo" / "network.yaml"
SEED = 7
PROMPTS = 4  # for each picture
LEARNING_RATES = (2e-3, 1e-3)  # of Muon, of AdamW
DECAY_OVER = 0.8  # the last part of the last stage, down to nothing
HARD_FROM = 6000  # scenes until the curriculum shows the full difficulty
AVERAGE = 0.998  # of the weights that are kept, an exponential moving average
SAVE_EVERY = 100  # steps


class Stage(NamedTuple):
    size: int  # pixels
    batch: int  # pictures
    steps: int


STAGES = (Stage(128, 8, 5000), Stage(128, 16, 600))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint.pt and weights.safetensors go here")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    for number in range(len(STAGES)):
        _train_stage(number, arguments.folder)


def _train_stage(number: int, folder: Path) -> None:
    stage, checkpoint = STAGES[number], folder / "checkpoint.pt"
    torch.manual_seed(SEED + number)
    sam = network.build(network.load_config(CONFIG) | {"image_size": stage.size})
    _initialise(sam)
    average = copy.deepcopy(sam)
    optimizers, start = _optimizers(sam), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["stage"] > number:
            return
        sam.load_state_dict(_resized(saved["sam"], sam))
        average.load_state_dict(_resized(saved["average"], sam))
        if saved["stage"] == number:
            start = saved["step"]
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
    validation, before = HeldOut(64), time.monotonic()
    for step, batch in enumerate(_batches(number, start), start):
        for optimizer, rate in zip(optimizers, LEARNING_RATES, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _share_of_rate(number, step)
        loss, iou = _step(sam, batch, optimizers, np.random.default_rng([SEED, number, step]))
        _follow(average, sam, min(AVERAGE, (1 + step) / (10 + step)) if number == 0 else AVERAGE)
        if step % 20 == 0:
            print(
                f"stage {number} step {step} loss {loss:.3f} iou {iou:.3f} {time.monotonic() - before:.0f} s",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            state = {"stage": number, "step": step + 1, "sam": sam.state_dict(), "average": average.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save_file({k: v.half() for k, v in average.state_dict().items()}, folder / "weights.safetensors")
        if (step + 1) % (3 * SAVE_EVERY) == 0 or step + 1 == stage.steps:
            print(f"stage {number} step {step + 1} held out: {validation.measure(average)}", flush=True)


@torch.no_grad()
def _initialise(sam: Sam) -> None:
    """Start with whitened principal components of patches, and with sines of positions."""
    encoder = sam.image_encoder
    stem, size, patch = encoder.patch_embed.proj, encoder.img_size, encoder.patch_embed.proj.kernel_size[0]
    scenes = PromptedScenes(0, 64, 64, size, 1, 1)
    pixels = torch.stack([scenes[i].image for i in range(64)])
    patches = F.unfold((pixels - sam.pixel_mean) / sam.pixel_std, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variance, directions = torch.linalg.eigh((patches - mean).T.cov())
    kept = directions[:, -stem.out_channels :] / (variance[-stem.out_channels :] + 0.01).sqrt()
    stem.weight.copy_(kept.T.view_as(stem.weight))
    stem.bias.copy_(-mean @ kept)
    rows, _, width = encoder.pos_embed.shape[1:]
    frequencies = torch.pi * 2 ** torch.linspace(-1, 3, width // 4)
    waves = torch.linspace(0, 1, rows)[:, None] * frequencies
    waves = torch.cat([waves.sin(), waves.cos()], 1)
    down, across = waves[:, None].expand(-1, rows, -1), waves[None].expand(rows, -1, -1)
    encoder.pos_embed.copy_(0.5 * torch.cat([down, across], 2)[None])


def _batches(number: int, start: int) -> DataLoader[Prompted]:
    stage = STAGES[number]
    seen = sum(earlier.batch * earlier.steps for earlier in STAGES[:number])
    scenes = PromptedScenes(
        seen + start * stage.batch, (stage.steps - start) * stage.batch, stage.batch, stage.size, PROMPTS, HARD_FROM
    )
    return DataLoader(scenes, stage.batch, num_workers=1, prefetch_factor=4, multiprocessing_context="spawn")


def _optimizers(sam: Sam) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformers, AdamW for everything else."""
    inside = {
        parameter
        for transformer in (sam.image_encoder.blocks, sam.mask_decoder.transformer)
        for name, parameter in transformer.named_parameters()
        if parameter.ndim == 2 and "rel_pos" not in name
    }
    matrices = [parameter for parameter in sam.parameters() if parameter in inside]
    others = [parameter for parameter in sam.parameters() if parameter not in inside]
    return [
        Muon(matrices, lr=LEARNING_RATES[0], weight_decay=0.05),
        torch.optim.AdamW(others, lr=LEARNING_RATES[1], weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def _share_of_rate(number: int, step: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    if number < len(STAGES) - 1:
        return warm
    steps = STAGES[number].steps
    return warm * min(1.0, (steps - step) / (steps * DECAY_OVER))


def _step(
    sam: Sam, batch: Prompted, optimizers: list[torch.optim.Optimizer], rng: np.random.Generator
) -> tuple[float, float]:
    """One update; returns the loss and the mean IoU of the shown mask after the first prompt."""
    sam.train()
    image = (batch.image - sam.pixel_mean) / sam.pixel_std
    embedding = sam.image_encoder(image)
    target = batch.target.flatten(0, 1)
    points = batch.click.flatten(0, 1)[:, None]
    labels = torch.ones(len(target), 1)
    boxes = batch.box.flatten(0, 1) if rng.random() < 0.25 else None
    if boxes is not None and rng.random() < 0.5:
        points, labels = points[:, :0], labels[:, :0]
    losses, ious, previous = [], [], None
    for turn in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])):
        logits, scores = decode(sam, embedding, (points, labels), boxes, previous)
        loss, iou, chosen = _loss(logits, scores, target, ambiguous=turn == 0 and boxes is None)
        losses.append(loss)
        ious.append(iou)
        previous = chosen[:, None] if rng.random() < 0.7 else None
        points, labels = _corrected(rng, points, labels, chosen, target, batch.image.shape[-1])
    total = torch.stack(losses).mean()
    total.backward()
    nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total.item(), ious[0]


def decode(
    sam: Sam,
    embedding: Tensor,
    points: tuple[Tensor, Tensor],
    boxes: Tensor | None,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """MaskDecoder.predict_masks for a batch of pictures, which it only does for one.

    embedding: (B, C, h, w); points: (B*P, n, 2) and (B*P, n); previous: logits (B*P, 1, 4h, 4w).
    Returns logits (B*P, 4, 4h, 4w) and scores (B*P, 4).
    """
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    sparse, dense = encoder(points if points[1].numel() else None, boxes, previous)
    count, (height, width) = len(sparse), embedding.shape[-2:]
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(count, -1, -1)
    source = embedding.repeat_interleave(count // len(embedding), dim=0) + dense
    tokens, source = decoder.transformer(
        source, encoder.get_dense_pe().expand(count, -1, -1, -1), torch.cat([own, sparse], dim=1)
    )
    upscaled = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, (height, width)))
    kernels = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = (torch.stack(kernels, dim=1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return logits, decoder.iou_prediction_head(tokens[:, 0])


def _loss(logits: Tensor, scores: Tensor, target: Tensor, ambiguous: bool) -> tuple[Tensor, float, Tensor]:
    """The loss, the mean IoU of the mask that the product would show, and that mask's logits (N, h, w), detached.

    After a lone click it shows the best-scored of the three masks; after anything clearer, the single one.
    """
    wanted = target[:, None].expand_as(logits)
    probability = logits.sigmoid()
    overlap = 2 * (probability * wanted).sum((2, 3)) + 1
    dice = 1 - overlap / (probability.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((2, 3))
    each = 2 * cross_entropy + dice
    single, three = each[:, 0], each[:, 1:]
    # The two masks that were not the best learn a little too: none may starve.
    best_of_three = 0.8 * three.min(1).values + 0.2 * three.mean(1)
    mask_loss = (0.3 * single + best_of_three if ambiguous else single + 0.3 * best_of_three).mean()
    found, truth = logits > 0, wanted > 0.5
    iou = (found & truth).sum((2, 3)) / (found | truth).sum((2, 3)).clamp(min=1)
    shown = scores[:, 1:].argmax(1) + 1 if ambiguous else torch.zeros(len(scores), dtype=torch.long)
    each_row = torch.arange(len(scores))
    return mask_loss + F.mse_loss(scores, iou), iou[each_row, shown].mean().item(), logits[each_row, shown].detach()


def _corrected(
    rng: np.random.Generator, points: Tensor, labels: Tensor, chosen: Tensor, target: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """One more click for every prompt, where the chosen mask is wrong."""
    truth = (target > 0.5).numpy()
    clicks = [
        correction(rng, found, wanted if wanted.any() else soft > 0)
        for found, wanted, soft in zip((chosen > 0).numpy(), truth, target.numpy(), strict=True)
    ]
    scale = size / target.shape[-1]
    new = torch.from_numpy(np.stack([(point + 0.5) * scale - 0.5 for point, _ in clicks])).float()
    label = torch.tensor([label for _, label in clicks], dtype=torch.float32)
    return torch.cat([points, new[:, None]], 1), torch.cat([labels, label[:, None]], 1)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - keep)
    for kept, new in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(new)


def _resized(state: dict[str, Tensor], sam: Sam) -> dict[str, Tensor]:
    """`state` with its positional tables stretched to the picture size of `sam`."""
    shapes = {key: tensor.shape for key, tensor in sam.state_dict().items()}

    def fit(key: str, tensor: Tensor) -> Tensor:
        if tensor.shape == shapes[key]:
            return tensor
        if key.endswith("pos_embed"):
            stretched = F.interpolate(tensor.permute(0, 3, 1, 2), shapes[key][1:3], mode="bicubic")
            return stretched.permute(0, 2, 3, 1)
        return F.interpolate(tensor.T[None], shapes[key][0], mode="linear")[0].T

    return {key: fit(key, tensor) for key, tensor in state.items()}


if __name__ == "__main__":
    main()
