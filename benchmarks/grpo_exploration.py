"""Which steps of a rollout the reward hears: its spread within groups when some steps alone are stochastic.

    python -m benchmarks.grpo_exploration [--prompts 16] [--samples 16] [--cases dance:0.3:0:15 exact:0.7:3:1 ...]

Samples of a prompt share their initial noise and differ in that of a window of steps. A policy gradient can learn from
a step only what the reward hears of its noise. Embedded model, prompts with two bodies, no guidance, the exact judge.
Writes benchmarks/results/grpo_exploration.json. A case is KERNEL:NOISE:FIRST:STEPS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.embedded_sampling import load
from benchmarks.gates import write_result
from postgen import world
from postgen.assets import embedded_model
from postgen.families import Condition, denoiser_for
from postgen.grpo.quality import diversity
from postgen.sampling.conditions import Embeddings
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sample, Sampler, Sampling, Trajectories
from postgen.sampling.schedule import Schedule, schedule_of
from postgen.sampling.seeds import seed_of
from postgen.sampling.transition import KINDS
from postgen.world.check import check_batch

STEPS = 16
SIZE = {"num_frames": 17, "height": 96, "width": 96}
#: Scenes that neither training (from 1,000,000 on) nor the other benchmarks (from 0 on) draw.
FIRST = 500_000

CASES = (
    *("dance:0.3:0:15", "dance:0.7:0:15", "dance:1:0:15", "dance:1:0:8"),
    *("dance:0.3:0:1", "dance:0.3:6:1", "dance:0.3:14:1"),
    *("exact:0.7:0:1", "exact:0.7:3:1", "exact:0.7:6:1", "exact:0.7:14:1"),
)


def case(text: str) -> tuple[str, float, int, int]:
    """Read KIND:NOISE:FIRST:STEPS."""
    try:
        kind, noise, first, window = text.split(":")
        found = kind, float(noise), int(first), int(window)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND:NOISE:FIRST:STEPS") from None
    if kind not in KINDS or not 0 <= found[2] < found[2] + found[3] < STEPS:
        raise argparse.ArgumentTypeError(f"{text!r}: kinds are {', '.join(KINDS)}, steps lie in 0..{STEPS - 2}")
    return found


class Explorer:
    """Draws groups with one stochastic step and scores them."""

    def __init__(self, prompts: int, samples: int, batch: int, device: str, first: int = FIRST) -> None:
        self.denoiser = denoiser_for(load(embedded_model(), device))
        self.device, self.prompts, self.samples, self.batch = torch.device(device), prompts, samples, batch
        self.specs = [world.sample(first + k, num_bodies=2, camera="static") for k in range(prompts)]
        self.texts = [world.simple_caption(spec) for spec in self.specs]
        self.schedule = schedule_of(self.denoiser, STEPS, self.denoiser.latent_shape(**SIZE))
        self.embeddings = Embeddings(
            self.denoiser, size=SIZE, guidance=False, negative_prompt="", keep_all=True, device=self.device
        )

    def draw(self, how: Sampling, start: int, schedule: Schedule) -> tuple[Trajectories, Tensor]:
        """Return rollouts whose windows begin at a step, prompt by prompt, and their scores (prompts, samples)."""
        sampler = Sampler(self.denoiser, schedule, how, Meter(self.device), self.device)
        samples = [
            Sample(
                index=index,
                prompt=index // self.samples,
                initial=seed_of(0, "initial", index // self.samples),
                step_seed=partial(seed_of, 0, "step", index),
                start=start,
            )
            for index in range(self.prompts * self.samples)
        ]
        paths = sampler.draw(samples, self.conditions, self.batch)
        with torch.no_grad():
            clips = torch.cat([self.denoiser.decode(part) for part in paths.clean.split(self.batch)])
        reports = check_batch(clips.float(), [self.specs[sample.prompt] for sample in samples])
        return paths, torch.tensor([report.score for report in reports]).view(self.prompts, self.samples)

    def conditions(self, prompts: Sequence[int]) -> Condition:
        """Return the conditions of prompts by number."""
        return self.embeddings.table(lambda prompt: {"prompt": self.texts[prompt]})(prompts)

    def group(self, kind: Any, noise: float, step: int, window: int) -> dict[str, float]:
        """Spread of score and latents in groups whose samples differ in the noise of `window` steps from `step` on."""
        how = Sampling(kind=kind, noise=noise, window=window, size=SIZE)
        paths, score = self.draw(how, step, self.schedule)
        spread = score.std(dim=1)
        owners = [row // self.samples for row in range(self.prompts * self.samples)]
        return {
            "score": float(score.mean()),
            "score_spread": float(spread.mean()),
            "groups_with_spread": float((spread > 0.05).float().mean()),
            "latent_diversity": float(diversity(paths.clean, owners)),
            "sigma": float(self.schedule.sigmas[step]),
        }


def options(about: str | None, read: Callable[[str], Any], cases: Sequence[str], output: str) -> argparse.Namespace:
    """Read the command line: how many samples to draw, the cases to measure, and where to write."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="of a batch")
    parser.add_argument("--samples", type=int, default=16, help="of each prompt")
    parser.add_argument("--cases", nargs="*", type=read, default=list(map(read, cases)), help="see above")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default=output, help="name or path of the result file")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = options(__doc__, case, CASES, "grpo_exploration")
    explorer = Explorer(args.prompts, args.samples, args.batch, args.device)
    rows = []
    for kind, noise, first, window in tqdm(args.cases, unit="case"):
        found = explorer.group(kind, noise, first, window)
        rows.append({"kernel": kind, "noise": noise, "first": first, "window": window, **found})
        tqdm.write(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    settings = {"prompts": args.prompts, "samples": args.samples}
    write_result(args.output, {"settings": settings, "rows": rows, "gates": []})


if __name__ == "__main__":
    main()
