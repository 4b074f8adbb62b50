"""A model that nobody has seen before is one folder and one stanza: docs/adding-a-model.md, step by step."""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded
from PIL import Image
from safetensors.torch import load_file
from serving import Server, own_path, palimpsest, serving

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
WIDTH = 2560  # 236 MB of weights: room for one such model and another that is parked, not for two
GREY = np.add.outer(np.arange(12), np.arange(18)).astype(np.uint8)
PICTURE = np.stack((GREY, GREY[::-1], GREY[:, ::-1]), axis=2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with the model added: nothing but its folder and its stanza."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("contract", "handlers", "serve"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "config.properties", tree)
    shutil.copytree(EXAMPLES / "upscale", tree / "handlers" / "upscale")
    # Published at a size at which it is worth parking.
    (tree / "handlers" / "upscale" / "published.yaml").write_text(f"factor: 2\nwidth: {WIDTH}\n")
    stanza = (EXAMPLES / "weights.toml").read_text().replace("SHA256", publish(tree / "published"))
    with (tree / "serve" / "archives" / "weights.toml").open("a") as weights:
        weights.write(stanza)
    return tree


def publish(folder: Path) -> str:
    """Writes a network that adds 10 grey levels to all that it sees; the file's hash."""
    folder.mkdir()
    shapes = {"0": (WIDTH, 3, 5, 5), "2": (WIDTH, WIDTH, 3, 3), "4": (12, WIDTH, 3, 3)}
    weights = {f"{layer}.weight": torch.zeros(shape) for layer, shape in shapes.items()}
    weights |= {f"{layer}.bias": torch.zeros(shape[0]) for layer, shape in shapes.items()}
    torch.save(weights | {"4.bias": torch.full((12,), 10 / 255)}, folder / "espcn_x2.pth")
    return hashlib.sha256((folder / "espcn_x2.pth").read_bytes()).hexdigest()


def run(tree: Path, store: Path, *arguments: str) -> str:
    environment = os.environ | own_path(tree) | {"PALIMPSEST_STORE": str(store), "PALIMPSEST_STATE": str(store / "s")}
    command = [*palimpsest(tree), *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


def enlarged(server: Server, model: str, **arguments: object) -> np.ndarray:
    reply = server.ask(model, image=encoded(PICTURE), gen_args=arguments)
    assert reply["warnings"] == []
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["generated_image"])))).astype(int)


@pytest.mark.torchserve
def test_a_fourth_model_is_one_folder_and_one_stanza(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    listed = run(tree, store, "archives", "list")
    assert re.findall(r"^(\S*upscale) .*not built", listed, re.M) == ["upscale", "demo/upscale"]
    run(tree, store, "archives", "build", "upscale", "--from", str(tree / "published"))
    run(tree, store, "archives", "build", "upscale", "--models", "demo")
    assert load_file(store / "demo" / "upscale" / "weights.safetensors")["2.weight"].std() > 0  # drawn
    shutil.copytree(store / "upscale", store / "rival")

    monkeypatch.setenv("PALIMPSEST_MEMORY_BUDGET", "450")
    monkeypatch.setenv("PALIMPSEST_HOST_BUDGET", "600")
    monkeypatch.setenv("PALIMPSEST_MINIMUM_STAY", "0")
    with serving(tmp_path, store, "full", cpu_only=True, tree=tree) as server:
        interpolated = enlarged(server, "demo/upscale", detail=0)
        assert interpolated.shape == (24, 36, 3)
        assert np.any(enlarged(server, "demo/upscale") != interpolated)  # what random weights make of it
        server.http.post("/v1/models/demo/upscale/unload").raise_for_status()
        brighter = enlarged(server, "upscale")
        assert np.array_equal(brighter, np.minimum(interpolated + 10, 255))

        worker = server.worker("upscale").pid
        server.http.post("/v1/models/rival/load").raise_for_status()
        assert state(server, "upscale") == "parked"
        assert np.array_equal(enlarged(server, "upscale"), brighter)
        assert server.worker("upscale").pid == worker
        assert "palimpsest_worker_slow_starts_total 0" in server.http.get("/metrics").text

        document = server.http.get("/openapi.json").json()
        assert "ESPCN (picture → twice as large)" in document["info"]["description"]
        body = document["paths"]["/predictions/{model}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        arguments = body["properties"]["gen_args"]["anyOf"][0]["properties"]
        assert arguments["detail"]["description"].startswith("upscale: How much")
        assert arguments["output_format"]["description"].startswith("lama, sd, upscale: ")
        assert body["required"] == ["image"]


def state(server: Server, name: str) -> object:
    models = server.http.get("/v1/models").json()["models"]
    return next(model["state"] for model in models if model["name"] == name)
