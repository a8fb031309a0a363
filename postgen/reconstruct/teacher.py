"""The teacher: the plan of the records, its sampling trajectories, and its forward passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.families import Block, Condition, Denoiser
from postgen.families.recording import recorded_bytes
from postgen.families.timesteps import timestep_of, timestep_per_row
from postgen.prompt_rows import prompt_row
from postgen.sampling.conditions import Conditions, Embeddings, Row, load_image
from postgen.sampling.sampler import Sample, Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.sampling.seeds import seed_of
from postgen.training.digests import digest, weights_digest
from postgen.training.drawn import check_teacher

from .config import RecordsConfig
from .records import FORMAT


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A batch of prompts that go through the teacher together."""

    number: int
    prompts: tuple[int, ...]
    held_out: bool

    def record(self, place: int) -> str:
        """Return the name of the record with index `place` of this batch."""
        return f"{self.number:05}-{place:03}"


class Teacher:
    """The transformer whose modules are recorded, with the sampler of its trajectories."""

    def __init__(
        self,
        denoiser: Denoiser,
        modules: Sequence[Block | str],
        transformer: str,
        config: RecordsConfig,
        prompts: Iterable[str | Mapping[str, Any]],
    ) -> None:
        if transformer not in denoiser.transformers:
            known = ", ".join(denoiser.transformers)
            raise UserError(f"the pipeline has no transformer named {shown(transformer)}. It has: {known}")
        self.denoiser, self.config, self.name = denoiser, config, transformer
        self.network: nn.Module = denoiser.transformers[transformer]
        self.modules = sorted({each if isinstance(each, str) else each.name for each in modules})
        self.rows = _rows(prompts, config)
        self.device = next(self.network.parameters()).device
        schedule = schedule_of(denoiser, config.num_inference_steps, denoiser.latent_shape(**config.size))
        sampling = Sampling(guidance=config.guidance_scale, size=config.size)
        self.sampler = Sampler(denoiser, schedule, sampling, device=self.device)
        self.conditions: Conditions = Embeddings(
            denoiser,
            size=config.size,
            guidance=config.guidance_scale > 1,
            negative_prompt=config.negative_prompt,
            keep_all=False,
            device=self.device,
        ).table(lambda number: self.rows[number])
        self.chunks = _chunks(len(self.rows), config)

    def plan(self) -> dict[str, Any]:
        """Return the plan of the records, the content of `records.json`."""
        levels = self._levels()
        each = min(self.config.levels_per_prompt or len(levels), len(levels))
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("max_gb",)}
        return {
            "format": FORMAT,
            "settings": settings,
            "teacher": [type(self.network).__name__, self.name, weights_digest(self.network)],
            "prompts": digest([_said(row, self.config) for row in self.rows]),
            "sigmas": self.sampler.schedule.sigmas.tolist(),
            "levels": levels,
            "modules": self.modules,
            "records": {
                chunk.record(place): {"held_out": chunk.held_out, "rows": len(chunk.prompts)}
                for chunk in self.chunks
                for place in range(each)
            },
        }

    def steps(self, plan: Mapping[str, Any], chunk: Chunk) -> list[list[int]]:
        """Return the step of each row in each record of a chunk, as nested lists (records, prompts)."""
        levels: list[int] = plan["levels"]
        each = sum(name.startswith(f"{chunk.number:05}-") for name in plan["records"])
        order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        return [
            [levels[order[(prompt * each + place) % len(levels)]] for prompt in chunk.prompts] for place in range(each)
        ]

    def trajectory(self, chunk: Chunk) -> Tensor:
        """Sample a chunk and return its latents before every step, (steps, prompts, ...), on the CPU.

        Raises:
            UserError: the latents are not finite.
        """
        seed = self.config.seed
        samples = [
            Sample(index=prompt, prompt=prompt, initial=seed_of(seed, "initial", 0, prompt), step_seed=int, start=0)
            for prompt in chunk.prompts
        ]
        latents = torch.stack([state.x.cpu() for state in self.sampler.states(samples, self.conditions)])
        check_teacher(latents.transpose(0, 1), chunk.prompts)
        return latents

    def forward(self, x: Tensor, steps: Sequence[int], condition: Condition) -> None:
        """Run the teacher on latents x, each row at its own step. Hooks record the calls."""
        self.sampler.predict(x.to(self.device), torch.tensor(steps, device=self.device), condition)

    def bytes(self, plan: Mapping[str, Any]) -> int:
        """Return the size of a record of the first chunk in bytes, measured in one forward pass."""
        chunk = self.chunks[0]
        prompts = list(chunk.prompts)
        x = self.sampler.noise(range(len(prompts)))
        steps = [plan["levels"][0]] * len(prompts)
        told = self.conditions(prompts)
        return recorded_bytes(self.network, self.modules, lambda: self.forward(x, steps, told))

    def timesteps(self) -> dict[int, float]:
        """Return the steps in which this transformer runs, with the timestep that it receives in each.

        Raises:
            UserError: its class has no argument `timestep`.
        """
        return {step: reached.timestep() for step, reached in enumerate(self._reached()) if reached.name == self.name}

    def _levels(self) -> list[int]:
        """Return the noise levels to record: the steps in which this transformer runs.

        If there are more of them than records of training prompts, these are evenly spaced ones with the first and the
        last.
        """
        found = [step for step, reached in enumerate(self._reached()) if reached.name == self.name]
        if not found:
            raise UserError(
                f"{self.name} runs in none of the {self.sampler.schedule.steps} steps: increase num_inference_steps"
            )
        prompts = sum(len(chunk.prompts) for chunk in self.chunks if not chunk.held_out)
        count = prompts * min(self.config.levels_per_prompt or len(found), len(found))
        if count >= len(found):
            return found
        return [found[round(place)] for place in torch.linspace(0, len(found) - 1, count).tolist()]

    def _reached(self) -> list[_Reached]:
        """Return the transformer that each step reaches, without running it; Wan 2.2 has two that alternate."""
        x, told = self.sampler.noise([0]), self.conditions([0])
        found = []
        for step in range(self.sampler.schedule.steps):
            with ExitStack() as stack:
                for name, network in self.denoiser.transformers.items():
                    hook = network.register_forward_pre_hook(_raises(name), with_kwargs=True)
                    stack.callback(hook.remove)
                try:
                    self.forward(x, [step], told)
                except _Reached as reached:
                    found.append(reached)
        return found


