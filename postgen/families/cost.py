"""FLOPs and bytes of a transformer's forward pass, counted without allocating weights and without computing.

The model is built from its config with fake weights (shapes only) and called once. Every matrix product, convolution
and attention call is counted when torch executes it, for the module in which it runs. So there is no formula per
family that could go out of date. A multiplication and an addition are two FLOPs. Norms, activations, rotations and
softmax are not counted.

    print(forward_cost(pipe.transformer, num_frames=81, height=480, width=832).table())
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop
from torch.utils.module_tracker import ModuleTracker

from postgen.compat import unwrap
from postgen.errors import UserError
from postgen.families.call_extras import Size
from postgen.families.calls import (
    block_names,
    call_arguments,
    call_of,
    compression,
    grid_of_call,
    makes_pictures,
    registered_name,
    self_attention_names,
)
from postgen.families.layout import Call
from postgen.families.linear import role_of
from postgen.families.video_tokens import Grid

Part = Literal["self-attention", "other attention", "projections", "feed-forward", "modulation", "other"]
"""`self-attention`: scores and values among the video tokens, including text tokens in the same sequence;
`other attention`: scores and values of cross-attention, text refiners and attention within a frame; `projections`:
linear layers of any attention; `feed-forward`: feed-forward layers; `modulation`: linear layers that compute scales
and shifts; `other`: embeddings and the output layer."""

PARTS: tuple[Part, ...] = get_args(Part)

_aten: Any = torch.ops.aten
# torch does not count its CPU attention kernel, which takes the same shapes as the other attention kernels.
_FLOPS: dict[Any, Any] = {**flop_registry, _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
_SMALL = 2**20
"""Tensors without weights (masks, positions) are computed up to this number of elements: models branch on them."""
_WITH_WEIGHTS = {_aten.mm, _aten.addmm, _aten.convolution}
_PARTS_OF_ROLES: dict[str, Part] = {
    "attention": "projections",
    "feed_forward": "feed-forward",
    "modulation": "modulation",
    "other": "other",
}


@dataclass(frozen=True, slots=True)
class Work:
    """Cost of one part of a forward pass."""

    flops: int = 0
    weight_bytes: int = 0
    """Bytes of the parameters that are read, once per pass; embedding tables are not counted."""
    activation_bytes: int = 0
    """Bytes of the activations that matrix products and attention calls read and write, if each of them is one kernel
    that also does the elementwise work around it. Attention scores are never written. Only a kernel that fuses two
    products moves fewer bytes."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.weight_bytes * times, self.activation_bytes * times)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a forward pass of a transformer, by part and by block."""

    transformer: str
    """Class name of the transformer."""
    grid: Grid | None
    """Token grid of the video; None if the arguments of the call do not determine it."""
    parts: dict[Part, Work]
    """Cost of the whole forward pass, by part."""
    blocks: dict[str, dict[Part, Work]]
    """Cost of each repeated block, by name and part. Modules outside the blocks count in `parts` only."""

    @property
    def total(self) -> Work:
        """Sum of all parts."""
        return sum(self.parts.values(), Work())

    @property
    def flops(self) -> int:
        """FLOPs of all parts."""
        return self.total.flops

    def share(self, *parts: Part) -> float:
        """Return the share of the given parts in all FLOPs, 0 to 1."""
        return sum(self.parts[part].flops for part in parts) / max(1, self.flops)

    def table(self) -> str:
        """Return a text table with one line per part: TFLOP, share, gigabytes of weights and of activations."""
        grid = self.grid
        size = "" if grid is None else f", {grid.frames} x {grid.height} x {grid.width} = {grid.tokens} video tokens"
        lines = [f"{self.transformer}{size}, {len(self.blocks)} blocks"]
        lines.append(f"{'':18}{'TFLOP':>12}{'share':>8}{'weights GB':>12}{'activations GB':>16}")
        for name, work in (*self.parts.items(), ("total", self.total)):
            share = work.flops / max(1, self.flops)
            numbers = f"{work.flops / 1e12:12.3f}{share:8.1%}{work.weight_bytes / 1e9:12.3f}"
            lines.append(f"{name:18}{numbers}{work.activation_bytes / 1e9:16.3f}")
        return "\n".join(lines)


