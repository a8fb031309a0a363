"""Registry by class name: layouts of transformers with their blocks and tokens, and denoisers of pipelines."""

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
"""Denoisers from `register_denoiser`, by name of the pipeline class. They take precedence over those of the rows."""


def register_layout(layout: Layout) -> None:
    r"""Add the layout of a transformer class, or replace the whole layout, with its call, attention and denoisers.

    A complete row:

    ```python
    from postgen.families import BlockGroup, Blocks, Call, Layout, VideoTokens, register_layout
    from postgen.families.video_tokens import grid_bcthw

    register_layout(
        Layout(
            transformer="MyTransformer3DModel",
            # hidden_states, text = block(hidden_states, encoder_hidden_states, ...), one block after the other
            blocks=Blocks(groups=(BlockGroup(names=r"layers\.\d+", hidden_out=0, text_out=1),)),
            timestep_shapes=("B", "BT"),
            # Needed only to measure or change softmax attention over the frames.
            video=VideoTokens(
                self_attention=r"layers\.\d+\.attn1",
                token_order="text-video",
                latent_axes="BCTHW",
                grid_rule=grid_bcthw,
                attention_call="dispatch",
            ),
            call=Call(text_width="text_dim"),  # needed with `video`
            attention="my_package.attention:ANATOMY",  # needed only by methods that compute attention
            denoisers={"MyPipeline": "my_package.denoiser:MyDenoiser"},  # needed only for training and sampling
        )
    )
    ```

    `docs/own_model.md` has a model with such a row, and the allowed values of all fields.
    """
    _layouts[layout.transformer] = layout


def known_layouts() -> tuple[Layout, ...]:
    """Return all layouts."""
    return tuple(_layouts.values())


def register_denoiser(pipeline: str, factory: Callable[[Any], Denoiser]) -> None:
    """Add or replace the denoiser of a pipeline class.

    Args:
        pipeline: name of the pipeline class.
        factory: `factory(pipe)` returns the denoiser.
    """
    _denoisers[pipeline] = factory


def layout_of(transformer: nn.Module) -> Layout:
    """Return the layout of a transformer.

    Args:
        transformer: may be wrapped (DDP, compiled, peft), and may be of a subclass of a known class.

    Raises:
        UserError: the class is unknown, or known to be unsupported; the message has the reason.
    """
    kind, *parents = _class_names(transformer)
    return layout_named(kind, *parents)


def layout_named(kind: str, *parents: str) -> Layout:
    """Return the layout of a transformer class by its name.

    Args:
        kind: name of the class.
        parents: names of its parent classes, nearest first. The first class with a layout is used.

    Raises:
        UserError: the class is unknown, or known to be unsupported; the message has the reason.
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
        UserError: the class is unknown, or the model's structure differs from its layout.
    """
    from postgen.compat import unwrap

    return layout_of(transformer).blocks.find(unwrap(transformer))


def video_tokens_of(transformer: nn.Module) -> VideoTokens:
    """Return where the tokens of a video are in the self-attention of a transformer, wrapped or not.

    Raises:
        UserError: the class is unknown, or has no softmax attention over frames; the message has the reason.
    """
    kind, *parents = _class_names(transformer)
    return video_tokens_named(kind, *parents)


def video_tokens_named(kind: str, *parents: str) -> VideoTokens:
    """Return where the tokens of a video are, by names of a class and its parents (see `layout_named`).

    Raises:
        UserError: the class is unknown, or has no softmax attention over frames; the message has the reason.
    """
    return _tokens((kind, *parents), _video, NO_VIDEO_TOKENS, "video tokens")


def tokens_of(transformer: nn.Module) -> VideoTokens:
    """Return where the tokens of a video or of a picture are in the self-attention of a transformer, wrapped or not.

    Raises:
        UserError: the class is unknown, or has no softmax attention over these tokens; the message has the reason.
    """
    kind, *parents = _class_names(transformer)
    return tokens_named(kind, *parents)


def tokens_named(kind: str, *parents: str) -> VideoTokens:
    """Return where the tokens of a video or picture are, by names of a class and its parents (see `layout_named`).

    Raises:
        UserError: the class is unknown, or has no softmax attention over these tokens; the message has the reason.
    """
    return _tokens((kind, *parents), _video_or_image, NO_TOKENS, "tokens of a video or picture")


def _video(row: Layout) -> VideoTokens | None:
    return row.video


def _video_or_image(row: Layout) -> VideoTokens | None:
    return row.video or row.image


def _tokens(
    names: tuple[str, ...], part: Callable[[Layout], VideoTokens | None], reasons: Mapping[str, str], what: str
) -> VideoTokens:
    """Return the tokens of the first class whose row has them.

    Args:
        names: names of a class and its parents, nearest first.
        part: returns the tokens of a row, or None.
        reasons: reasons why there are none, by class name.
        what: kind of tokens, for the message.

    Raises:
        UserError: no class has them. The message has the reason of the first known class.
    """
    for name in names:
        row = _layouts.get(name)
        tokens = None if row is None else part(row)
        if tokens is not None:
            return tokens
        reason = reasons.get(name, "its layout does not describe them" if row is not None else "")
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
    """Return the denoiser of a pipeline; a subclass has the denoiser of its parent.

    Raises:
        UserError: the class is unknown.
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
