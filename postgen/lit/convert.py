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
from postgen.families.linear_checks import check_not_quantized
from postgen.families.own_format import erase_note, read_note, write_note
from postgen.lit.adapter import check_weights, put_back
from postgen.lit.config import LitConfig
from postgen.lit.conversion import CHILD, HALF, NAME, Conversion, Converted
from postgen.lit.layers import LitLayer, Shape, make_layer
from postgen.lit.options import LINEAR_TYPES, OF_FRAMES
from postgen.lit.pattern import types_of_blocks
from postgen.lit.report import Report, Row

LOADER = "postgen.lit.load"
"""Name of the loader in the config of a saved converted model."""
PROJECTIONS = ("to_q", "to_k", "to_v")
"""Names of the layers that `inherit="output"` initialises anew; diffusers uses these names in all models."""
ORDERS = ("video", "video-text", "text-video")
"""Token orders that the layers support."""


class Fresh(nn.Module):
    """A projection that is initialised anew.

    It is no `nn.Linear`, so loading a LoRA of the base model into it fails with an error instead of adapting weights
    for which the LoRA was not trained.
    """

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
        """Return the projection of x."""
        out: torch.Tensor = self.fresh(x)
        return out


def convert(transformer: nn.Module, config: LitConfig | None = None) -> Report:
    """Convert the self-attention over the video (or image) of a stock transformer, block by block, in place.

    Each new layer is a child of its attention module, on the device and in the dtype of the projections. Every weight
    of the base model keeps its name, so LoRAs of the base model still load. `save_pretrained` writes all weights, and
    the settings for `load` go into config.json. If no block is converted, the outputs equal those of the stock model,
    bit by bit.

    Args:
        transformer: a transformer of diffusers, possibly wrapped (compiled, DDP, ...).
        config: the layer types and their options; None for `LitConfig()`, every second block `window_delta`.

    Returns:
        The report; `print` shows a table.

    Raises:
        UserError: the class is unknown, linear already, quantised, or a U-Net; the code of a processor differs from
            the known versions; another plug-in computes the attention; float16 without qk-norm; or settings that do
            not fit. The transformer is unchanged in these cases.

    Example:
        print(convert(pipe.transformer, LitConfig(layers="every 2nd:window_delta")))
    """
    config = LitConfig() if config is None else config
    if not isinstance(config, LitConfig):
        raise UserError(f"config must be a LitConfig, got {type(config).__name__}")
    model = the_transformer(transformer)
    if NAME in installed(model).plug_ins:
        raise UserError(
            f"this {type(model).__name__} is converted already: revert the conversion first (postgen.lit.revert)"
        )
    check_not_quantized(model, "be converted: load the exact model")
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
    # Every check is above, or in `_begin_anew` and `install`, which change nothing if they fail.
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
    """Remove a conversion, in place. The transformer becomes a stock transformer with the current base weights.

    Weights that an adapter replaced (`apply_adapter`) return to their values before the adapter. `from_config` with
    the config of a converted model creates a stock model whose config still has the entry of the conversion; for such
    a model, `revert` removes the entry.

    Raises:
        UserError: the transformer is not converted; another plug-in has replaced a layer that would be removed; or
            weights that an adapter replaced cannot be restored, because a LoRA is merged into them, or they are fused
            or offloaded. The transformer is unchanged in these cases.
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
    """Return the conversion of a converted transformer.

    Raises:
        UserError: the transformer is not converted.
    """
    model = the_transformer(transformer)
    found: Conversion | None = installed(model).plug_ins.get(NAME)
    if found is None:
        raise UserError(f"this {type(model).__name__} is not converted: call postgen.lit.convert first")
    return found


def layers_of(transformer: nn.Module) -> dict[str, LitLayer]:
    """Return the new layers of a converted transformer, by the name of their attention module.

    Raises:
        UserError: the transformer is not converted.
    """
    model = the_transformer(transformer)
    return {each.module: getattr(model.get_submodule(each.module), CHILD) for each in conversion_of(model).converted}


def set_grid(transformer: nn.Module, grid: Grid) -> None:
    """Set the token grid for blocks that are called without their transformer; copies of blocks keep this grid.

    Each call of the transformer sets the grid from its own arguments.

    Raises:
        UserError: the transformer is not converted.
    """
    conversion_of(transformer).set_grid(grid)


def modules_of_blocks(model: nn.Module) -> list[list[str]]:
    """Return the names of the self-attention modules of each block, in running order.

    Raises:
        UserError: the class is unknown, or the layers do not support its tokens.
    """
    video, kind = tokens_of(model), type(model).__name__
    if video.token_order not in ORDERS or video.factorised:
        raise UserError(
            f"{kind} cannot be converted: its attention has tokens other than the grid of the video and the text, or"
            " does not attend over the whole grid at once"
        )
    if video.causal_rule is not None and video.causal_rule(model.config):
        raise UserError(f"{kind} cannot be converted: its attention is block-causal")
    names = [*video.attention_modules(model)]
    found = [[name for name in names if name.startswith(f"{block.name}.")] for block in blocks_of(model)]
    assert sum(map(len, found)) == len(names), "every attention module is in a block"
    return [each for each in found if each]


def the_transformer(transformer: nn.Module) -> nn.Module:
    """Return the only transformer of a pipeline, or the transformer inside wrappers.

    Raises:
        UserError: the pipeline has several transformers.
    """
    found = transformers_of(transformer)
    if len(found) != 1:
        raise UserError(f"this pipeline has {len(found)} transformers: pass the transformers one by one")
    return next(iter(found.values()))


def stock_transformer(transformer: nn.Module, advice: str) -> nn.Module:
    """Return the same as `the_transformer`, but refuse a converted transformer.

    Args:
        transformer: the stock transformer, possibly wrapped.
        advice: the operation, as a verb for the error message, such as "score".

    Raises:
        UserError: see `the_transformer`; or the transformer is converted.
    """
    model = the_transformer(transformer)
    if NAME in installed(model).plug_ins:
        raise UserError(
            f"this {type(model).__name__} is converted: {advice} the stock transformer from which it was made"
        )
    return model


def readers_for(model: nn.Module, chosen: tuple[Converted, ...]) -> dict[str, AttentionReader]:
    """Return the attention reader of each chosen module, by the name of the module.

    Raises:
        UserError: a module cannot be converted to its layer type.
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
                f"the layer type {each.kind} needs frames, but {type(model).__name__} generates images: use one of"
                f" {', '.join(kind for kind in LINEAR_TYPES if kind not in OF_FRAMES)}"
            )
    return readers


