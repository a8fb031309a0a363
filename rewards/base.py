"""The contract of a reward function, the base class of rewards with a network, and the wrapper that names a reward.

A reward function is called by keyword. It receives a batch and returns one number per clip:

    r(prompts, completions, *, fps=None, latents=None, trainer_state=None, log_extra=None, log_metric=None,
      log_reasons=None, **columns) -> list[float | None]

`completions` are float32 tensors (F,3,H,W) in [0,1], F = 1 for images; sizes may differ within a batch. A larger score
is better. None means that the clip cannot be scored; the function may pass the reasons to `log_reasons`, one text or
None per clip. On failure the function raises. `columns` are the other columns of the dataset, one value per row. A
function receives only the arguments that its signature names, or all of them if it has `**columns`. It may be
`async def`. These attributes of the function are optional: `groupwise = True` requests all rows of one prompt in one
call; `streams = True` (set by `streaming`) accepts long videos as `postgen.video.Footage`, read in windows;
`needs_prompts = False` (set by `promptless`) accepts clips without a prompt; `prompt_columns` (set by `prompted_by`)
names the columns that can replace a prompt. By default a function needs prompts if its signature requires `prompts`.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.rewards.weights import absent
from postgen.video import Footage

Clip = Tensor | Footage
"""A clip (F,3,H,W), or a long video whose frames are read when they are needed."""

Scores = Sequence[float | None] | Tensor
"""One number per clip of a batch."""

GIVEN = frozenset(
    {"prompts", "completions", "fps", "latents", "trainer_state", "log_extra", "log_metric", "log_reasons"}
)
"""Arguments of a reward function that its caller passes in addition to the columns of the dataset."""

_VIDEO_FORMS = ("videos", "images", "frames_pil")
Function = TypeVar("Function", bound=Callable[..., Any])


def streaming(function: Function) -> Function:
    """Mark a reward function or class as one that accepts a `postgen.video.Footage` in place of a clip.

    The function must read the frames with `windows`, `picked` or `frames`. A function without this mark receives the
    whole video as one tensor.
    """
    function.streams = True  # type: ignore[attr-defined]
    return function


def promptless(function: Function) -> Function:
    """Mark a reward function or class as one that also scores clips without a prompt; it receives "" for these."""
    function.needs_prompts = False  # type: ignore[attr-defined]
    return function


def prompted_by(*columns: str) -> Callable[[Function], Function]:
    """Mark a reward function or class as one for which a value in one of these columns can replace a prompt."""

    def mark(function: Function) -> Function:
        function.prompt_columns = columns  # type: ignore[attr-defined]
        return function

    return mark


def unfit(clip: Clip, frames: int, side: int = 1) -> str | None:
    """Return a message if a clip has too few frames or too few pixels on its shorter side, else None."""
    if len(clip) >= frames and min(clip.shape[-2:]) >= side:
        return None
    least = [f"{frames} frames"] * (frames > 1) + [f"{side} px a side"] * (side > 1)
    height, width = clip.shape[-2:]
    has = f"{len(clip)} {'frame' if len(clip) == 1 else 'frames'} of {width}x{height}"
    return f"it has {has}, and needs at least {' of '.join(least)}"


def _dtype(asked: torch.dtype | str) -> torch.dtype:
    """Return a dtype by its name, which is how a recipe or a command gives it."""
    for name in ("float16", "bfloat16", "float32", "float64"):
        if asked in (name, getattr(torch, name)):
            return cast(torch.dtype, getattr(torch, name))
    raise UserError(f"dtype must be float16, bfloat16, float32 or float64, got {shown(asked)}")


def _check_exists(device: torch.device, name: str) -> None:
    """Refuse a device that this machine does not have, before weights are read."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the reward {name} cannot use the device {device}: {reason}. Give a device of this machine, such as cpu"
        ) from error


