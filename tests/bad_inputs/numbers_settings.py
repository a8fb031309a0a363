"""Wrong numbers in configurations, generated from the dataclasses, so that new fields are covered."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from postgen.assets import embedded_model
from postgen.plug_ins import known_plug_ins, resolve
from postgen.reconstruct import ReconstructConfig, RecordsConfig
from postgen.request import GenerateConfig
from postgen.training.recipe import METHODS, find_method
from tests.bad_inputs.row import Row

WRONG: tuple[Any, ...] = (
    *(math.inf, -math.inf, math.nan, 1e30, -1e30, 10**12, -(10**12), 10**5000, -(10**5000), 2**70),
    *(True, "", "0x10", "many", "\u0661\u0662", [1, 2], {"a": 1}, date(2026, 1, 1), b"1", 1j),
)
"""Values that no numeric field of a configuration accepts."""
LARGEST = {"GenerateConfig.seed": 2**63 - 1}
"""Largest value of fields that accept some of these values."""

RIGHT: Mapping[str, Any] = {
    **{"decoder_base_dim": 16, "flow_shift": 3.0, "max_sequence_length": 128, "height": 32, "width": 32},
    **{"num_frames": 5, "fps": 12.5, "rollout_batch_size": 2, "decode_batch_size": 2, "reward_weights": [1.0]},
    **{"eval_num_inference_steps": 4, "eval_guidance_scale": 2.0, "steps_per_generation": 2},
    **{"generation_batch_size": 24, "best_of_n": 4, "noise_level": 0.3, "sde_window_size": 2},
    **{"sde_window_range": [0, 4], "epsilon_high": 1e-3, "save_total_limit": 3},
    **{"num_inference_steps": 3, "guidance_scale": 4.0, "true_cfg_scale": 4.0, "seed": 7},
    **{"relative_weight": 0.5, "max_gain": 2.0, "max_locations": 5, "chunk_size": 5, "weight": 2.0},
    **{"levels_per_prompt": 2, "learning_rate_new": 1e-3, "variance_weight": 0.1, "transfer_blocks": 2},
    "branch_learning_rate": 1e-3,
}
"""A value that must be accepted, for fields whose default is None or empty."""

_NEEDED: Mapping[str, Any] = {
    "output_dir": "x",
    "autoencoder": str(embedded_model()),
    "train_dataset": "prompts.txt",
    **{"num_frames": 5, "height": 32, "width": 32},
}
"""Values of fields without a default."""

_MORE: Mapping[str, Mapping[str, Any]] = {
    "WorldJudgeConfig": {"per_device_train_batch_size": 4},
    "QuantTrainingConfig": {"weight": "int4:g32", "branch_rank": 2},
}
"""Settings that a configuration needs for its other defaults or for the fields under test."""


def classes() -> Iterator[tuple[type[Any], Callable[..., Any], dict[str, Any]]]:
    """Yield every configuration class, a function that creates one, and the keyword arguments that it needs."""
    for method in METHODS:
        config = find_method(method).config_class
        needed = [field.name for field in dataclasses.fields(config) if field.default is field.default_factory]
        base = {name: _NEEDED[name] for name in needed} | {"method": method}
        base |= _MORE.get(config.__name__, {})
        yield config, lambda config=config, **words: config.from_dict(words), base
    yield GenerateConfig, GenerateConfig, {"prompt": "a"}
    yield RecordsConfig, RecordsConfig, {"num_frames": 5, "height": 32, "width": 32}
    yield ReconstructConfig, ReconstructConfig, {"output_dir": "x"}
    for row in known_plug_ins():
        kinds = typing.get_args(typing.get_type_hints(resolve(row.apply))["config"])
        config = next(kind for kind in kinds if dataclasses.is_dataclass(kind))
        yield config, config, {}


def numbers(hint: Any) -> tuple[type | None, bool]:
    """Return int or float for the type hint of a numeric field, and whether the field is a list."""
    if typing.get_origin(hint) is list:
        return numbers(typing.get_args(hint)[0])[0], True
    if typing.get_origin(hint) is typing.Literal:
        return None, False
    kinds = typing.get_args(hint) or (hint,)
    return next((kind for kind in (float, int) if kind in kinds), None), False


def rows() -> Iterator[Row]:
    """Yield the rows of every numeric field. A field that several configurations inherit unchanged is tested once."""
    seen = set()
    for config, make, base in classes():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            kind, listed = numbers(hints[field.name])
            owner = next(base for base in config.__mro__ if field.name in vars(base).get("__annotations__", {}))
            if kind is None or (owner, field.name) in seen:
                continue
            seen.add((owner, field.name))
            yield from _of(config, field, kind, listed, partial(make, **base))
    yield from _minus_zero()


def _of(config: type, field: Any, kind: type, listed: bool, make: partial[Any]) -> Iterator[Row]:
    name = f"{config.__name__}.{field.name}"

    def made(value: Any) -> Callable[[Path], Any]:
        # A required field of the configuration may be the field under test.
        return lambda _: getattr(make(**{**make.keywords, field.name: value}), field.name)

    for value in (*WRONG, *((1.5,) if kind is int else ())):
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST.get(name, 0):
            continue
        if isinstance(value, dict) and name.startswith("EnhanceAVideoConfig.weight"):
            continue  # a weight per layer is allowed
        yield Row(name=f"{name}={_said(value)}", call=made([value] if listed else value), says=field.name)
    right = RIGHT.get(field.name, field.default)
    # A list that is derived from other fields has their length.
    derived = right is dataclasses.MISSING
    right = field.default_factory() if derived else right
    yield Row(name=f"{name} right", call=made(right), value=None if derived else right, wrong=False)


def _minus_zero() -> Iterator[Row]:
    """A field must treat -0 like 0: accept it as 0, or refuse it if it refuses 0."""
    for config, make, base in classes():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if numbers(hints[field.name]) == (float, False):
                one = partial(make, **base)
                name = f"{config.__name__}.{field.name}=-0.0"
                yield Row(name=name, call=partial(_same, one, field.name), value=True, wrong=False)


def _same(make: Callable[..., Any], name: str, _: Path) -> bool:
    found = []
    for zero in (0, -0.0):
        try:
            found.append(getattr(make(**{name: zero}), name))
        except ValueError:
            found.append("refused")
    return bool(found[0] == found[1])


def _said(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**40:
        return "5000 digits"
    return repr(value)
