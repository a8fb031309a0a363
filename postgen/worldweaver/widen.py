"""Add channels for depth and flow to a trained transformer, and remove them again.

The RGB weights are not changed. The weight columns of the new inputs are zero, so the RGB output is the same as before
for any values of the new inputs. The weight rows of the new outputs are copies of the RGB rows. VideoJAM
(arXiv:2502.02492) widens a model in the same way: in the channels, without additional tokens. The result is a plain
model of the same class with larger `in_channels` and `out_channels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postgen.errors import UserError, check_number, first_line, shown
from postgen.families.installed import installed, transformers_of
from postgen.families.registry import layout_of
from postgen.families.widths import Widths, channel_axis, find_widths, inputs_of, resize, set_sizes
from postgen.worldweaver.latent_scale import Scale, scale_words
from postgen.worldweaver.levels import MODALITIES, Modality

NAME = "worldweaver"
AUX: tuple[tuple[Modality, ...], ...] = (("depth",), ("depth", "flow"))
_FIELDS = ("in_channels", "out_channels")


@dataclass(slots=True, eq=False)
class Widened:
    """Record of a transformer with channels of several modalities."""

    modalities: tuple[Modality, ...]
    """Modalities, RGB first."""
    channels: int
    """Number of latent channels of each modality."""
    widths: Widths
    """First and last layer of the widened transformer, and their channel positions."""
    placed: bool = False
    """Whether there are inputs for placed memory: a latent of each modality, and a mask."""
    before: dict[str, int | None] | None = None
    """`in_channels` and `out_channels` of the config before widening; None: unknown, because the transformer was
    loaded widened."""
    told: str = "not set yet"
    """How the network receives the noise levels of the frames, for the summary."""
    latent_scale: Scale | None = None
    """Factor by which the latents of each modality are multiplied for the network; None: 1 for all."""
    embedder: nn.Module | None = None
    """The level embedder: of the loaded adapter, or of the last `WorldWeaverModel`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the adapter that the embedder came with."""

    def driven_by(self, embedder: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        """Set the level embedder. `settings=None` keeps the settings if the embedder stays the same."""
        if settings is not None or embedder is not self.embedder:
            self.settings = dict(settings or {})
        self.embedder = embedder

    @property
    def scale(self) -> Scale:
        """`latent_scale` with None replaced by ones."""
        return self.latent_scale or (1.0,) * len(self.modalities)

    @property
    def aux(self) -> int:
        """Number of channels of modalities other than RGB."""
        return self.channels * (len(self.modalities) - 1)

    @property
    def shown(self) -> int:
        """Number of channels of placed memory, which are inputs only."""
        return self.channels * len(self.modalities) + 1 if self.placed else 0

    def describe(self) -> str:
        """Return a one-line description of the modalities and settings."""
        memory = ", and placed memory" if self.placed else ""
        names = " + ".join(scale_words(self.modalities, self.scale))
        return f"{names}, {self.channels} channels each{memory}; noise levels: {self.told}"


def widen_transformer(
    target: Any,
    aux: Sequence[Modality] = ("depth",),
    init_out: Literal["copy", "zero"] = "copy",
    aux_scale: float = 1.0,
    *,
    placed: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Add inputs and outputs for further modalities to a transformer, in place. The config is updated.

    Inputs of a new modality follow all existing inputs (36 in Wan image-to-video). Outputs of a new modality follow
    the RGB outputs.

    Args:
        target: a transformer, or a pipeline with one transformer.
        aux: ("depth",) or ("depth", "flow"); with `placed` also ().
        init_out: initialisation of the rows of the new outputs: "copy" copies the RGB rows, "zero" sets them to zero.
            With "zero" the new inputs receive no gradients from the new outputs in the first step.
        aux_scale: factor on the copied rows.
        placed: whether to add inputs for placed memory: as many channels as the latents of all modalities, and a mask,
            behind all other inputs.
        arguments: arguments of a small forward pass, for a class whose call postgen does not know.

    Returns:
        The transformer.

    Raises:
        UserError: two experts; a transformer that is already widened; or a class or layer that cannot be widened, with
            the reason.
    """
    model, modalities = transformer_of(target), (MODALITIES[0], *aux)
    _check_settings(aux, init_out, aux_scale, placed)
    there: Widened | None = installed(model).plug_ins.get(NAME)
    if there is not None and (there.aux or there.placed):
        raise UserError(f"this {type(model).__name__} is already widened: call narrow_transformer first")
    channels = _channels(model)
    old = find_widths(model, arguments)
    _check_layers(model, old)
    before = {field: model.config[field] for field in _FIELDS}
    made = Widened(modalities, channels, old, placed, before)
    # out_channels=None means as many outputs as inputs, which does not hold with inputs for placed memory.
    outputs = None if before["out_channels"] is None and not placed else channels + made.aux
    grown = {"in_channels": before["in_channels"] + made.aux + made.shown, "out_channels": outputs}
    _check_class(model, old, grown)
    more = None if arguments is None else _with_channels(model, arguments, made.aux + made.shown)
    parts = _weights(model, old)
    with _undone(model, parts, before):
        # Replace the parameters of both layers by larger ones, then fill them.
        resize(model, old, len(old.columns) + made.aux + made.shown, len(old.rows) + made.aux, grown)
        made.widths = find_widths(model, more)
        _fill(model, parts, old, made.widths)
        if init_out == "copy" and aux:
            _copy(model, parts, old, made, aux_scale)
    installed(model).plug_ins[NAME] = made
    return model