class RewardModel(ABC):
    """Base class of rewards with a network: built on first use, moved between devices by `load` and `offload`.

    A subclass sets `name` and implements `build` and `__call__`, which has the signature of a reward function. A
    subclass with several outputs names them in `outputs` and returns a dict of lists. The runner calls it once per
    batch, even if several of its outputs are used.

    Args:
        device: device of the network. `RewardRunner` then keeps the network there, whatever its own `device` is. None:
            the network is on the device that `load` names, at first the CPU.
        dtype: dtype of the weights, or its name, such as "bfloat16"; the published scores were computed in float32.

    Raises:
        UserError: `dtype` is not one of float16, bfloat16, float32, float64.
    """

    name: str
    outputs: tuple[str, ...] = ()
    groupwise: bool = False
    batch_bytes: int | None = None
    """Largest size of the clips (float32) of one call in bytes; None uses the limit of the runner."""

    __call__: Callable[..., Any]

    def __init__(self, *, device: torch.device | str | None = None, dtype: torch.dtype | str = torch.float32) -> None:
        self.own_device = None if device is None else torch.device(device)
        """The device that the caller chose for this reward; None if the caller chose none."""
        self.device, self.dtype = self.own_device or torch.device("cpu"), _dtype(dtype)
        self._net: nn.Module | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network with its weights, on any device.

        Raises:
            UserError: the weights cannot be found or do not fit.
        """

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return where the published weights are: pairs of model and file, as `weights.absent` takes them."""
        return ()

    def lacking(self) -> str | None:
        """Return one line that names what this reward needs and this machine lacks; None if nothing is missing.

        No file is read: damaged weights, or weights of another model, are only found at the first use.
        """
        return next((told for place in self.needed() if (told := absent(*place))), None)

    @property
    def net(self) -> Any:
        """The network on `device`; it is built on first access."""
        if self._net is None:
            self.load()
        return self._net

    def load(self, device: torch.device | str | None = None) -> None:
        """Move the network to a device (None: the current one); build it first if necessary.

        Raises:
            UserError: the machine has no such device; see also `build`.
        """
        self.device = self.device if device is None else torch.device(device)
        _check_exists(self.device, getattr(self, "name", type(self).__name__))
        if self._net is None:
            self._net = self.build().eval().requires_grad_(False)
        self._net.to(self.device, self.dtype)

    def offload(self) -> None:
        """Move the network to the CPU to free the accelerator's memory; call `load` before the next use."""
        if self._net is not None:
            self._net.to("cpu")


