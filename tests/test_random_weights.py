"""Random checkpoints: same seed, same bytes; loadable by the libraries that serve them; full-size dimensions right."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from handlers.building import random_weights

ROOT = Path(__file__).parent.parent
CONFIGS = {model: ROOT / "handlers" / model / "demo" for model in ("sam", "lama", "sd")}
SD2 = ROOT / "tests/data/sd2"


def checkpoint_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sam", "lama", "sd"])
def test_the_seed_decides_every_byte(model: str, tmp_path: Path) -> None:
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        random_weights.write(model, CONFIGS[model], tmp_path / name, seed)
    first, again, other = (checkpoint_bytes(tmp_path / name) for name in ("first", "again", "other"))
    assert first
    assert first == again
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize(("model", "config"), [("sam", "network.yaml"), ("lama", "config.yaml")])
def test_weights_fill_the_network_that_the_config_describes(model: str, config: str, tmp_path: Path) -> None:
    random_weights.write(model, CONFIGS[model], tmp_path, seed=0, dtype=torch.float16)
    assert (tmp_path / config).read_text() == (CONFIGS[model] / config).read_text()
    with safe_open(tmp_path / "weights.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118 - not a dict
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}


def test_diffusers_loads_every_parameter_of_the_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    random_weights.write("sd", CONFIGS["sd"], tmp_path, seed=0)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "pipeline")
    folder = tmp_path / "pipeline"
    for network, file, prefix in (
        (pipeline.unet, "unet/diffusion_pytorch_model.safetensors", ""),
        (pipeline.vae, "vae/diffusion_pytorch_model.safetensors", ""),
        (pipeline.text_encoder, "text_encoder/model.safetensors", "text_model."),
    ):
        with safe_open(folder / file, "pt") as weights:
            stored = {key.removeprefix(prefix): weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
        loaded = {key.removeprefix(prefix): value for key, value in network.state_dict().items()}
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(stored[key], loaded[key]) for key in stored)


def test_a_config_folder_without_its_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        random_weights.write("sam", tmp_path, tmp_path / "out", seed=0)


def test_demo_tokenizer_has_a_token_for_each_word_and_bytes_for_the_rest() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(CONFIGS["sd"] / "pipeline/tokenizer")
    for text in ("a red wooden ball", "purple striped mushroom", "cyan glass house"):
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    ids = tokenizer("Zürich 犬 #1").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "zürich 犬 # 1"
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_demo_pipeline_is_consistent_and_native_at_256() -> None:
    folder = CONFIGS["sd"] / "pipeline"
    unet, vae, text = (
        json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")
    )
    assert unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1) == 256
    assert unet["in_channels"] == 2 * vae["latent_channels"] + 1
    assert unet["cross_attention_dim"] == text["hidden_size"]
    assert text["vocab_size"] == len(json.loads((folder / "tokenizer/vocab.json").read_text()))


def test_full_size_configs_have_the_published_parameter_counts() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = SD2 / "pipeline"
    with torch.device("meta"):
        networks = (
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        )
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [865_925_124, 83_653_863, 340_387_840]
