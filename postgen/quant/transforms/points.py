"""The tensors of a block that can be scaled and shifted: the rows of `postgen.families.folds` on a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Block, blocks_of
from postgen.families.folds import Fold, Kind, Modulation, Norm, Projection, Table, Writer, folds_of, has_folds


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Input or output channels of a linear layer."""

    name: str
    """Name of the layer inside the block."""
    start: int
    """First channel."""
    stop: int
    """The channel after the last one."""
    inverse: bool = False
    """Whether a written tensor is multiplied by the scale instead of divided (keys)."""
    shifts: bool = True
    """Whether a writer subtracts the shift."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldPoint:
    """One tensor of a block that can be scaled and shifted per channel."""

    block: str
    """Name of the block in the model; empty for a block alone."""
    fold: Fold
    width: int
    """Number of channels of the scale and of the shift."""
    readers: tuple[Part, ...]
    """Linear layers that read the tensor, and in which input channels. Empty for queries and keys."""
    writers: tuple[Part, ...]
    """Linear layers that write the tensor itself, and in which output channels: values, gated hidden states, queries
    and keys without a norm. Empty if a norm or a modulation writes it."""
    shiftable: bool
    """Whether a shift is possible: everything that has to absorb it has a bias."""

    @property
    def name(self) -> str:
        """Name of the tensor inside the block."""
        return self.fold.name

    @property
    def kind(self) -> Kind:
        """What the tensor is."""
        return self.fold.kind


def let_points(
    model: nn.Module, block: Block | str = "", *, kinds: Collection[Kind] = get_args(Kind)
) -> list[FoldPoint]:
    """Return the tensors of a block that can be scaled and shifted per channel.

    Args:
        model: a transformer, or a block alone (for instance a copy of one).
        block: the block or its name; not needed if `model` is a block.
        kinds: which tensors.

    Raises:
        UserError: the class of the block has no rows, the model has no such block, or a layer is not a plain linear
            layer with floating-point weights (adapters, fused projections, quantised layers).
    """
    name = block.name if isinstance(block, Block) else block
    module = block_of(model, name)
    found = [point for point in points_in(module, name) if point.kind in kinds]
    _check(module, name or type(module).__name__)
    _check_shared(model, module, name)
    return found


def points_in(block: nn.Module, name: str = "") -> list[FoldPoint]:
    """Return the points of a block without checks of its layers, which may be quantised.

    Raises:
        UserError: the class of the block has no rows.
    """
    found = (_point(block, name, fold) for fold in folds_of(block))
    return [point for point in found if point is not None]


def block_of(model: nn.Module, name: str) -> nn.Module:
    """Return a block of a model by its name; a block alone is its own block.

    Raises:
        UserError: the model has no such block, or no name is given and the model is no block with rows.
    """
    if not name:
        folds_of(model)  # raises if the model is no block
    if not name or has_folds(model):
        return model
    blocks = blocks_of(model)
    for block in blocks:
        if block.name == name:
            return block.module
    raise UserError(f"{type(model).__name__} has no block {name!r}. Blocks: {blocks[0].name} ... {blocks[-1].name}")


def found_in(block: nn.Module, name: str) -> Any:
    """Return a module or an attribute of a block by its dotted name; None if there is none."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _point(block: nn.Module, name: str, fold: Fold) -> FoldPoint | None:
    if not _meant(block, fold):
        return None
    writers = [writer for writer in fold.writers if _present(block, writer)]
    modules = [(reader, found_in(block, reader.linear)) for reader in fold.readers]
    readers = [(reader, module) for reader, module in modules if module is not None]
    linears = [module for _, module in readers if isinstance(module, nn.Linear)]
    # A reader that is not a linear layer (a convolution) cannot absorb the scale.
    if not writers or (fold.readers and not linears) or len(linears) < len(readers):
        return None
    widths = {_channels(block, writer) for writer in writers}
    widths |= {layer.in_features for (reader, _), layer in zip(readers, linears, strict=True) if not reader.first}
    width = widths.pop()
    if widths or not width:
        return None
    biased = all(layer.bias is not None for layer in linears) and all(_can_shift(block, each) for each in writers)
    return FoldPoint(
        block=name,
        fold=fold,
        width=width,
        readers=tuple(Part(name=reader.linear, start=0, stop=width) for reader, _ in readers),
        writers=tuple(part for each in writers if (part := _rows(block, each, width)) is not None),
        shiftable=fold.shift and biased,
    )


