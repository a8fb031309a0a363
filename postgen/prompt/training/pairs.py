"""Rows for training an enhancer with TRL: pairs for `SFTTrainer`, prompts for `GRPOTrainer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from postgen.errors import UserError, shown
from postgen.prompt.enhancer import PromptEnhancer
from postgen.prompt.guard import GuardConfig, check
from postgen.prompt.instructions import messages_for
from postgen.prompt.target import Target

_SEPARATOR = "\n"
"""Between prompt and completion of rows without messages."""


@dataclass(frozen=True, slots=True)
class SftPairs:
    """Rows for `trl.SFTTrainer`, and what was left out."""

    rows: list[dict[str, Any]]
    """Rows with `prompt` and `completion`, for `datasets.Dataset.from_list`."""
    refused: dict[str, int]
    """Reason -> number of pairs that were left out; `unchanged` are prompts that the enhancer does not change."""


def to_sft_pairs(
    source: Iterable[str | Mapping[str, Any]],
    enhancer: PromptEnhancer | None = None,
    *,
    target: Target | None = None,
    guard: GuardConfig | None = None,
    messages: bool = True,
) -> SftPairs:
    """Return pairs of short and enhanced prompts that pass the guard.

    Args:
        source: prompts, which `enhancer` rewrites; or rows with `prompt` and `enhanced_prompt`, such as those of
            another model or of people.
        enhancer: the teacher; None: `source` has rows with both texts.
        target: the video model; None: that of the enhancer, or a model of unknown length.
        guard: settings of the guard for rows.
        messages: whether prompts and completions are messages of a chat, as `ChatRewriter(..., examples=False)` sends
            them; otherwise they are texts, for models without a chat template.

    Raises:
        UserError: a row has no such texts, or no pair is left.

    >>> pairs = to_sft_pairs([{"prompt": "a red ball", "enhanced_prompt": "A ball."}, {"prompt": "a cat",
    ...     "enhanced_prompt": "A grey cat sleeps."}], messages=False)
    >>> pairs.rows, pairs.refused
    ([{'prompt': 'a cat\\n', 'completion': 'A grey cat sleeps.'}], {'red is missing': 1})
    """
    told: Counter[str] = Counter()
    rows = []
    given = list(source)
    if target is None:
        target = (enhancer.target if enhancer is not None else None) or Target()
    pairs = _pairs(given) if enhancer is None else _enhanced(given, enhancer)
    for original, text in pairs:
        verdict = check(original, text, target, guard or (enhancer.config.guard if enhancer else None))
        if not verdict.ok:
            told[verdict.problems[0]] += 1
        elif verdict.text == " ".join(original.split()):
            told["unchanged"] += 1
        else:
            rows.append(_row(original, verdict.text, target, messages))
    if not rows:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in told.most_common(3)) or "the source is empty"
        raise UserError(f"no pair of prompts is left for training ({reasons}): give other prompts or another enhancer")
    return SftPairs(rows, dict(told))


def to_rl_rows(
    source: Iterable[str | Mapping[str, Any]], *, target: Target | None = None, messages: bool = True
) -> list[dict[str, Any]]:
    """Return rows for `trl.GRPOTrainer`: the request to rewrite a prompt, and the prompt as `original_prompt`.

    Args:
        source: prompts, or rows with `prompt`; their other columns are passed on to the rewards.
        target: the video model.
        messages: as in `to_sft_pairs`.

    Raises:
        UserError: a row has no prompt, or there are no rows.
    """
    rows = []
    for number, given in enumerate(source):
        row = {"prompt": given} if isinstance(given, str) else dict(given)
        text = _text(row.pop("prompt", None), f"the prompt of row {number}")
        asked = messages_for(text, target or Target(), examples=False) if messages else text + _SEPARATOR
        rows.append({**row, "prompt": asked, "original_prompt": text})
    if not rows:
        raise UserError("there are no prompts to train with: give at least one")
    return rows


def _pairs(given: list[Any]) -> list[tuple[str, str]]:
    found = []
    for number, row in enumerate(given):
        if not isinstance(row, Mapping):
            raise UserError(
                f"row {number} must have prompt and enhanced_prompt, got {shown(row)}: or give an enhancer"
            )
        texts = [_text(row.get(name), f"{name} of row {number}") for name in ("prompt", "enhanced_prompt")]
        found.append((texts[0], texts[1]))
    return found


def _enhanced(given: list[Any], enhancer: PromptEnhancer) -> list[tuple[str, str]]:
    prompts = [
        _text(row.get("prompt") if isinstance(row, Mapping) else row, f"the prompt of row {number}")
        for number, row in enumerate(given)
    ]
    return [(each.original, each.text) for each in enhancer.enhance(prompts)] if prompts else []


def _row(original: str, text: str, target: Target, messages: bool) -> dict[str, Any]:
    if not messages:
        return {"prompt": original + _SEPARATOR, "completion": text}
    return {
        "prompt": messages_for(original, target, examples=False),
        "completion": [{"role": "assistant", "content": text}],
    }


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} must be a text that is not empty, got {shown(value)}")
    return value
