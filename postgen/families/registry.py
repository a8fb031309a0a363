"""Find the layout of a transformer, the parts of it, and the denoiser of a pipeline, by class name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError
from postgen.families import rows_images, rows_others, rows_unets, rows_wan
from postgen.families.blocks import Block
from postgen.families.denoiser import Denoiser
from postgen.families.layout import Layout, found
from postgen.families.rows_refused import NO_LAYOUT, NO_TOKENS, NO_VIDEO_TOKENS
from postgen.families.video_tokens import VideoTokens

if TYPE_CHECKING:
    from torch import nn

_layouts: dict[str, Layout] = {
    row.transformer: row for row in (*rows_wan.ROWS, *rows_others.ROWS, *rows_images.ROWS, *rows_unets.ROWS)
}
_denoisers: dict[str, Callable[[Any], Denoiser]] = {}
"""What was registered beside the rows, by pipeline class."""


def register_layout(layout: Layout) -> None:
    r"""Add the layout of a transformer class, or replace it with all that it says: call, attention and denoisers too.

    Example:
        from postgen.families import BlockGroup, Blocks, Layout, VideoTokens, register_layout
        from postgen.families.video_tokens import grid_bcthw

        register_layout(
            Layout(
                transformer="MyTransformer3DModel",
                # hidden_states, text = block(hidden_states, encoder_hidden_states, ...), one block after the other
                blocks=Blocks(groups=(BlockGroup(names=r"layers\.\d+", hidden_out=0, text_out=1),)),
                timestep_shapes=("B", "BT"),
                # Only where softmax attention over the frames is to be measured or changed.
                video=VideoTokens(
                    self_attention=r"layers\.\d+\.attn1",
                    token_order="text-video",
                    latent_axes="BCTHW",
                    grid_rule=grid_bcthw,
                    attention_call="dispatch",
                ),
            )
        )
    """
    _layouts[layout.transformer] = layout


def known_layouts() -> tuple[Layout, ...]:
    """Return every row."""
    return tuple(_layouts.values())


def register_denoiser(pipeline: str, factory: Callable[[Any], Denoiser]) -> None:
    """Add the denoiser of the pipeline class of this name, or replace that of its row; `factory(pipe)` makes it."""
    _denoisers[pipeline] = factory


def layout_of(transformer: nn.Module) -> Layout:
    """Return the layout of a transformer, which may be wrapped (DDP, compiled, peft) or of a subclass.

    Raises:
        UserError: nothing is known of the class, or it is known why it has no layout.
    """
    kind, *parents = _class_names(transformer)
    return layout_named(kind, *parents)


def layout_named(kind: str, *parents: str) -> Layout:
    """Return the layout of a transformer class by its name, or that of the first of its parents that has one.

    Raises:
        UserError: nothing is known of the class, or it is known why it has no layout.
    """
    for name in (kind, *parents):
        if name in _layouts:
            return _layouts[name]
        if reason := NO_LAYOUT.get(name):
            raise UserError(f"no layout for {kind}: {reason}. Known: {', '.join(sorted(_layouts))}")
    raise _unknown(kind)


def blocks_of(transformer: nn.Module) -> tuple[Block, ...]:
    """Return the repeated blocks of a transformer, wrapped or not, in the order in which they run.

    Raises:
        UserError: nothing is known of the class, or its structure is not what its layout says.
    """
    from postgen.compat import unwrap

    return layout_of(transformer).blocks.find(unwrap(transformer))


def video_tokens_of(transformer: nn.Module) -> VideoTokens:
    """Return where the tokens of a video are in the self-attention of a transformer, wrapped or not.

    Raises:
        UserError: nothing is known of the class, or why it has no softmax attention over frames.
    """
    kind, *parents = _class_names(transformer)
    return video_tokens_named(kind, *parents)


def video_tokens_named(kind: str, *parents: str) -> VideoTokens:
    """Return where the tokens of a video are, by the name of a class or of the first of its parents that is known.

    Raises:
        UserError: nothing is known of the class, or why it has no softmax attention over frames.
    """
    return _tokens((kind, *parents), _video, NO_VIDEO_TOKENS, "video tokens")


def tokens_of(transformer: nn.Module) -> VideoTokens:
    """Return where the tokens of a video or of a picture are in the self-attention of a transformer, wrapped or not.

    Raises:
        UserError: nothing is known of the class, or why it has no softmax attention among them.
    """
    kind, *parents = _class_names(transformer)
    return tokens_named(kind, *parents)


def tokens_named(kind: str, *parents: str) -> VideoTokens:
    """Return where the tokens of a video or picture are, by the name of a class or of the first known parent.

    Raises:
        UserError: nothing is known of the class, or why it has no softmax attention among them.
    """
    return _tokens((kind, *parents), _video_or_image, NO_TOKENS, "tokens of a video or picture")


def _video(row: Layout) -> VideoTokens | None:
    return row.video


def _video_or_image(row: Layout) -> VideoTokens | None:
    return row.video or row.image


def _tokens(
    names: tuple[str, ...], part: Callable[[Layout], VideoTokens | None], reasons: Mapping[str, str], what: str
) -> VideoTokens:
    """Return a part of the row of the first class that has it, or say why the first that is known has none."""
    for name in names:
        row = _layouts.get(name)
        tokens = None if row is None else part(row)
        if tokens is not None:
            return tokens
        reason = reasons.get(name, "its layout says nothing of them" if row is not None else "")
        if reason:
            known = sorted(name for name, row in _layouts.items() if part(row) is not None)
            raise UserError(f"no {what} in {names[0]}: {reason}. Known: {', '.join(known)}")
    raise _unknown(names[0])


def _unknown(kind: str) -> UserError:
    return UserError(
        f"no layout for {kind}. Known: {', '.join(sorted(_layouts))}."
        " To add one, pass a row to postgen.families.register_layout"
    )


def _class_names(transformer: nn.Module) -> tuple[str, ...]:
    from postgen.compat import unwrap

    return tuple(parent.__name__ for parent in type(unwrap(transformer)).__mro__)


def denoiser_for(pipe: Any) -> Denoiser:
    """Return the denoiser of a pipeline; a subclass gets that of its parent.

    Raises:
        UserError: nothing is known of the class.
    """
    known = _known_denoisers()
    for parent in type(pipe).__mro__:
        if parent.__name__ in known:
            made: Denoiser = found(known[parent.__name__])(pipe)
            return made
    raise UserError(
        f"no denoiser for {type(pipe).__name__}. Known: {', '.join(sorted(known))}."
        " To add one, pass a factory to postgen.families.register_denoiser"
    )


def pipelines_per_frame() -> tuple[str, ...]:
    """Return the pipeline classes whose denoisers take a noise level per latent frame, sorted."""
    rows = (row for row in _layouts.values() if {"BT", "BL"} & {*row.timestep_shapes})
    return tuple(sorted(name for row in rows for name in row.denoisers))


def _known_denoisers() -> dict[str, str | Callable[[Any], Denoiser]]:
    known = {name: place for row in _layouts.values() for name, place in row.denoisers.items()}
    return known | _denoisers