class _Reached(Exception):
    """Raised by a hook when a transformer is about to run."""

    def __init__(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(name)
        self.name, self.call = name, (module, args, kwargs)

    def timestep(self) -> float:
        """Return the timestep of the first row of the call."""
        return float(timestep_per_row(timestep_of(*self.call))[0])


def _raises(name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(name, module, args, kwargs)

    return hook


def _rows(prompts: Iterable[str | Mapping[str, Any]], config: RecordsConfig) -> list[Row]:
    if isinstance(prompts, str | Mapping):
        raise UserError(f"prompts must be a list of texts or rows, got {shown(prompts)}")
    rows = [
        prompt_row({"prompt": row} if isinstance(row, str) else row, f"row {number} of the prompts")
        for number, row in enumerate(prompts)
    ]
    if len(rows) <= config.held_out_prompts:
        raise UserError(
            f"there are {len(rows)} prompts, and held_out_prompts={config.held_out_prompts} of them are held out, so"
            " none is left for training: add prompts, or lower held_out_prompts"
        )
    return rows


def _chunks(count: int, config: RecordsConfig) -> list[Chunk]:
    parts = [range(count - config.held_out_prompts), range(count - config.held_out_prompts, count)]
    found: list[Chunk] = []
    for held_out, part in enumerate(parts):
        for low in range(0, len(part), config.batch_size):
            prompts = tuple(part[low : low + config.batch_size])
            found.append(Chunk(number=len(found), prompts=prompts, held_out=bool(held_out)))
    return found


def _said(row: Row, config: RecordsConfig) -> list[Any]:
    """Return the inputs of a row that change the trajectory, as JSON values: prompt, negative prompt, image digest."""
    image = row.get("image")
    if image is not None:
        picture = load_image(image, config.height, config.width).contiguous()
        image = hashlib.sha256(picture.numpy().tobytes()).hexdigest()[:16]
    return [row["prompt"], row.get("negative_prompt"), image]
