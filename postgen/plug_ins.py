"""The table of plug-ins: one row each, and everything that offers them is made from it.

From a row come the option of `postgen generate` and `postgen compare`, the key of `--a` and `--b`, the entry in a
sidecar, and the keyword argument of the drop-in pipelines. Rows name functions as `module:function`: the table imports
none of them before it is needed, so that the command line starts at once.
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
    """A row of the table."""

    name: str
    """Under which a transformer has it among its plug-ins; also the keyword argument of the drop-in pipelines."""
    option: str
    """`--option` of the command line, key of `--a` and `--b`, entry of a sidecar."""
    title: str
    """What people call it."""
    summary: str
    """What the text of the option says, in one line."""
    metavar: str
    """What stands for that text in `--help`."""
    values: str
    """What is on for one call of a drop-in pipeline, in words."""
    panel: str
    """Panel of `--help`: Video for what changes the video, Running for what changes how it is computed."""
    parse: str
    """Place of a function: the text of the option -> a setting that `for_call` takes.

    It raises a `UserError` for a text that is none."""
    check: str
    """Place of a function that takes the class name of a transformer and raises a `UserError` where it cannot act."""
    for_call: str
    """Place of a function (pipeline or transformer, setting) -> context manager for the calls in a block.

    None leaves it as it is, False or 0 is off, everything else on; afterwards it is as before."""
    apply: str
    """Place of a function (pipeline or transformer, config or None) -> `postgen.families.handle.PlugInHandle`."""

    @property
    def flag(self) -> str:
        """The option as it is written on the command line."""
        return f"--{self.option.replace('_', '-')}"

    def __post_init__(self) -> None:
        for field in ("name", "option"):
            if not str(getattr(self, field)).isidentifier():
                raise UserError(f"{field} of a plug-in must be a name of Python, got {getattr(self, field)!r}")
        for field in ("parse", "check", "for_call", "apply"):
            if not _PLACE.fullmatch(getattr(self, field)):
                raise UserError(f"{field} of {self.name} must be module:function, got {getattr(self, field)!r}")


_rows = [
    # In the order in which they are put on a model.
    PlugIn(
        name="fused_ops",
        option="fused",
        title="Fused operations",
        summary="Fused kernels: auto for all, or some of norm_rope,adaln,attention.",
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
        summary="FP8 attention on Hopper and later: auto, a report of calibration (.json), or simulate.",
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
        summary="Enhance-A-Video: its weight, or auto for the model's.",
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
        summary="Linear layers in FP8: auto, or some of attention,cross_attention,feed_forward,feed_forward_out.",
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
    """Return the rows of the table, in the order in which they are put on a model."""
    return tuple(_rows)


def register_plug_in(row: PlugIn) -> None:
    """Add a row to the table, for this process.

    Command lines that start and drop-in pipelines that are called afterwards have it. A program gives a plug-in of
    its own to the `postgen` command in two lines: this call, then `postgen.cli.main()`.

    Raises:
        UserError: another row has its name or its option.
    """
    for other in _rows:
        for field in ("name", "option"):
            if getattr(other, field) == getattr(row, field):
                raise UserError(f"the plug-in {other.name} has the {field} {getattr(row, field)} already")
    _rows.append(row)


def resolve(place: str) -> Any:
    """Import what stands at `module:function`.

    >>> resolve("math:floor")(2.5)
    2
    """
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def prepare_plug_ins(facts: ModelFacts, texts: Mapping[str, str]) -> dict[str, Any]:
    """Turn the texts of options into settings, before the weights of the model are read.

    Args:
        facts: of the model.
        texts: by option; what is not named is off.

    Returns:
        A setting by name of the plug-in, for `plug_ins_for_call`; nothing for a model without a transformer.

    Raises:
        UserError: a text that is none of its plug-in, or a plug-in that cannot act on the model.
    """
    from postgen.families.handle import is_off

    settings = {row.name: resolve(row.parse)(texts[row.option]) if row.option in texts else False for row in _rows}
    for row in _rows:
        if is_off(settings[row.name]):
            continue
        if facts.transformer is None:
            raise UserError(f"{facts.pipeline} has no transformer, which {row.flag} works on: leave it out")
        resolve(row.check)(facts.transformer)
    return settings if facts.transformer is not None else {}


@contextmanager
def plug_ins_for_call(target: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Set plug-ins for the calls in a block; afterwards they are as before.

    Args:
        target: a pipeline or transformer.
        settings: by name; one that is absent or None leaves its plug-in as it is.

    Raises:
        UserError: a setting that is wrong, or a model that a plug-in does not know.
    """
    with ExitStack() as stack:
        for row in _rows:
            setting = settings.get(row.name)
            if setting is not None and _acts(target, row.name, setting):
                stack.enter_context(resolve(row.for_call)(target, setting))
        yield


def _acts(target: Any, name: str, setting: Any) -> bool:
    """Whether a setting changes anything: what is off where it is not on anyway need not even be imported."""
    from postgen.families.handle import is_off
    from postgen.families.installed import installed, transformers_of

    return not is_off(setting) or any(name in installed(m).plug_ins for m in transformers_of(target).values())
