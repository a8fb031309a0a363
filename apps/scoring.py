"""Work of the Rewards tab: list the rewards that this machine can use, and score a clip with some of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from postgen.apps.jobs import CancelledError, Task
from postgen.apps.making import check_prompts
from postgen.apps.state import App
from postgen.errors import UserError, check_text, shown
from postgen.rewards.about import ABOUT

if TYPE_CHECKING:
    from postgen.rewards import Reward
    from postgen.video import Footage

FIRST = ("world", "motion_floor", "brightness_band", "sharpness_band", "flow_smoothness", "world_judge")
"""Rewards that are selected at the start, if they are available."""
_IN_MEMORY = 2**26
"""Largest clip in bytes (12 per pixel) that is read into memory once; each reward reads a longer clip in windows."""
_WHOLE = 2**31
"""Largest longer clip in bytes for rewards that need all frames at once."""
_WATCH = 0.2
"""Seconds between two checks whether a job that reads frames was cancelled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A named reward."""

    name: str
    says: str
    range: str
    lacks: str | None
    """What is missing to use the reward on this machine, and how to get it; None if it is available."""
    needs_prompt: bool


@dataclass(kw_only=True, slots=True)
class Scored:
    """Scores of a clip and the findings of the judge of the synthetic world."""

    scores: dict[str, float | None] = field(default_factory=dict)
    """Reward -> score, larger is better; None if the reward has no score."""
    notes: dict[str, str] = field(default_factory=dict)
    """Reward -> reason why it has no score."""
    clauses: list[tuple[str, str]] = field(default_factory=list)
    """Clauses of a prompt of the synthetic world, each with the reason why it cannot be judged (empty: it can be)."""
    checks: list[dict[str, Any]] = field(default_factory=list)
    """Checks of the world's judge, each with `what`, `wanted`, `found` and `right`."""
    all_right: bool | None = None
    """Verdict of the judge; None if the prompt describes no scene of the world or the clip cannot be judged."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def known() -> list[Known]:
    """Return all named rewards, with what is missing to use them on this machine."""
    from postgen.rewards import get_reward, known_rewards

    found = []
    for name in known_rewards():
        reward, about = get_reward(name), ABOUT[name]
        found.append(
            Known(
                name=name,
                says=about.says,
                range=about.range,
                lacks=_lacks(reward),
                needs_prompt=reward.needs_prompts,
            )
        )
    return found


def chosen_rewards(names: Any) -> list[Reward]:
    """Return the rewards for the names that the page sent.

    Raises:
        UserError: no reward is chosen, a name is unknown, or a reward is not available on this machine.
    """
    from postgen.rewards import get_reward, known_rewards

    if not isinstance(names, list) or not names:
        raise UserError("no reward is chosen: choose at least one")
    found = []
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        if name not in known_rewards():  # `get_reward` also takes the name of code, which a page must never run
            raise UserError(f"unknown reward {shown(name)}. Known: {', '.join(known_rewards())}")
        reward = get_reward(name)
        if (lacks := _lacks(reward)) is not None:
            raise UserError(f"{name} is not available on this machine: {lacks}")
        found.append(reward)
    return found


def checked_prompt(prompt: Any, rewards: Sequence[Reward]) -> str | None:
    """Return the checked prompt; None if it is empty.

    Raises:
        UserError: the prompt is not a text or too long, or it is empty and all rewards need one.
    """
    check_prompts(text := "" if prompt is None else prompt)
    text = text.strip()
    check_text("the prompt", text)
    if not text and all(reward.needs_prompts for reward in rewards):
        raise UserError("these rewards need a prompt: describe what the clip should show")
    return text or None


def work_of(app: App, footage: Footage, prompt: str | None, rewards: Sequence[Reward]) -> Callable[[Task], Scored]:
    """Return the work of a job that scores a clip with each reward and runs the world's judge.

    Args:
        app: the server.
        footage: the clip.
        prompt: prompt of the clip, or None.
        rewards: rewards from `chosen_rewards`.
    """

    def work(task: Task) -> Scored:
        from postgen.commands.score import reward_device

        if any(getattr(reward.function, "needed", tuple)() for reward in rewards):
            app.models.clear()  # the networks of these rewards may not fit into memory beside a pipeline
        task.tell("Reading the clip")
        clip = _clip(footage)
        found, device = Scored(), reward_device(app.settings.device)
        with _closed_by_cancel(task, footage):
            task.tell("Running the judge of the synthetic world")
            score = _judged(found, clip, prompt)
            # The score of the judge is the score of the reward `world`, so this reward is not computed again.
            rest = [reward for reward in rewards if score is None or reward.name != "world"]
            groups = _groups(rest)
            for number, group in enumerate(groups):
                task.tell(f"Scoring: {', '.join(reward.name for reward in group)}")
                task.step(number, len(groups))
                _score(found, clip, footage.info.fps, prompt, group, device)
            task.check()
        found.scores = {r.name: score if r not in rest else found.scores[r.name] for r in rewards}
        return found

    return work


def _lacks(reward: Reward) -> str | None:
    try:
        reward.check_columns(())
    except UserError:
        return "it needs more data than a clip and a prompt: use postgen score with --prompts"
    return reward.lacking()


def _clip(footage: Footage) -> Any:
    """Return the frames of a short clip, or the `Footage` of a long clip, which each reward reads in windows."""
    from postgen.video import VideoError, read_video

    if 4 * footage.numel() > _IN_MEMORY:
        footage.most = _WHOLE
        return footage
    try:
        return read_video(footage.path)
    except VideoError as error:
        raise UserError(str(error).replace(str(footage.path), footage.path.name)) from error


def _groups(rewards: Sequence[Reward]) -> list[list[Reward]]:
    """Group the rewards that share one network, so that the network sees the clip once."""
    groups: dict[int, list[Reward]] = {}
    for reward in rewards:
        groups.setdefault(id(reward.function), []).append(reward)
    return list(groups.values())


def _score(found: Scored, clip: Any, fps: float, prompt: str | None, rewards: Sequence[Reward], device: str) -> None:
    from postgen.rewards import RewardRunner

    runner = RewardRunner(list(rewards), device=device)
    result = runner(prompts=[prompt], completions=[clip], fps=[fps or None], must_score=False)
    for name, value in zip(result.names, result.values[0].tolist(), strict=True):
        found.scores[name] = None if value != value else value
        if value != value:
            told = result.failures.get(name, {}).get(0) or result.reasons.get(name, {}).get(0)
            found.notes[name] = _without_place(told or "the reward returned no score", clip)


def _judged(found: Scored, clip: Any, prompt: str | None) -> float | None:
    """Run the world's judge and return its score; None if it cannot judge the clip or the prompt."""
    from postgen.rewards.world import reports_of, why_not
    from postgen.video import VideoError
    from postgen.world import read

    reading = read(prompt) if prompt else None
    if reading is None:
        return None
    found.clauses = [(clause.text, clause.why) for clause in reading.clauses]
    if why_not(clip, True) is not None:
        return None
    try:
        report = reports_of([clip], [reading])[0]
    except VideoError as error:
        raise UserError(_without_place(f"the clip cannot be read: {error}", clip)) from error
    found.all_right, found.checks = report.all_right, _checks(report, reading)
    return float(report.score)