def forward_cost(
    model: nn.Module | Mapping[str, Any],
    *,
    num_frames: int,
    height: int,
    width: int,
    text_tokens: int | None = None,
    batch: int = 1,
    guidance: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    factors: tuple[int, int] | None = None,
) -> Cost:
    """Count the cost of one denoising step: the call that the pipeline of the class makes, for a size in pixels.

    Args:
        model: a transformer, or the config of a transformer (with `_class_name`, as in config.json). Only the class
            and the config of a transformer are read, so plug-ins on it do not change the result. No memory is
            allocated for weights.
        num_frames: number of frames of the clip; 1 for a picture.
        height: height in pixels.
        width: width in pixels.
        text_tokens: number of tokens of the prompt, which are all counted. None uses the padded length of the
            pipeline, or no text for a model without text (DiT).
        batch: number of clips.
        guidance: guidance scale. Above 1, a second pass for the negative prompt is counted, which reads the weights
            again.
        dtype: dtype of weights and activations, for the bytes.
        factors: frames in a latent frame, and pixels per side in a latent pixel. None uses the factors of the
            autoencoder that the class is published with.

    Raises:
        UserError: the class is unknown, or the model does not take this size.
    """
    kind, config = _kind_and_config(model)
    row = registered_name(kind)
    size = latent_size(row, config, num_frames, height, width, text_tokens=text_tokens, batch=batch, factors=factors)
    return call_cost(model, call_arguments(row, config, size), passes=2 if guidance > 1 else 1, dtype=dtype)


