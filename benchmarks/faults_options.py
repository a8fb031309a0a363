"""Check that every option of `generate` has an effect in every family, or is refused before the weights are read.

    python -m benchmarks.faults_options

The benchmark generates videos of 32 pixels with and without each option, with tiny random models of the real classes.
It counts the options without effect and prints the table of docs/support.md. It does not measure quality.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from postgen.compat import quiet_libraries
from postgen.errors import UserError
from postgen.families.loading import RATES
from postgen.generate import generate_video, load, prepare, run
from postgen.request import GenerateConfig
from postgen.video import probe
from tests.families.tiny_videos import VIDEOS, save_tiny_video

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "--width": ({"width": 64}, {"width": 33}, {"width": 40}),
    "--height": ({"height": 64}, {"height": 33}, {"height": 40}),
    "--frames": ({"num_frames": 13}, {"num_frames": 17}, {"num_frames": 10}, {"num_frames": 8}),
    "--steps": ({"num_inference_steps": 3}, {"num_inference_steps": 1}),
    "--guidance": ({"guidance_scale": 5.0},),
    "--negative-prompt": ({"negative_prompt": "ugly"},),
    "--negative-prompt, --true-cfg": ({"negative_prompt": "ugly", "true_cfg_scale": 4.0},),
    "--true-cfg": ({"true_cfg_scale": 4.0},),
    "--seed": ({"seed": 8},),
    "--image": ({"image": "second.png"},),
    "--fps": ({"fps": 12.0}, {"fps": 12.5}),
}
"""Changes of the request by option. Each change must have the intended effect or be refused."""

_SAID = {"num_frames": "frames", "num_inference_steps": "steps", "guidance_scale": "guidance", "image": "--image"}
_SAID |= {"negative_prompt": "negative"}
"""Text that an error message uses for a setting, if it is not the name of the setting."""


_FRAMES = {"CogVideoX": 9, "Mochi": 7}
"""Number of frames of the video without options, for families that cannot make 5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of an option in a family."""

    family: str
    option: str
    state: str
    """`acts`, `refused`, or a description of the fault."""

    @property
    def holds(self) -> bool:
        """Whether the option acts or is refused."""
        return self.state in ("acts", "refused")


class Family:
    """A tiny model of a family, and the video that it generates without any option."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.pipes: dict[Any, Any] = {}
        save_tiny_video(name, folder)
        for number, colour in enumerate(((250, 30, 60), (20, 90, 240))):
            Image.new("RGB", (32, 32), colour).save(folder / f"{('first', 'second')[number]}.png")
        self.given = {
            "width": 32,
            "height": 32,
            "num_frames": next((n for family, n in _FRAMES.items() if family in name), 5),
            "num_inference_steps": 2,
            "dtype": "float32",
        }
        if prepare_facts(folder).needs_image:
            self.given["image"] = str(folder / "first.png")
        if "guidance_scale" in prepare_facts(folder).arguments:
            self.given["guidance_scale"] = 3.0

    def request(self, **changes: Any) -> GenerateConfig:
        """Return the request without options, with changes."""
        if "image" in changes:
            changes["image"] = str(self.folder / changes["image"])
        return GenerateConfig(
            **{"prompt": "a red ball", "model": str(self.folder), "device": "cpu", **self.given, **changes}
        )

    @cached_property
    def plain(self) -> Tensor:
        """The clip that is generated without options."""
        return self.clip()

    def clip(self, **changes: Any) -> Tensor:
        """Generate a clip with changes of the request."""
        job = prepare(self.request(**changes))
        return run(self._pipe(job), job)

    def _pipe(self, job: Any) -> Any:
        """Return the pipeline for a job. Jobs with the same loading settings share one pipeline."""
        if job.loading not in self.pipes:
            self.pipes[job.loading] = load(job)
        return self.pipes[job.loading]

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcome of every option."""
        for option, all_changes in OPTIONS.items():
            states = [self._state(changes) for changes in all_changes]
            wrong = [state for state in states if state not in ("acts", "refused")]
            # If one value of an option acts, the family has this option, even if it refuses other values.
            state = wrong[0] if wrong else "acts" if "acts" in states else "refused"
            yield Outcome(family=self.name, option=option, state=state)

    def _state(self, changes: dict[str, Any]) -> str:
        asked = ", ".join(f"{name}={value}" for name, value in changes.items())
        try:
            prepare(self.request(**changes))
        except UserError as error:
            named = any(_SAID.get(name, name) in str(error) for name in changes)
            return "refused" if named and "\n" not in str(error) else f"the message does not name {asked}: {error}"
        try:
            return "acts" if self._acts(changes) else f"{asked} has no effect"
        except Exception as error:  # any exception here is a fault, because the weights are already read
            return f"{asked} fails: {type(error).__name__}: {error}"

    def _acts(self, changes: dict[str, Any]) -> bool:
        if "fps" in changes:
            return self._plays(**changes)
        clip = self.clip(**changes)
        if not torch.isfinite(clip).all():
            return False
        sizes = {"num_frames": clip.shape[0], "width": clip.shape[-1], "height": clip.shape[-2]}
        if set(changes) <= sizes.keys():
            return all(sizes[name] == value for name, value in changes.items())
        return clip.shape != self.plain.shape or not torch.equal(clip, self.plain)

    def _plays(self, fps: float) -> bool:
        """Return whether the written video has the rate `fps`, and whether the network receives it if it takes one."""
        job = prepare(self.request(fps=fps))
        with tempfile.TemporaryDirectory() as folder:
            files = generate_video(job.config, Path(folder) / "x.mp4", pipe=self._pipe(job))
            plays = probe(files.video).fps == fps
        told = set(RATES) & prepare_facts(self.folder).arguments
        return plays and not (told and torch.equal(self.clip(fps=fps), self.plain))


def prepare_facts(folder: Path) -> Any:
    """Return the facts about a model that are known before its weights are loaded."""
    from postgen.families.loading import inspect_model

    return inspect_model(folder)


def outcomes() -> list[Outcome]:
    """Return the outcomes of all options in all families."""
    found = []
    with tempfile.TemporaryDirectory() as folder, quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SVD warns at each call that it takes no text
        for number, name in enumerate(VIDEOS):
            found += Family(name, Path(folder) / str(number)).outcomes()
    return found


def options_without_effect() -> int:
    """Return the number of options, over all families, that neither act nor are refused before weights are read."""
    return sum(not each.holds for each in outcomes())


def table(found: list[Outcome]) -> str:
    """Return the table of docs/support.md, with one row per family and one column per option."""
    lines = [f"| | {' | '.join(f'`{option}`' for option in OPTIONS)} |", "|---" * (len(OPTIONS) + 1) + "|"]
    for family in VIDEOS:
        states = {each.option: each.state for each in found if each.family == family}
        lines.append(f"| {family} | {' | '.join(states[option] for option in OPTIONS)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and the number of options without effect."""
    found = outcomes()
    print(table(found))
    print(f"options without effect: {sum(not each.holds for each in found)} of {len(found)}")


if __name__ == "__main__":
    main()
