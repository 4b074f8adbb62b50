"""Train the demo SAM: `python -m training.sam FOLDER`. Stop it at will; the same command goes on from where it was.

The recipe is SAM's (Kirillov et al. 2023, section 5 and appendix A): many prompts for each encoded picture, the first a
click or a box, the next on what was wrong, with the previous logits; the best of three masks learns; the score learns
the IoU. The same seed on the same machine gives the same weights.
"""

import argparse
import copy
import time
from pathlib import Path

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
STEPS = 6_000
BATCH = 8  # pictures
PROMPTS = 4  # for each picture
LEARNING_RATES = (2e-3, 1e-3)  # of Muon, of AdamW
WARM_UP = 100  # steps
DECAY_OVER = 0.25  # of all steps, the last ones, down to nothing
HARD_FROM = 6000  # scenes until the curriculum shows the full difficulty
AVERAGE = 0.998  # of the weights that are kept, an exponential moving average
SAVE_EVERY = 100  # steps
MEASURE_EVERY = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint.pt and weights.safetensors go here")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    sam = network.build(network.load_config(CONFIG))
    _initialise(sam)
    average, optimizers = copy.deepcopy(sam), _optimizers(sam)
    first = _resume(arguments.folder, sam, average, optimizers)
    validation, started = HeldOut(64), time.monotonic()
    for step, batch in enumerate(_batches(sam.image_encoder.img_size, first), first):
        for optimizer, rate in zip(optimizers, LEARNING_RATES, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _share_of_rate(step)
        loss, iou = _step(sam, batch, optimizers, np.random.default_rng([SEED, step]))
        _follow(average, sam, min(AVERAGE, (1 + step) / (10 + step)))
        if step % 20 == 0:
            print(f"step {step} loss {loss:.3f} IoU {iou:.3f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            _save(arguments.folder, step + 1, sam, average, optimizers)
        if (step + 1) % MEASURE_EVERY == 0 or step + 1 == STEPS:
            print(f"step {step + 1} held out: {validation.measure(average)}", flush=True)


def _resume(folder: Path, sam: Sam, average: Sam, optimizers: list[torch.optim.Optimizer]) -> int:
    """Take up the checkpoint in `folder`, if there is one; returns the number of steps done."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    sam.load_state_dict(saved["sam"])
    average.load_state_dict(saved["average"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"]


def _save(folder: Path, step: int, sam: Sam, average: Sam, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {"step": step, "sam": sam.state_dict(), "average": average.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state, folder / "checkpoint.new")  # a stop while saving leaves the old one whole
    (folder / "checkpoint.new").replace(folder / "checkpoint.pt")
    save_file({key: tensor.half() for key, tensor in average.state_dict().items()}, folder / "weights.safetensors")


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


def _batches(size: int, first: int) -> DataLoader[Prompted]:
    scenes = PromptedScenes(first * BATCH, (STEPS - first) * BATCH, BATCH, size, PROMPTS, HARD_FROM)
    return DataLoader(scenes, BATCH, num_workers=1, prefetch_factor=4, multiprocessing_context="spawn")


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


def _share_of_rate(step: int) -> float:
    return min(1.0, (step + 1) / WARM_UP, (STEPS - step) / (STEPS * DECAY_OVER))


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


if __name__ == "__main__":
    main()
