"""Give a trained transformer channels for depth and flow beside those of RGB, and take them away again.

The weights of RGB stay where they are. Columns of the new inputs are zero, so RGB comes out as before whatever the
others are given; rows of the new outputs are a copy of those of RGB (as VideoJAM, arXiv:2502.02492, widens a model, in
the channels and without more tokens). The result is a plain model of its class with larger `in_channels` and
`out_channels`.
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
    """What a transformer with channels of several modalities carries."""

    modalities: tuple[Modality, ...]
    """RGB first."""
    channels: int
    """Of each modality."""
    widths: Widths
    """Of the widened transformer."""
    placed: bool = False
    """Whether there are inputs for memory that is placed: a latent of each modality, and a mask."""
    before: dict[str, int | None] | None = None
    """`in_channels` and `out_channels` as they stood in the config before; None: not known, it was loaded widened."""
    told: str = "not driven yet"
    """How its network is told the noise levels of the frames."""
    latent_scale: Scale | None = None
    """What the latents of each modality are multiplied by before the network sees them; None is 1."""
    embedder: nn.Module | None = None
    """The level embedder that tells it the levels: of the adapter that is in it, or of the last `WorldWeaverModel`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that came with that embedder's adapter."""

    def driven_by(self, embedder: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        """Remember a level embedder; without settings it keeps those that it has."""
        if settings is not None or embedder is not self.embedder:
            self.settings = dict(settings or {})
        self.embedder = embedder

    @property
    def scale(self) -> Scale:
        """`latent_scale` as numbers."""
        return self.latent_scale or (1.0,) * len(self.modalities)

    @property
    def aux(self) -> int:
        """Channels that are not of RGB."""
        return self.channels * (len(self.modalities) - 1)

    @property
    def shown(self) -> int:
        """Channels of placed memory, which are inputs alone."""
        return self.channels * len(self.modalities) + 1 if self.placed else 0

    def describe(self) -> str:
        """Say in one line what is on and how it is set."""
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
    """Give a transformer inputs and outputs for further modalities, in place; its config is updated.

    Inputs of a new modality come behind all that there are (36 in Wan image-to-video), outputs behind those of RGB.

    Args:
        target: a transformer, or a pipeline with one.
        aux: ("depth",) or ("depth", "flow"); with `placed` also none.
        init_out: rows of the new outputs: "copy" of those of RGB, or "zero". Rows that are zero keep the new inputs
            from getting gradients of the new outputs in the first step.
        aux_scale: what the copies are multiplied by.
        placed: whether to add inputs for memory that is placed in the coming frames: as many channels as the latents
            of all modalities have, and a mask, behind all others.
        arguments: of a small forward, for a class of which postgen does not know how it is called.

    Returns:
        The transformer.

    Raises:
        UserError: two experts; widened already; a class or layer that cannot be widened, with the reason.
    """
    model, modalities = transformer_of(target), (MODALITIES[0], *aux)
    _check_settings(aux, init_out, aux_scale, placed)
    there: Widened | None = installed(model).plug_ins.get(NAME)
    if there is not None and (there.aux or there.placed):
        raise UserError(f"this {type(model).__name__} is widened already: narrow_transformer undoes it")
    channels = _channels(model)
    old = find_widths(model, arguments)
    _check_layers(model, old)
    before = {field: model.config[field] for field in _FIELDS}
    made = Widened(modalities, channels, old, placed, before)
    # None stands for as many outputs as inputs, which placed memory ends.
    outputs = None if before["out_channels"] is None and not placed else channels + made.aux
    grown = {"in_channels": before["in_channels"] + made.aux + made.shown, "out_channels": outputs}
    _check_class(model, old, grown)
    more = None if arguments is None else _with_channels(model, arguments, made.aux + made.shown)
    parts = _weights(model, old)
    with _undone(model, parts, before):
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
    """Take the channels of all modalities but RGB away, in place: the stock model, bit for bit where not trained.

    Args:
        target: a transformer, or a pipeline with one.
        aux: what there is beside RGB, for a transformer that was loaded widened.
        placed: whether it has inputs for placed memory, of such a transformer.
        arguments: as for `widen_transformer`, of the stock model.

    Returns:
        The transformer.

    Raises:
        UserError: it is not widened, or it is not known with what.
    """
    model = transformer_of(target)
    modalities = None if aux is None else (MODALITIES[0], *aux)
    wide = widened(model, modalities, placed=placed, arguments=arguments)
    if not (wide.aux or wide.placed):
        raise UserError(f"this {type(model).__name__} has channels of RGB alone: there is nothing to take away")
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
    """Take off what there is: channels, and the record of a model of RGB alone."""
    found: Widened | None = installed(model).plug_ins.get(NAME)
    if found is not None and (found.aux or found.placed):
        narrow_transformer(model)
    else:
        installed(model).plug_ins.pop(NAME, None)


def stock_channels(wide: Widened, config: Mapping[str, Any]) -> dict[str, int | None]:
    """Return `in_channels` and `out_channels` without those that were added, where a config has them."""
    less = {"in_channels": wide.aux + wide.shown, "out_channels": wide.aux}
    return {field: None if config[field] is None else config[field] - count for field, count in less.items()}


def widened(
    target: Any,
    modalities: tuple[Modality, ...] | None = None,
    *,
    placed: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Widened:
    """Return what a widened transformer carries; one that was loaded from a folder is looked at.

    With ("rgb",) a stock transformer counts as one of a single modality.

    Args:
        target: a transformer, or a pipeline with one.
        modalities: that it has, RGB first; needed where it was loaded.
        placed: whether it has inputs for placed memory; heard where it was loaded.
        arguments: as for `widen_transformer`, of the stock model.

    Raises:
        UserError: it is not widened, or with other modalities.
    """
    model = transformer_of(target)
    found: Widened | None = installed(model).plug_ins.get(NAME)
    if found is None:
        if modalities is None:
            raise UserError(
                f"this {type(model).__name__} is not widened: call widen_transformer; of one that was loaded widened"
                " say with what, as aux=('depth',)"
            )
        if modalities[:1] != MODALITIES[:1] or tuple(modalities[1:]) not in ((), *AUX):
            raise UserError(f"modalities must be the first ones of {', '.join(MODALITIES)}, got {shown(modalities)}")
        outputs = _channels(model)
        if outputs % len(modalities):
            raise UserError(f"{outputs} output channels are not those of {len(modalities)} modalities")
        channels = outputs // len(modalities)
        more = outputs - channels + (outputs + 1 if placed else 0)
        call = None if arguments is None else _with_channels(model, arguments, more)
        found = Widened(tuple(modalities), channels, find_widths(model, call), placed)
        if len(found.widths.columns) < outputs + found.shown:
            raise UserError(f"this {type(model).__name__} has no inputs for placed memory: leave placed out")
        installed(model).plug_ins[NAME] = found
    elif modalities is not None and modalities != found.modalities:
        raise UserError(f"this transformer has {', '.join(found.modalities)}, asked was for {', '.join(modalities)}")
    return found


def transformer_of(target: Any) -> Any:
    """Return the transformer of a pipeline, or the transformer itself, without what is wrapped around it.

    Raises:
        UserError: two experts.
    """
    found = transformers_of(target)
    config: Mapping[str, Any] = {} if "" in found else getattr(target, "config", {})
    if len(found) > 1 or config.get("boundary_ratio") is not None:
        raise UserError(two_experts(type(target).__name__))
    return next(iter(found.values()))


def two_experts(pipeline: str) -> str:
    """Return why a pipeline of two experts is refused."""
    return (
        f"{pipeline} has two experts, one for high and one for low noise (Wan2.2-A14B): a window holds frames of both,"
        " and one network sees it whole. Use a model of one network (Wan2.1, Wan2.2-TI2V-5B)"
    )


def _check_settings(aux: Sequence[Modality], init_out: str, aux_scale: float, placed: bool) -> None:
    if tuple(aux) not in AUX and not (placed and not aux):
        raise UserError(f"aux must be {' or '.join(map(str, AUX))}, got {shown(tuple(aux))}")
    if init_out not in ("copy", "zero"):
        raise UserError(f"init_out must be 'copy' or 'zero', got {shown(init_out)}")
    check_number("aux_scale", aux_scale, -1000, 1000)
    if init_out == "zero" and aux_scale != 1:
        raise UserError(f"aux_scale={aux_scale:g} scales copied rows: use init_out='copy' with it")


def _channels(model: Any) -> int:
    """Output channels, which are those of the latents; further inputs are conditions."""
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
                f"{name} is a {type(layer).__name__}, which cannot be given other channels: take a LoRA or another"
                " number format off this layer first"
            )


def _check_class(model: Any, widths: Widths, config: dict[str, Any]) -> None:
    """See that the class, built with more channels, has the same other weights: or it could not be loaded again."""
    from accelerate import init_empty_weights

    kind = type(model).__name__
    try:
        with init_empty_weights():
            own = {name: value for name, value in model.config.items() if not name.startswith("_")}
            built = type(model).from_config({**own, **config})
    except Exception as error:  # a class checks its numbers as it likes
        raise UserError(f"{kind} cannot be widened, it is not made with more channels: {first_line(error)}") from error
    may = {f"{widths.first}.weight", f"{widths.last}.weight", f"{widths.last}.bias"}
    there = {name.replace(".base_layer.", "."): weight.shape for name, weight in model.state_dict().items()}
    for name, weight in built.state_dict().items():
        if name in there and name not in may and weight.shape != there[name]:
            raise UserError(
                f"{kind} cannot be widened: {name} depends on the number of channels too, and takes something else"
                " than the latents"
            )


def _with_channels(model: Any, arguments: Mapping[str, Any], more: int) -> dict[str, Any]:
    latents: Tensor = arguments["hidden_states"]
    axis = channel_axis(layout_of(model))
    zeros = latents.new_zeros([more if each == axis else size for each, size in enumerate(latents.shape)])
    return {**arguments, "hidden_states": torch.cat([latents, zeros], dim=axis)}


def _weights(model: nn.Module, widths: Widths) -> dict[str, Any]:
    """The layers and their parameters as they are, for filling the new ones and for undoing."""
    first: Any = model.get_submodule(widths.first)
    last: Any = model.get_submodule(widths.last)
    parts = {"first": first, "last": last, "first.weight": first.weight, "last.weight": last.weight}
    return parts if last.bias is None else {**parts, "last.bias": last.bias}


@contextmanager
def _undone(model: Any, parts: dict[str, Any], config: dict[str, Any]) -> Iterator[None]:
    """Leave the model as it was where the block fails."""
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
    """Give the outputs of every further modality the rows of RGB."""
    last: Any = model.get_submodule(made.widths.last)
    copies = made.widths.rows[made.channels :].unflatten(0, (-1, made.channels))
    for name in ("weight", "bias"):
        if f"last.{name}" in parts:
            getattr(last, name).data[copies] = parts[f"last.{name}"].detach()[old.rows] * scale


def _fill(model: nn.Module, parts: dict[str, Any], old: Widths, new: Widths) -> None:
    """Copy what both have: channels from the first on, at each place of the patch."""
    first: Any = model.get_submodule(new.first)
    last: Any = model.get_submodule(new.last)
    inputs, outputs = (min(len(a), len(b)) for a, b in ((old.columns, new.columns), (old.rows, new.rows)))
    source = parts["first.weight"].detach().flatten(1)[:, old.columns[:inputs].flatten()]
    first.weight.data.flatten(1)[:, new.columns[:inputs].flatten()] = source
    for name in ("weight", "bias"):
        if f"last.{name}" in parts:
            getattr(last, name).data[new.rows[:outputs]] = parts[f"last.{name}"].detach()[old.rows[:outputs]]
