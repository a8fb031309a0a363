"""Convert a trained transformer to hybrid linear attention, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from postgen.errors import UserError
from postgen.families import Grid, blocks_of, layout_of, tokens_of
from postgen.families.attention import AttentionReader, attention_of
from postgen.families.installed import installed, processor_stack, transformers_of
from postgen.families.linear import replace_linears, replaced_linears
from postgen.families.own_format import erase_note, read_note, write_note
from postgen.lit.adapter import check_weights, put_back
from postgen.lit.config import LiTConfig
from postgen.lit.conversion import CHILD, HALF, NAME, Conversion, Converted
from postgen.lit.layers import LitLayer, Shape, make_layer
from postgen.lit.options import LINEAR_TYPES, OF_FRAMES
from postgen.lit.pattern import types_of_blocks
from postgen.lit.report import Report, Row

LOADER = "postgen.lit.load"
"""What a saved model's config names."""
PROJECTIONS = ("to_q", "to_k", "to_v")
"""Layers that begin anew with `inherit="output"`, by the names that diffusers gives them everywhere."""
ORDERS = ("video", "video-text", "text-video")


class Fresh(nn.Module):
    """A projection that began anew. A LoRA of the base finds no layer of its kind here, and says so."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.fresh = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, **place)
        if not base.weight.is_meta:
            nn.init.xavier_uniform_(self.fresh.weight)
            if self.fresh.bias is not None:
                nn.init.zeros_(self.fresh.bias)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project."""
        out: torch.Tensor = self.fresh(x)
        return out


def convert(transformer: nn.Module, config: LiTConfig | None = None) -> Report:
    """Convert self-attention over the video (or picture) of a stock transformer, block by block, in place.

    New layers stand in the attention modules, under names of their own, on the device and in the dtype of the
    projections; every weight of the base keeps its name, so its LoRAs still attach. `save_pretrained` writes both, and
    what `load` needs into config.json. A model without any converted block computes the stock model's bits.

    Args:
        transformer: of diffusers, perhaps wrapped.
        config: which blocks, and how; None is every second block `window_delta`.

    Returns:
        What was done, as a table.

    Raises:
        UserError: an unknown class, one that is linear already, a U-Net, a processor whose code has changed; somebody
            else computes the attention; float16 without qk-norm; settings that do not fit. Nothing is changed then.

    Example:
        print(convert(pipe.transformer, LiTConfig(layers="every 2nd:window_delta")))
    """
    config = LiTConfig() if config is None else config
    if not isinstance(config, LiTConfig):
        raise UserError(f"config must be a LiTConfig, got {type(config).__name__}")
    model = the_transformer(transformer)
    if NAME in installed(model).plug_ins:
        raise UserError(f"this {type(model).__name__} is converted already: revert it first")
    modules = modules_of_blocks(model)
    types = types_of_blocks(config.layers, len(modules), first_block=config.first_block)
    chosen = tuple(
        Converted(block, name, kind)
        for block, (kind, names) in enumerate(zip(types, modules, strict=True))
        for name in names
        if kind != "softmax"
    )
    readers = readers_for(model, chosen)
    processor_stack(model).check_claim(NAME, readers)
    layers = new_layers(model, config, chosen)
    report = _report(model, types, modules, layers, config)
    conversion = Conversion(model, config, chosen, report)
    # Everything that can be wrong shows above or in these two, which change nothing where they fail.
    write_note(model, LOADER, config.as_json())
    try:
        if config.inherit == "output" and chosen:
            _begin_anew(model, config, chosen)
            conversion.fresh = True
        conversion.install(model, readers)
    except BaseException:
        erase_note(model)
        _end_anew(model, conversion)
        raise
    for name, layer in layers.items():
        model.get_submodule(name).add_module(CHILD, layer)
    return report


