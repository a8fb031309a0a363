"""The instructions with which language models rewrite prompts. Light to import."""

from __future__ import annotations

from postgen.prompt.target import Target

_SYSTEM = (
    "You rewrite short prompts for a text-to-video model. Keep every thing, colour, number, name, direction and quoted"
    " text of the prompt in its own words, and keep what belongs to what. Add how things look and move, the setting,"
    " the camera and the light. Do not add other main subjects, and do not say what is absent. {advice} Write at most"
    " {words} words. Answer with the rewritten prompt only."
)
_EXAMPLES = (
    (
        "two white cats on a sofa",
        "Two white cats sit close together on a soft sofa and slowly turn their heads. Static camera, medium shot,"
        " warm light from a window.",
    ),
    (
        "a boat leaves the harbour, anime",
        "A small wooden boat leaves the harbour and glides over calm water, anime style. The camera follows it from"
        " the pier in soft morning light.",
    ),
)


def messages_for(prompt: str, target: Target, *, examples: bool = True) -> list[dict[str, str]]:
    """Return the messages that ask a chat model to rewrite a prompt.

    Args:
        prompt: prompt of the user.
        target: the video model.
        examples: whether to add two examples, which small models need.
    """
    messages = [{"role": "system", "content": system_for(target)}]
    for short, long in _EXAMPLES if examples else ():
        messages += [{"role": "user", "content": short}, {"role": "assistant", "content": long}]
    return [*messages, {"role": "user", "content": prompt}]


def system_for(target: Target) -> str:
    """Return the system message for a video model."""
    return _SYSTEM.format(advice=target.style.advice, words=min(target.most_words, 120))
