"""How to paint: what a request says beside picture and mask, checked and completed."""

import re
import secrets
from collections.abc import Collection
from typing import Any, NamedTuple

import diffusers

from handlers.pictures.picture import Picture
from handlers.requests.fields import FEATHER, OUTPUT_FORMAT, PATCH, RESULT
from handlers.requests.payload import BadRequest, Request
from handlers.requests.reply import OUTPUT_FORMATS
from handlers.sd.description import (
    EMBED_PARAMETERS,
    GUIDANCE,
    MASK_BY,
    NEGATIVE_PROMPT,
    PRESETS,
    PROMPT,
    QUALITY,
    SCHEDULER,
    SEED,
    SIZE,
    STEPS,
    STRENGTH,
    TRANSPARENCY,
    VARIANTS,
)
from handlers.sd.syntax import foreign_syntax

# The names of description.SCHEDULER -> diffusers' class and what it needs to be told.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

DEFAULT_GUIDANCE = 7.5  # as Stable Diffusion's own; `handler.guidance_scale` in model-config.yaml replaces it

# Words that every prompt may have around what it is about.
_FILLERS = frozenset(
    ["a", "an", "the", "one", "some", "of", "and", "with", "in", "on", "at", "photo", "photograph", "picture", "image"]
)

# What is drawn, and the seeds of all its variants, a float holds exactly: JavaScript reads every number as one.
_RANDOM_SEEDS = 2**53 - VARIANTS.high


class PaintSettings(NamedTuple):
    """What to paint and how, as description.py says each. seed: drawn where the request has none.

    scheduler: a key of SCHEDULERS, or "" for the archive's own. output_format: a value of OUTPUT_FORMATS.
    patch: whether to reply with the rectangle around the mask alone. by_transparency: as Request.mask has it.
    size: [width, height] that the picture must have, if any.
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float
    strength: float
    seed: int
    scheduler: str
    variants: int
    feather: int
    output_format: str
    patch: bool
    by_transparency: bool
    size: list[int] | None
    embed_parameters: bool

    @classmethod
    def parse(cls, request: Request, default_guidance: float = DEFAULT_GUIDANCE) -> "PaintSettings":
        """Reads prompt, negative_prompt and gen_args; raises BadRequest. default_guidance: the archive's own."""
        arguments = request.arguments()
        seed = arguments.integer(SEED)
        preset = PRESETS[arguments.choice(QUALITY)]
        settings = cls(
            prompt=request.text(PROMPT.name),
            negative_prompt=request.text(NEGATIVE_PROMPT.name, ""),
            steps=arguments.integer(STEPS, preset.steps),
            guidance_scale=arguments.number(GUIDANCE, default_guidance),
            strength=arguments.number(STRENGTH),
            seed=secrets.randbelow(_RANDOM_SEEDS) if seed < 0 else seed,
            scheduler=arguments.choice(SCHEDULER, preset.scheduler),
            variants=arguments.integer(VARIANTS),
            feather=arguments.integer(FEATHER),
            output_format=OUTPUT_FORMATS[arguments.choice(OUTPUT_FORMAT)],
            patch=arguments.choice(RESULT) == PATCH,
            by_transparency=arguments.choice(MASK_BY) == TRANSPARENCY,
            size=arguments.structure(SIZE),
            embed_parameters=arguments.flag(EMBED_PARAMETERS),
        )
        arguments.finish()
        settings._check(request)
        return settings

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt is computed beside the prompt, as diffusers decides it."""
        return self.guidance_scale > 1

    @property
    def prompts(self) -> dict[str, str]:
        """Both, by their names in a request."""
        return {"prompt": self.prompt, "negative_prompt": self.negative_prompt}

    def of_variant(self, index: int) -> "PaintSettings":
        """These settings with the seed of the variant; the one after the largest is 0."""
        return self._replace(seed=(self.seed + index) % (SEED.high + 1))

    def parameters(self, default_scheduler: Any) -> dict[str, Any]:
        """gen_args that give this picture again; a scheduler that has no name here goes by its class."""
        own = type(default_scheduler).__name__
        known = {kind: name for name, (kind, options) in SCHEDULERS.items() if "use_karras_sigmas" not in options}
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "strength": self.strength,
            "seed": self.seed,
            "scheduler": self.scheduler or known.get(own, own),
            "feather": self.feather,
        }

    def make_scheduler(self, default: Any) -> Any:
        """A new scheduler with the noise schedule of the archive's own; never a used one, for they carry state."""
        kind, options = SCHEDULERS[self.scheduler] if self.scheduler else (type(default).__name__, {})
        return getattr(diffusers, kind).from_config(default.config, **options)

    def warn_of_syntax(self, request: Request, tokenizer: Any) -> None:
        """Says what of the prompts looks like other programs' syntax, which is plain text here."""
        own = tuple(tokenizer.get_added_vocab())
        for name, text in self.prompts.items():
            if found := foreign_syntax(text, own):
                shown = ", ".join(piece if len(piece) <= 40 else piece[:37] + "..." for piece in found[:3])
                request.warnings.append(f"{name}: weights and the like have no effect; read as plain text: {shown}")

    def warn_of_cut(self, request: Request, tokenizer: Any) -> None:
        """Says which words lie past the text encoder's limit and so have no effect."""
        for name, text in self.prompts.items():
            ids = tokenizer(text, truncation=False, verbose=False).input_ids
            limit = tokenizer.model_max_length
            if len(ids) > limit:
                # The last place is the end-of-text token's.
                lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
                request.warnings.append(f"{name} is longer than {limit} tokens; this had no effect: {lost[:300]}")

    def warn_of_unknown(self, request: Request, vocabulary: Collection[str]) -> None:
        """Says which words have no meaning for a model that was taught these and no others."""
        for name, text in self.prompts.items():
            words = dict.fromkeys(re.findall(r"[^\W_]+", text.lower()))
            if unknown := [word for word in words if word not in vocabulary and word not in _FILLERS]:
                shown = ", ".join(word[:40] for word in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
                known = ", ".join(vocabulary)
                request.warnings.append(f"{name}: this model does not know {shown}. It knows these words: {known}")

    def check_size(self, picture: Picture) -> None:
        """Raises BadRequest where the picture must have another."""
        if self.size not in (None, list(picture.size)):
            name, (width, height) = f"gen_args.{SIZE.name}", picture.size
            raise BadRequest(f"{name} must be the picture's own, {width}x{height}: nothing is resized", name)

    def _check(self, request: Request) -> None:
        # As diffusers counts them.
        if int(self.steps * self.strength) < 1:
            raise BadRequest(
                f"gen_args.num_inference_steps = {self.steps} times gen_args.strength = {self.strength:g} leaves no"
                " step to run: raise either until at least one remains",
                "gen_args.strength",
            )
        if not self.is_guided and self.negative_prompt:
            request.warnings.append("guidance_scale of 1 or less runs without guidance: negative_prompt had no effect")