def _meant(block: nn.Module, fold: Fold) -> bool:
    """Whether a row is for blocks with this config."""
    attribute, value = fold.when
    if attribute and found_in(block, attribute) != value:
        return False
    if fold.present and found_in(block, fold.present) is None:
        return False
    return not fold.absent or found_in(block, fold.absent) is None


def _present(block: nn.Module, writer: Writer) -> bool:
    match writer:
        case Table():
            return hasattr(block, writer.name)
        case Norm():
            return any(found_in(block, name) is not None for name in (writer.name, writer.instead) if name)
    return found_in(block, writer.linear) is not None


def _channels(block: nn.Module, writer: Writer) -> int:
    """Return the number of channels that a writer writes; 0 if it cannot absorb a scale."""
    match writer:
        case Table():
            return int(getattr(block, writer.name).shape[-1])
        case Norm():
            norm = found_in(block, writer.name)
            if norm is None:
                return _share(found_in(block, writer.instead), 1)
            weight = getattr(norm, "weight", None)
            return 0 if weight is None else int(weight.numel())
        case Modulation():
            layer = found_in(block, writer.linear)
            # The scale is 1 + chunk, which only a bias can absorb.
            return 0 if getattr(layer, "bias", None) is None else _share(layer, writer.chunks)
    return _share(found_in(block, writer.linear), writer.part[1])


def _share(layer: nn.Module | None, parts: int) -> int:
    return 0 if not isinstance(layer, nn.Linear) or layer.out_features % parts else layer.out_features // parts


def _can_shift(block: nn.Module, writer: Writer) -> bool:
    match writer:
        case Table():
            return True
        case Modulation():
            return writer.shift is not None
        case Norm():
            return getattr(found_in(block, writer.name), "bias", None) is not None
    return not writer.shifts or getattr(found_in(block, writer.linear), "bias", None) is not None


def _rows(block: nn.Module, writer: Writer, width: int) -> Part | None:
    """Return the rows of a linear layer that are the tensor itself; None if a norm or a modulation writes it."""
    if isinstance(writer, Projection):
        start = writer.part[0] * width
        return Part(name=writer.linear, start=start, stop=start + width, shifts=writer.shifts)
    if isinstance(writer, Norm) and found_in(block, writer.name) is None:
        return Part(name=writer.instead, start=0, stop=width, inverse=writer.inverse)
    return None


def _check(block: nn.Module, name: str) -> None:
    """Refuse a block in which a fold would miss a reader or a writer."""
    for inner, module in block.named_modules():
        place = f"{name}.{inner}" if inner else name
        if getattr(module, "fused_projections", False):
            raise UserError(f"{place} has fused projections, which a fold would miss: call unfuse_qkv_projections()")
        if hasattr(module, "base_layer"):
            raise UserError(f"{place} has an adapter, which a fold would miss: fuse and unload the LoRA first")
        processor = getattr(module, "processor", None)
        if isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
            raise UserError(
                f"the attention processor of {place}, a {type(processor).__name__}, has weights of its own, which a"
                " fold would miss: unload it (for instance an IP adapter) first"
            )
        if isinstance(module, nn.Linear):
            _check_weight(module.weight, place)


def _check_weight(weight: Tensor, place: str) -> None:
    if weight.is_meta:
        raise UserError(f"the weights of {place} are not loaded (offloading): load the model without it to fold")
    # Libraries store quantised weights as integers, in 8-bit floats, or in tensor classes of their own.
    if not weight.is_floating_point() or weight.element_size() < 2 or type(weight) is not nn.Parameter:
        kind = "" if type(weight) is nn.Parameter else f", a {type(weight).__name__}"
        raise UserError(
            f"{place} is quantised already{kind}: fold before layers are quantised, in float32 or bfloat16"
        )


def _check_shared(model: nn.Module, block: nn.Module, name: str) -> None:
    """Refuse parameters that are also those of another part of the model, which a fold would change."""
    if model is block:
        return
    own = {id(parameter): inner for inner, parameter in block.named_parameters()}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and f"{name}.{own[id(parameter)]}" not in other:
            raise UserError(f"{name}.{own[id(parameter)]} is also {other}, so folding one would change the other")