def _checks(report: Any, reading: Any) -> list[dict[str, Any]]:
    """Return a row for each check of the judge: count, then every body, then the rest of the scene."""
    bodies = reading.scene.bodies
    rows = [_row("number of bodies", len(bodies), report.found_count, report.count)]
    for body, seen in zip(bodies, report.bodies, strict=True):
        name = f"{body.colour} {body.shape}"
        rows.append(_row(f"{name}: colour", body.colour, seen.found_colour, seen.colour >= 0.5))
        rows.append(_row(f"{name}: shape", body.shape, seen.found_shape, seen.shape >= 0.5))
        if seen.event is not None:
            rows.append(_row(f"{name}: event", body.event, seen.found_event, seen.event >= 0.5))
        if seen.direction is not None:
            rows.append(_row(f"{name}: direction", None, None, seen.direction >= 0.5))
        rows.append(_row(f"{name}: present and unchanged in every frame", None, None, seen.steady >= 0.5))
    more = f"something in {report.strange} frames" if report.strange else "nothing"
    rows.append(_row("nothing else in the picture", None, more, report.steady or not report.strange))
    if report.camera is not None:
        rows.append(_row("camera", reading.scene.camera, None, report.camera))
    return rows


def _row(what: str, wanted: Any, found: Any, right: bool) -> dict[str, Any]:
    return {"what": what, "wanted": _text(wanted), "found": _text(found), "right": bool(right)}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


@contextmanager
def _closed_by_cancel(task: Task, footage: Footage) -> Iterator[None]:
    """While the block runs, close the footage when the job is cancelled: reading then ends at the next window."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH):
            try:
                task.check()
            except CancelledError:
                footage.closed = True
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except UserError:
        task.check()  # a closed footage raises a UserError: report the cancel instead
        raise
    finally:
        over.set()
        thread.join()


def _without_place(text: str, clip: Any) -> str:
    path = getattr(clip, "path", None)
    return text if path is None else text.replace(str(path), path.name)
