"""Which columns of its first layer, and which rows of its last one, a network has for each channel of its latents.

Families unpack the last layer's features in different orders, channel after channel or patch after patch, so appending
rows at the end does not append channels. The order is read off the network itself: it is called twice on numbered
latents, and in the second call the last layer gives the numbers of its rows. No weight is touched.

    widths = find_widths(pipe.transformer)
    weight = pipe.transformer.get_submodule(widths.last).weight[widths.rows[3]]  # the rows of channel 3
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from postgen.compat import unwrap
from postgen.errors import UserError, named_error
from postgen.families.call_extras import Size
from postgen.families.calls import call_arguments, call_of, registered_name
from postgen.families.layout import Layout
from postgen.families.registry import layout_named
from postgen.families.video_tokens import LatentAxes, patch_of

_KINDS = (nn.Linear, nn.Conv2d, nn.Conv3d)
_CHANNEL_AXIS: dict[LatentAxes, int] = {"BCTHW": 1, "BTCHW": 2, "BTHWC": 4, "BCHW": 1, "packed": 2}
_LORA = re.compile(r"(.+)\.(base_layer|lora_[AB])\b")
_DIGIT = 256
"""Whole numbers up to it are exact in bfloat16, so numbers are told in digits of this base."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Widths:
    """The two layers that the number of channels decides."""

    first: str
    """Name of the layer that takes the latents: a linear layer or a convolution with the size of a patch."""
    columns: Tensor
    """(C_in, P) int64: columns of its `weight.flatten(1)` for each input channel, by place in the patch."""
    last: str
    """Name of the layer that gives them: linear."""
    rows: Tensor
    """(C_out, P) int64: rows of its weight and bias for each output channel, by place in the patch."""


@dataclass(slots=True, eq=False)
class _Watch:
    """What two calls showed."""

    marks: Tensor = field(default_factory=lambda: torch.empty(0))
    """Latents of the call under way."""
    first: str = ""
    entering: list[Tensor] = field(default_factory=list)
    """What the first layer was given in each call, one token of it."""
    last: str = ""


