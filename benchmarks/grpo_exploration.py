"""Sensitivity of the reward to the steps of a rollout: its spread within groups if only some steps are stochastic.

    python -m benchmarks.grpo_exploration [--prompts 16] [--samples 16] [--cases dance:0.3:0:15 exact:0.7:3:1 ...]

The samples of a prompt share the initial noise and differ only in the noise of a window of steps. A policy gradient
can learn from a step only if the noise of this step changes the reward. The benchmark uses the embedded model, prompts
with two bodies, no guidance, and the exact judge. It writes benchmarks/results/grpo_exploration.json. A case is
KERNEL:NOISE:FIRST:STEPS.
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
#: First seed of the scenes. The training (seeds from 1,000,000) and other benchmarks (from 0) do not use these seeds.
FIRST = 500_000

CASES = (
    *("dance:0.3:0:15", "dance:0.7:0:15", "dance:1:0:15", "dance:1:0:8"),
    *("dance:0.3:0:1", "dance:0.3:6:1", "dance:0.3:14:1"),
    *("exact:0.7:0:1", "exact:0.7:3:1", "exact:0.7:6:1", "exact:0.7:14:1"),
)


def case(text: str) -> tuple[str, float, int, int]:
    """Parse a case of the form KERNEL:NOISE:FIRST:STEPS.

    Raises:
        argparse.ArgumentTypeError: if the text is not a valid case.
    """
    try:
        kind, noise, first, window = text.split(":")
        found = kind, float(noise), int(first), int(window)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KERNEL:NOISE:FIRST:STEPS") from None
    if kind not in KINDS or not 0 <= found[2] < found[2] + found[3] < STEPS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: kernels are {', '.join(KINDS)}, and all steps must be between 0 and {STEPS - 2}"
        )
    return found


class Explorer:
    """Samples groups with a window of stochastic steps and scores them."""

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
        """Sample rollouts whose window begins at step `start`, in the order of the prompts.

        Returns:
            The rollouts, and their scores with shape (prompts, samples).
        """
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
        """Return the conditions of the prompts with the given numbers."""
        return self.embeddings.table(lambda prompt: {"prompt": self.texts[prompt]})(prompts)

    def group(self, kind: Any, noise: float, step: int, window: int) -> dict[str, float]:
        """Return the spread of score and latents in groups.

        The samples of a group differ only in the noise of `window` steps, from `step` on.
        """
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
    """Read the command line: the number of samples, the cases to measure, and the output file."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per batch (default: 16)")
    parser.add_argument("--samples", type=int, default=16, help="samples per prompt (default: 16)")
    parser.add_argument("--cases", nargs="*", type=read, default=list(map(read, cases)), help="cases, described above")
    parser.add_argument("--batch", type=int, default=128, help="largest batch of a forward pass (default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default=output, help="name or path of the result file")
    return parser.parse_args()


def main() -> None:
    """Measure all cases, print and write them."""
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