def narrow_transformer(
    target: Any,
    aux: Sequence[Modality] | None = None,
    *,
    placed: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Remove the channels of all modalities but RGB, in place. Untrained weights equal the stock weights bit by bit.

    Args:
        target: a transformer, or a pipeline with one transformer.
        aux: modalities beside RGB; required for a transformer that was loaded widened.
        placed: whether a transformer that was loaded widened has inputs for placed memory.
        arguments: as for `widen_transformer`, of the stock model.

    Returns:
        The transformer.

    Raises:
        UserError: the transformer is not widened, or its modalities are unknown.
    """
    model = transformer_of(target)
    modalities = None if aux is None else (MODALITIES[0], *aux)
    wide = widened(model, modalities, placed=placed, arguments=arguments)
    if not (wide.aux or wide.placed):
        raise UserError(f"this {type(model).__name__} has only RGB channels: there is nothing to remove")
    old = wide.widths
    _check_layers(model, old)
    inputs, outputs = len(old.columns) - wide.aux - wide.shown, len(old.rows) - wide.aux
    config = {field: model.config[field] for field in _FIELDS}
    small = wide.before or stock_channels(wide, config)
    parts = _weights(model, old)
    with _undone(model, parts, config):
        resize(model, old, inputs, outputs, small)
        new = find_widths(model, arguments)
        _fill(model, parts, old, new)
    del installed(model).plug_ins[NAME]
    return model


def forget_widening(model: Any) -> None:
    """Remove all additional channels, and the record of an RGB-only model."""
    found: Widened | None = installed(model).plug_ins.get(NAME)
    if found is not None and (found.aux or found.placed):
        narrow_transformer(model)
    else:
        installed(model).plug_ins.pop(NAME, None)


def stock_channels(wide: Widened, config: Mapping[str, Any]) -> dict[str, int | None]:
    """Return `in_channels` and `out_channels` of a widened config as they were before widening; None stays None."""
    less = {"in_channels": wide.aux + wide.shown, "out_channels": wide.aux}
    return {field: None if config[field] is None else config[field] - count for field, count in less.items()}


def widened(
    target: Any,
    modalities: tuple[Modality, ...] | None = None,
    *,
    placed: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Widened:
    """Return the record of a widened transformer. For a transformer that was loaded widened, a record is made.

    With modalities=("rgb",) a stock transformer counts as a transformer with a single modality.

    Args:
        target: a transformer, or a pipeline with one transformer.
        modalities: modalities of the transformer, RGB first; required for a transformer that was loaded widened.
        placed: whether it has inputs for placed memory; used only for a transformer that was loaded widened.
        arguments: as for `widen_transformer`, of the stock model.

    Raises:
        UserError: the transformer is not widened, or has other modalities.
    """
    model = transformer_of(target)
    found: Widened | None = installed(model).plug_ins.get(NAME)
    if found is None:
        if modalities is None:
            raise UserError(
                f"this {type(model).__name__} is not widened: call widen_transformer; for a transformer that was"
                " loaded widened give the modalities, as aux=('depth',)"
            )
        if modalities[:1] != MODALITIES[:1] or tuple(modalities[1:]) not in ((), *AUX):
            raise UserError(f"modalities must be the first ones of {', '.join(MODALITIES)}, got {shown(modalities)}")
        outputs = _channels(model)
        if outputs % len(modalities):
            raise UserError(
                f"{outputs} output channels cannot be divided into {len(modalities)} modalities: give the modalities"
                " of this transformer"
            )
        channels = outputs // len(modalities)
        more = outputs - channels + (outputs + 1 if placed else 0)
        call = None if arguments is None else _with_channels(model, arguments, more)
        found = Widened(tuple(modalities), channels, find_widths(model, call), placed)
        if len(found.widths.columns) < outputs + found.shown:
            raise UserError(f"this {type(model).__name__} has no inputs for placed memory: omit placed")
        installed(model).plug_ins[NAME] = found
    elif modalities is not None and modalities != found.modalities:
        raise UserError(
            f"this transformer has {', '.join(found.modalities)}, but {', '.join(modalities)} is requested: give the"
            " modalities of this transformer"
        )
    return found


def transformer_of(target: Any) -> Any:
    """Return the transformer of a pipeline, or the transformer itself, without wrappers.

    Raises:
        UserError: the pipeline has two experts.
    """
    found = transformers_of(target)
    config: Mapping[str, Any] = {} if "" in found else getattr(target, "config", {})
    if len(found) > 1 or config.get("boundary_ratio") is not None:
        raise UserError(two_experts(type(target).__name__))
    return next(iter(found.values()))


def two_experts(pipeline: str) -> str:
    """Return the error message for a pipeline with two experts."""
    return (
        f"{pipeline} has two experts, one for high and one for low noise (Wan2.2-A14B), but a window has frames of"
        " high and low noise and needs one network: use a model with one network (Wan2.1, Wan2.2-TI2V-5B)"
    )


def _check_settings(aux: Sequence[Modality], init_out: str, aux_scale: float, placed: bool) -> None:
    if tuple(aux) not in AUX and not (placed and not aux):
        raise UserError(f"aux must be {' or '.join(map(str, AUX))}, got {shown(tuple(aux))}")
    if init_out not in ("copy", "zero"):
        raise UserError(f"init_out must be 'copy' or 'zero', got {shown(init_out)}")
    check_number("aux_scale", aux_scale, -1000, 1000)
    if init_out == "zero" and aux_scale != 1:
        raise UserError(f"aux_scale={aux_scale:g} applies to copied rows: give init_out='copy', or omit aux_scale")


def _channels(model: Any) -> int:
    """Return the number of output channels, which equals the latent channels; further inputs are conditions."""
    layout_of(model)
    config, kind = model.config, type(model).__name__
    if not isinstance(config.get("in_channels"), int) or "out_channels" not in config:
        raise UserError(f"{kind} cannot be widened: its config has no in_channels and out_channels")
    inputs, outputs = config["in_channels"], config["out_channels"] or config["in_channels"]
    if outputs > inputs:
        raise UserError(
            f"{kind} cannot be widened: it has {outputs} outputs for {inputs} inputs, so it also predicts a variance"
        )
    return int(outputs)


def _check_layers(model: nn.Module, widths: Widths) -> None:
    for name in (widths.first, widths.last):
        layer = model.get_submodule(name)
        if type(layer) not in (nn.Linear, nn.Conv2d, nn.Conv3d):
            raise UserError(
                f"{name} is a {type(layer).__name__} and cannot be widened: remove the LoRA or the quantisation from"
                " this layer first"
            )


def _check_class(model: Any, widths: Widths, config: dict[str, Any]) -> None:
    """Check that the class with more channels has the same other weights, so that it can be saved and loaded."""
    from accelerate import init_empty_weights

    kind = type(model).__name__
    try:
        with init_empty_weights():
            own = {name: value for name, value in model.config.items() if not name.startswith("_")}
            built = type(model).from_config({**own, **config})
    except Exception as error:  # a model class may raise any exception for its config
        raise UserError(
            f"{kind} cannot be widened, because it cannot be created with more channels: {first_line(error)}"
        ) from error
    may = {f"{widths.first}.weight", f"{widths.last}.weight", f"{widths.last}.bias"}
    there = {name.replace(".base_layer.", "."): weight.shape for name, weight in model.state_dict().items()}
    for name, weight in built.state_dict().items():
        if name in there and name not in may and weight.shape != there[name]:
            raise UserError(
                f"{kind} cannot be widened: {name} also depends on the number of channels, but its input is not the"
                " latents"
            )


def _with_channels(model: Any, arguments: Mapping[str, Any], more: int) -> dict[str, Any]:
    latents: Tensor = arguments["hidden_states"]
    axis = channel_axis(layout_of(model))
    zeros = latents.new_zeros([more if each == axis else size for each, size in enumerate(latents.shape)])
    return {**arguments, "hidden_states": torch.cat([latents, zeros], dim=axis)}


def _weights(model: nn.Module, widths: Widths) -> dict[str, Any]:
    """Return the two layers and their current parameters, to fill the new parameters or to undo the change."""
    first: Any = model.get_submodule(widths.first)
    last: Any = model.get_submodule(widths.last)
    parts = {"first": first, "last": last, "first.weight": first.weight, "last.weight": last.weight}
    return parts if last.bias is None else {**parts, "last.bias": last.bias}


@contextmanager
def _undone(model: Any, parts: dict[str, Any], config: dict[str, Any]) -> Iterator[None]:
    """Context manager that restores the model if the block raises."""
    first, last = parts["first"], parts["last"]
    sizes = inputs_of(first), last.out_features
    try:
        yield
    except BaseException:
        first.weight, last.weight = parts["first.weight"], parts["last.weight"]
        if last.bias is not None:
            last.bias = parts["last.bias"]
        set_sizes(model, first, last, *sizes, config)
        raise


def _copy(model: nn.Module, parts: dict[str, Any], old: Widths, made: Widened, scale: float) -> None:
    """Copy the RGB rows, times a scale, to the outputs of every further modality."""
    last: Any = model.get_submodule(made.widths.last)
    copies = made.widths.rows[made.channels :].unflatten(0, (-1, made.channels))
    for name in ("weight", "bias"):
        if f"last.{name}" in parts:
            getattr(last, name).data[copies] = parts[f"last.{name}"].detach()[old.rows] * scale


def _fill(model: nn.Module, parts: dict[str, Any], old: Widths, new: Widths) -> None:
    """Copy the channels that both sizes have, at each position of the patch."""
    first: Any = model.get_submodule(new.first)
    last: Any = model.get_submodule(new.last)
    inputs, outputs = (min(len(a), len(b)) for a, b in ((old.columns, new.columns), (old.rows, new.rows)))
    source = parts["first.weight"].detach().flatten(1)[:, old.columns[:inputs].flatten()]
    first.weight.data.flatten(1)[:, new.columns[:inputs].flatten()] = source
    for name in ("weight", "bias"):
        if f"last.{name}" in parts:
            getattr(last, name).data[new.rows[:outputs]] = parts[f"last.{name}"].detach()[old.rows[:outputs]]
