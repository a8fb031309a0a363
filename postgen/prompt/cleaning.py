"""Reduce the answer of a language model to the prompt in it: without reasoning, markup, labels and remarks."""

from __future__ import annotations

import html
import json
import re
from typing import Any

_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[\w-]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_TAG = re.compile(r"<\|[^|<>]*\|>|</?[A-Za-z][\w-]*(?:\s[^<>]*)?/?>")
_OPENING = re.compile(
    r"^(?:(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|great|yes)\s*[,:!.]\s*)?"
    r"(?:(?:here(?:'s|\u2019s| is| are| it is| you go)|below is|this is|the following is)\b[^\n:]{0,120}:\s*)?",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^(?:the )?(?:enhanced|rewritten|improved|expanded|refined|detailed|final|revised|new|better|video)?[ _-]*"
    r"(?:video[ _-]*)?(?:prompt|description|caption|version|output|answer|result|rewrite)"
    r"(?:\s*:\s*|\s+[-\u2013\u2014]\s+)",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"^(?:\(?(?:note|notes|explanation|reasoning|rationale|changes)\b\s*:|i hope\b|i have\b|i've\b|let me know\b|"
    r"feel free\b|this (?:prompt|description|version|rewrite)\b|if you\b.*\bi can\b|would you like\b)",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^\s*(?:[-*+\u2022]\s+|\d{1,2}[.)]\s+|#{1,6}\s+|>\s+)")
_MARKS = re.compile(r"\*\*|__|`|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")
_RULE = re.compile(r"\s*(?:[-*_=~]\s*){3,}")
_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]+)\]\([^)\s]*\)")
_PAIRS = {'"': '"', "'": "'", "\u201c": "\u201d", "\u00ab": "\u00bb"}
_KEYS = ("prompt", "enhanced_prompt", "rewritten_prompt", "video_prompt", "description", "caption", "output", "text")
_REFUSAL = re.compile(
    r"\b(?:i(?:'|\u2019)?m (?:sorry|unable|afraid|not able)|i am (?:sorry|unable|not able)"
    r"|i (?:can(?:'|\u2019)t|cannot|can not) "
    r"|i (?:won(?:'|\u2019)t|will not) |as an? (?:ai|language model)|(?:ai|language) (?:language )?model"
    r"|against (?:my|the) (?:guidelines|policy)|(?:sorry|apologies|apologize)\b.{0,40}\b(?:cannot|can't|unable))",
    re.IGNORECASE,
)
_META = re.compile(
    r"\b(?:(?:enhanced|rewritten|improved|original|user(?:'|\u2019)?s?(?:'s)?|following|this|the|your) prompt"
    r"|rewrit(?:e|es|ten|ing) (?:the|this|it)|text-to-video|word count|words or (?:fewer|less)"
    r"|\d+ (?:words|tokens)\b)",
    re.IGNORECASE,
)


def clean(answer: str) -> str:
    """Return the prompt in the answer of a language model, in one line; empty if there is none.

    Reasoning (`<think>`), code fences, a JSON object around the prompt, tags, Markdown, labels ("Enhanced prompt:"),
    openings ("Sure, here is ...:"), remarks after the prompt and quotation marks around it are removed.

    >>> clean('Sure! Here is the prompt:\\n\\n**"A red ball rolls left."**\\n\\nNote: I kept the colour.')
    'A red ball rolls left.'
    """
    text = _THOUGHT.sub(" ", answer)
    text = re.split(r"</think(?:ing)?>|\[/INST\]", text, flags=re.IGNORECASE)[-1]
    if fenced := _FENCE.search(text):
        text = fenced[1]
    text = _from_json(text.strip())
    text = html.unescape(_TAG.sub(" ", _LINK.sub(r"\1", _PICTURE.sub(" ", text))))
    lines: list[str] = []
    for line in text.splitlines():
        if _RULE.fullmatch(line):
            continue
        line = _MARKS.sub("", _BULLET.sub("", line)).strip()
        if not lines:
            line = _LABEL.sub("", _OPENING.sub("", line).strip()).strip()
        if lines and _REMARK.match(line):
            break
        if line:
            lines.append(line)
    text = "".join(c if c.isprintable() else " " for c in " ".join(lines))
    return _unquoted(" ".join(text.split()))


def is_refusal(text: str) -> bool:
    """Return whether a text contains words in which a language model refuses or speaks of itself.

    >>> is_refusal("I'm sorry, but I cannot help with that."), is_refusal("a dog runs")
    (True, False)
    """
    return _REFUSAL.search(text) is not None


def is_meta(text: str) -> bool:
    """Return whether a text speaks about a prompt instead of a video.

    >>> is_meta("The prompt shows a dog"), is_meta("a dog runs")
    (True, False)
    """
    return _META.search(text) is not None


def _from_json(text: str) -> str:
    """Return the prompt of a JSON value with one of the usual keys, or of a list of one; else the text unchanged."""
    if not text.startswith(("{", "[")):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    given = _prompt_in(found)
    return text if given is None else given


def _prompt_in(found: Any, depth: int = 3) -> str | None:
    """Return the prompt in a JSON value, up to a depth; None if there is none, or more than one."""
    if isinstance(found, str):
        return found
    if not depth:
        return None
    if isinstance(found, list):
        return _prompt_in(found[0], depth - 1) if len(found) == 1 else None
    if not isinstance(found, dict):
        return None
    return next((text for key in _KEYS if (text := _prompt_in(found.get(key), depth - 1)) is not None), None)


def _unquoted(text: str) -> str:
    """Remove quotation marks around a whole text, but not those of a quoted text at its beginning or end."""
    while len(text) > 1 and _PAIRS.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
