"""Full-size architectures with random weights: published file -> archive -> TorchServe -> answer.

Not part of `make test`: `make test-full` takes minutes and about 15 GB of disk. It reports time and memory.
"""

import base64
import dataclasses
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import DATA, pixels
from serving import ROOT, Server, serving

from handlers.lama import network as lama_network
from handlers.sam import network as sam_network
from serve.archives.build import build_full
from serve.archives.weights import File, Published, SearchFolders, read_weights
from training.lama_network import PublishedLaMa

pytestmark = pytest.mark.full
HANDLERS = ROOT / "handlers"


@pytest.mark.parametrize("name", ["sam", "lama", "sd"])
def test_checkpoint_to_answer(tmp_path: Path, dog: bytes, dog_mask: bytes, name: str) -> None:
    checkpoints, store = tmp_path / "checkpoints", tmp_path / "store"
    MAKERS[name](checkpoints)
    weights = on_record(dataclasses.replace(read_weights()[PUBLISHED[name]], name=name), checkpoints)
    began = time.monotonic()
    build_full(weights, store, SearchFolders(tmp_path / "downloads", checkpoints), no_progress, print)
    report: dict[str, float] = {"build s": time.monotonic() - began}
    shutil.rmtree(checkpoints)

    with serving(tmp_path, store, "full") as server:
        inside = pixels(dog_mask).max(axis=2) >= 128
        for call in ("cold answer s", "warm answer s"):
            began = time.monotonic()
            reply = ask(server, name, dog, dog_mask)
            report[call] = time.monotonic() - began
            check(name, reply, dog, inside)
        report |= memory(server.worker(name))
    print(f"\n{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in report.items()))


def ask(server: Server, name: str, dog: bytes, dog_mask: bytes) -> dict[str, Any]:
    if name == "sam":
        return server.ask("sam", image=dog, gen_args={"point_coords": [750, 500]})
    return server.ask(
        name, image=dog, mask_image=dog_mask, prompt="a hamster", gen_args={"num_inference_steps": 2, "seed": 1}
    )


def check(name: str, reply: dict[str, Any], dog: bytes, inside: np.ndarray) -> None:
    after = pixels(base64.b64decode(reply["generated_image"]))
    if name == "sam":
        assert after.shape == inside.shape
    else:
        assert np.array_equal(after[~inside], pixels(dog)[~inside])


def memory(worker: psutil.Process) -> dict[str, float]:
    """MB: resident now, and at its peak."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
    return {"resident MB": worker.memory_info().rss / 1e6, "peak MB": int(status["VmHWM"].split()[0]) / 1e3}


def make_sam(folder: Path) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    network = sam_network.build(sam_network.load_config(HANDLERS / "sam" / "vit_b.yaml"))
    torch.save(network.state_dict(), folder / "sam_vit_b_01ec64.pth")


def make_lama(folder: Path) -> None:
    """As unpacked from big-lama.zip: a Lightning checkpoint and its config."""
    (folder / "big-lama" / "models").mkdir(parents=True)
    shutil.copy(HANDLERS / "lama" / "big_lama.yaml", folder / "big-lama" / "config.yaml")
    torch.manual_seed(0)
    network = PublishedLaMa(lama_network.load_config(HANDLERS / "lama" / "big_lama.yaml"))
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, folder / "big-lama" / "models" / "best.ckpt")


def make_sd(folder: Path) -> None:
    """The real SD-2-inpainting configuration; the demo's tokenizer, whose ids are all below the real vocabulary's."""
    tool = [sys.executable, "-m", "handlers.building.random_weights", "sd", str(DATA / "sd2"), str(folder)]
    subprocess.run([*tool, "--seed", "0", "--dtype", "float16"], cwd=ROOT, check=True, timeout=900)
    pipeline = folder / "pipeline"
    shutil.copytree(HANDLERS / "sd" / "demo" / "pipeline" / "tokenizer", pipeline / "tokenizer", dirs_exist_ok=True)
    for path in pipeline.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    for item in pipeline.iterdir():
        item.rename(folder / item.name)


MAKERS: dict[str, Callable[[Path], None]] = {"sam": make_sam, "lama": make_lama, "sd": make_sd}
PUBLISHED = {"sam": "sam_vit_b", "lama": "lama", "sd": "sd"}


def on_record(weights: Published, folder: Path) -> Published:
    """The stanza with the hashes of our random files in place of the published ones."""

    def record(file: File) -> File:
        path = next((p for p in (folder / file.path, folder / Path(file.path).name) if p.is_file()), None)
        if path is None or file.sha256 is None:
            return file
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return dataclasses.replace(file, bytes=path.stat().st_size, sha256=digest)

    return dataclasses.replace(weights, sources=tuple(tuple(record(f) for f in s) for s in weights.sources))


@contextmanager
def no_progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    yield lambda done: None
