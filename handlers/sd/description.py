"""Stable Diffusion inpainting, described without being loaded."""

from typing import NamedTuple

from contract.description import Choice, Description, Field, Flag, Integer, Number, Structure
from handlers.requests.fields import FEATHER, IMAGE, MASK, OUTPUT_FORMAT, RESULT

PROMPT = Field("prompt", "text", "What to paint.")
NEGATIVE_PROMPT = Field("negative_prompt", "text", "What to avoid.", required=False)


class Preset(NamedTuple):
    """What a quality stands for where a request does not say it. scheduler: one of SCHEDULER, or "": the archive's."""

    scheduler: str
    steps: int


# Chosen by what docs/schedulers.md measured.
PRESETS = {"draft": Preset("dpmpp_2m", 10), "standard": Preset("", 30), "best": Preset("", 50)}
QUALITY = Choice(
    "quality",
    "standard",
    tuple(PRESETS),
    "How many steps of which scheduler, where the request does not say: "
    + ", ".join(f"{name} {steps} of {scheduler or 'its own'}" for name, (scheduler, steps) in PRESETS.items())
    + ".",
)
STEPS = Integer("num_inference_steps", None, 1, 150, "More are slower and finer. The quality's if absent.")
GUIDANCE = Number(
    "guidance_scale",
    None,
    0,
    50,
    "How closely to follow the prompt; 1 or less: without. If absent the archive's own: 7.5, demo 3.",
)
STRENGTH = Number("strength", 1.0, 0, 1, "How much of what is there to forget; 1: all of it.")
SEED = Integer("seed", -1, -1, 2**63 - 1, "The same seed gives the same picture; -1: a random one.")
# The names that other programs use.
SCHEDULER = Choice(
    "scheduler",
    None,
    ("ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_karras", "unipc"),
    "The quality's if absent.",
)
VARIANTS = Integer("variants", 1, 1, 4, "Pictures with seeds seed, seed + 1, ...; more than one need JSON.")
ANY, TRANSPARENCY = "any", "transparency"
MASK_BY = Choice(
    "mask_by",
    ANY,
    (ANY, TRANSPARENCY),
    "What a mask marks with: white, colours, or a hole in the picture; or by its transparency alone, so that what is"
    " fully transparent is marked, whatever its colours.",
)
SIZE = Structure(
    "size",
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    "[width, height] that the upright picture must have, if it matters.",
)
EMBED_PARAMETERS = Flag("embed_parameters", False, "Writes prompts and parameters into a PNG's text chunk.")

DESCRIPTION = Description(
    title="Stable Diffusion inpainting",
    summary="picture, mask and prompt → object replaced",
    fields=(IMAGE, MASK, PROMPT, NEGATIVE_PROMPT),
    arguments=(
        QUALITY, STEPS, GUIDANCE, STRENGTH, SEED, SCHEDULER, VARIANTS, FEATHER, OUTPUT_FORMAT, RESULT,
        MASK_BY, SIZE, EMBED_PARAMETERS,
    ),
    imports=(
        "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip", "diffusers.guiders",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint",
        # A scheduler asks for all those that it could be exchanged for.
        "diffusers.schedulers.scheduling_ddpm", "diffusers.schedulers.scheduling_deis_multistep",
        "diffusers.schedulers.scheduling_dpmsolver_singlestep", "diffusers.schedulers.scheduling_edm_euler",
        "diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete",
        "diffusers.schedulers.scheduling_k_dpm_2_discrete", "diffusers.schedulers.scheduling_unipc_multistep",
    ),
    converters={"diffusers": "handlers.sd.convert:convert"},
    random_weights="handlers.sd.random_weights:write",
    demo="demo",
)  # fmt: skip
