"""Wrong calls of the Python API: plug-ins, rewards and their options, video files, requests."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import postgen
from postgen.fused.config import FusedOpsConfig
from postgen.generate import generate_video
from postgen.pipelines import WanPipeline
from postgen.request import GenerateConfig
from postgen.rewards import RewardRunner, get_reward, known_rewards, split_rewards
from postgen.rewards.compose import guarded, per_frame, thresholded
from postgen.rewards.registry import get_rewards
from postgen.rewards.remote import RemoteReward
from postgen.training.recipe import find_method
from postgen.video import contact_sheet, iter_video, probe, read_video, side_by_side, write_video
from tests.bad_inputs.row import Content, Row
from tests.bad_inputs.tiny import folder

Config = postgen.EnhanceAVideoConfig
NUMBERS: tuple[Any, ...] = (math.inf, -math.inf, math.nan, 1e30, 10**12, 10**5000, True, "", "4", None, [1], -1)
"""Values that no numeric option of a reward accepts."""
NEGATIVE_ALLOWED = ("bound", "worst")

CLIP = torch.zeros(2, 3, 8, 8)


@functools.cache
def _pipe() -> Any:
    return WanPipeline.from_pretrained(folder("wan"))


def _applied(apply: Callable[..., Any], *given: Any) -> None:
    """Apply a plug-in, and remove it if it was not refused."""
    apply(*given).remove()


def _on(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """Change the settings of an applied plug-in, and remove it afterwards."""

    def call(_: Path) -> Any:
        handle = postgen.apply_enhance_a_video(_pipe(), Config(weight=1.0))
        try:
            return change(handle)
        finally:
            handle.remove()

    return call


def _called(**settings: Any) -> Callable[[Path], Any]:
    """Call a drop-in pipeline, and return the shape of its clip."""

    def call(_: Path) -> Any:
        sizes = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 1, "guidance_scale": 1.0}
        frames = _pipe()("a", **sizes, output_type="pt", **settings).frames
        return tuple(frames.shape)

    return call


def _config(**words: Any) -> Callable[[Path], Any]:
    return lambda _: Config(**words)


def _fused(**words: Any) -> Callable[[Path], Any]:
    return lambda _: FusedOpsConfig(**words)


PLUG_INS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "enhance nothing": (lambda _: _applied(postgen.apply_enhance_a_video, None), "transformer|pipeline"),
    "enhance a number": (lambda _: _applied(postgen.apply_enhance_a_video, 3), "transformer|pipeline"),
    "enhance a name": (lambda _: _applied(postgen.apply_enhance_a_video, "wan"), "transformer|pipeline"),
    "enhance a layer": (lambda _: _applied(postgen.apply_enhance_a_video, nn.Linear(2, 2)), "no layout for Linear"),
    "enhance a class": (lambda _: _applied(postgen.apply_enhance_a_video, WanPipeline), "transformer|pipeline"),
    "enhance with a number": (lambda _: _applied(postgen.apply_enhance_a_video, _pipe(), 3), "EnhanceAVideoConfig"),
    "enhance with a mapping": (lambda _: _applied(postgen.apply_enhance_a_video, _pipe(), {}), "EnhanceAVideoConfig"),
    "enhance with the other's": (
        lambda _: _applied(postgen.apply_enhance_a_video, _pipe(), FusedOpsConfig()),
        "EnhanceAVideoConfig",
    ),
    "fuse nothing": (lambda _: _applied(postgen.apply_fused_ops, None), "transformer|pipeline"),
    "fuse a layer": (lambda _: _applied(postgen.apply_fused_ops, nn.Linear(2, 2)), "Linear"),
    "fuse with a word": (lambda _: _applied(postgen.apply_fused_ops, _pipe(), "auto"), "FusedOpsConfig"),
    "twice": (_on(lambda _: postgen.apply_enhance_a_video(_pipe())), "already"),
    "update to NaN": (_on(lambda handle: handle.update(weight=math.nan)), "weight"),
    "update to a word": (_on(lambda handle: handle.update(weight="strong")), "weight"),
    "update of nothing known": (_on(lambda handle: handle.update(wait=1)), "wait"),
    "update to a number": (_on(lambda handle: handle.update(3)), "EnhanceAVideoConfig"),
    "no layer of that name": (
        lambda _: _applied(postgen.apply_enhance_a_video, _pipe(), Config(weight={"nobody": 1.0})),
        "nobody",
    ),
    "weight of no pattern": (
        lambda _: _applied(postgen.apply_enhance_a_video, _pipe(), Config(weight={"(": 1.0})),
        "pattern",
    ),
    "weight by a number": (_config(weight={3: 1.0}), "pattern"),
    "weight by bytes": (_config(weight={b"blocks": 1.0}), "pattern"),
    "weight by a pattern too large": (_config(weight={"a{" + "9" * 30 + "}": 1.0}), "pattern"),
    "enhance with a pipeline": (lambda _: _applied(postgen.apply_enhance_a_video, _pipe(), _pipe()), "WanPipeline {"),
    "weight by nothing": (_config(weight={}), "weight is an empty mapping"),
    "weight by words": (_config(weight={"blocks": "auto"}), "weight"),
    "weight NaN by layer": (_config(weight={"blocks": math.nan}), "weight"),
    "weight a tensor": (_config(weight=torch.ones(2)), "weight"),
    "both weights": (_config(weight=1.0, relative_weight=1.0), "give only one of them"),
    "start after stop": (_config(start=0.5, stop=0.5), "start"),
    "stop beyond": (_config(stop=1.5), "stop"),
    "start a word": (_config(start="half"), "start"),
    "reduction": (_config(reduction="mean"), "reduction"),
    "reduction a list": (_config(reduction=["batch"]), "reduction"),
    "progress": (_config(progress=0.5), "progress"),
    "train": (_config(train="yes"), "train"),
    "gain of 1": (_config(max_gain=1.0), "max_gain"),
    "nothing fused": (_fused(norm_rope=False, adaln=False, attention=None), "fuse nothing"),
    "fused a word": (_fused(norm_rope="yes"), "norm_rope"),
    "fused a number": (_fused(adaln=1), "adaln"),
    "attention unknown": (_fused(attention="nobody"), "unknown attention"),
    "attention a number": (_fused(attention=3), "unknown attention"),
    "attention a list": (_fused(attention=["auto"]), "unknown attention"),
    **{f"call enhanced by {value!r}": (_called(enhance_a_video=value), "weight|settings|EnhanceAVideoConfig")
       for value in ("much", math.nan, math.inf, 1e30, [1], {3: 1.0}, FusedOpsConfig())},
    **{f"call fused by {value!r}": (_called(fused_ops=value), "FusedOpsConfig") for value in ("all", 2, [], Config())},
}  # fmt: skip

RIGHT_PLUG_INS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "enhance": (lambda _: postgen.apply_enhance_a_video(_pipe()).remove(), None),
    "fuse": (lambda _: postgen.apply_fused_ops(_pipe()).remove(), None),
    "weights by layer": (
        lambda _: _applied(postgen.apply_enhance_a_video, _pipe(), Config(weight={r"blocks\.0\..*": 1.0})),
        None,
    ),
    "update": (_on(lambda handle: handle.update(weight=2.0) or handle.config.weight), 2.0),
    "call": (_called(enhance_a_video=2.5, fused_ops=False), (1, 1, 3, 16, 16)),
    "call off": (_called(enhance_a_video=-0.0, fused_ops=0), (1, 1, 3, 16, 16)),
}


def brightness(completions: list[Tensor]) -> list[float]:
    """Return the brightness of each clip; a reward."""
    return [clip.mean().item() for clip in completions]


REWARDS: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: get_reward(3), "reward"),
    "nothing": (lambda: get_reward(None), "reward"),
    "empty": (lambda: get_reward(""), "unknown reward"),
    "near": (lambda: get_reward("clip_scor"), "Did you mean 'clip_score'"),
    "open bracket": (lambda: get_reward("clip_score(frames=8"), "cannot read the options"),
    "no pairs": (lambda: get_reward("clip_score(8)"), "cannot read the options"),
    "code": (lambda: get_reward("clip_score(frames=__import__('os').mkdir('pwned'))"), "cannot read the options"),
    "unknown option": (lambda: get_reward("clip_score(framez=8)"), "no option 'framez'"),
    "bare word": (lambda: get_reward("clip_score(frames=inf)"), "cannot read the options"),
    "deep option": (lambda: get_reward(f"clip_score(frames={'[' * 500}{']' * 500})"), "options"),
    "5000 digits": (lambda: get_reward(f"clip_score(frames={'9' * 5000})"), "options"),
    "null character": (lambda: get_reward("clip_score(frames='\0')"), "options|frames"),
    "reduce": (lambda: get_reward("clip_score", reduce="median"), "reduce|median"),
    "a lambda of nothing": (lambda: get_reward(lambda x: x), "neither prompts nor completions"),
    "an address of nothing": (lambda: get_reward("http://"), "http"),
    "an address of a bad port": (lambda: get_reward("http://127.0.0.1:99999/"), "port|address|http"),
    "a word port": (lambda: get_reward("http://127.0.0.1:many/"), "port|address|http"),
    "absent file": (lambda: get_reward("absent.py:fn"), "does not exist"),
    "absent module": (lambda: get_reward("absent_module.fn"), "cannot be imported"),
    "absent name": (lambda: get_reward("os.path.nobody"), "nobody"),
    "brackets": (lambda: split_rewards("world, clip_score(frames=8"), "a bracket is not closed"),
    "none": (lambda: RewardRunner([]), "no reward"),
    "twice": (lambda: RewardRunner(["world", "world"]), "two rewards are named"),
    "weights too many": (lambda: RewardRunner([brightness], [1.0, 2.0]), "one number per reward"),
    "weights NaN": (lambda: RewardRunner([brightness], [math.nan]), "finite number"),
    "weights 0": (lambda: RewardRunner([brightness], [0.0]), "finite number"),
    "weights words": (lambda: RewardRunner([brightness], ["1"]), "finite number"),  # type: ignore[list-item]
    "weights true": (lambda: RewardRunner([brightness], [True]), "finite number"),
    "weight 5000 digits": (lambda: RewardRunner([brightness], [10**5000]), "finite number"),
    "a weight": (lambda: RewardRunner([brightness], 1.0), "one number per reward"),  # type: ignore[arg-type]
    "reward_error": (lambda: RewardRunner([brightness], reward_error="quiet"), "reward_error"),  # type: ignore[arg-type]
    "frames 0": (lambda: per_frame(brightness, frames=0), "frames"),
    "frames a word": (lambda: per_frame(brightness, frames="all"), "frames"),  # type: ignore[arg-type]
    "no guard": (lambda: guarded(brightness, []), "no guard"),
    "guards nothing": (lambda: guarded(brightness, None), "reward|guard"),  # type: ignore[arg-type]
    "rewards a number": (lambda: get_rewards(3), "reward"),  # type: ignore[arg-type]
}


def _with(make: Callable[..., Any], **fixed: Any) -> Callable[[str, Any], Callable[[Path], Any]]:
    return lambda name, value: lambda _: make(**{**fixed, name: value})


BUILDERS: dict[str, tuple[Callable[[str, Any], Callable[[Path], Any]], tuple[str, ...]]] = {
    "RewardRunner": (_with(RewardRunner, reward_funcs=[brightness]), ("timeout", "batch_bytes")),
    "per_frame": (_with(per_frame, reward=brightness), ("frames",)),
    "thresholded": (_with(thresholded, reward=brightness), ("bound",)),
    "guarded": (_with(guarded, reward=brightness, guards=[brightness]), ("worst",)),
    "RemoteReward": (_with(RemoteReward, url="http://127.0.0.1:9/"), ("timeout", "retries", "backoff", "batch_bytes")),
}
"""Function -> how to call it with a keyword argument, and its numeric keyword arguments."""


def _rewards() -> Iterator[Row]:
    for name, (make, says) in REWARDS.items():
        yield Row(name=f"reward {name}", call=lambda _, make=make: make(), says=says)
    for name in known_rewards():
        for option in sorted(_numeric_options(name)):
            for value in NUMBERS:
                call: Callable[[Path], Any] = lambda _, name=name, option=option, value=value: get_reward(  # noqa: E731
                    name, **{option: value}
                )
                yield Row(name=f"{name}({option}={_said(value)})", call=call, says=option)
            yield Row(name=f"{name} right", call=lambda _, name=name: get_reward(name).name, value=name, wrong=False)
    for name, (given, options) in BUILDERS.items():
        for option in options:
            for value in NUMBERS:
                if (value is None and option == "timeout") or (value == -1 and option in NEGATIVE_ALLOWED):
                    continue
                if value is True or (name == "thresholded" and value in (10**12, 1e30)):
                    continue
                yield Row(name=f"{name} {option}={_said(value)}", call=given(option, value), says=option)
            right: Callable[[Path], Any] = lambda _, given=given, option=option: bool(given(option, 2)(_))  # noqa: E731
            yield Row(name=f"{name} {option} right", call=right, value=True, wrong=False)


def _numeric_options(name: str) -> set[str]:
    """Return the numeric options of a reward and of its base classes."""
    target = get_reward(name).function
    kinds = type(target).__mro__[:-1] if not inspect.isroutine(target) else (target,)
    found = set()
    for kind in kinds:
        for option in inspect.signature(kind).parameters.values():
            if option.annotation in ("int", "float", int, float) and option.name != "fps":
                found.add(option.name)
    return found


def _video(path: Path) -> None:
    write_video(path, CLIP, fps=8)


FILMS: Mapping[str, Content] = {"v.mp4": _video, "p.mp4": os.mkfifo}
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"fps {value!r:.20}": (lambda here, value=value: write_video(here / "x.mp4", CLIP, fps=value), "fps")
       for value in (0, -1, math.nan, math.inf, 1e30, 1e-30, 1001, "8", None, True, [8], 1j)},
    **{f"quality {value!r}": (lambda to, value=value: write_video(to / "x.mp4", CLIP, fps=8, quality=value), "quality")
       for value in (-1, 11, math.nan, math.inf, "7", True, [7])},
    "gif at 60": (lambda here: write_video(here / "x.gif", CLIP, fps=60), "at most 50"),
    "NaN": (lambda here: write_video(here / "x.mp4", CLIP * math.nan, fps=8), "values must lie"),
    "0 to 255": (lambda here: write_video(here / "x.mp4", CLIP + 255, fps=8), "values must lie"),
    "no frames": (lambda here: write_video(here / "x.mp4", CLIP[:0], fps=8), "no frame"),
    "two channels": (lambda here: write_video(here / "x.mp4", CLIP[:, :2], fps=8), "expected a tensor"),
    "no tensor": (lambda here: write_video(here / "x.mp4", [3], fps=8), "expected a tensor"),  # type: ignore[list-item]
    "an empty picture": (lambda here: write_video(here / "x.mp4", torch.zeros(1, 3, 0, 8), fps=8), "shape|pixel|size"),
    "two sizes": (lambda here: write_video(here / "x.mp4", [CLIP, CLIP[..., :4]], fps=8), "has shape"),
    "format": (lambda here: write_video(here / "x.mp4", CLIP, fps=8, format="mov"), "unknown video format"),
    "format a number": (lambda here: write_video(here / "x.mp4", CLIP, fps=8, format=3), "format"),  # type: ignore[arg-type]
    "read absent": (lambda here: read_video(here / "absent.mp4"), "absent"),
    "read a pipe": (lambda here: read_video(here / "p.mp4"), "not a regular file"),
    "probe a pipe": (lambda here: probe(here / "p.mp4"), "not a regular file"),
    "probe a device": (lambda _: probe("/dev/zero"), "not a regular file"),
    "read a device": (lambda _: read_video("/dev/zero"), "not a regular file"),
    "read nothing": (lambda _: read_video(""), "folder|name|frame"),
    **{f"start {value!r}": (lambda here, value=value: read_video(here / "v.mp4", start=value), "start")
       for value in (-1, 1.5, "0", True, 10**12)},
    "start beyond the end": (lambda here: read_video(here / "v.mp4", start=10**6), "ends earlier"),
    **{f"count {value!r}": (lambda here, value=value: read_video(here / "v.mp4", count=value), "count")
       for value in (-1, 0, 1.5, "1", True)},
    "iterate absent": (lambda here: next(iter_video(here / "absent.mp4")), "absent"),
    "columns 0": (lambda here: contact_sheet(CLIP, here / "s.png", columns=0), "columns"),
    "columns a word": (lambda here: contact_sheet(CLIP, here / "s.png", columns="2"), "columns"),  # type: ignore[arg-type]
    "one side empty": (lambda _: list(side_by_side(CLIP, CLIP[:0])), "no frame"),
}  # fmt: skip


REQUESTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a setting nobody knows": (lambda _: GenerateConfig.of({"prompt": "a", "hight": 3}), "hight"),
    "plug-ins a list": (lambda _: GenerateConfig(prompt="a", plug_ins=["enhance"]), "plug_ins"),  # type: ignore[arg-type]
    "lora a text": (lambda _: GenerateConfig(prompt="a", lora="l"), "lora"),  # type: ignore[arg-type]
    "lora of numbers": (lambda _: GenerateConfig(prompt="a", lora=(3,)), "lora"),  # type: ignore[arg-type]
    "a gif at 60": (
        lambda here: generate_video(GenerateConfig(prompt="a", model=str(folder("wan")), fps=60.0), here / "x.gif"),
        "at most 50",
    ),
    "no settings": (lambda _: find_method("dancegrpo").config_class.from_dict({}), "output_dir"),
    "settings a list": (lambda _: find_method("dancegrpo").config_class.from_dict([1]), "mapping"),  # type: ignore[arg-type]
    "settings a number": (lambda _: find_method("dancegrpo").config_class.from_dict(3), "mapping"),  # type: ignore[arg-type]
    "settings by numbers": (lambda _: find_method("dancegrpo").config_class.from_dict({3: 4}), "Unknown key"),  # type: ignore[dict-item]
    "a trainer of nothing": (lambda _: _trainer()(), "needs args"),
    "a trainer of a mapping": (lambda _: _trainer()(args={}), "args|DanceGRPOConfig"),
    "a trainer without prompts": (
        lambda here: _trainer()(args=_args(here), reward_funcs=brightness),
        "no prompts",
    ),
    "a trainer with rows of words": (
        lambda here: _trainer()(args=_args(here), reward_funcs=brightness, train_dataset=["a"]),
        "row 0 of train_dataset|row 1 of train_dataset",
    ),
    "a trainer with no rows": (
        lambda here: _trainer()(args=_args(here), reward_funcs=brightness, train_dataset=[]),
        "no rows",
    ),
    "a trainer with a number of rows": (
        lambda here: _trainer()(args=_args(here), reward_funcs=brightness, train_dataset=3),
        "train_dataset",
    ),
    "a trainer of a number": (
        lambda here: _trainer()(3, args=_args(here), reward_funcs=brightness, train_dataset=[{"prompt": "a"}]),
        "model|pipeline",
    ),
}


def _trainer() -> Any:
    return find_method("dancegrpo")


def _args(here: Path) -> Any:
    return _trainer().config_class(
        output_dir=str(here / "run"), device="cpu", num_generations=2, per_device_train_batch_size=2, report_to=[]
    )


def rows() -> Iterator[Row]:
    """Yield all rows."""
    for name, (call, says) in PLUG_INS.items():
        yield Row(name=f"plug-in: {name}", call=call, says=says, loads=True)
    for name, (call, value) in RIGHT_PLUG_INS.items():
        yield Row(name=f"plug-in: {name} right", call=call, value=value, wrong=False, loads=True)
    yield from _rewards()
    for name, (call, says) in FILES.items():
        yield Row(name=f"video: {name}", call=call, says=says, files=FILMS)
    yield Row(name="video: right", call=lambda here: len(read_video(here / "v.mp4", start=1, count=1)), value=1,
              files=FILMS, wrong=False)  # fmt: skip
    for name, (call, says) in REQUESTS.items():
        yield Row(name=f"request: {name}", call=call, says=says)


def _said(value: Any) -> str:
    return "5000 digits" if isinstance(value, int) and value > 10**20 else repr(value)