def find_widths(transformer: nn.Module, arguments: Mapping[str, Any] | None = None) -> Widths:
    """Find the columns and rows of every channel.

    Args:
        transformer: of a class that has a layout; it may be wrapped.
        arguments: of one forward, for a class of which it is not known how it is called; a batch of 1 and few tokens.

    Raises:
        UserError: nothing is known of the class; the latents enter no single layer, or leave none, as they are.
    """
    model: Any = unwrap(transformer)
    kind = registered_name(type(model))
    given = dict(arguments) if arguments is not None else smallest_call(kind, model)
    axis = channel_axis(layout_named(kind))
    numbers = _numbers(given["hidden_states"], axis)
    watch = _Watch()
    with torch.no_grad(), _watching(model, watch):
        for digit in (0, 1):
            if digit and not watch.first:
                raise UserError(f"no layer of {kind} takes the latents alone, so it cannot be given more channels")
            _check_bare(watch)
            latents = given["hidden_states"]
            watch.marks = (numbers // _DIGIT**digit % _DIGIT).to(latents.dtype).expand(latents.shape)
            with _giving_rows(model, watch.last) if digit else _plain():
                out = _called(model, kind, {**given, "hidden_states": watch.marks})
    low, high = (each.float().round().long().cpu() for each in watch.entering)
    channels = numbers.shape[axis]
    columns = _columns(model, kind, watch.first, low + _DIGIT * high, channels, numbers.numel() // channels)
    rows = _rows(kind, out.movedim(axis, 1)[0].flatten(1).cpu(), model.get_submodule(watch.last).out_features)
    return Widths(first=watch.first, columns=columns, last=watch.last, rows=rows)


def smallest_call(kind: str, model: Any) -> dict[str, Any]:
    """Return the arguments of a forward on as few tokens as the class takes, on the model's device and in its dtype.

    Raises:
        UserError: it is not known how the class is called, or its weights are not in memory.
    """
    try:
        call = call_of(kind)
    except UserError as error:
        raise UserError(f"{error}; or give the arguments of a small forward") from error
    config, row = model.config, layout_named(kind)
    frames, height, width = patch_of(config) if "patch_size" in config else (1, 1, 1)
    blocks = row.video.causal_rule(config) if row.video is not None and row.video.causal_rule is not None else 0
    weight = next(model.parameters())
    if weight.is_meta:
        raise UserError(f"the weights of this {kind} are not in memory: do this before they are offloaded")
    size = Size(
        batch=1,
        num_frames=1,
        frames=frames * max(1, blocks) + call.more_frames,
        height=2 * height,
        width=2 * width,
        # Where positions are learned, text of another length does not fit.
        text_tokens=config.get("max_text_seq_length") or min(call.text_tokens, 16),
        device=weight.device,
        dtype=model.dtype,
    )
    return call_arguments(kind, config, size)


def channel_axis(row: Layout) -> int:
    """Return which axis of a class's latents, as its forward takes them, is that of the channels."""
    tokens = row.video or row.image
    return _CHANNEL_AXIS[tokens.latent_axes if tokens is not None else "BCTHW"]


def _check_bare(watch: _Watch) -> None:
    """Refuse a LoRA on either layer: what it adds has the shape of the layer that it was made for."""
    for name in (watch.first, watch.last):
        if match := _LORA.match(name):
            raise UserError(
                f"{match[1]} has a LoRA, so it cannot be given other channels: take it off or merge it first"
            )


def _numbers(latents: Tensor, axis: int) -> Tensor:
    """Number the elements of one sample: channel * places + place."""
    shape = latents.movedim(axis, 1).shape[1:]
    count = shape.numel()
    if count > _DIGIT**2:
        raise UserError(f"latents of {count} numbers are too many to tell apart: give at most {_DIGIT**2}")
    return torch.arange(count, device=latents.device).view(1, *shape).movedim(1, axis)


def _called(model: Any, kind: str, arguments: dict[str, Any]) -> Tensor:
    try:
        out = model(**arguments, return_dict=False)
    except Exception as error:  # whatever a family raises on a call that is too small for it, or lacks something
        raise UserError(
            f"a small call of {kind}, to see which rows of its layers are which channel, failed: {named_error(error)}"
        ) from error
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@contextmanager
def _watching(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """See which layer is given the latents and nothing else, and which layer is the last to run."""

    def before(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0] if inputs else None
            if watch.first in ("", name) and isinstance(x, Tensor) and _same_numbers(x, watch.marks):
                watch.first = name
                watch.entering.append(x.flatten(0, -2)[0] if isinstance(module, nn.Linear) else x)

        return see

    def after(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            watch.last = name

        return see

    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, _KINDS):
                handles += [
                    module.register_forward_pre_hook(before(name)),
                    module.register_forward_hook(after(name)),
                ]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain() -> Iterator[None]:
    yield


@contextmanager
def _giving_rows(model: nn.Module, name: str) -> Iterator[None]:
    """Let a linear layer give the number of each of its rows. What follows may only move them."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"the last layer of {type(model).__name__}, {name}, is a {type(layer).__name__}: linear is needed"
        )

    def rows(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.arange(output.shape[-1], device=output.device, dtype=torch.float32).expand(output.shape)

    handle = layer.register_forward_hook(rows)
    try:
        yield
    finally:
        handle.remove()


def _same_numbers(x: Tensor, marks: Tensor) -> bool:
    if x.numel() != marks.numel():
        return False
    # Offloading may have brought the model to another device for the call.
    return bool((x.flatten().sort()[0] == marks.to(x.device).flatten().sort()[0]).all())


def _columns(model: nn.Module, kind: str, name: str, seen: Tensor, channels: int, places: int) -> Tensor:
    """Sort what the first layer was given into columns by channel and place."""
    layer: Any = model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        # One token: its features are the numbers of some places, the same ones of every channel.
        order = seen.argsort()
        owners = seen[order] // places
        if not torch.equal(owners, torch.arange(channels).repeat_interleave(len(seen) // channels)):
            raise UserError(f"{name} of {kind} is not given all channels of a token: more cannot be added")
        return order.view(channels, -1)
    owners = (seen.movedim(1, 0).flatten(1) // places).unique(dim=1)
    if layer.groups != 1 or not torch.equal(owners, torch.arange(channels)[:, None]):
        raise UserError(f"{name} of {kind} is not given one channel of the latents in each of its own")
    return torch.arange(layer.weight[0].numel()).view(channels, -1)


def _rows(kind: str, out: Tensor, count: int) -> Tensor:
    """Sort the rows that came out, (C, places), by channel and by the place in the patch where each was seen first."""
    seen: dict[float, int] = {}
    for place, row in enumerate(out[0].tolist()):
        seen.setdefault(row, place)
    rows = out[:, [*seen.values()]].long()
    if not torch.equal(rows.flatten().sort()[0], torch.arange(count)) or (rows != out[:, [*seen.values()]]).any():
        raise UserError(
            f"the output of {kind} is more than the rows of its last layer put in order: none can be added"
        )
    return rows


def resize(model: Any, widths: Widths, inputs: int, outputs: int, config: dict[str, int | None]) -> None:
    """Give both layers zeros for other numbers of channels, and let config and attributes say so.

    Args:
        model: the transformer, without a wrapper.
        widths: as they are.
        inputs: channels.
        outputs: channels.
        config: `in_channels` and `out_channels` as the config is to have them; None means as many as the other.
    """
    first: Any = model.get_submodule(widths.first)
    last: Any = model.get_submodule(widths.last)
    linear = isinstance(first, nn.Linear)
    columns = inputs * widths.columns.shape[1] if linear else inputs
    rows = outputs * widths.rows.shape[1]
    first.weight = _zeros(first.weight, (first.weight.shape[0], columns, *first.weight.shape[2:]))
    last.weight = _zeros(last.weight, (rows, last.weight.shape[1]))
    if last.bias is not None:
        last.bias = _zeros(last.bias, (rows,))
    set_sizes(model, first, last, columns, rows, config)


def _zeros(like: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(like.detach().new_zeros(shape), requires_grad=like.requires_grad)


def inputs_of(layer: Any) -> int:
    """Return the features of a linear layer, or the channels of a convolution, that it takes."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def set_sizes(model: Any, first: Any, last: Any, columns: int, rows: int, config: dict[str, int | None]) -> None:
    """Let the attributes of both layers and of the model, and its config, say how large they are."""
    setattr(first, "in_features" if isinstance(first, nn.Linear) else "in_channels", columns)
    last.out_features = rows
    for name, value in config.items():
        # Some classes keep the number beside the config, and reshape by it.
        if isinstance(vars(model).get(name), int):
            setattr(model, name, value or config["in_channels"])
    # Of entries that nobody named diffusers keeps a list, and `from_config` would take the class's defaults for them.
    lists = {name: value for name, value in model.config.items() if name.startswith("_") and isinstance(value, list)}
    named = {name: [each for each in value if each not in config] for name, value in lists.items()}
    model.register_to_config(**config, **named)
