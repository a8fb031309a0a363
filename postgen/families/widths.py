"""Columns of a network's first layer and rows of its last layer that belong to each channel of its latents.

Families unpack the output features of the last layer in different orders, channel by channel or patch by patch, so
additional rows at the end are not additional channels. This module measures the order: it calls the network twice on
numbered latents, and in the second call a hook makes the last layer return the numbers of its rows. Weights do not
change.

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
"""Base in which numbers are written, one digit per call: bfloat16 represents integers up to 256 exactly."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Widths:
    """First and last layer of a network, with the weights that belong to each channel of the latents."""

    first: str
    """Name of the layer that takes the latents: a linear layer, or a convolution whose kernel is a patch."""
    columns: Tensor
    """(C_in, P) int64: columns of its `weight.flatten(1)` for each input channel and each position in the patch."""
    last: str
    """Name of the linear layer that returns the output latents."""
    rows: Tensor
    """(C_out, P) int64: rows of its weight and bias for each output channel and each position in the patch."""


@dataclass(slots=True, eq=False)
class _Watch:
    """Observations from two calls of the network."""

    marks: Tensor = field(default_factory=lambda: torch.empty(0))
    """Numbered latents of the current call."""
    first: str = ""
    """Name of the first layer."""
    entering: list[Tensor] = field(default_factory=list)
    """Input of the first layer in each call; only one token if the layer is linear."""
    last: str = ""
    """Name of the last layer."""


def find_widths(transformer: nn.Module, arguments: Mapping[str, Any] | None = None) -> Widths:
    """Find the columns and rows of every channel.

    Args:
        transformer: a transformer of a class with a layout; it may be wrapped.
        arguments: forward arguments with a batch of 1 and few tokens; needed if the layout does not describe the call.

    Raises:
        UserError: the class is unknown; no layer takes exactly the latents, or the output is not a permutation of the
            features of the last layer.
    """
    model: Any = unwrap(transformer)
    kind = registered_name(type(model))
    given = dict(arguments) if arguments is not None else smallest_call(kind, model)
    axis = channel_axis(layout_named(kind))
    numbers = _numbers(given["hidden_states"], axis)
    watch = _Watch()
    # The latents are element numbers: their low digits in the first call, their high digits in the second. The first
    # call finds both layers, so that in the second the last layer can return its row numbers.
    with torch.no_grad(), _watching(model, watch):
        for digit in (0, 1):
            if digit and not watch.first:
                raise UserError(
                    f"no layer of {kind} takes the latents without other inputs, so no channel can be added"
                )
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
    """Return forward arguments with as few tokens as the class accepts, on the model's device and in its dtype.

    Raises:
        UserError: the layout of the class does not describe its call, or the weights are not in memory.
    """
    try:
        call = call_of(kind)
    except UserError as error:
        raise UserError(f"{error}; or give the arguments of a small forward pass") from error
    config, row = model.config, layout_named(kind)
    frames, height, width = patch_of(config) if "patch_size" in config else (1, 1, 1)
    blocks = row.video.causal_rule(config) if row.video is not None and row.video.causal_rule is not None else 0
    weight = next(model.parameters())
    if weight.is_meta:
        raise UserError(f"the weights of this {kind} are not in memory: change its channels before offloading")
    size = Size(
        batch=1,
        num_frames=1,
        frames=frames * max(1, blocks) + call.more_frames,
        height=2 * height,
        width=2 * width,
        # Models with learned positions of the text need its full length.
        text_tokens=config.get("max_text_seq_length") or min(call.text_tokens, 16),
        device=weight.device,
        dtype=model.dtype,
    )
    return call_arguments(kind, config, size)


def channel_axis(row: Layout) -> int:
    """Return the channel axis of the latents that the forward of a class takes."""
    tokens = row.video or row.image
    return _CHANNEL_AXIS[tokens.latent_axes if tokens is not None else "BCTHW"]


def _check_bare(watch: _Watch) -> None:
    """Refuse a LoRA on the first or last layer, because its weights have the shape of the original layer.

    Raises:
        UserError: one of the layers has a LoRA.
    """
    for name in (watch.first, watch.last):
        if match := _LORA.match(name):
            raise UserError(
                f"{match[1]} has a LoRA, so the number of channels cannot change: remove or merge the LoRA first"
            )


