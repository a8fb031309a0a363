"""Runs of the toy model in which one of two processes has wrong input or fails."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any, ClassVar

from postgen.errors import UserError
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from tests.grpo.toy import ROWS, near
from tests.sampling.toy import PointPipeline

LAST = os.environ.get("RANK") == "1"


def counting(completions: Any, number: Any, **columns: Any) -> list[float]:
    """A reward that needs a column."""
    return near(completions)


@dataclass(kw_only=True)
class BadConfig(DanceGRPOConfig):
    may_change: ClassVar[tuple[str, ...]] = ("bad",)

    bad: str = ""
    """What is wrong in the second process."""


class BadGRPO(DanceGRPOTrainer):
    config_class = BadConfig

    @classmethod
    def from_config(cls, args: Any) -> Any:
        rows: Any = ROWS
        if LAST and args.bad == "column":
            rows = [{"prompt": row["prompt"]} for row in ROWS]
        if LAST and args.bad == "rows":
            rows = ROWS[::-1]
        return cls(PointPipeline(), counting, args, rows)

    def draw(self, number: Any, samples: Any) -> Any:
        if LAST and self.global_step == 1:
            if self.args.bad == "user":
                raise UserError("no such thing: do that")
            if self.args.bad == "bug":
                raise RuntimeError("no way")
            if self.args.bad == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(number, samples)