def revert(transformer: nn.Module) -> None:
    """Take a conversion off: the transformer is the stock one again, with the weights of the base as they are now.

    Weights that an adapter had replaced (`apply_adapter`) are what they were before.

    A stock model that `from_config` made of a converted one's config has the mark of a conversion in its own, and no
    layer: of it the mark is taken off.

    Raises:
        UserError: it is not converted, somebody holds a projection that began anew or a layer that would go, or
            weights that an adapter had replaced cannot be put back: a LoRA is merged into them, they are fused or
            offloaded. Nothing is changed then.
    """
    model: Any = the_transformer(transformer)
    if NAME not in installed(model).plug_ins and read_note(model.config, LOADER) is not None:
        erase_note(model)
        return
    conversion = conversion_of(model)
    _check_free(model, conversion)
    _end_anew(model, conversion)
    conversion.uninstall(model)
    for each in conversion.converted:
        attention: Any = model.get_submodule(each.module)
        put_back(attention, getattr(attention, CHILD).before)
        delattr(attention, CHILD)
    erase_note(model)


def conversion_of(transformer: nn.Module) -> Conversion:
    """Return what a conversion left on a transformer.

    Raises:
        UserError: it is not converted.
    """
    model = the_transformer(transformer)
    found: Conversion | None = installed(model).plug_ins.get(NAME)
    if found is None:
        raise UserError(f"this {type(model).__name__} is not converted: call postgen.lit.convert first")
    return found


def layers_of(transformer: nn.Module) -> dict[str, LitLayer]:
    """Return the new layers of a converted transformer by the name of their attention module.

    Raises:
        UserError: it is not converted.
    """
    model = the_transformer(transformer)
    return {each.module: getattr(model.get_submodule(each.module), CHILD) for each in conversion_of(model).converted}


def set_grid(transformer: nn.Module, grid: Grid) -> None:
    """Say the grid of tokens for blocks that are called alone, without their transformer; copies of blocks keep it.

    Calls of the transformer say their own.

    Raises:
        UserError: it is not converted.
    """
    conversion_of(transformer).set_grid(grid)


def modules_of_blocks(model: nn.Module) -> list[list[str]]:
    """Return the names of the self-attention modules of each block, in running order.

    Raises:
        UserError: nothing is known of the class, or its tokens are in an order that no layer takes.
    """
    video, kind = tokens_of(model), type(model).__name__
    if video.token_order not in ORDERS or video.factorised:
        raise UserError(f"{kind} cannot be converted: its attention sees tokens beside the video's grid and the text")
    if video.causal_rule is not None and video.causal_rule(model.config):
        raise UserError(f"{kind} cannot be converted: its attention is block-causal")
    names = [*video.attention_modules(model)]
    found = [[name for name in names if name.startswith(f"{block.name}.")] for block in blocks_of(model)]
    assert sum(map(len, found)) == len(names), "every attention module is in a block"
    return [each for each in found if each]


def the_transformer(transformer: nn.Module) -> nn.Module:
    """Return the one transformer of a pipeline, or what is inside wrappers.

    Raises:
        UserError: there are several.
    """
    found = transformers_of(transformer)
    if len(found) != 1:
        raise UserError(f"a pipeline with {len(found)} transformers was given: convert one after the other")
    return next(iter(found.values()))


def stock_transformer(transformer: nn.Module, advice: str) -> nn.Module:
    """Return what `the_transformer` does, which is to be softmax everywhere.

    Args:
        transformer: perhaps wrapped.
        advice: what to do with the one that a converted one was made from, for the error.

    Raises:
        UserError: as `the_transformer`, or it is converted.
    """
    model = the_transformer(transformer)
    if NAME in installed(model).plug_ins:
        raise UserError(f"this {type(model).__name__} is converted: {advice} the one that it was made from")
    return model