class Reward:
    """A reward function with its name: what `get_reward` returns and `RewardRunner` takes.

    Args:
        function: a reward function, or a callable object with the same signature.
        name: the name in tables and metrics; None uses the function's own name.
        output: the output to use, for a function with several `outputs`.

    Raises:
        UserError: the object is not callable, takes neither prompts nor completions, or has no such output.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, output: str | None = None) -> None:
        self.name = name or _name_of(function)
        if not callable(function):
            raise UserError(
                f"the reward {self.name}: an object of class {type(function).__name__} cannot be called. Add a method"
                " __call__(self, prompts, completions) to the class, or name a function"
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
        self._parameters = parameters_of(function, self.name)
        self._needs_prompts = _said(function, "needs_prompts", None)
        self._prompt_columns = tuple(_said(function, "prompt_columns", ()))
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        if not self._takes_all and not {"prompts", "completions", *_VIDEO_FORMS} & set(self._parameters):
            raise UserError(
                f"the reward {self.name} takes neither prompts nor completions: add one of them to its arguments"
            )

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip], **columns: Any) -> list[float | None]:
        """Score a batch without catching failures. Only for rewards that are not async."""
        with torch.no_grad():
            raw = self.function(**self.arguments({"prompts": prompts, "completions": completions, **columns}))
        return self.read(raw, len(completions))

    def __repr__(self) -> str:
        return f"Reward({self.name!r})"

    def load(self, device: torch.device | str | None = None) -> None:
        """Build the network of a reward and move it to the reward's own device, or else to `device`.

        Rewards without a network ignore the call.

        Args:
            device: device of rewards that have no `own_device`; None leaves them where they are.

        Raises:
            UserError: weights cannot be found, or the machine has no such device.
        """
        if hasattr(self.function, "load"):
            own = getattr(self.function, "own_device", None)
            self.function.load(device if own is None else own)

    def lacking(self) -> str | None:
        """Return one line that names what the reward needs and this machine lacks; None if nothing is missing."""
        if parts := getattr(self.function, "parts", ()):
            return next((told for part in parts if (told := part.lacking())), None)
        own: Callable[[], str | None] | None = getattr(self.function, "lacking", None)
        return None if own is None else own()

    def offload(self) -> None:
        """Free the accelerator memory of a reward with a network; other rewards ignore the call."""
        if hasattr(self.function, "offload"):
            self.function.offload()

    @property
    def needs_prompts(self) -> bool:
        """Whether the function, or one of the functions that it is composed of, scores no clip without a prompt.

        The mark `promptless` decides. A function without this mark needs prompts if its signature requires them.
        """
        if self._needs_prompts is not None:
            return bool(self._needs_prompts)
        if parts := getattr(self.function, "parts", ()):
            return any(part.needs_prompts for part in parts)
        asked = self._parameters.get("prompts")
        return asked is not None and asked.default is asked.empty

    def lacks_prompt(self, prompt: str | None, columns: Mapping[str, Any]) -> bool:
        """Whether a clip cannot be scored because it has neither a prompt nor a column that can replace one.

        Args:
            prompt: prompt of the clip.
            columns: the other columns of the clip.
        """
        if prompt is not None or not self.needs_prompts:
            return False
        if parts := getattr(self.function, "parts", ()):
            return any(part.lacks_prompt(prompt, columns) for part in parts)
        return all(columns.get(name) is None for name in self._prompt_columns)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check, before anything is scored, that all required arguments of the function are available.

        Raises:
            UserError: the function needs a column that the data does not have.
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
        """Select the arguments that the function takes, with the clips in the form that the function names.

        Functions from outside postgen receive copies of clips and latents, so that changes made in place do not
        reach the next reward.
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
        """Convert what the function returned to numbers; None and values that are not finite become None.

        Raises:
            ValueError: the number of scores differs from the number of clips, or a value is not a score.
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


def parameters_of(target: Callable[..., Any], name: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a reward function or class.

    Args:
        target: the function or class.
        name: name of the reward in the error message.

    Raises:
        UserError: Python does not know the parameters, as for some built-in functions.
    """
    try:
        return inspect.signature(target).parameters
    except ValueError as error:
        raise UserError(
            f"the reward {name} is a built-in function without a known signature: call it in a function of your own"
            " with the arguments prompts and completions"
        ) from error


def _finite(value: Any) -> float | None:
    number = float("nan") if value is None else float(value)
    return number if abs(number) < float("inf") else None


def _name_of(function: Any) -> str:
    return str(getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__)


def _said(function: Any, name: str, otherwise: Any) -> Any:
    """Return an attribute of a function, of the function in a partial, or of the `__call__` of an object."""
    while isinstance(function, functools.partial) and not hasattr(function, name):
        function = function.func
    call = None if inspect.isroutine(function) else getattr(function, "__call__", None)  # noqa: B004
    return getattr(function, name, getattr(call, name, otherwise))


def _home(function: Callable[..., Any]) -> str:
    """Return the module of a function, of the class of an object, or of the function in a partial."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _as_form(form: str, completions: Sequence[Tensor], name: str) -> list[Any]:
    """Return the clips as `videos` (unchanged), `images` (3,H,W) or `frames_pil` (one list of PIL images per clip)."""
    if form == "videos":
        return list(completions)
    if form == "images":
        if any(len(clip) != 1 for clip in completions):
            raise ValueError(f"{name} scores images, not videos: wrap it in postgen.rewards.compose.per_frame")
        return [clip[0] for clip in completions]
    from PIL import Image

    bytes_ = [(clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for clip in completions]
    return [[Image.fromarray(picture) for picture in clip] for clip in bytes_]
