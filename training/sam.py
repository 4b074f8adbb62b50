"""Train the demo SAM: `python -m training.sam FOLDER`. Stop it at will; the same command goes on from where it was.

The recipe is SAM's (Kirillov et al. 2023, section 5 and appendix A): many prompts for each encoded picture, the first a
click or a box, the next on what was wrong, with the previous logits; the best of three masks learns; the score learns
the IoU. Processes make scenes all the time; each step draws from the last ones and changes them. What a step does with
them follows from its number, but which they are depends on the machine's speed: two runs give much the same, not the
same weights.
"""

import argparse
import copy
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import Sam, image_encoder
from torch import Tensor, nn
from torch.nn import functional as F

from handlers.sam import network
from training.eval_sam import HeldOut
from training.muon import Muon
from training.sam_batch import decode, relative_positions
from training.sam_prompts import Targets, changed, choose_targets, click_inside, correction, rough_box
from training.sam_scenes import Pool, SceneMakers
from training.scenes import SceneMaker

CONFIG = Path(network.__file__).parent / "demo" / "network.yaml"
SEED = 7
STEPS = 6_000
BATCH = {"cpu": 8, "cuda": 128}  # pictures
POOL = {"cpu": 8_192, "cuda": 131_072}  # scenes of 64 kB
FIRST_SCENES = 1_024  # in the pool before the first step
PROMPTS = 4  # for each picture
TURNS = (0.4, 0.3, 0.3)  # how often prompts are corrected not at all, once, twice
LEARNING_RATES = (2e-3, 1e-3)  # of Muon, of AdamW, for a batch of 8
SCORE_LOSS = 4.0  # the scores' weight beside the masks'
WARM_UP = 200  # steps
DECAY_OVER = 0.35  # of the run, the last part, down to nothing
TUNING = 0.5  # of the rates, for weights that have learned already
TUNED_FROM = 1_000_000  # the number of the first scene that is shown to these
AVERAGE_OVER = 0.02  # of the run: the weights that are kept are a moving average over so much
PRINT_EVERY = 5.0  # seconds
SAVE_EVERY = 60.0
MEASURE_EVERY = 90.0