def readers_for(model: nn.Module, chosen: tuple[Converted, ...]) -> dict[str, AttentionReader]:
    """Return what knows the calls of each module that is chosen.

    Raises:
        UserError: a module whose layer cannot be its type.
    """
    anatomy = attention_of(model)
    readers = {}
    for each in chosen:
        module: Any = model.get_submodule(each.module)
        readers[each.module] = anatomy.reader(
            module.processor, what="linear form", advice="leave this block softmax, or set a processor of diffusers"
        )
        half = _weight(module).dtype == torch.float16
        if half and getattr(module, "norm_q", None) is None:
            raise UserError(HALF.format(kind=each.kind))
        if each.kind in OF_FRAMES and layout_of(model).video is None:
            raise UserError(
                f"{each.kind} looks at frames, and {type(model).__name__} makes pictures: take"
                f" {', '.join(kind for kind in LINEAR_TYPES if kind not in OF_FRAMES)}"
            )
    return readers


def new_layers(model: nn.Module, config: LiTConfig, chosen: tuple[Converted, ...]) -> dict[str, LitLayer]:
    """Make the new layers; the random numbers of the process are left as they were."""
    layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for each in chosen:
            module: Any = model.get_submodule(each.module)
            weight = _weight(module)
            layer = make_layer(each.kind, shape_of(module, config), config.options(each.kind))
            layers[each.module] = layer.to(device=weight.device, dtype=weight.dtype).train(module.training)
    return layers


def shape_of(module: Any, config: LiTConfig) -> Shape:
    """Return what a layer must know of an attention module of a stock transformer."""
    grid = None
    if config.grid is not None:
        frames, rows, columns = config.grid
        grid = Grid(frames=frames, height=rows, width=columns)
    width = module.to_qkv.out_features // 3 if hasattr(module, "to_qkv") else module.to_q.out_features
    heads = int(module.heads)
    return Shape(heads=heads, channels=width // heads, hidden=_weight(module).shape[1], grid=grid)


def _weight(module: Any) -> torch.Tensor:
    """The weight that projects to queries."""
    layer = module.to_qkv if getattr(module, "fused_projections", False) else module.to_q
    weight: torch.Tensor = getattr(layer, "base_layer", layer).weight
    return weight


def _check_free(model: nn.Module, conversion: Conversion) -> None:
    for owner, handle in replaced_linears(model).items():
        if owner != NAME and (held := [name for name in handle.modules if f".{CHILD}." in name]):
            raise UserError(f"cannot revert: {owner} has replaced {held[0]}. Take {owner} off before")
    layers = {each.module: getattr(model.get_submodule(each.module), CHILD) for each in conversion.converted}
    check_weights(model, [f"{module}.{name}" for module, layer in layers.items() for name in layer.before], "revert")


def _end_anew(model: nn.Module, conversion: Conversion) -> None:
    # A handle knows the model: kept in the conversion, it would go along with every copy of a block.
    if conversion.fresh:
        replaced_linears(model)[NAME].remove()


def _begin_anew(model: nn.Module, config: LiTConfig, chosen: tuple[Converted, ...]) -> None:
    names = "|".join(re.escape(each.module) for each in chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        replace_linears(
            model, lambda _, base: Fresh(base), owner=NAME, pattern=rf"({names})\.({'|'.join(PROJECTIONS)})"
        )


def _report(
    model: nn.Module,
    types: tuple[str, ...],
    modules: list[list[str]],
    layers: Mapping[str, LitLayer],
    config: LiTConfig,
) -> Report:
    rows = []
    for block, names in enumerate(modules):
        for name in names:
            children = [child for child, _ in model.get_submodule(name).named_children() if child != CHILD]
            begun = PROJECTIONS if config.inherit == "output" and name in layers else ()
            new = sum(weight.numel() for weight in layers[name].parameters()) if name in layers else 0
            rows.append(
                Row(
                    block=block,
                    module=name,
                    kind=types[block],
                    new=new,
                    inherited=tuple(child for child in children if child not in begun),
                    fresh=begun,
                )
            )
    total = sum(weight.numel() for weight in model.parameters())
    return Report(transformer=type(model).__name__, types=types, rows=tuple(rows), base_parameters=total)
