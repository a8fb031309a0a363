"""Prompt enhancement on the embedded model: short, vague prompts with and without the template enhancer.

    python -m benchmarks.prompt run --seconds 560       # repeat while the exit code is 3
    python -m benchmarks.prompt report --docs           # result, contact sheet, table of the page

`run` draws both clips of each prompt from the same noise, judges them, and continues where it was stopped.

Rules, fixed before the runs:

- 128 short prompts: 16 of each form of `benchmarks.prompt_inputs`. They name colours and shapes only. 32 long prompts
  are full captions. No prompt is left out, and no run is repeated because of its result.
- Size 96, 17 frames, 10 steps, and the guidance scale with which users run the model.
- The score of a clip of a short prompt is the mean of five values in [0, 1] for what the raw prompt asks: right count
  (0 or 1), colours, shapes (`Report.bodies`), steadiness of every body and nothing else in the picture (0 or 1), and
  1 / (1 + exp(-judge)) of the learned `world_judge`, which sees no prompt and gives 0 to a typical render. `right`
  asks all of the first four. Motion is not asked, so it is not scored; its ratio is reported beside, because an
  enhancer that freezes videos must show.
- A long prompt is judged by everything that it says: the score of the exact judge.
- `prompt_gain` is the lower end of the 95 % bootstrap interval of the paired difference of the score over the short
  prompts, and it must be above 0.
- `entities_kept` is the share of all prompts, with a list of hard ones (numbers, quoted texts, names, negations),
  whose listed words all appear in the enhanced prompt. The lists are written by hand or known from the scene; the
  guard of the enhancer is not asked.

On one core of a CPU, a clip takes 2 seconds: 11 minutes. On an H200, less than one minute.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import prompt_report
from benchmarks.command import ended
from benchmarks.embedded_sampling import Defaults, Job, generate, load
from benchmarks.embedded_sheets import bytes_of
from benchmarks.gates import device
from benchmarks.prompt_inputs import FORMS, Prompt, hard_prompts, long_prompts, short_prompts
from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.files import replacing
from postgen.grpo.quality import clip_statistics
from postgen.info import versions
from postgen.prompt import PromptEnhancer
from postgen.rewards import RewardRunner
from postgen.world.check import Report, check_batch

JUDGE = "world_judge"
SEED = 31_000
"""Seed of the noise of the first prompt; each prompt has the next one."""
_SHOWN_EACH = 2
"""Prompts of each form whose clips are kept for the contact sheet."""
_BATCH = {"cpu": 4, "cuda": 64}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the measurement."""

    each: int = 16
    """Short prompts of each form."""
    long: int = 32
    size: int = 96
    frames: int = 17
    steps: int = 10
    guidance: float = 3.0

    @classmethod
    def of(cls, *, tiny: bool) -> Sizes:
        """Return the sizes of the experiment, or those of `--tiny`."""
        if tiny:
            return cls(each=1, long=2, size=64, frames=5, steps=2, guidance=1.0)
        return cls(guidance=Defaults.of(embedded_model()).guidance)


def kept(prompt: Prompt, text: str) -> bool:
    """Return whether an enhanced prompt has all words of a prompt that must survive; quoted texts letter by letter."""
    return all(_has(text, word) for word in prompt.kept)


def _has(text: str, word: str) -> bool:
    if word[:1] in "\"'\u201c":
        return word in text
    found = re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower())
    return found is not None


