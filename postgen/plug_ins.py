"""The table of plug-ins, with one row for each plug-in.

A row defines the option of `postgen generate` and `postgen compare`, the key of `--a` and `--b`, the entry in a
sidecar, and the keyword argument of the drop-in pipelines. Rows name functions as `module:function`. A function is
imported only when it is needed, so that the command line starts quickly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    from postgen.families.loading import ModelFacts

_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlugIn:
    """A row of the table of plug-ins."""

    name: str
    """Name of the plug-in on a transformer, and keyword argument of the drop-in pipelines."""
    option: str
    """Name of the option on the command line, of the key of `--a` and `--b`, and of the entry in a sidecar."""
    title: str
    """Name of the plug-in in texts for users."""
    summary: str
    """Help of the option in one line: a title, a colon, and the values. The app shows the part after the colon."""
    metavar: str
    """Placeholder for the value in `--help`."""
    values: str
    """Values that switch the plug-in on for one call of a drop-in pipeline, for its documentation."""
    panel: str
    """Panel of `--help`: Video if the plug-in changes the video, Running if it changes how the video is computed."""
    parse: str
    """Function, as `module:function`, that converts the text of the option to a setting for `for_call`.

    The function raises a `UserError` if the text is invalid."""
    check: str
    """Function, as `module:function`, that takes the class name of a transformer.

    The function raises a `UserError` if the plug-in does not support this class."""
    for_call: str
    """Function, as `module:function`, that takes a pipeline or transformer and a setting, and returns a context
    manager.

    The setting applies to the calls inside the context manager: None changes nothing, False or 0 switches the plug-in
    off, any other setting switches it on. Afterwards the plug-in is as before."""
    apply: str
    """Function, as `module:function`, that takes a pipeline or transformer and a config or None.

    The function returns a `postgen.families.handle.PlugInHandle`."""

    @property
    def flag(self) -> str:
        """Option with its hyphens, as the user writes it on the command line."""
        return f"--{self.option.replace('_', '-')}"

    def __post_init__(self) -> None:
        for field in ("name", "option"):
            if not str(getattr(self, field)).isidentifier():
                raise UserError(f"{field} of a plug-in must be a Python identifier, got {getattr(self, field)!r}")
        for field in ("parse", "check", "for_call", "apply"):
            if not _PLACE.fullmatch(getattr(self, field)):
                raise UserError(f"{field} of {self.name} must be module:function, got {getattr(self, field)!r}")


_rows = [
    # In the order in which the plug-ins are applied to a model.
    PlugIn(
        name="fused_ops",
        option="fused",
        title="Fused operations",
        summary="Fused kernels: auto for all, or a comma-separated list of norm_rope, adaln, attention.",
        metavar="auto|OPS",
        values="True or a [`postgen.FusedOpsConfig`]",
        panel="Running",
        parse="postgen.fused.config:fused_setting",
        check="postgen.fused:check_known",
        for_call="postgen.fused:fused_for_call",
        apply="postgen.fused:apply_fused_ops",
    ),
    PlugIn(
        name="fp8_attention",
        option="fp8_attention",
        title="FP8 attention",
        summary="FP8 attention on Hopper GPUs and later: auto, a calibration report (.json), or simulate.",
        metavar="auto|simulate|REPORT",
        values="True or a [`postgen.FP8AttentionConfig`]",
        panel="Running",
        parse="postgen.fused.fp8_attention.config:fp8_attention_setting",
        check="postgen.fused.fp8_attention:check_known",
        for_call="postgen.fused.fp8_attention:fp8_attention_for_call",
        apply="postgen.fused.fp8_attention:apply_fp8_attention",
    ),
    PlugIn(
        name="enhance_a_video",
        option="enhance",
        title="Enhance-A-Video",
        summary="Enhance-A-Video: a weight, or auto for the recommended weight of the model.",
        metavar="WEIGHT|auto",
        values='a weight, "auto" or a [`postgen.EnhanceAVideoConfig`]',
        panel="Video",
        parse="postgen.enhance.config:enhance_setting",
        check="postgen.families:video_tokens_named",
        for_call="postgen.enhance:enhance_for_call",
        apply="postgen.enhance:apply_enhance_a_video",
    ),
    PlugIn(
        name="fp8_linears",
        option="fp8_linears",
        title="Linear layers in FP8",
        summary="Linear layers in FP8: auto for all parts, or a comma-separated list of attention,"
        " cross_attention, feed_forward, feed_forward_out.",
        metavar="auto|PARTS",
        values="True or a [`postgen.FP8LinearConfig`]",
        panel="Running",
        parse="postgen.fp8_linear.config:fp8_linears_setting",
        check="postgen.fp8_linear:check_known",
        for_call="postgen.fp8_linear:fp8_linears_for_call",
        apply="postgen.fp8_linear:apply_fp8_linears",
    ),
]


def known_plug_ins() -> tuple[PlugIn, ...]:
    """Return the rows of the table, in the order in which the plug-ins are applied to a model."""
    return tuple(_rows)


def register_plug_in(row: PlugIn) -> None:
    """Add a row to the table of this process.

    The row affects command lines that start, and drop-in pipelines that are called, after this function. A program
    adds its own plug-in to the `postgen` command in two lines: a call of this function, then `postgen.cli.main()`.

    Raises:
        UserError: another row has the same name or option.
    """
    for other in _rows:
        for field in ("name", "option"):
            if getattr(other, field) == getattr(row, field):
                raise UserError(
                    f"the plug-in {other.name} already has the {field} {getattr(row, field)}: choose another {field}"
                )
    _rows.append(row)


def resolve(place: str) -> Any:
    """Import the function that `module:function` names.

    >>> resolve("math:floor")(2.5)
    2
    """
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def prepare_plug_ins(facts: ModelFacts, texts: Mapping[str, str]) -> dict[str, Any]:
    """Convert the texts of options to settings of plug-ins, before the weights of the model are loaded.

    Args:
        facts: properties of the model.
        texts: text by option. A plug-in without a text is off.

    Returns:
        Setting by name of the plug-in, for `plug_ins_for_call`; empty for a model without a transformer.

    Raises:
        UserError: a text is invalid, or a plug-in does not support the model.
    """
    from postgen.families.handle import is_off

    settings = {row.name: resolve(row.parse)(texts[row.option]) if row.option in texts else False for row in _rows}
    for row in _rows:
        if is_off(settings[row.name]):
            continue
        if facts.transformer is None:
            raise UserError(f"{row.flag} needs a transformer, and {facts.pipeline} has none: omit {row.flag}")
        resolve(row.check)(facts.transformer)
    return settings if facts.transformer is not None else {}


@contextmanager
def plug_ins_for_call(target: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Context manager that sets plug-ins for the calls inside it; afterwards they are as before.

    Args:
        target: a pipeline or transformer.
        settings: setting by name of the plug-in. A plug-in with no setting, or with the setting None, is not changed.

    Raises:
        UserError: a setting is wrong, or a plug-in does not support the model.
    """
    with ExitStack() as stack:
        for row in _rows:
            setting = settings.get(row.name)
            if setting is not None and _acts(target, row.name, setting):
                stack.enter_context(resolve(row.for_call)(target, setting))
        yield


def _acts(target: Any, name: str, setting: Any) -> bool:
    """Return whether a setting changes anything.

    Switching off a plug-in that is not applied changes nothing, so its module need not be imported.
    """
    from postgen.families.handle import is_off
    from postgen.families.installed import installed, transformers_of

    return not is_off(setting) or any(name in installed(m).plug_ins for m in transformers_of(target).values())