class Run:
    """A network in training, the average that is kept of it, and how far it is; `folder` is where it is saved."""

    def __init__(self, folder: Path, config: Mapping[str, Any], device: torch.device, batch: int) -> None:
        torch.manual_seed(SEED)
        self.folder, self.device, self.batch = folder, device, batch
        self.sam = network.build(config).to(device).train()
        self.average = copy.deepcopy(self.sam)
        # Lists, since to walk through the modules takes as long as many a kernel.
        self.learned, self.kept = list(self.sam.parameters()), list(self.average.parameters())
        # A larger batch bears a larger step, but Muon's less than in proportion to the noise's root.
        self.rates = [rate * (batch / BATCH["cpu"]) ** 0.25 for rate in LEARNING_RATES]
        self.optimizers = _optimizers(self.sam)
        self.step, self.seconds = 0, 0.0

    def load(self, saved: dict[str, Any]) -> None:
        self.sam.load_state_dict(saved["sam"])
        self.average.load_state_dict(saved["average"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self, scenes: int) -> None:
        """`scenes` is the number of the first scene that is not made yet."""
        state = {"step": self.step, "seconds": self.seconds, "scenes": scenes}
        state |= {"sam": self.sam.state_dict(), "average": self.average.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, self.folder / "checkpoint.new")  # a stop while saving leaves the old one whole
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")
        weights = {key: tensor.half().cpu() for key, tensor in self.average.state_dict().items()}
        save_file(weights, self.folder / "weights.safetensors")

    def start_from(self, weights: Path) -> None:
        """Go on with what another run learned, at smaller rates."""
        tensors = {key: tensor.float() for key, tensor in load_file(weights).items()}
        self.sam.load_state_dict(tensors)
        self.average.load_state_dict(tensors)
        self.rates = [TUNING * rate for rate in self.rates]

    def learn(self, scenes: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """One update with scenes from the pool, `done` (0-1) of the run being behind; returns as `gradients` does."""
        share = min(1.0, (self.step + 1) / WARM_UP, (1 - done) / DECAY_OVER)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        results = gradients(self.sam, scenes, random_kind(np.random.default_rng([SEED, self.step])))
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        over = max(10.0, AVERAGE_OVER * self.step / max(done, 1e-9))
        keep = min(1 - 1 / over, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.kept, self.learned, 1 - keep)
        self.step += 1
        return results


def main() -> None:
    arguments = _arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.folder / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu") if checkpoint.exists() else None
    config = network.load_config(arguments.config)
    first = saved["scenes"] if saved else TUNED_FROM if arguments.start else 0
    # Before CUDA is asked for anything.
    makers = SceneMakers(SceneMaker("train"), arguments.workers, first, config["image_size"])
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")  # tf32 on a GPU
    image_encoder.get_rel_pos = relative_positions
    pool = Pool(arguments.pool or POOL[device.type], config["image_size"], device)
    run = Run(arguments.folder, config, device, arguments.batch or BATCH[device.type])
    validation = HeldOut(arguments.measured)
    makers.give(pool, FIRST_SCENES)
    if arguments.start:
        run.start_from(arguments.start)
    if saved:
        run.load(saved)
    elif not arguments.start:
        _initialise(run, pool)
    _train(run, makers, pool, validation, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint.pt and weights.safetensors go here")
    parser.add_argument("--start", type=Path, help="weights.safetensors to go on from, at smaller rates")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the network's dimensions, a YAML file")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=STEPS, help="of the whole run, earlier starts counted in")
    length.add_argument("--minutes", type=float, help="likewise, instead of steps; without the start")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that make scenes")
    parser.add_argument("--batch", type=int, help=f"pictures in a step; default: {BATCH}")
    parser.add_argument("--pool", type=int, help=f"scenes in the pool; default: {POOL}")
    parser.add_argument("--measured", type=int, default=64, help="held-out scenes, now and then")
    parser.add_argument("--threads", type=int, default=2, help="of the training on a CPU")
    return parser.parse_args()


def _train(run: Run, makers: SceneMakers, pool: Pool, validation: HeldOut, arguments: argparse.Namespace) -> None:
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    began, made = time.monotonic() - run.seconds, makers.started()
    printed, saved, measured = (Every(seconds) for seconds in (PRINT_EVERY, SAVE_EVERY, MEASURE_EVERY))
    first = run.step
    while not stop:
        minutes = arguments.minutes
        done = run.seconds / (60 * minutes) if minutes else run.step / arguments.steps
        if done >= 1:
            break
        makers.give(pool)
        torch.manual_seed(SEED + run.step)
        loss, iou = run.learn(pool.draw(run.batch), done)
        run.seconds = time.monotonic() - began
        if passed := printed.passed():
            print(
                f"step {run.step} ({done:.1%}) loss {loss.item():.3f} IoU {iou.item():.3f} {run.seconds:.0f} s, "
                f"{1000 * passed / (run.step - first):.0f} ms/step, {(makers.started() - made) / passed:.0f} scenes/s, "
                f"{len(pool)} of {pool.taken} in the pool",
                flush=True,
            )
            first, made = run.step, makers.started()
            if not stop:  # what ends this process may have ended those
                makers.check()
        if saved.passed():
            run.save(makers.started())
        if measured.passed():
            print(f"step {run.step} held out: {validation.measure(run.average)}", flush=True)
    run.save(makers.started())
    print(f"step {run.step} held out: {validation.measure(run.average)}", flush=True)


class Every:
    """Says, each time that many seconds have passed, how many they were."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def passed(self) -> float | None:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return None
        passed, self._last = now - self._last, now
        return passed


@torch.no_grad()
def _initialise(run: Run, pool: Pool) -> None:
    """Start with whitened principal components of patches, and with sines of positions."""
    sam, encoder = run.sam, run.sam.image_encoder
    stem, patch = encoder.patch_embed.proj, encoder.patch_embed.proj.kernel_size[0]
    pixels = pool.draw(64)[:, :3]
    patches = F.unfold((pixels - sam.pixel_mean) / sam.pixel_std, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variance, directions = torch.linalg.eigh((patches - mean).T.cov().cpu())
    # With more channels than components, some start as noise.
    known = min(stem.out_channels, len(variance))
    kept = (directions[:, -known:] / (variance[-known:] + 0.01).sqrt()).to(mean.device)
    stem.weight[-known:] = kept.T.reshape(known, *stem.weight.shape[1:])
    stem.bias[-known:] = -mean @ kept
    rows, _, width = encoder.pos_embed.shape[1:]
    frequencies = torch.pi * 2 ** torch.linspace(-1, 3, width // 4)
    waves = torch.linspace(0, 1, rows)[:, None] * frequencies
    waves = torch.cat([waves.sin(), waves.cos()], 1)
    down, across = waves[:, None].expand(-1, rows, -1), waves[None].expand(rows, -1, -1)
    encoder.pos_embed.copy_(0.5 * torch.cat([down, across], 2)[None])
    run.average.load_state_dict(sam.state_dict())


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
        torch.optim.AdamW(others, lr=LEARNING_RATES[1], weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]


class Kind(NamedTuple):
    """What the prompts of one batch have in common."""

    clicked: bool
    boxed: bool
    turns: int


def random_kind(rng: np.random.Generator) -> Kind:
    boxed = rng.random() < 0.25
    return Kind(not boxed or rng.random() < 0.5, boxed, int(rng.choice([1, 2, 3], p=TURNS)))


def gradients(sam: Sam, scenes: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Leave in the parameters the gradients for scenes from the pool, uint8 (B, 4, size, size).

    Returns the loss and the mean IoU of the shown mask after the first prompt, both of no dimension and still on the
    device: to look at them is to wait for them.
    """
    with torch.no_grad():
        image, owner = changed(scenes, sam.pixel_mean)
        targets = choose_targets(owner, PROMPTS)
    with torch.autocast(scenes.device.type, torch.bfloat16, enabled=scenes.is_cuda):
        embedding = sam.image_encoder((image - sam.pixel_mean) / sam.pixel_std)
        total, iou = _asked(sam, embedding, targets, kind)
    total.backward()
    return total.detach(), iou


def _asked(sam: Sam, embedding: Tensor, targets: Targets, kind: Kind) -> tuple[Tensor, Tensor]:
    """Ask for all targets, show what was wrong, ask again; the mean loss, and the IoU after the first prompt."""
    solid = targets.solid
    points = click_inside(solid)[:, None] if kind.clicked else solid.new_zeros((len(solid), 0, 2), dtype=torch.float32)
    labels = torch.ones(points.shape[:2], device=points.device)
    boxes = rough_box(targets.soft) if kind.boxed else None
    losses, ious, previous = [], [], None
    for turn in range(kind.turns):
        if turn:
            click, label = correction(previous > 0, solid)
            points, labels = torch.cat([points, click[:, None]], 1), torch.cat([labels, label[:, None]], 1)
        logits, scores = decode(sam, embedding, (points, labels), boxes, previous)
        loss, iou, previous = _loss(logits, scores, targets, ambiguous=turn == 0 and not kind.boxed)
        losses.append(loss)
        ious.append(iou)
    return torch.stack(losses).mean(), ious[0]


def _loss(logits: Tensor, scores: Tensor, targets: Targets, ambiguous: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the mean IoU of the mask that the product would show, and that mask's logits (N, h, w), detached.

    After a lone click it shows the best-scored of the three masks; after anything clearer, the single one.
    """
    wanted = targets.soft[:, None].expand_as(logits)
    probability = logits.sigmoid()
    overlap = 2 * (probability * wanted).sum((2, 3)) + 1
    dice = 1 - overlap / (probability.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((2, 3))
    each = 2 * cross_entropy + dice
    single, three = each[:, 0], each[:, 1:]
    # The two masks that were not the best learn a little too: none may starve.
    best_of_three = 0.8 * three.min(1).values + 0.2 * three.mean(1)
    mask_loss = 0.3 * single + best_of_three if ambiguous else single + 0.3 * best_of_three
    with torch.no_grad():
        found, truth = logits > 0, wanted > 0.5
        iou = (found & truth).sum((2, 3)) / (found | truth).sum((2, 3)).clamp(min=1)
        shown = scores[:, 1:].argmax(1, keepdim=True) + 1 if ambiguous else torch.zeros_like(scores[:, :1]).long()
        chosen = logits.gather(1, shown[..., None, None].expand(-1, -1, *logits.shape[2:]))[:, 0]
    share = targets.weight / targets.weight.sum().clamp(min=1)
    loss = (share * (mask_loss + SCORE_LOSS * (scores - iou).square().mean(1))).sum()
    return loss, (share * iou.gather(1, shown)[:, 0]).sum(), chosen


if __name__ == "__main__":
    main()