class Measuring:
    """Clips of raw and enhanced prompts, and their measures.

    Args:
        sizes: sizes of the measurement.
        out: folder of the rows.
        device_name: "cpu" or "cuda".
    """

    def __init__(self, sizes: Sizes, out: Path, device_name: str) -> None:
        self.sizes, self.out, self.device = sizes, out, device_name
        self.pipe = load(embedded_model(), device_name)
        self.enhancer = PromptEnhancer().for_pipeline(self.pipe)
        self.judge = RewardRunner([JUDGE], device=device_name)

    def __call__(self, seconds: float) -> bool:
        """Measure what is not measured yet, for some time (0: no limit); return whether all is done."""
        prompts = [*short_prompts(self.sizes.each), *long_prompts(self.sizes.long)]
        began, size = time.monotonic(), _BATCH[self.device]
        for low in range(0, len(prompts), size):
            place = self.out / "rows" / f"{low:04d}.json"
            if place.is_file():
                continue
            if seconds and time.monotonic() - began > seconds:
                return False
            rows = self._rows(prompts[low : low + size], low)
            _write(place, rows)
            print(f"{low + len(rows)} of {len(prompts)} prompts", flush=True)
        _write(self.out / "settings.json", self.settings())
        return True

    def settings(self) -> dict[str, Any]:
        """Return what was measured, and where."""
        return {"sizes": asdict(self.sizes), "seed": SEED, "device": device(), "versions": versions()}

    def _rows(self, prompts: Sequence[Prompt], first: int) -> list[dict[str, Any]]:
        texts = [each.text for each in prompts]
        enhanced = self.enhancer(texts)
        changed = [number for number, text in enumerate(texts) if enhanced[number] != text]
        seeds = [SEED + first + number for number in range(len(prompts))]
        raw = self._clips(texts, seeds)
        new = raw.clone()
        if changed:
            new[changed] = self._clips([enhanced[n] for n in changed], [seeds[n] for n in changed])
        arms = {"raw": self._measured(raw, prompts), "enhanced": self._measured(new, prompts)}
        self._keep(prompts, raw, new, enhanced, first)
        return [
            {
                "prompt": prompt.text,
                "kind": prompt.kind,
                "text": enhanced[number],
                "kept": kept(prompt, enhanced[number]),
                **{arm: rows[number] for arm, rows in arms.items()},
            }
            for number, prompt in enumerate(prompts)
        ]

    def _clips(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        sizes = self.sizes
        job = Job(
            prompts=list(texts),
            seeds=list(seeds),
            size=sizes.size,
            frames=sizes.frames,
            steps=sizes.steps,
            guidance=sizes.guidance,
        )
        return generate(self.pipe, job).clamp(0, 1)

    def _measured(self, clips: Tensor, prompts: Sequence[Prompt]) -> list[dict[str, float]]:
        asked = [prompt.text if prompt.kind == "long" else _known(prompt) for prompt in prompts]
        reports = check_batch(clips, asked)
        judged = self.judge(prompts=[prompt.text for prompt in prompts], completions=list(clips)).values[:, 0].tolist()
        return [
            _row(report, float(judge), clip_statistics(clip)["motion"], whole=prompt.kind == "long")
            for report, judge, clip, prompt in zip(reports, judged, clips, prompts, strict=True)
        ]

    def _keep(self, prompts: Sequence[Prompt], raw: Tensor, new: Tensor, enhanced: Sequence[str], first: int) -> None:
        """Keep the clips of the first prompts of each form for the contact sheet."""
        for number, prompt in enumerate(prompts):
            if prompt.kind != "long" and first + number < _SHOWN_EACH * len(FORMS):
                place = self.out / "clips" / f"{first + number:04d}.safetensors"
                place.parent.mkdir(parents=True, exist_ok=True)
                with replacing(place) as part:
                    pair = {"raw": bytes_of(raw[number]), "enhanced": bytes_of(new[number])}
                    save_file(pair, part, metadata={"raw": prompt.text, "enhanced": enhanced[number]})


def _known(prompt: Prompt) -> Any:
    assert prompt.spec is not None
    return prompt.spec


def _row(report: Report, judge: float, motion: float, *, whole: bool) -> dict[str, float]:
    """Return the measures of a clip; see the rules of this benchmark."""
    colour, shape = (
        sum(getattr(body, name) for body in report.bodies) / len(report.bodies) for name in ("colour", "shape")
    )
    values = {"count": float(report.count), "colour": colour, "shape": shape, "steady": float(report.steady)}
    shown = report.count and report.colour and report.shape and report.steady and report.world >= 0.5
    score = report.score if whole else (sum(values.values()) + 1 / (1 + math.exp(-judge))) / 5
    right = report.all_right if whole else shown
    return {**values, "judge": judge, "score": score, "right": float(right), "motion": motion}


def hard_rows() -> Iterator[dict[str, Any]]:
    """Yield the hard prompts with their enhanced texts, for a model with prose prompts."""
    enhance = PromptEnhancer()
    for prompt in hard_prompts():
        text = enhance([prompt.text])[0]
        yield {"prompt": prompt.text, "text": text, "kept": kept(prompt, text)}


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return all measured rows in their order.

    Raises:
        UserError: the run is not complete.
    """
    if not (out / "settings.json").is_file():
        raise UserError(f"{out} is not complete: repeat 'run' with this --out until its exit code is 0")
    files = sorted((out / "rows").glob("*.json"))
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def _write(place: Path, content: Any) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as part:
        part.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    run, report = commands.add_parser("run"), commands.add_parser("report")
    for command in (run, report):
        command.add_argument("--out", type=Path, default=Path("runs/prompt"), help="folder of the measurements")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", default=usual, choices=["cpu", "cuda"], help="device of the models")
    run.add_argument("--seconds", type=float, default=0.0, help="end after about this time; 0: no limit")
    run.add_argument("--tiny", action="store_true", help="tiny sizes, only to show that everything runs")
    report.add_argument("-o", "--output", default="prompt", help="name or path of the result")
    report.add_argument("--docs", action="store_true", help="write the tables of the page")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names."""
    options = parser().parse_args(argv)

    def work() -> int:
        if options.command == "run":
            done = Measuring(Sizes.of(tiny=options.tiny), options.out, options.device)(options.seconds)
            return 0 if done else 3
        settings = json.loads((options.out / "settings.json").read_text()) if read_rows(options.out) else {}
        where = prompt_report.write(read_rows(options.out), list(hard_rows()), settings, options.output)
        print(prompt_report.sheet_of(options.out, where.with_suffix(".png")))
        if options.docs:
            prompt_report.write_page(where)
        return 0

    return ended("benchmarks.prompt", work)


if __name__ == "__main__":
    sys.exit(main())
