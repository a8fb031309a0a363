"""Arms of the experiment of `python -m benchmarks.dancegrpo`: recipes with settings, budgets and seeds.

The budget of an arm is a number of forward-equivalents by the meter of the training, which counts all passes:
rollouts, training, and those of the old policy, the reference and data. A run ends after the first update that reaches
its budget. It keeps the averaged weights at `points` equal parts of the budget.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import job_queue
from benchmarks.arm_runs import ArmRun, arms_named
from postgen.errors import UserError
from postgen.rewards.registry import get_rewards
from postgen.training import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
SHORT, LONG = 115_000, 345_000
EQUAL = 230_000
"""Forward-equivalents of the arms that are compared with `nft`: about 60 updates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of training."""

    what: str
    """Description for tables."""
    recipe: str
    """Name of the recipe."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings on top of the recipe."""
    budget: float = EQUAL
    """Forward-equivalents after which a run ends."""
    reference: str = ""
    """The arm with which the report compares this arm; empty for the base model alone."""
    reward: tuple[str, ...] = ("world",)
    """Measures (`dancegrpo_clips.MEASURES`) whose sum is the trained reward."""
    points: int = 8
    """Number of checkpoints that are kept and measured."""
    parted: bool = False
    """Whether the raw weights and mixtures with the base model are measured too."""

    def words(self) -> list[str]:
        """Return the settings as options of a command line."""
        return [word for name, value in self.settings.items() for word in _option(name, value)]


def _option(name: str, value: Any) -> Iterator[str]:
    yield f"--{name}"
    for each in value if isinstance(value, tuple | list) else (value,):
        yield str(each).lower() if isinstance(each, bool) else str(each)


def _nft(what: str, **settings: Any) -> Arm:
    return Arm(what=what, recipe="nft-tiny", settings=settings, reference="nft")


SHIPPED = {
    "faithful": Arm(what="`dancegrpo-tiny`", recipe="dancegrpo-tiny", budget=1_630_000),
    # Its 460 thousand are less than a third of those of `faithful`.
    "fast": Arm(what="`fast-tiny`", recipe="fast-tiny", budget=2 * EQUAL),
    "nft": Arm(what="`nft-tiny`", recipe="nft-tiny"),
}
CONTROL = {"shuffled": _nft("control: advantages shuffled within groups", shuffle_advantages=True)}
COUNTER = {
    "residual": _nft("`motion_residual: 1`", motion_residual=1.0),
    "motion_reward": _nft(
        "`world_motion` as a second reward, weight 0.5",
        reward_funcs=("world(workers=4)", "world_motion"),
        reward_weights=(1.0, 0.5),
    ),
    "scale_max": _nft("`scale_rewards: max`", scale_rewards="max"),
    "scale_rank": _nft("`scale_rewards: rank`", scale_rewards="rank"),
    "noise_group": _nft("`forward_noise: group`", forward_noise="group"),
    "data": _nft("`data_beta: 0.1`", data_beta=0.1),
    "norm": _nft("`norm_guard: 10`", norm_guard=10.0),
    "temporal": _nft("`temporal_guard: 1`", temporal_guard=1.0),
    "kl": _nft("`beta: 0.01`", beta=0.01),
    "fast_residual": Arm(
        what="`fast-tiny` with `motion_residual: 1`",
        recipe="fast-tiny",
        settings={"motion_residual": 1.0},
        budget=2 * EQUAL,
        reference="fast",
    ),
}
LOSSES = {
    name: _nft(f"`forward_loss: {loss}`{' and `motion_residual: 1`' * bool(more)}", forward_loss=loss, **more)
    for loss in ("awm", "crd", "dgpo")
    for name, more in ((loss, {}), (f"{loss}_residual", {"motion_residual": 1.0}))
}
FIVE = {
    "visual": ("aesthetics", "world_judge_visual"),
    "clip": ("alignment", "world_clip"),
    "moves": ("motion", "world_judge_motion"),
    "quality": ("image quality", "brisque(least=32)"),
    "right": ("binary", "benchmarks.dancegrpo_rewards.wholly_right"),
}
"""Measure -> the kind of reward of DanceGRPO that it stands for, and the reward."""


def _rewards(what: str, measures: Sequence[str], **settings: Any) -> Arm:
    funcs = tuple(FIVE[name][1] for name in measures)
    settings = {"reward_funcs": funcs, **settings}
    return Arm(what=what, recipe="nft-tiny", settings=settings, budget=SHORT, reward=tuple(measures), points=4)


REWARDS = {
    **{f"reward_{name}": _rewards(f"{kind}: `{reward}`", (name,)) for name, (kind, reward) in FIVE.items()},
    "five_clip_sum": _rewards("all five, their weighted sum clipped", (*FIVE,)),
    "five_clip_each": _rewards("all five, each clipped before the sum", (*FIVE,), advantage_clip_per="reward"),
    "five_normalised": _rewards(
        "all five, the sum of the rewards normalised", (*FIVE,), multi_objective_aggregation="sum_then_normalize"
    ),
}


def _hack(what: str, reward: str, measure: str) -> Arm:
    settings = {"reward_funcs": reward, "learning_rate": 1e-4}
    return Arm(what=what, recipe="nft-tiny", settings=settings, budget=LONG, reward=(measure,), points=12, parted=True)