def _numbers(latents: Tensor, axis: int) -> Tensor:
    """Return the number of each element of one sample: channel * places + place."""
    shape = latents.movedim(axis, 1).shape[1:]
    count = shape.numel()
    if count > _DIGIT**2:
        raise UserError(f"the latents have {count} elements: give smaller arguments, with at most {_DIGIT**2}")
    return torch.arange(count, device=latents.device).view(1, *shape).movedim(1, axis)


def _called(model: Any, kind: str, arguments: dict[str, Any]) -> Tensor:
    try:
        out = model(**arguments, return_dict=False)
    except Exception as error:  # models raise many types of errors if a call is too small or lacks arguments
        raise UserError(
            f"a small forward pass of {kind}, to find the channels in its layers, failed: {named_error(error)}"
        ) from error
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@contextmanager
def _watching(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Observe which layer takes exactly the latents, and which layer runs last."""

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
    """Make a linear layer return the number of each of its rows. Operations after it may only permute them.

    Raises:
        UserError: the layer is not linear.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"the last layer of {type(model).__name__}, {name}, is a {type(layer).__name__}: a linear layer is needed"
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
    # Offloading may move the model to another device for the call.
    return bool((x.flatten().sort()[0] == marks.to(x.device).flatten().sort()[0]).all())


def _columns(model: nn.Module, kind: str, name: str, seen: Tensor, channels: int, places: int) -> Tensor:
    """Return the columns of the first layer by channel and place, from the numbers in its input.

    Raises:
        UserError: the input of the layer does not have all channels of a token or of a patch.
    """
    layer: Any = model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        # The features of one token are the numbers of some places, which are the same places in every channel.
        order = seen.argsort()
        owners = seen[order] // places
        if not torch.equal(owners, torch.arange(channels).repeat_interleave(len(seen) // channels)):
            raise UserError(f"{name} of {kind} does not take all channels of a token: no channel can be added")
        return order.view(channels, -1)
    owners = (seen.movedim(1, 0).flatten(1) // places).unique(dim=1)
    if layer.groups != 1 or not torch.equal(owners, torch.arange(channels)[:, None]):
        raise UserError(
            f"the input channels of {name} in {kind} are not those of the latents: no channel can be added"
        )
    return torch.arange(layer.weight[0].numel()).view(channels, -1)


def _rows(kind: str, out: Tensor, count: int) -> Tensor:
    """Return the rows of the last layer by channel and by position in the patch.

    Args:
        kind: name of the class, for the error message.
        out: (C, places): row number of each element of the output.
        count: number of rows of the last layer.

    Raises:
        UserError: the output is not a permutation of the rows.
    """
    seen: dict[float, int] = {}
    for place, row in enumerate(out[0].tolist()):
        seen.setdefault(row, place)
    rows = out[:, [*seen.values()]].long()
    if not torch.equal(rows.flatten().sort()[0], torch.arange(count)) or (rows != out[:, [*seen.values()]]).any():
        raise UserError(
            f"the output of {kind} is not a permutation of its last layer's features: no channel can be added"
        )
    return rows


def resize(model: Any, widths: Widths, inputs: int, outputs: int, config: dict[str, int | None]) -> None:
    """Replace the weights of both layers by zeros for other numbers of channels, and update config and attributes.

    Args:
        model: the transformer, without a wrapper.
        widths: layers of the transformer, from `find_widths`.
        inputs: new number of input channels.
        outputs: new number of output channels.
        config: new config entries `in_channels` and `out_channels`; None for `out_channels` means as many as
            `in_channels`.
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
    """Return the number of input features of a linear layer, or of input channels of a convolution."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def set_sizes(model: Any, first: Any, last: Any, columns: int, rows: int, config: dict[str, int | None]) -> None:
    """Update the sizes in the attributes of both layers and of the model, and in its config.

    Args:
        model: the transformer, without a wrapper.
        first: its first layer.
        last: its last layer.
        columns: input features or channels of the first layer.
        rows: output features of the last layer.
        config: as for `resize`.
    """
    setattr(first, "in_features" if isinstance(first, nn.Linear) else "in_channels", columns)
    last.out_features = rows
    for name, value in config.items():
        # Some classes also have the number as an attribute and use it in reshapes.
        if isinstance(vars(model).get(name), int):
            setattr(model, name, value or config["in_channels"])
    # diffusers has a list of config entries that were left at their defaults, and `from_config` would ignore their new
    # values. So the changed entries are removed from the list.
    lists = {name: value for name, value in model.config.items() if name.startswith("_") and isinstance(value, list)}
    named = {name: [each for each in value if each not in config] for name, value in lists.items()}
    model.register_to_config(**config, **named)