def call_cost(
    model: nn.Module | Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    passes: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Count the cost of a call with given arguments.

    Args:
        model: a transformer, or the config of a transformer with `_class_name`.
        arguments: keyword arguments of its `forward`, on any device and of any dtype.
        passes: number of forward passes, at least 1.
        dtype: dtype for the bytes; the shapes are determined in float32.

    Raises:
        UserError: the class is unknown, `passes` is below 1, or the model does not take the arguments.
    """
    if passes < 1:
        raise UserError(f"passes must be at least 1, got {passes}")
    from diffusers import attention_backend

    kind, config = _kind_and_config(model)
    registered_name(kind)
    arguments = tree_map_only(Tensor, _on_cpu, dict(arguments))
    fake = FakeTensorMode()
    known = inspect.signature(kind.__init__).parameters
    with fake:
        built: Any = kind(**{name: value for name, value in config.items() if name in known and name != "self"}).eval()
    counter = _Counter(fake, dtype.itemsize)
    try:
        # The attention backend of diffusers is a setting of the whole process, and only torch's own is counted.
        with torch.no_grad(), attention_backend("native"), counter.modules, counter:
            built(**arguments)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"{kind.__name__} does not take this call: {told}. Use a size and arguments that its config allows"
        ) from error
    return _collect(built, counter, arguments, passes)


def latent_size(
    kind: str,
    config: Mapping[str, Any],
    num_frames: int,
    height: int,
    width: int,
    *,
    text_tokens: int | None = None,
    batch: int = 1,
    factors: tuple[int, int] | None = None,
    **place: Any,
) -> Size:
    """Convert a size in pixels into the size of the latents.

    `kind` is the name of a registered transformer class, `config` its config, and `place` has the `device` and `dtype`
    of the `Size`. The other arguments are those of `forward_cost`.

    Raises:
        UserError: the autoencoder and the patches do not divide the size, or a number is too small.
    """
    # The number of text tokens, and the frames and pixels per token.
    call = call_of(kind)
    least = _least_text(kind, call, text_tokens)
    text_tokens = call.text_tokens if text_tokens is None else text_tokens
    if makes_pictures(kind) and num_frames != 1:
        raise UserError(f"{kind} makes pictures: num_frames must be 1, got {num_frames}")
    time, space = factors or compression(kind, config)
    if min(time, space) < 1:
        raise UserError(f"factors are {time} frames and {space} pixels in a latent, both must be at least 1")
    patch = config.get("patch_size") or 1
    side = space * (patch if isinstance(patch, int) else patch[-1])
    # The clip must consist of whole tokens.
    wrong = (num_frames - 1) % time or height % side or width % side
    if wrong or min(num_frames, height, width, batch) < 1 or text_tokens < least:
        raise UserError(
            f"{kind} takes at least one clip and text token, 1 + a multiple of {time} frames and sides that are"
            f" multiples of {side}, got {num_frames} frames of {height} x {width}, batch {batch},"
            f" {text_tokens} text tokens"
        )
    patch_t = config.get("patch_size_t") or 1
    frames = (num_frames - 1) // time + 1 + call.more_frames
    return Size(
        batch=batch,
        num_frames=num_frames,
        # CogVideoX 1.5 pads the clip to whole patches in time.
        frames=-(-frames // patch_t) * patch_t,
        height=height // space,
        width=width // space,
        text_tokens=text_tokens,
        **place,
    )


def _least_text(kind: str, call: Call, given: int | None) -> int:
    if call.text_width is None and given:
        raise UserError(f"{kind} takes no text: leave text_tokens out, got {given}")
    return 0 if call.text_width is None else 1


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _kind_and_config(model: nn.Module | Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(model, nn.Module):
        inner: Any = unwrap(model)
        return type(inner), getattr(inner, "config", {})
    import diffusers

    name = model.get("_class_name")
    if name is None:
        raise UserError("the config has no _class_name: add the class name of the transformer, as in its config.json")
    call_of(name)
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {name}: pass the transformer instead of its config")
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}
    return kind, {**defaults, **model}


class _Counter(TorchDispatchMode):
    """Counts the executed operations by the name of the innermost running module.

    Every tensor that depends on a weight is fake. Small masks and positions have real values. A boolean index with
    real values is converted into integer indices, because the result of a fake boolean index has no known shape.
    """

    def __init__(self, fake: FakeTensorMode, itemsize: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.itemsize = itemsize
        self.modules = ModuleTracker()
        self.work: defaultdict[tuple[str, bool], Work] = defaultdict(Work)
        """Work by (module name, whether the operation is an attention call)."""
        self.ran: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and self._is_small(function, args, kwargs):
            return function(*args, **kwargs)
        if function is _aten.index.Tensor:
            args = (args[0], list(_as_numbers(args[1])))
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        with self.fake:
            out = function(*args, **kwargs)
        # `parents` has the full names of all running modules, which begin with the class of the outermost one.
        self.ran |= self.modules.parents
        packet = function._overloadpacket
        if packet in _FLOPS:
            name = max(self.modules.parents, key=len).partition(".")[2]
            attends = packet not in _WITH_WEIGHTS
            flops = _FLOPS[packet](*args, **kwargs, out_val=out)
            self.work[name, attends] += Work(flops, activation_bytes=_moved(packet, args, out) * self.itemsize)
        return out

    def _is_small(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether to compute an operation without weights; an operation that returns a dense mask is too large."""
        # The result of broadcasting, concatenation or repetition has at most as many elements as the product.
        sizes = (each.numel() if isinstance(each, Tensor) else each for each in tree_leaves((args, kwargs)))
        if prod(1 + abs(size) for size in sizes if isinstance(size, int)) <= _SMALL:
            return True
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        try:
            with self.fake:
                made = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True
        return sum(each.numel() for each in made) <= _SMALL

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def _as_numbers(indices: Any) -> Iterator[Any]:
    for index in indices:
        known = isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        if known:
            yield from index.nonzero().unbind(1)
        else:
            yield index


def _moved(packet: Any, args: tuple[Any, ...], out: Any) -> int:
    """Return the number of elements that an operation reads and writes; weights are not counted."""
    operands = {_aten.mm: args[:1], _aten.addmm: args[1:2], _aten.convolution: args[:1]}.get(packet, args[:3])
    result = out[0] if isinstance(out, tuple) else out
    return sum(each.numel() for each in (*operands, result) if isinstance(each, Tensor))


def _collect(model: Any, counter: _Counter, arguments: Mapping[str, Any], passes: int) -> Cost:
    attention, names = self_attention_names(model), block_names(model)
    parts: dict[Part, Work] = dict.fromkeys(PARTS, Work())
    blocks: dict[str, dict[Part, Work]] = {name: dict.fromkeys(PARTS, Work()) for name in names}
    inside = re.compile("|".join(f"({re.escape(name)})(?:\\..+)?" for name in names))
    for name, part, work in (*_products(counter, attention), *_weights(model, counter)):
        parts[part] += work * passes
        if found := inside.fullmatch(name):
            blocks[found[found.lastindex or 0]][part] += work * passes
    return Cost(transformer=type(model).__name__, grid=grid_of_call(model, arguments), parts=parts, blocks=blocks)


def _products(counter: _Counter, attention: tuple[str, ...]) -> Iterator[tuple[str, Part, Work]]:
    for (name, attends), work in counter.work.items():
        role = role_of(name)
        part = _PARTS_OF_ROLES[role]
        if attends and any(name == one or name.startswith(f"{one}.") for one in attention):
            part = "self-attention"
        elif attends and role == "attention":
            part = "other attention"
        yield name, part, work


def _weights(model: nn.Module, counter: _Counter) -> Iterator[tuple[str, Part, Work]]:
    ran = {name.partition(".")[2] for name in counter.ran}
    for name, module in model.named_modules():
        if name in ran and not isinstance(module, nn.Embedding):
            size = sum(weight.numel() for weight in module.parameters(recurse=False)) * counter.itemsize
            yield name, _PARTS_OF_ROLES[role_of(name)], Work(weight_bytes=size)
