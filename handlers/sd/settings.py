"""How to paint: what a request says beside picture and mask, checked and completed."""

import secrets
from typing import Any, NamedTuple

import diffusers

from handlers.limits import LIMITS
from handlers.payload import BadRequest, Request
from handlers.reply import OUTPUT_FORMATS
from handlers.sd.syntax import foreign_syntax

# The names that other programs use -> diffusers' class and what it needs to be told.
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

# What is drawn, and the seeds of all its variants, a float holds exactly: JavaScript reads every number as one.
_RANDOM_SEEDS = 2**53 - LIMITS.max_variants


class Settings(NamedTuple):
    """What to paint and how. All but the prompts are from gen_args; limits are in handlers.limits.

    prompt, negative_prompt: text. steps: `num_inference_steps`, from 1. strength: 0..1.
    guidance_scale: 0..50; absent, `handler.guidance_scale` of the archive's model-config.yaml, else 7.5.
    seed: from 0; absent or -1 is a random one. scheduler: a key of SCHEDULERS, or "" for the archive's own.
    variants: how many pictures, from 1, with seed, seed + 1, and so on.
    feather: px over which the paint fades in, inside the mask; 0 by default, for fading brings back what was there.
    output_format: a value of OUTPUT_FORMATS. embed_parameters: whether a PNG's text chunk says them and the prompts.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 30
    guidance_scale: float = 7.5
    strength: float = 1.0
    seed: int = 0
    scheduler: str = ""
    variants: int = 1
    feather: int = 0
    output_format: str = "image/png"
    embed_parameters: bool = False

    @classmethod
    def parse(cls, request: Request, default_guidance: float) -> "Settings":
        """Reads prompt, negative_prompt and gen_args; raises BadRequest. default_guidance: the archive's own."""
        arguments, default = request.arguments(), cls("")
        seed = arguments.integer("seed", -1, -1, LIMITS.max_seed)
        settings = cls(
            prompt=request.text("prompt"),
            negative_prompt=request.text("negative_prompt", ""),
            steps=arguments.integer("num_inference_steps", default.steps, 1, LIMITS.max_steps),
            guidance_scale=arguments.number("guidance_scale", default_guidance, 0, 50),
            strength=arguments.number("strength", default.strength, 0, 1),
            seed=secrets.randbelow(_RANDOM_SEEDS) if seed < 0 else seed,
            scheduler=arguments.choice("scheduler", default.scheduler, tuple(SCHEDULERS)),
            variants=arguments.integer("variants", default.variants, 1, LIMITS.max_variants),
            feather=arguments.integer("feather", default.feather, 0, LIMITS.max_feather),
            output_format=OUTPUT_FORMATS[arguments.choice("output_format", "png", tuple(OUTPUT_FORMATS))],
            embed_parameters=arguments.flag("embed_parameters", default.embed_parameters),
        )
        arguments.finish()
        settings._check(request)
        return settings

    def of_variant(self, index: int) -> "Settings":
        """These settings with the seed of the variant; the one after the largest is 0."""
        return self._replace(seed=(self.seed + index) % (LIMITS.max_seed + 1))

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
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if found := foreign_syntax(text, own):
                shown = ", ".join(piece if len(piece) <= 40 else piece[:37] + "..." for piece in found[:3])
                request.warnings.append(f"{name}: weights and the like have no effect; read as plain text: {shown}")

    def warn_of_cut(self, request: Request, tokenizer: Any) -> None:
        """Says which words lie past the text encoder's limit and so have no effect."""
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            ids = tokenizer(text, truncation=False, verbose=False).input_ids
            limit = tokenizer.model_max_length
            if len(ids) > limit:
                # The last place is the end-of-text token's.
                lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
                request.warnings.append(f"{name} is longer than {limit} tokens; this had no effect: {lost[:300]}")

    def _check(self, request: Request) -> None:
        # As diffusers counts them.
        if int(self.steps * self.strength) < 1:
            raise BadRequest(
                f"gen_args.num_inference_steps = {self.steps} times gen_args.strength = {self.strength:g} leaves no"
                " step to run: raise either until at least one remains",
                "gen_args.strength",
            )
        if self.guidance_scale <= 1 and self.negative_prompt:
            request.warnings.append("guidance_scale of 1 or less runs without guidance: negative_prompt had no effect")
