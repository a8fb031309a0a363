"""A run of the toy model from a recipe, in a process that kills itself with signal 9 at a named point."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any, ClassVar

from postgen.grpo.motion import motions
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from postgen.training import checkpoint
from tests.grpo.toy import ROWS, near
from tests.sampling.toy import ClipPipeline, PointPipeline


@dataclass(kw_only=True)
class KilledConfig(DanceGRPOConfig):
    may_change: ClassVar[tuple[str, ...]] = ("kill_at", "kill_step")

    kill_at: str = ""
    """Point of the kill: rollout, reward, update or checkpoint."""

    kill_step: int = 0
    """Number of updates before the kill."""


class KilledGRPO(DanceGRPOTrainer):
    config_class = KilledConfig

    @classmethod
    def from_config(cls, args: Any) -> Any:
        return cls(PointPipeline(), near, args, ROWS, ROWS)

    def _maybe(self, point: str) -> None:
        if (self.args.kill_at, self.args.kill_step) == (point, self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def draw(self, number, samples):
        paths = super().draw(number, samples)
        self._maybe("rollout")
        return paths

    def score(self, rows, clips, latents):
        result = super().score(rows, clips, latents)
        self._maybe("reward")
        return result

    def backward(self, loss):
        super().backward(loss)
        self._maybe("update")

    def _save(self):
        write = checkpoint._save_tensors

        def dying(path, tensors):
            write(path, tensors)
            if path.name == "optimizer.safetensors":
                self._maybe("checkpoint")

        checkpoint._save_tensors = dying
        super()._save()
        checkpoint._save_tensors = write


class Whole:
    """Mixin of trainers of the toy model: it has no blocks, so it is sharded as one piece."""

    def shard_blocks(self, name: str) -> list[Any]:
        return []


class WitnessGRPO(Whole, KilledGRPO):
    """Writes the weights of each process after the last update."""

    @property
    def must_shard(self) -> bool:
        return self.args.fully_shard

    def on_optimizer_step(self) -> None:
        if self.global_step == self.args.max_steps:
            from safetensors.torch import save_file
            from torch.distributed.tensor import DTensor

            from postgen.training.sharding import whole

            cut = {isinstance(value, DTensor) for value in self.trained().values()}
            assert self.sharded == self.must_shard, "the launch was not heeded"
            assert cut == {self.sharded}, "sharding fell back to something else"
            weights = {name: whole(value.detach()).clone() for name, value in self.trained().items()}
            save_file(weights, self.args.folder / f"rank-{self.accelerator.process_index}.safetensors")


def still(completions):
    """Return the reward of each clip, minus its motion."""
    return (-motions(completions)).tolist()


class ClipGRPO(WitnessGRPO):
    """A trainer of clips with two rewards."""

    @classmethod
    def from_config(cls, args: Any) -> Any:
        return cls(ClipPipeline(), [near, still], args, ROWS, ROWS)


class ShardedWitnessGRPO(WitnessGRPO):
    """A trainer for accelerate's FSDP2, which checks that the weights are sharded."""

    must_shard = True


def broken(completions):
    raise RuntimeError("out of order")


class FailingGRPO(KilledGRPO):
    """A trainer whose only reward always fails."""

    @classmethod
    def from_config(cls, args: Any) -> Any:
        return cls(PointPipeline(), broken, args, ROWS)
