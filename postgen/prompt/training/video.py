"""Reward of an enhanced prompt by the video that a frozen generator makes from it, at a low cost per video."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, check_number, first_line, named_error, shown
from postgen.prompt.cache import PromptCache, key_of
from postgen.prompt.cleaning import clean
from postgen.prompt.training.answers import answer_of, originals_of
from postgen.rewards import RewardRunner
from postgen.training.digests import weights_digest

_log = logging.getLogger(__name__)
_NO_COLUMNS = frozenset(
    (
        "completion_ids",
        "trainer_state",
        "environments",
        "prompt",
        "prompts",
        "completions",
        "fps",
        "latents",
        "must_score",
    )
)
"""Arguments of TRL and of `RewardRunner` that are no columns of the data set."""
_CALL = ("num_inference_steps", "num_frames", "height", "width", "guidance_scale")


@dataclass(slots=True)
class Counts:
    """What a `VideoGenerationReward` has done."""

    videos: int = 0
    """Number of videos made."""
    cached: int = 0
    """Number of scores from the cache, including repetitions in one batch."""
    failed: int = 0
    """Number of answers without a score: empty, or the pipeline or every reward failed."""


class VideoGenerationReward:
    """Reward function for `trl.GRPOTrainer`, unchanged: scores of the video of each rewritten prompt.

    All rewrites of one `original_prompt` start from the same noise, so that their videos differ by the prompt alone.
    The rewards receive the original prompt and not the rewrite, so that a rewrite gains nothing by promising less.

    Args:
        pipeline: a text-to-video pipeline of diffusers on its device; or a folder, Hub id or `embedded`, which is
            loaded.
        rewards: one or several inputs of `postgen.rewards.get_reward`.
        weights: one per reward; None: 1 for each.
        num_inference_steps: denoising steps of a preview; few are enough to rank prompts.
        num_frames: frames of a preview; None: the default of the pipeline, as for the next three.
        height: height in pixels.
        width: width in pixels.
        guidance_scale: scale of classifier-free guidance.
        fps: frame rate that the rewards assume.
        seed: seed of the run, from 0.
        batch_size: number of videos in one call of the pipeline.
        cache: file of the scores, which later runs and other processes use too; None: in memory.
        call: further arguments of the call of the pipeline, such as a negative prompt.
        name: name of the reward in logs.

    Raises:
        UserError: a reward is unknown, a number is out of range, or the pipeline cannot be loaded.
    """

    def __init__(
        self,
        pipeline: Any,
        rewards: Any,
        *,
        weights: Sequence[float] | None = None,
        num_inference_steps: int = 8,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        fps: float = 8.0,
        seed: int = 0,
        batch_size: int = 1,
        cache: PromptCache | str | Path | None = None,
        call: Mapping[str, Any] | None = None,
        name: str = "video",
    ) -> None:
        given = locals()
        self.settings = {key: given[key] for key in _CALL if given[key] is not None}
        for key, value in self.settings.items():
            check_number(key, value, 0 if key == "guidance_scale" else 1, 1e6, whole=key != "guidance_scale")
        check_number("fps", fps, 0.01, 1000)
        check_number("seed", seed, 0, 2**31 - 1, whole=True)
        check_number("batch_size", batch_size, 1, 4096, whole=True)
        self.fps, self.seed, self.batch_size, self.call = fps, seed, batch_size, dict(call or {})
        self.runner = RewardRunner(rewards, weights)
        self.cache = cache if isinstance(cache, PromptCache) else PromptCache(cache)
        self.counts, self.__name__ = Counts(), name
        self.pipeline = _loaded(pipeline) if isinstance(pipeline, str | Path) else pipeline
        if not callable(self.pipeline):
            raise UserError(f"pipeline must be a pipeline of diffusers or its folder, got {shown(pipeline)}")
        self._generator = _fingerprint(self.pipeline)
        self._warned: set[str] = set()

    def __call__(
        self,
        prompts: Any,
        completions: Sequence[Any],
        *,
        original_prompt: Sequence[str] | None = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return one score per completion; None for one without a score.

        Raises:
            UserError: the column `original_prompt` is missing or wrong, or a column that a reward needs is missing.
        """
        originals = originals_of(original_prompt, len(completions), self.__name__)
        texts = [clean(answer_of(answer)) for answer in completions]
        rest = {key: values for key, values in columns.items() if key not in _NO_COLUMNS and values is not None}
        for reward in self.runner.rewards:
            reward.check_columns(rest)
        rows = [{key: values[place] for key, values in rest.items()} for place in range(len(texts))]
        keys = [self._key(*row) for row in zip(texts, originals, rows, strict=True)]
        found: dict[str, dict[str, float]] = {}
        left: dict[str, int] = {}
        for place, key in enumerate(keys):
            if (stored := self.cache.get(key)) is not None:
                found[key] = json.loads(stored)
            elif texts[place]:
                left.setdefault(key, place)
        made = len(left)
        todo = list(left.values())
        for first in range(0, len(todo), self.batch_size):
            places = todo[first : first + self.batch_size]
            self._score(places, texts, originals, rows, keys, found)
        scores = [found.get(key, {}).get("total") for key in keys]
        self.counts.failed += scores.count(None)
        self.counts.cached += len(scores) - scores.count(None) - sum(key in found for key in left)
        self._tell(log_metric, log_extra, [found.get(key) for key in keys], made)
        return scores

    def seed_for(self, original: str) -> int:
        """Return the seed of the noise for all rewrites of a prompt."""
        digest = hashlib.sha256(f"{self.seed}:{original}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def _key(self, text: str, original: str, row: Mapping[str, Any]) -> str:
        return key_of(
            {
                "text": text,
                "original": original,
                "seed": self.seed,
                "call": repr(sorted({**self.settings, **self.call}.items())),
                "rewards": [list(self.runner.names), list(self.runner.weights)],
                "model": self._generator,
                "row": repr(sorted(row.items())),
            }
        )

    def _score(
        self,
        places: list[int],
        texts: list[str],
        originals: list[str],
        rows: list[dict[str, Any]],
        keys: list[str],
        found: dict[str, dict[str, float]],
    ) -> None:
        """Make and score the videos of some rows, and store the scores."""
        try:
            clips = self._videos([texts[place] for place in places], [originals[place] for place in places])
        except Exception as error:  # a failed preview must not end a training run of days
            self._warn(f"the pipeline made no video: {named_error(error)}")
            return
        columns: dict[str, Any] = {name: [rows[place][name] for place in places] for name in rows[places[0]]}
        result = self.runner([originals[place] for place in places], clips, fps=self.fps, must_score=False, **columns)
        for name, reason in result.errors.items():
            self._warn(f"the reward {name} failed: {reason}")
        totals = result.weighted().tolist()
        for row, place in enumerate(places):
            if not math.isfinite(totals[row]):
                continue
            values = {name: result.values[row, at].item() for at, name in enumerate(result.names)}
            values = {name: value for name, value in values.items() if math.isfinite(value)}
            found[keys[place]] = {**values, "total": totals[row]}
            # A score in which one of the rewards is missing is not stored: the next call tries again.
            if len(values) == len(result.names):
                self.cache.put(keys[place], json.dumps(found[keys[place]]), prompt=texts[place])

    @torch.no_grad()
    def _videos(self, texts: list[str], originals: list[str]) -> list[Tensor]:
        """Return one clip (F, 3, H, W) in [0, 1] on the CPU for each text."""
        generators = [torch.Generator().manual_seed(self.seed_for(original)) for original in originals]
        several = len(texts) > 1
        with torch.random.fork_rng():  # the random state of the trainer is not touched
            frames = self.pipeline(
                prompt=texts if several else texts[0],
                generator=generators if several else generators[0],
                output_type="pt",
                **self.settings,
                **self.call,
            ).frames
        self.counts.videos += len(texts)
        return [clip.float().cpu().clamp(0, 1) for clip in frames]

    def _tell(self, log_metric: Any, log_extra: Any, found: list[dict[str, float] | None], made: int) -> None:
        count = len(found)
        if log_metric is not None and count:
            log_metric(f"{self.__name__}/videos", made)
            log_metric(f"{self.__name__}/failed", sum(row is None for row in found) / count)
            for name in self.runner.names:
                values = [row[name] for row in found if row is not None and name in row]
                if values:
                    log_metric(f"{self.__name__}/{name}", sum(values) / len(values))
        if log_extra is not None:
            for name in self.runner.names:
                log_extra(f"{self.__name__}_{name}", [None if row is None else row.get(name) for row in found])

    def _warn(self, text: str) -> None:
        """Log a warning, once for each text."""
        if text not in self._warned:
            self._warned.add(text)
            _log.warning("%s: %s", self.__name__, text)


def _fingerprint(pipe: Any) -> str:
    """Return what identifies a generator in a cache of scores: its class and the weights of its networks."""
    networks = {name: part for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)}
    return f"{type(pipe).__name__} {' '.join(weights_digest(networks[name]) for name in sorted(networks))}"


def _loaded(model: str | Path) -> Any:
    from postgen.families.loading import inspect_model, load_pipeline

    try:
        pipe = load_pipeline(inspect_model(model), dtype="auto", device="auto", offload="none")
    except UserError as error:
        raise UserError(f"the pipeline {model} of the video reward cannot be loaded: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
