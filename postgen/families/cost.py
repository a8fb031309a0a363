"""FLOPs and bytes of a transformer's forward, counted on the real model without its memory and without computing.

The model is built from its config with fake weights (shapes only) and called once; every matrix product, convolution
and attention call is counted where torch executes it, by the module it runs in. So there is no formula per family that
could go stale. A multiplication and an addition are two FLOPs; norms, activations, rotations and softmax are left out.

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
"""`self-attention`: scores and values among the video tokens, text in the same sequence included; `other attention`:
the same of cross-attention, text refiners and attention within a frame; `projections`: linear layers of any
attention; `modulation`: linear layers that make scales and shifts; `other`: embeddings and the output layer."""

PARTS: tuple[Part, ...] = get_args(Part)

_aten: Any = torch.ops.aten
# torch counts no attention on CPU: its kernel has the shapes of the others.
_FLOPS: dict[Any, Any] = {**flop_registry, _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
_SMALL = 2**20
"""Tensors without weights (masks, positions) are computed up to this length, because models branch on them."""
_WITH_WEIGHTS = {_aten.mm, _aten.addmm, _aten.convolution}
_PARTS_OF_ROLES: dict[str, Part] = {
    "attention": "projections",
    "feed_forward": "feed-forward",
    "modulation": "modulation",
    "other": "other",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What one part of a forward costs."""

    flops: int = 0
    weight_bytes: int = 0
    """Parameters that are read, each once a pass; of embedding tables nothing."""
    activation_bytes: int = 0
    """What products and attention calls read and write when each is one kernel that does the work around it as well:
    scores are never written. Only a kernel that joins two products needs less."""

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
    """What a forward of a transformer costs, by part and by block."""

    transformer: str
    """Class name."""
    grid: Grid | None
    """Token grid of the video; None where the call does not tell."""
    parts: dict[Part, Work]
    """The whole forward."""
    blocks: dict[str, dict[Part, Work]]
    """Each repeated block, by name. What stands in none is in `parts` only."""

    @property
    def total(self) -> Work:
        """Everything."""
        return sum(self.parts.values(), Work())

    @property
    def flops(self) -> int:
        """FLOPs of everything."""
        return self.total.flops

    def share(self, *parts: Part) -> float:
        """Return the share of the FLOPs that some parts have, 0 to 1."""
        return sum(self.parts[part].flops for part in parts) / max(1, self.flops)

    def table(self) -> str:
        """Return one line a part: TFLOP, share, gigabytes of weights and of activations."""
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
    """Count one step of the denoiser: a call as the class's pipeline makes it, at a size in pixels.

    Args:
        model: a transformer, or the config of one (with `_class_name`, as in its config.json). Nothing is allocated
            for a config; of a transformer only class and config are read, so no plug-in counts.
        num_frames: frames of the clip; 1 for a picture.
        height: in pixels.
        width: in pixels.
        text_tokens: tokens of the prompt, all of them counted; None is what the pipeline pads to, or that there is no
            text (DiT).
        batch: clips.
        guidance: above 1 there is a second pass for the negative prompt, which reads the weights again.
        dtype: of weights and activations, for the bytes.
        factors: frames and pixels a side that the autoencoder puts into a latent; None takes those of the
            autoencoder that the class is published with.

    Raises:
        UserError: an unknown class, or a size that the model does not take.
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
    """Count a call with given arguments.

    Args:
        model: a transformer, or the config of one with `_class_name`.
        arguments: keyword arguments of its forward, on any device and of any dtype.
        passes: how often it is called, at least once.
        dtype: what the bytes are counted in; shapes are found in float32.

    Raises:
        UserError: an unknown class, no pass, or arguments that the class or its configuration does not take.
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
        # Setting the backend of any model sets that of the process, and torch counts its own attention alone.
        with torch.no_grad(), attention_backend("native"), counter.modules, counter:
            built(**arguments)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"{kind.__name__} does not take this call: {told}. Give a size and arguments that it takes"
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
    """Turn a size in pixels into that of the latents.

    Raises:
        UserError: frames, height or width that the autoencoder and the patches do not divide.
    """
    call = call_of(kind)
    least = _least_text(kind, call, text_tokens)
    text_tokens = call.text_tokens if text_tokens is None else text_tokens
    if makes_pictures(kind) and num_frames != 1:
        raise UserError(f"{kind} makes pictures: num_frames must be 1, got {num_frames}")
    time, space = factors or compression(kind, config)
    if min(time, space) < 1:
        raise UserError(f"factors are {time} frames and {space} pixels in a latent, they must be at least 1")
    patch = config.get("patch_size") or 1
    side = space * (patch if isinstance(patch, int) else patch[-1])
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
        # CogVideoX 1.5 fills its last patch in time.
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
        raise UserError("a config needs _class_name, the transformer's class, as its config.json has it")
    call_of(name)
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {name}: give the transformer itself")
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}
    return kind, {**defaults, **model}


class _Counter(TorchDispatchMode):
    """Counts what is executed, by the name of the innermost module that runs.

    Whatever touches a weight is fake. What masks and positions say is known as long as they are small; a boolean
    index is turned into numbers while it is known.
    """

    def __init__(self, fake: FakeTensorMode, itemsize: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.itemsize = itemsize
        self.modules = ModuleTracker()
        self.work: defaultdict[tuple[str, bool], Work] = defaultdict(Work)
        """By module name and whether it is attention between tokens."""
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
        # The names of the modules that are running contain one another; the class of the outermost leads them.
        self.ran |= self.modules.parents
        packet = function._overloadpacket
        if packet in _FLOPS:
            name = max(self.modules.parents, key=len).partition(".")[2]
            attends = packet not in _WITH_WEIGHTS
            flops = _FLOPS[packet](*args, **kwargs, out_val=out)
            self.work[name, attends] += Work(flops, activation_bytes=_moved(packet, args, out) * self.itemsize)
        return out

    def _is_small(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an operation without weights is worth computing: one that gives a dense mask is not."""
        # Broadcasting, joining and repeating give at most the product of what they are given.
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
    """Numbers in the activations among the operands, and in the result."""
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
