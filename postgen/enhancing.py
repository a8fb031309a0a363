"""Enhance the prompts of requests before the video model is loaded: `--enhance-prompt` of `generate` and `compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from postgen.errors import SettingError

if TYPE_CHECKING:
    from postgen.generate import Job


def enhanced(job: Job) -> Job:
    """Return a job with its enhanced prompt; a job without an enhancer, or with an enhanced prompt, is unchanged.

    Raises:
        UserError: an error of `enhanced_jobs`.
    """
    return enhanced_jobs([job])[0]


def enhanced_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs with their enhanced prompts. Each enhancer is loaded once, and its memory is freed afterwards.

    The result depends on the prompt and not on the seed of the video, so that all videos of a prompt are comparable.

    Raises:
        UserError: an enhancer is unknown, cannot be loaded or cannot be asked; or the pipeline takes no text.
    """
    from postgen.prompt.calls import by_segment, takes_segments

    waiting: dict[tuple[str, str, str], list[int]] = {}
    for place, job in enumerate(jobs):
        name = job.config.enhance_prompt
        if name is None or job.config.enhanced_prompt is not None:
            continue
        if "prompt" not in job.facts.arguments:
            raise SettingError("enhance_prompt", f": omit it, {job.facts.pipeline} takes no text", before="wrong ")
        waiting.setdefault((name, job.facts.source, job.facts.pipeline), []).append(place)
    found = list(jobs)
    for (name, source, pipeline), places in waiting.items():
        first = jobs[places[0]]
        import diffusers  # only here, because it takes seconds

        enhancer = _enhancer(name, source, pipeline, first.config.device)
        asked = [jobs[place].config.prompt for place in places]
        kind = getattr(diffusers, pipeline, None)
        texts = by_segment(enhancer, asked, kind is not None and takes_segments(kind))
        release = getattr(enhancer.rewriter, "release", None)
        if release is not None:
            release()
        for place, text in zip(places, texts, strict=True):
            config = dataclasses.replace(jobs[place].config, enhanced_prompt=text)
            found[place] = dataclasses.replace(jobs[place], config=config)
    return found


def _enhancer(name: str, source: str, pipeline: str, device: str) -> Any:
    """Return the enhancer of a name for a model; answers of language models are kept in the cache folder."""
    from postgen.prompt import EnhancerConfig, PromptEnhancer, get_rewriter
    from postgen.prompt.cache import NAME, cache_folder
    from postgen.prompt.target import target_of_model

    rewriter = get_rewriter(name, device=device)
    asks = name == "smollm2" or name.startswith(("chat:", "api:"))
    return PromptEnhancer(
        rewriter,
        EnhancerConfig(fallback="template"),
        target=target_of_model(source, pipeline),
        cache=cache_folder() / NAME if asks else None,
    )
