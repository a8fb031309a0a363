"""What a reward is: the contract of a reward function, the base of those that hold a network, and the named wrapper.

A reward function is called by keyword, with a batch in and one number per clip out:

    r(prompts, completions, *, fps=None, latents=None, trainer_state=None, log_extra=None, log_metric=None,
      log_reasons=None, **columns) -> list[float | None]

`completions` are float32 tensors (F,3,H,W) in [0,1], F = 1 for images; sizes may differ within a batch. Larger is
better. None says that this clip cannot be scored, `log_reasons` takes why: one text or None a clip; a failure raises.
`columns` are the other columns of the data set, one value a row. A function gets only the arguments that its signature
names, or all of them with `**columns`. It may be `async def`. An attribute `groupwise = True` asks for the rows of one
prompt at a time; `streams = True` (`streaming`) says that it takes long videos as `postgen.video.Footage`, a window at
a time; `needs_prompts = False` (`promptless`) that a clip without a prompt can be scored too, `prompt_columns`
(`prompted_by`) which columns stand in for one. Without those, a function needs prompts that asks for them.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.rewards.weights import absent
from postgen.video import Footage

Clip = Tensor | Footage
"""A clip (F,3,H,W), or a long video that is read where it is looked at."""

Scores = Sequence[float | None] | Tensor
"""One number per clip of a batch."""

GIVEN = frozenset(
    {"prompts", "completions", "fps", "latents", "trainer_state", "log_extra", "log_metric", "log_reasons"}
)
"""Arguments of a reward function that its caller gives, beside the columns of the data."""

_VIDEO_FORMS = ("videos", "images", "frames_pil")
Function = TypeVar("Function", bound=Callable[..., Any])


def streaming(function: Function) -> Function:
    """Say of a reward function, or of a class of one, that it takes a `postgen.video.Footage` in place of a clip.

    It must go through its frames by `windows`, `picked` or `frames`. Any other gets such a video as one tensor.
    """
    function.streams = True  # type: ignore[attr-defined]
    return function


def promptless(function: Function) -> Function:
    """Say of a reward function, or of a class of one, that it scores clips without prompts too, which are "" then."""
    function.needs_prompts = False  # type: ignore[attr-defined]
    return function


def prompted_by(*columns: str) -> Callable[[Function], Function]:
    """Say of a reward function, or of a class of one, that a value in one of these columns stands in for a prompt."""

    def mark(function: Function) -> Function:
        function.prompt_columns = columns  # type: ignore[attr-defined]
        return function

    return mark


def unfit(clip: Clip, frames: int, side: int = 1) -> str | None:
    """Say that a clip has too few frames, or too few pixels at its shorter side; None if it has enough."""
    if len(clip) >= frames and min(clip.shape[-2:]) >= side:
        return None
    least = [f"{frames} frames"] * (frames > 1) + [f"{side} px a side"] * (side > 1)
    height, width = clip.shape[-2:]
    has = f"{len(clip)} {'frame' if len(clip) == 1 else 'frames'} of {width}x{height}"
    return f"it has {has}, and needs at least {' of '.join(least)}"


class RewardModel(ABC):
    """Base of the rewards that hold a network: it is built at its first use, moved by `load` and `offload`.

    A subclass sets `name`, writes `build`, and `__call__` with the signature of a reward function. One with several
    outputs names them in `outputs` and returns a dict of lists; it is scored once a batch, whatever of it is used.

    Args:
        device: where to compute when `load` names no other device.
        dtype: of the weights; float32 scores are what the published numbers were made with.
    """

    name: str
    outputs: tuple[str, ...] = ()
    groupwise: bool = False
    batch_bytes: int | None = None
    """Most bytes of clips (float32) in one call; None takes the runner's."""

    __call__: Callable[..., Any]

    def __init__(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._net: nn.Module | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network with its weights, on any device.

        Raises:
            UserError: the weights cannot be found or do not fit.
        """

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return where its published weights are: each a model and a file as `weights.absent` takes them."""
        return ()

    def lacking(self) -> str | None:
        """Say in one line what it needs and this machine does not have, None where it could be used at once.

        Nothing is read: weights that are damaged, or of another model, show at the first use.
        """
        return next((told for place in self.needed() if (told := absent(*place))), None)

    @property
    def net(self) -> Any:
        """The network, ready to use on `device`."""
        if self._net is None:
            self.load()
        return self._net

    def load(self, device: torch.device | str | None = None) -> None:
        """Bring the network to a device (None: where it was last), building it if this is the first time.

        Raises:
            UserError: as `build`.
        """
        self.device = self.device if device is None else torch.device(device)
        if self._net is None:
            self._net = self.build().eval().requires_grad_(False)
        self._net.to(self.device, self.dtype)

    def offload(self) -> None:
        """Give the accelerator's memory back; the next use, or `load`, brings the network to `device` again."""
        if self._net is not None:
            self._net.to("cpu")


class Reward:
    """A reward function with its name: what `get_reward` returns and `RewardRunner` takes.

    Args:
        function: a reward function, or an object that is called like one.
        name: how it is named in tables and metrics; None takes the function's own name.
        output: which output of a function with several (`outputs`) this is a view of.

    Raises:
        UserError: it cannot be called, takes neither prompts nor completions, or has no such output.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, output: str | None = None) -> None:
        self.name = name or _name_of(function)
        if not callable(function):
            raise UserError(
                f"the reward {self.name} is no function: it must be called as r(prompts, completions, ...)"
            )
        outputs = tuple(getattr(function, "outputs", ()))
        if (output is None) != (not outputs) or (output is not None and output not in outputs):
            raise UserError(f"the reward {self.name} has the outputs {', '.join(outputs) or 'none'}, not {output}")
        self.function, self.output = function, output
        self._ours = _home(function).startswith("postgen.rewards.")
        self.groupwise = bool(_said(function, "groupwise", False))
        self.streams = bool(_said(function, "streams", False))
        self.batch_bytes: int | None = _said(function, "batch_bytes", None)
        call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        self._parameters = inspect.signature(function).parameters
        self._needs_prompts = _said(function, "needs_prompts", None)
        self._prompt_columns = tuple(_said(function, "prompt_columns", ()))
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        if not self._takes_all and not {"prompts", "completions", *_VIDEO_FORMS} & set(self._parameters):
            raise UserError(f"the reward {self.name} takes neither prompts nor completions: it could score nothing")

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip], **columns: Any) -> list[float | None]:
        """Score a batch directly: no failure is caught. For a reward that is not async."""
        with torch.no_grad():
            raw = self.function(**self.arguments({"prompts": prompts, "completions": completions, **columns}))
        return self.read(raw, len(completions))

    def __repr__(self) -> str:
        return f"Reward({self.name!r})"

    def load(self, device: torch.device | str | None = None) -> None:
        """Bring a reward that holds a network to a device."""
        if hasattr(self.function, "load"):
            self.function.load(device)

    def lacking(self) -> str | None:
        """Say in one line what it needs and this machine does not have, None where it could be used at once."""
        if parts := getattr(self.function, "parts", ()):
            return next((told for part in parts if (told := part.lacking())), None)
        own: Callable[[], str | None] | None = getattr(self.function, "lacking", None)
        return None if own is None else own()

    def offload(self) -> None:
        """Let a reward that holds a network give its accelerator memory back."""
        if hasattr(self.function, "offload"):
            self.function.offload()

    @property
    def needs_prompts(self) -> bool:
        """Whether the function, or one that it is composed of, scores no clip without a prompt.

        It says so itself (`promptless`); one that says nothing does when it asks for the prompts.
        """
        if self._needs_prompts is not None:
            return bool(self._needs_prompts)
        if parts := getattr(self.function, "parts", ()):
            return any(part.needs_prompts for part in parts)
        asked = self._parameters.get("prompts")
        return asked is not None and asked.default is asked.empty

    def lacks_prompt(self, prompt: str | None, columns: Mapping[str, Any]) -> bool:
        """Whether a clip cannot be scored because it has no prompt, nor a column that stands in for one.

        Args:
            prompt: of the clip.
            columns: its further columns.
        """
        if prompt is not None or not self.needs_prompts:
            return False
        if parts := getattr(self.function, "parts", ()):
            return any(part.lacks_prompt(prompt, columns) for part in parts)
        return all(columns.get(name) is None for name in self._prompt_columns)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Find out before anything is scored whether the function's arguments can be given.

        Raises:
            UserError: it needs a column that is not there.
        """
        known = GIVEN | set(_VIDEO_FORMS) | set(columns)
        for part in getattr(self.function, "parts", ()):
            part.check_columns(columns)
        for name, p in self._parameters.items():
            optional = p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            if not optional and name not in known:
                raise UserError(
                    f"the reward {self.name} needs the column {name!r}, the data has "
                    f"{', '.join(sorted(set(columns))) or 'no columns besides the prompt'}"
                )

    def arguments(self, available: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the available arguments that the function takes, clips in the form it names.

        Code that is not ours gets clips and latents of its own: what it writes there, the next reward must not see.
        """
        clips = available["completions"]
        forms = [f for f in _VIDEO_FORMS if f in self._parameters and f not in available]
        if not self.streams or {"images", "frames_pil"} & {*forms}:
            clips = [clip.whole() if isinstance(clip, Footage) else clip for clip in clips]
        if not self._ours:
            clips = [clip.clone() if isinstance(clip, Tensor) else clip for clip in clips]
            if available.get("latents") is not None:
                available = {**available, "latents": available["latents"].clone()}
        available = {**available, "completions": clips}
        taken = {k: v for k, v in available.items() if self._takes_all or k in self._parameters}
        return taken | {form: _as_form(form, available["completions"], self.name) for form in forms}

    def read(self, raw: Any, count: int) -> list[float | None]:
        """Turn what the function returned into numbers; None where it gave None or no finite number.

        Raises:
            ValueError: another number of scores than of clips, or something that is no score.
        """
        if self.output is not None:
            if not isinstance(raw, Mapping) or self.output not in raw:
                raise ValueError(f"{self.name} must return a dict with {self.output!r}, got {type(raw).__name__}")
            raw = raw[self.output]
        if isinstance(raw, Tensor):
            raw = raw.detach().float().cpu().tolist()
        if isinstance(raw, str | Mapping) or not isinstance(raw, Iterable):
            raise ValueError(f"{self.name} must return a list of numbers, got {type(raw).__name__}")
        values = list(raw)
        if len(values) != count:
            raise ValueError(f"{self.name} returned {len(values)} scores for {count} clips")
        return [_finite(value) for value in values]


def _finite(value: Any) -> float | None:
    number = float("nan") if value is None else float(value)
    return number if abs(number) < float("inf") else None


def _name_of(function: Any) -> str:
    return str(getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__)


def _said(function: Any, name: str, otherwise: Any) -> Any:
    """What a function says of itself, the one inside a partial, or the method by which an object is called."""
    while isinstance(function, functools.partial) and not hasattr(function, name):
        function = function.func
    call = None if inspect.isroutine(function) else getattr(function, "__call__", None)  # noqa: B004
    return getattr(function, name, getattr(call, name, otherwise))


def _home(function: Callable[..., Any]) -> str:
    """The module of a function, of the class of an object, or of what options are bound to."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _as_form(form: str, completions: Sequence[Tensor], name: str) -> list[Any]:
    """The clips as the argument `videos` (as they are), `images` (3,H,W) or `frames_pil` (a list of pictures each)."""
    if form == "videos":
        return list(completions)
    if form == "images":
        if any(len(clip) != 1 for clip in completions):
            raise ValueError(f"{name} scores images, not videos: wrap it in postgen.rewards.compose.per_frame")
        return [clip[0] for clip in completions]
    from PIL import Image

    bytes_ = [(clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for clip in completions]
    return [[Image.fromarray(picture) for picture in clip] for clip in bytes_]
