"""What a request says of how to paint, before any model sees it."""

from typing import Any

import pytest

from handlers.requests.payload import BadRequest, Request
from handlers.sd.description import PRESETS, QUALITY, SEED, VARIANTS
from handlers.sd.settings import PaintSettings
from handlers.sd.syntax import foreign_syntax


class Tokenizer:
    def get_added_vocab(self) -> dict[str, int]:
        return {"<cat-toy>": 49408}


@pytest.mark.parametrize("drawn", [0, 1, -1])
def test_a_drawn_seed_is_one_that_javascript_reads_exactly(monkeypatch: pytest.MonkeyPatch, drawn: int) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda bound: range(bound)[drawn])
    settings = PaintSettings.parse(Request({"prompt": "x", "gen_args": {"variants": VARIANTS.high}}), 7.5)
    seeds = [settings.of_variant(index).seed for index in range(settings.variants)]
    assert max(seeds) < 2**53
    assert [int(float(seed)) for seed in seeds] == seeds == list(range(seeds[0], seeds[0] + VARIANTS.high))


def test_a_clients_own_seed_may_be_larger() -> None:
    settings = PaintSettings.parse(Request({"prompt": "x", "gen_args": {"seed": SEED.high}}), 7.5)
    assert settings.seed == SEED.high


@pytest.mark.parametrize("quality", ["draft", "standard", "best", None])
def test_a_quality_stands_for_scheduler_and_steps_where_none_are_named(quality: str | None) -> None:
    def parse(**gen_args: Any) -> PaintSettings:
        named = {} if quality is None else {"quality": quality}
        return PaintSettings.parse(Request({"prompt": "x", "gen_args": named | gen_args}))

    preset = PRESETS[quality or "standard"]
    assert (parse().scheduler, parse().steps) == preset
    assert (parse(num_inference_steps=7).scheduler, parse(num_inference_steps=7).steps) == (preset.scheduler, 7)
    assert (parse(scheduler="heun").scheduler, parse(scheduler="heun").steps) == ("heun", preset.steps)


def test_a_quality_costs_more_the_better_it_is_and_the_default_is_the_archives_own() -> None:
    draft, standard, best = (PRESETS[name] for name in QUALITY.choices)
    assert draft.steps < standard.steps < best.steps
    assert standard.scheduler == ""
    with pytest.raises(BadRequest, match="draft, standard, best"):
        PaintSettings.parse(Request({"prompt": "x", "gen_args": {"quality": "fine"}}))


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red:1.4) ball", "a (red ball: .8)", "((x)) y", "(((very red)))", "[[x]]", "<lora:x:1> dog",
        "an <embedding>", "a cat BREAK a dog", "a cat AND a dog", "red:1.3 ball", "(red)1.4", "(red)++", "red++, ball",
        "[cat:dog:0.5]",
        "[cat|dog]", "{cat|dog}", "{{cat}}", "dog::2 cat", "a dog --ar 16:9", "('a', 'b').blend(1, 0.5)",
        "embedding:name",    ],
)  # fmt: skip
def test_syntax_of_other_programs_ends_in_a_warning(prompt: str) -> None:
    for name in ("prompt", "negative_prompt"):
        request = Request({"prompt": ""} | {name: prompt})
        PaintSettings.parse(request, 7.5).warn_of_syntax(request, Tokenizer())
        (warning,) = request.warnings
        assert warning.startswith(f"{name}: ")
        assert "no effect" in warning


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo (16:9)", "a meeting at 10:30", "(John 3:16)", "[sic]", "a dog [1]", "a C++ book", "x < y > z",
        "i <3 you", "CATS AND DOGS", "a dog (see below), red", "ratio 4:3", "a dog -- running",
        "he said: 2 dogs (note: red)",
        "a (very nice) dog", "smile :) and :-)", "(1.5)", "well-known, semi-", "AND", "f/1.8, 50 mm", "a <cat-toy>",
    ],
)  # fmt: skip
def test_prose_does_not(prompt: str) -> None:
    request = Request({"prompt": prompt})
    PaintSettings.parse(request, 7.5).warn_of_syntax(request, Tokenizer())
    assert request.warnings == []


def test_a_warning_of_syntax_is_short() -> None:
    request = Request({"prompt": "(" + "a" * 190 + ":1.4) " + " ".join(f"(a{number}:1.4)" for number in range(900))})
    PaintSettings.parse(request, 7.5).warn_of_syntax(request, Tokenizer())
    assert len(request.warnings[0]) < 300


WORDS = ["red", "ball", "wooden", "moon"]


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red ball", ""), ("A Photo of the RED, wooden-ball!", ""), ("", ""), ("  ,.  ", ""),
        ("a ball and a moon", ""), ("a hamster", "hamster"),
        ("a red hamster on a sofa, red sofa", "hamster, sofa"), ("balls", "balls"),
        ("eine rote Kugel", "eine, rote, kugel"), ("\u732b", "\u732b"), ("Fußball_red", "fußball"),
        ("x" * 99, "x" * 40), ("1 2 3 4 5 6 7", "1, 2, 3, 4, 5, ..."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_words_that_the_model_was_not_taught_are_named_with_those_that_it_was(
    name: str, prompt: str, unknown: str
) -> None:
    request = Request({"prompt": ""} | {name: prompt})
    PaintSettings.parse(request, 7.5).warn_of_unknown(request, WORDS)
    told = f"{name}: this model does not know {unknown}. It knows these words: red, ball, wooden, moon"
    assert request.warnings == ([told] if unknown else [])


@pytest.mark.parametrize(
    "piece", ["(", "(a", "[:", "<a:", "a", "a:", "((a", "{", " BREAK", "+", "(a: ", "(:1 ", "-", ")."]
)
def test_no_prompt_takes_long(piece: str) -> None:
    """Where a search is quadratic this takes minutes."""
    foreign_syntax(piece * 20_000)
