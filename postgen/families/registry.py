"""Find the layout of a transformer and the denoiser of a pipeline, by class name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError
from postgen.families import rows_others, rows_wan
from postgen.families.denoiser import Denoiser
from postgen.families.layout import LAYOUTS, Layout
from postgen.families.rows_refused import REFUSED

if TYPE_CHECKING:
    from torch import nn

_layouts: dict[str, Layout] = {row.transformer: row for row in (*LAYOUTS, *rows_wan.ROWS, *rows_others.ROWS)}
_denoisers: dict[str, str | Callable[[Any], Denoiser]] = {
    "CogVideoXPipeline": "postgen.families.cogvideox:CogVideoXDenoiser",
    "FluxPipeline": "postgen.families.flux:FluxDenoiser",
    "HunyuanVideoPipeline": "postgen.families.hunyuan_video:HunyuanVideoDenoiser",
    "LTXPipeline": "postgen.families.ltx:LTXDenoiser",
    "SkyReelsV2Pipeline": "postgen.families.wan:SkyReelsV2Denoiser",
    "StableDiffusion3Pipeline": "postgen.families.stable_diffusion_3:StableDiffusion3Denoiser",
    "StableDiffusionPipeline": "postgen.families.stable_diffusion:StableDiffusionDenoiser",
    "StableDiffusionXLPipeline": "postgen.families.stable_diffusion:StableDiffusionXLDenoiser",
    "WanImageToVideoPipeline": "postgen.families.wan:WanDenoiser",
    "WanPipeline": "postgen.families.wan:WanDenoiser",
}


def register_layout(layout: Layout) -> None:
    """Add the layout of a transformer class, or replace it."""
    _layouts[layout.transformer] = layout


def register_denoiser(pipeline: str, factory: Callable[[Any], Denoiser]) -> None:
    """Add the denoiser of the pipeline class of this name, or replace it; `factory(pipe)` makes it."""
    _denoisers[pipeline] = factory


def layout_of(transformer: nn.Module) -> Layout:
    """Return the layout of a transformer, which may be wrapped (DDP, compiled, peft) or of a subclass.

    Raises:
        UserError: nothing is known of the class, or it is known that it has no layout.
    """
    from postgen.compat import unwrap

    return layout_named(*(parent.__name__ for parent in type(unwrap(transformer)).__mro__))


def layout_named(kind: str, *parents: str) -> Layout:
    """Return the layout of a transformer class by its name, or that of the first of its parents that has one.

    Raises:
        UserError: nothing is known of the class, or it is known that it has no layout.
    """
    for name in (kind, *parents):
        if name in _layouts:
            return _layouts[name]
        if reason := REFUSED.get(name):
            raise UserError(f"no layout for {kind}: {reason}. Known: {', '.join(sorted(_layouts))}")
    raise UserError(
        f"no layout for {kind}. Known: {', '.join(sorted(_layouts))}."
        " To add one, pass a row to postgen.families.register_layout"
    )


def denoiser_for(pipe: Any) -> Denoiser:
    """Return the denoiser of a pipeline; a subclass gets that of its parent.

    Raises:
        UserError: nothing is known of the class.
    """
    for parent in type(pipe).__mro__:
        if factory := _denoisers.get(parent.__name__):
            if isinstance(factory, str):
                module, name = factory.split(":")
                factory = getattr(import_module(module), name)
            made: Denoiser = factory(pipe)
            return made
    raise UserError(
        f"no denoiser for {type(pipe).__name__}. Known: {', '.join(sorted(_denoisers))}."
        " To add one, pass a factory to postgen.families.register_denoiser"
    )