HACK = {
    "hack_judge": _hack("only the learned judge `world_judge`, twice the learning rate", "world_judge", "judge"),
    "hack_clip": _hack("only the learned `world_clip`, twice the learning rate", "world_clip", "clip"),
    "hack_bright": _hack(
        "only brightness, twice the learning rate", "benchmarks.dancegrpo_rewards.brightness", "bright"
    ),
}
GROUPS: dict[str, dict[str, Arm]] = {
    **{"shipped": SHIPPED, "control": CONTROL, "counter": COUNTER},
    **{"losses": LOSSES, "hack": HACK, "rewards": REWARDS},
}
ARMS = {name: arm for group in GROUPS.values() for name, arm in group.items()}

TINY = {"num_generations": 2, "per_device_train_batch_size": 2, "rollout_batch_size": 2}
TINY |= {"gradient_accumulation_steps": 1, "num_inference_steps": 3, "num_frames": 5, "height": 32, "width": 32}
TINY |= {"bf16": False, "share_initial_noise": False, "eval_prompts": 2}
"""Settings of `--tiny`, which only shows that everything runs."""
TINY_BUDGET = 24.0
_WINDOW: dict[str, dict[str, Any]] = {"fast-tiny": {"sde_window_range": (0, 2)}}
OUT = "runs/dancegrpo"
"""Default output folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(ArmRun):
    """Training of an arm with one seed."""

    arms = ARMS

    @property
    def budget(self) -> float:
        """Forward-equivalents after which the run ends."""
        return TINY_BUDGET if self.tiny else ARMS[self.arm].budget

    @property
    def marks(self) -> list[float]:
        """Forward-equivalents at which the averaged weights are kept."""
        points = 2 if self.tiny else ARMS[self.arm].points
        return [self.budget * (number + 1) / points for number in range(points)]

    def words(self) -> list[str]:
        """Return the options of its training on top of the recipe. The budget ends the run, not `max_steps`."""
        arm = ARMS[self.arm]
        more = {**TINY, **_WINDOW.get(arm.recipe, {})} if self.tiny else {}
        if self.tiny and "motion_residual" in arm.settings:  # it is refused for small groups
            more |= dict.fromkeys(("num_generations", "per_device_train_batch_size", "rollout_batch_size"), 8)
        fixed = {"seed": self.seed, "output_dir": self.folder, "resume_from_checkpoint": "auto", "max_steps": 100_000}
        fixed |= {"eval_steps": 0, "eval_on_start": False, "save_seconds": 45, "save_total_limit": 1}
        fixed |= {"report_to": "none", "disable_tqdm": True}
        return [*arm.words(), *(word for name, value in (more | fixed).items() for word in _option(name, value))]

    def jobs(self, more: Sequence[str]) -> dict[str, job_queue.Job]:
        """Return the jobs that train and measure this run; `more` are options of both commands."""
        return {
            kind: job_queue.Job(
                name=self.name if kind == "train" else f"measure.{self.name}",
                command=(sys.executable, "-m", f"benchmarks.dancegrpo_{module}", self.name, *more),
                log=self.out / "logs" / f"{self.name}.{kind}.log",
                check=check,
                needs=needs,
            )
            for kind, module, check, needs in (
                ("train", "job", self.done.is_file, ()),
                ("measure", "measure", lambda: complete(self.measured), ("measure.base", self.name)),
            )
        }


def base_job(out: Path, more: Sequence[str]) -> job_queue.Job:
    """Return the job that measures the base model and the exact clips."""
    place = out / "measured" / "base.json"
    return job_queue.Job(
        name="measure.base",
        command=(sys.executable, "-m", "benchmarks.dancegrpo_measure", "base", *more),
        log=out / "logs" / "base.log",
        check=lambda: complete(place),
    )


def complete(path: Path) -> bool:
    """Return whether a file of measurements exists and all its checkpoints are measured."""
    return path.is_file() and '"complete": true' in path.read_text(encoding="utf-8")[:200]


def measurements(out: Path) -> list[Path]:
    """Return the complete files of measurements in an output folder, for `--back`.

    An incomplete file belongs to trained weights of this machine. Another machine trains the run again.
    """
    return [path for path in sorted((out / "measured").glob("*.json")) if complete(path)]


def named_arms(words: Sequence[str]) -> list[str]:
    """Return the arms for names of arms and groups, each once, in the order of the words.

    Raises:
        UserError: an unknown name.
    """
    return arms_named(words, ARMS, GROUPS)


def check_arms(names: Sequence[str], *, tiny: bool = False) -> None:
    """Check that the configurations know all settings of some arms, and that their rewards exist.

    Raises:
        UserError: an arm has a setting, a value or a reward that this version does not know.
    """
    for name in names:
        arm = ARMS[name]
        kind, _ = load_recipe(ROOT / "recipes" / f"{arm.recipe}.yaml")
        known = {item.name for item in dataclasses.fields(kind.config_class)}
        unknown = [key for key in arm.settings if key not in known]
        if unknown:
            raise UserError(
                f"arm {name}: {kind.config_class.__name__} has no setting {unknown[0]}; leave this arm out"
            )
        words = Run(arm=name, seed=0, out=Path("."), tiny=tiny).words()
        try:
            config: Any = load_recipe(ROOT / "recipes" / f"{arm.recipe}.yaml", words)[1]
            get_rewards(config.reward_funcs)
        except UserError as error:
            raise UserError(f"arm {name}: {error}") from error


def table() -> str:
    """Return the arms as a Markdown table."""
    rows = [
        f"| `{name}` | {group} | {arm.what} | {arm.budget / 1000:.0f} k |"
        for group, arms in GROUPS.items()
        for name, arm in arms.items()
    ]
    return "\n".join(["| arm | group | | budget |", "|---|---|---|---|", *rows])
