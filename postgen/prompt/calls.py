"""The argument `prompt_enhancer=` of the drop-in pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from postgen.errors import UserError, shown


def enhanced_for_call(pipe: Any, setting: Any, prompt: Any) -> Any:
    """Return the prompt for one call of a pipeline.

    Args:
        pipe: the pipeline, for the length of the prompt and its style.
        setting: None, False or 0: the prompt is not changed. True: the template enhancer. A name as in
            `get_rewriter`; a `PromptEnhancer`; or any function from a list of prompts to a list of prompts.
        prompt: a prompt or a list of prompts; an empty prompt is not changed.

    Returns:
        A prompt for a prompt, a list for a list.

    Raises:
        UserError: there is no prompt, the setting has another type, or a function returns something else.
    """
    if setting is None or setting is False or (isinstance(setting, int) and setting == 0):
        return prompt
    single = isinstance(prompt, str)
    texts = [prompt] if single else prompt
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"prompt_enhancer needs prompt as a text or a list of texts, got {shown(prompt)}: omit prompt_enhancer"
            " with prompt_embeds"
        )
    enhance = _callable(pipe, setting)
    asked = [text for text in texts if text.strip()]
    answers = by_segment(enhance, asked, takes_segments(type(pipe)))
    right = isinstance(answers, list | tuple) and len(answers) == len(asked)
    if not right or not all(isinstance(text, str) and text.strip() for text in answers):
        raise UserError(f"prompt_enhancer must return {len(asked)} texts that are not empty, got {shown(answers)}")
    left = iter(answers)
    found = [next(left) if text.strip() else text for text in texts]
    return found[0] if single else found


def takes_segments(kind: type) -> bool:
    """Return whether pipelines of a class split a prompt at `|` into prompts of successive segments."""
    return "prompt_segments" in inspect.signature(kind.__call__).parameters


def by_segment(enhance: Callable[[list[str]], Any], texts: Sequence[str], segmented: bool) -> Any:
    """Return the enhanced texts; those of a segmented video keep their segments, each of which is enhanced.

    Args:
        enhance: function from a list of prompts to a list of prompts.
        texts: prompts that are not empty.
        segmented: whether `|` separates the segments of a prompt.

    Raises:
        UserError: there is not one answer for each segment.
    """
    if not texts:
        return []
    if not segmented:
        return enhance(list(texts))
    parts = [[part.strip() for part in text.split("|") if part.strip()] for text in texts]
    answers = enhance([part for row in parts for part in row])
    if not isinstance(answers, list | tuple) or len(answers) != sum(map(len, parts)):
        raise UserError(f"prompt_enhancer must return a text for each of {sum(map(len, parts))} segments")
    left = iter(answers)
    return [" | ".join(str(next(left)) for _ in row) for row in parts]


def _callable(pipe: Any, setting: Any) -> Any:
    from postgen.prompt.enhancer import PromptEnhancer

    if setting is True or isinstance(setting, str):
        setting = PromptEnhancer("template" if setting is True else setting)
    if isinstance(setting, PromptEnhancer):
        return setting.for_pipeline(pipe)
    if not callable(setting):
        raise UserError(
            "prompt_enhancer must be True, a name, a PromptEnhancer or a function from a list of prompts to a list of"
            f" prompts, got {shown(setting)}"
        )
    return setting