def new_layers(model: nn.Module, config: LitConfig, chosen: tuple[Converted, ...]) -> dict[str, LitLayer]:
    """Create the new layers of the chosen modules. The global random state does not change."""
    layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for each in chosen:
            module: Any = model.get_submodule(each.module)
            weight = _weight(module)
            layer = make_layer(each.kind, shape_of(module, config), config.options(each.kind))
            layers[each.module] = layer.to(device=weight.device, dtype=weight.dtype).train(module.training)
    return layers


def shape_of(module: Any, config: LitConfig) -> Shape:
    """Return the sizes of an attention module of a stock transformer, for its new layer."""
    grid = None
    if config.grid is not None:
        frames, rows, columns = config.grid
        grid = Grid(frames=frames, height=rows, width=columns)
    width = module.to_qkv.out_features // 3 if hasattr(module, "to_qkv") else module.to_q.out_features
    heads = int(module.heads)
    return Shape(heads=heads, channels=width // heads, hidden=_weight(module).shape[1], grid=grid)


def _weight(module: Any) -> torch.Tensor:
    """Return the weight of the query projection, or of the fused projection."""
    layer = module.to_qkv if getattr(module, "fused_projections", False) else module.to_q
    weight: torch.Tensor = getattr(layer, "base_layer", layer).weight
    return weight


def _check_free(model: nn.Module, conversion: Conversion) -> None:
    """Refuse to revert while another plug-in, LoRA or offloading holds on to the layers or weights."""
    for owner, handle in replaced_linears(model).items():
        if owner != NAME and (held := [name for name in handle.modules if f".{CHILD}." in name]):
            raise UserError(f"cannot revert: {owner} has replaced {held[0]}. Remove {owner} first")
    layers = {each.module: getattr(model.get_submodule(each.module), CHILD) for each in conversion.converted}
    check_weights(model, [f"{module}.{name}" for module, layer in layers.items() for name in layer.before], "revert")


def _end_anew(model: nn.Module, conversion: Conversion) -> None:
    # The handle is looked up here, not stored in the conversion: it references the model, and a copy of a block would
    # then copy the whole model.
    if conversion.fresh:
        replaced_linears(model)[NAME].remove()


def _begin_anew(model: nn.Module, config: LitConfig, chosen: tuple[Converted, ...]) -> None:
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
    config: LitConfig,
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
