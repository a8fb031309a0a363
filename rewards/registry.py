"""The names of the rewards, and the conversion of a name, import path, address or function to a `Reward`."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast
from weakref import WeakValueDictionary

from postgen.errors import UserError, check_number, cut, did_you_mean, is_number, named_error, shown
from postgen.own_code import names_own_code, own_function
from postgen.rewards.base import GIVEN, Reward, parameters_of

Source = str | Callable[..., Any] | Reward
"""Input of `get_reward`: a name, an import path, an address, a function or class, or a `Reward`."""

_PLACES = {
    # name: "module of postgen.rewards:function or class", with ":output" for one output of a model with several
    "aesthetic": "aesthetic:Aesthetic",
    "brisque": "brisque:Brisque",
    "brightness_band": "guards:BrightnessBand",
    "clip_score": "clip_score:ClipScore",
    "conse": "conse:Conse",
    "depth_consistency": "depth_consistency:depth_consistency",
    "dynamic_degree": "dynamic_degree:DynamicDegree",
    "flow_smoothness": "flow_smoothness:FlowSmoothness",
    "geneval_hf": "geneval_hf:GenevalHF",
    "hps_v2_1": "hps_v2_1:HPSv21",
    "hps_v3": "hps_v3:HPSv3",
    "image_reward": "image_reward:ImageReward",
    "motion_floor": "guards:MotionFloor",
    "ocr": "ocr:OCR",
    "parabola": "parabola:parabola",
    "permanence": "permanence:permanence",
    "pickscore": "pickscore:PickScore",
    "sharpness_band": "guards:SharpnessBand",
    "vbench_aesthetic": "vbench:AestheticQuality",
    "vbench_background": "vbench:BackgroundConsistency",
    "vbench_flicker": "vbench:temporal_flickering",
    "vbench_subject": "vbench:SubjectConsistency",
    "videoalign": "videoalign:VideoAlign:overall",
    "videoalign_mq": "videoalign:VideoAlign:mq",
    "videoalign_ta": "videoalign:VideoAlign:ta",
    "videoalign_vq": "videoalign:VideoAlign:vq",
    "world": "world:world",
    "world_clip": "world_clip:WorldClip",
    "world_judge": "world_judge:WorldJudge:overall",
    "world_judge_motion": "world_judge:WorldJudge:motion",
    "world_judge_visual": "world_judge:WorldJudge:visual",
    "world_motion": "world_motion:WorldMotion",
}

_LARGEST = 1_000_000
"""Largest count that an option of a reward may have."""

_ONE = r"(?:[^,()]|\((?:[^()'\"]|'[^']*'|\"[^\"]*\")*\))+"
"""Pattern of one reward in a list of rewards, with its options in brackets."""

# Outputs of one model with equal options share the model for as long as one of them exists.
_SHARED: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()


def known_rewards() -> tuple[str, ...]:
    """Return the names that `get_reward` knows, in alphabetical order."""
    return tuple(sorted(_PLACES))


def get_reward(reward: Source, **options: Any) -> Reward:
    """Return a reward by its name, import path, address or function; weights are not loaded before the first use.

    Args:
        reward: a name from `known_rewards()`, a place as `own_function` takes it (`pkg.mod.fn`, `mod:fn`,
            `folder/file.py:fn`), an `http://` address that serves a reward, a reward function, or a reward class. A
            text may end with options, as in "clip_score(frames=8, reduce='min')". A place may also name a `Reward`,
            for instance a composed one.
        options: keyword arguments of the class or function, for instance `model`, `frames`, `device`.

    Raises:
        UserError: an unknown name (the message lists the known ones), a path that cannot be imported, or an option
            that the reward does not have.
    """
    if isinstance(reward, Reward):
        if options:
            raise UserError(f"{reward} is a finished object and takes no more options, got {', '.join(options)}")
        return reward
    if not isinstance(reward, str) and not callable(reward):
        raise UserError(f"a reward must be a name, an address or a function, got {shown(reward)}")
    if not isinstance(reward, str):
        return Reward(_with_options(reward, options, getattr(reward, "__name__", str(reward))))
    reward, written = _options(reward)
    options = {**written, **options}
    if reward.startswith(("http://", "https://")):
        from postgen.rewards.remote import RemoteReward

        return Reward(_with_options(RemoteReward, {"url": reward, **options}, reward))
    if reward in _PLACES:
        return _registered(reward, options)
    if names_own_code(reward):
        own = _own(reward)
        if isinstance(own, Reward):  # for instance a composed reward
            return get_reward(own, **options)
        return Reward(_with_options(own, options, reward))
    hint = did_you_mean(reward, known_rewards())
    raise UserError(
        f"unknown reward {shown(reward)}.{hint} Known: {', '.join(known_rewards())}. Or name a function of your own:"
        " 'pkg.mod.fn' or 'file.py:fn'."
    )


def split_rewards(text: str) -> list[str]:
    """Split a list of rewards at the commas outside brackets and quotes.

    Raises:
        UserError: a bracket or quote without a partner.

    >>> split_rewards("world, clip_score(frames=8, reduce='min')")
    ['world', "clip_score(frames=8, reduce='min')"]
    """
    if re.sub(_ONE, "", text).strip(", "):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
        problem = "brackets or quotes do not match"
        if not {"'", '"'} & set(bare) and bare.count("(") != bare.count(")"):
            problem = "a bracket is not " + ("closed" if bare.count("(") > bare.count(")") else "opened")
        raise UserError(f"{problem} in the rewards {shown(text)}: write name(key=value), other(key='text')")
    return [part.strip() for part in re.findall(_ONE, text) if part.strip()]


def _options(text: str) -> tuple[str, dict[str, Any]]:
    """Split `name(key=value, ...)` into the name and its options; values are Python literals."""
    name, bracket, inner = text.partition("(")
    if not bracket:
        return text.strip(), {}
    try:
        call = ast.parse(f"f({inner}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("expected key=value pairs")
        return name.strip(), {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"cannot read the options of the reward {cut(repr(text), 400)}: write name(key=value), numbers bare,"
            " text in quotes"
        ) from error


def get_rewards(rewards: Sequence[Source] | Source) -> list[Reward]:
    """Return one or several rewards as a list, each made by `get_reward`."""
    several = list(rewards) if isinstance(rewards, list | tuple) else [cast(Source, rewards)]
    return [get_reward(reward) for reward in several]


def _own(text: str) -> Callable[..., Any]:
    """Return the function or class that a text names; anything else is an error."""
    found = own_function(text, "the reward")
    if callable(found):
        return cast(Callable[..., Any], found)
    home = re.split("[.:]", text[::-1], maxsplit=1)[1][::-1]
    raise UserError(f"the reward {text} is {_described(found)}, not a function: name a function of {home}")


def _described(value: Any) -> str:
    """Return the kind of an object that cannot be called, for an error message."""
    if value is None:
        return "None"
    if inspect.ismodule(value):
        return f"the module {value.__name__}"
    if isinstance(value, bool | int | float | complex | str | bytes | list | tuple | dict | set):
        kinds = {bool: "a truth value", str: "a text", int: "a number", float: "a number"}
        return f"{kinds.get(type(value), f'a {type(value).__name__}')} ({shown(value)})"
    return f"an object of class {type(value).__name__}"


def _registered(name: str, options: dict[str, Any]) -> Reward:
    module, attribute, *output = _PLACES[name].split(":")
    target = getattr(import_module(f"postgen.rewards.{module}"), attribute)
    if not output:
        return Reward(_with_options(target, options, name), name=name)
    key = (f"{module}:{attribute}", repr(sorted(options.items())))
    model = _SHARED.get(key)
    if model is None:
        model = _SHARED[key] = _with_options(target, options, name)
    return Reward(model, name=name, output=output[0])


def _with_options(target: Callable[..., Any], options: dict[str, Any], name: str) -> Callable[..., Any]:
    """Instantiate a class with options, or bind options to a function; an unknown option is an error."""
    # Collect the options of the target; a class with **keywords also has those of its base classes.
    parameters = dict(parameters_of(target, name))
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and inspect.isclass(target):
        parameters |= _inherited(target)
    known = [o for o, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and o != "self"]
    if not inspect.isclass(target):
        known = [option for option in known if option not in GIVEN]  # arguments of the batch are not options
    # Refuse unknown options. Columns of the dataset are not listed among the known ones.
    unknown = [o for o in options if o not in known]
    if unknown:
        columns = [o for o in known if str(parameters[o].annotation).startswith("Sequence[")]
        own = [option for option in known if option not in columns]
        near = did_you_mean(unknown[0], own)
        raise UserError(
            f"the reward {name} has no option {shown(unknown[0])}: it has {', '.join(own) or 'none'}"
            f"{'.' if near else ''}{near}"
        )
    for option, value in options.items():
        try:
            _check_kind(option, value, parameters[option])
        except UserError as error:
            raise UserError(f"the reward {name} cannot be made with {option}={shown(value)}: {error}") from None
    if inspect.isclass(target):
        return _instance(target, options, name)
    return _bound(target, options) if options else target


def _instance(cls: type, options: dict[str, Any], name: str) -> Callable[..., Any]:
    """Return an object of a reward class."""
    own = parameters_of(cls, name)  # without those of base classes, which the class may set itself
    needed = [o for o, p in own.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [option for option in needed if option not in options]:
        told = ", ".join(f"{option}=VALUE" for option in missing)
        raise UserError(f"the reward {name} needs the option {missing[0]!r}: write {name}({told})")
    try:
        return cast(Callable[..., Any], cls(**options))
    except UserError:
        raise
    except Exception as error:  # the user's class may raise anything
        foreign = not cls.__module__.startswith("postgen.")
        if not foreign and not (options and isinstance(error, TypeError | ValueError | RuntimeError)):
            raise
        told = f" with {', '.join(f'{option}={value!r}' for option, value in options.items())}" if options else ""
        raise UserError(
            f"the reward {name} cannot be made{told}: {named_error(error) if foreign else error}"
        ) from error


def _check_kind(option: str, value: Any, parameter: inspect.Parameter) -> None:
    """Check that a numeric option has the right type; a count must not be below 0."""
    kind = {"int": int, "float": float}.get(str(parameter.annotation), parameter.annotation)
    if kind in (int, float):
        default = parameter.default if is_number(parameter.default) else 0
        most = max(_LARGEST, default) if kind is int else math.inf
        check_number(option, value, 0 if kind is int and default >= 0 else -math.inf, most, whole=kind is int)


def _bound(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    bound = functools.partial(function, **options)
    functools.update_wrapper(bound, function)
    del bound.__wrapped__  # type: ignore[attr-defined]  # it would hide the bound options from inspect.signature
    return bound


def _inherited(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of the constructors of all base classes, which a class accepts through `**place`."""
    return {k: p for base in reversed(cls.__mro__[:-1]) for k, p in inspect.signature(base).parameters.items()}
