"""Prompt syntax of other programs (AUTOMATIC1111, ComfyUI, Compel, NovelAI, Midjourney), which has no effect here."""

import re
from collections.abc import Collection

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
# Only what nobody writes in prose: "(16:9)", "(see below)", "[sic]", "C++", "10:30" and "x < y" are none of it.
_PATTERNS = (
    rf"\([^()\n]{{0,200}}[^\s\d():]\s*:\s*{_NUMBER}\s*\)",  # (red:1.4)
    r"\([^()\n]{0,200}:\d*\.\d+\)",  # (style 2:1.4)
    r"(?<![\w.:])[^\W\d]{2,40}:\d*\.\d+(?![\w.:])",  # red:1.4
    r"\({2,9}[^()\n]{1,200}\){2,9}",  # ((red))
    r"\[{2,9}[^\[\]\n]{1,200}\]{2,9}",  # [[red]]
    r"\{{1,9}[^{}\n]{1,200}\}{1,9}",  # {red}, {red|blue}
    rf"\[[^\[\]\n]{{0,200}}:\s*{_NUMBER}\s*\]",  # [red:blue:0.5]
    r"\[[^\[\]\n|]{1,200}\|[^\[\]\n]{1,200}\]",  # [red|blue]
    r"<[a-zA-Z]\w{0,40}(?::[^<>\n]{1,200})?>|<[a-zA-Z][\w-]{0,60}>",  # <lora:name:1>, <embedding>
    r"\bembedding:\w[\w.-]{0,60}",
    r"\)[-+]{1,9}(?![\w+-])|\)\d*\.\d+",  # (red)++, (red)1.4
    r"\b[^\W\d_]{2,40}\+{2,9}(?!\w)|\b[^\W\d_]{2,40}-{2,9}(?=,|$)",  # red++, red--
    r"\)\.(?:blend|and|swap)\(",
    r"\w::[-+]?\d?",  # red::2
    r"(?<!\S)--[a-z]{1,12}\b",  # --ar 16:9
)
_SYNTAX = re.compile("|".join(_PATTERNS))
_KEYWORD = re.compile(r"\b(?:BREAK|AND)\b")
_WORD = re.compile(r"[^\W\d_]+")


def foreign_syntax(prompt: str, own: Collection[str] = ()) -> list[str]:
    """The pieces of the prompt that another program would not have read as text. own: what this tokenizer knows."""
    found = [match[0] for match in _SYNTAX.finditer(prompt) if match[0] not in own]
    for match in _KEYWORD.finditer(prompt):
        start, end = match.span()
        neighbours = _WORD.findall(prompt, max(start - 40, 0), start)[-1:] + _WORD.findall(prompt, end, end + 40)[:1]
        # In a text that is all capitals they are words like any other.
        if neighbours and not "".join(neighbours).isupper():
            found.append(match[0])
    return list(dict.fromkeys(found))
