"""How to paint: what a request says beside picture and mask, checked and completed."""

import secrets
from dataclasses import dataclass
from typing import Any

import diffusers

from handlers.payload import BadRequest, Request

MAX_STEPS = 150
MAX_SEED = 2**63 - 1

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


@dataclass(frozen=True)
class Settings:
    """prompt, negative_prompt: text. steps: 1..MAX_STEPS. guidance_scale: 0..50. strength: 0..1. seed: 0..MAX_SEED.
    scheduler: a key of SCHEDULERS, or "" for the archive's own."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 30
    guidance_scale: float = 7.5
    strength: float = 1.0
    seed: int = 0
    scheduler: str = ""

    @classmethod
    def parse(cls, request: Request) -> "Settings":
        """Reads prompt, negative_prompt and gen_args; an absent seed, or -1, becomes a random one."""
        arguments = request.arguments()
        seed = arguments.integer("seed", -1, -1, MAX_SEED)
        settings = cls(
            prompt=request.text("prompt"),
            negative_prompt=request.text("negative_prompt", ""),
            steps=arguments.integer("num_inference_steps", cls.steps, 1, MAX_STEPS),
            guidance_scale=arguments.number("guidance_scale", cls.guidance_scale, 0, 50),
            strength=arguments.number("strength", cls.strength, 0, 1),
            seed=secrets.randbelow(MAX_SEED + 1) if seed < 0 else seed,
            scheduler=arguments.choice("scheduler", cls.scheduler, tuple(SCHEDULERS)),
        )
        arguments.finish()
        settings._check(request)
        return settings

    def make_scheduler(self, default: Any) -> Any:
        """A new scheduler with the noise schedule of the archive's own; never a used one, for they carry state."""
        kind, options = SCHEDULERS[self.scheduler] if self.scheduler else (type(default).__name__, {})
        return getattr(diffusers, kind).from_config(default.config, **options)

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
