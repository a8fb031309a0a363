"""Agreement of the gradients of two GRPO batches: how much of a gradient is signal.

    python -m benchmarks.grpo_agreement [--prompts 16] [--samples 16] [--cases dance:0.8:linspace:2.5:16:15 ...]

The gradient of a batch is the gradient of the expected reward plus noise. The noise of batches with different prompts
is independent, so the cosine of their gradients shows the share of signal. For each case the benchmark samples two
batches. It writes the cosine of their gradients, summed over the trained steps, and the contribution of each step to
benchmarks/results/grpo_agreement.json. A case is KERNEL:NOISE:GRID:SHIFT:STEPS:WINDOW[:FIRST], with the values of a
recipe.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gates import write_result
from benchmarks.grpo_exploration import FIRST, SIZE, Explorer, options
from postgen.grpo.advantages import compute_advantages
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sampler, Sampling, Trajectories
from postgen.sampling.schedule import Schedule, linspace_schedule, schedule_of
from postgen.sampling.transition import KINDS

CASES = (
    *("dance:0.3:pipeline:2.5:16:15", "dance:0.8:pipeline:2.5:16:15", "dance:0.3:linspace:2.5:16:15"),
    *("dance:0.5:linspace:2.5:16:15", "dance:0.8:linspace:2.5:16:15", "dance:1.1:linspace:2.5:16:15"),
    *("dance:0.8:linspace:5:16:15", "dance:1.1:linspace:5:16:15", "dance:0.8:linspace:2.5:10:9"),
    *("exact:0.7:pipeline:2.5:16:1:0", "exact:0.7:pipeline:2.5:16:1:3", "exact:0.7:pipeline:2.5:16:1:6"),
)


def case(text: str) -> dict[str, Any]:
    """Parse a case.

    Raises:
        argparse.ArgumentTypeError: if the text is not a valid case.
    """
    parts = text.split(":")
    try:
        kind, noise, grid, shift = parts[0], float(parts[1]), parts[2], float(parts[3])
        steps, window, first = int(parts[4]), int(parts[5]), int(parts[6]) if len(parts) > 6 else 0
    except (IndexError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form KERNEL:NOISE:GRID:SHIFT:STEPS:WINDOW[:FIRST]"
        ) from None
    if kind not in KINDS or grid not in ("pipeline", "linspace") or not 0 <= first < first + window < steps:
        raise argparse.ArgumentTypeError(
            f"{text!r}: kernels are {', '.join(KINDS)}, grids are pipeline and linspace, and the window must end"
            " before the last step"
        )
    return {
        **{"kernel": kind, "noise": noise, "grid": grid, "shift": shift},
        **{"steps": steps, "window": window, "first": first},
    }


def schedule(explorer: Explorer, given: dict[str, Any]) -> Schedule:
    """Return the schedule of noise levels of a case."""
    if given["grid"] == "linspace":
        return linspace_schedule(explorer.denoiser, given["steps"], given["shift"], explorer.device)
    shape = explorer.denoiser.latent_shape(**SIZE)
    return schedule_of(explorer.denoiser, given["steps"], shape)


def gradients(explorer: Explorer, sampler: Sampler, paths: Trajectories, advantages: Tensor) -> Tensor:
    """Return the gradient of each stochastic step, with shape (steps of the window, parameters)."""
    (transformer,) = explorer.denoiser.transformers.values()
    parameters = [x.requires_grad_() for x in transformer.parameters()]
    owners = torch.arange(len(advantages)) // explorer.samples
    found = []
    for place in range(paths.log_probs.shape[1]):
        transformer.zero_grad()
        for rows in torch.arange(len(advantages)).split(explorer.batch):
            index = paths.start[rows] + place
            x, y = paths.states[rows, place], paths.states[rows, place + 1]
            with torch.autocast(explorer.device.type, torch.bfloat16, enabled=explorer.device.type == "cuda"):
                prediction = sampler.predict(x, index, explorer.conditions(owners[rows].tolist()))
            log_prob = sampler.step(x, prediction.float(), index).log_prob(y)
            loss = -(log_prob * advantages[rows].to(explorer.device)).sum() / len(advantages)
            loss.backward()
        found.append(torch.cat([x.grad.flatten() for x in parameters if x.grad is not None]))
    return torch.stack(found)


def agreement(halves: list[Explorer], given: dict[str, Any]) -> dict[str, Any]:
    """Measure one case on two batches with different prompts."""
    how = Sampling(kind=given["kernel"], noise=given["noise"], window=given["window"], size=SIZE)
    found, scores = [], []
    for explorer in halves:
        levels = schedule(explorer, given)
        paths, score = explorer.draw(how, given["first"], levels)
        advantages = compute_advantages(score.view(-1, 1), torch.ones(1), explorer.samples, eps=0.05).values
        sampler = Sampler(explorer.denoiser, levels, how, Meter(explorer.device), explorer.device)
        found.append(gradients(explorer, sampler, paths, advantages))
        scores.append(score)
    one, two = found
    # Scale the gradient of every step to the same length. Optimal weights of the steps are not much better than this.
    even = [x / (x.norm(dim=1, keepdim=True) + 1e-30) for x in found]
    scale = one.sum(0).norm() * two.sum(0).norm()
    shares = (one @ two.sum(0) + two @ one.sum(0)) / (2 * scale)
    return {
        "score": float(torch.cat(scores).mean()),
        "score_spread": float(torch.cat(scores).std(dim=1).mean()),
        "agreement": float(shares.sum()),
        "agreement_even_steps": float(torch.cosine_similarity(even[0].sum(0), even[1].sum(0), dim=0)),
        "norm": float(scale.sqrt()),
        "step_norms": one.norm(dim=1).tolist(),
        "step_agreement": torch.cosine_similarity(one, two, dim=1).tolist(),
        "step_shares": shares.tolist(),
    }


def main() -> None:
    """Measure all cases, print and write them."""
    args = options(__doc__, case, CASES, "grpo_agreement")
    sizes = args.prompts, args.samples, args.batch, args.device
    halves = [Explorer(*sizes, first=FIRST), Explorer(*sizes, first=FIRST + args.prompts)]
    rows = []
    for given in tqdm(args.cases, unit="case"):
        rows.append({**given, **agreement(halves, given)})
        tqdm.write(", ".join(f"{k} {_shown(v)}" for k, v in rows[-1].items()))
    settings = {"prompts": args.prompts, "samples": args.samples}
    write_result(args.output, {"settings": settings, "rows": rows, "gates": []})


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(f"{x:.2g}" for x in value) + "]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
