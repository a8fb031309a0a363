"""Parts of the rows of `postgen.families.folds` that many classes of blocks share."""

from __future__ import annotations

from collections.abc import Iterable

from postgen.families.folds import Fold, Modulation, Norm, Projection, Reader, Writer

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
UP = "net.0.proj"
"""First linear layer of diffusers' `FeedForward`."""


def readers(module: str, names: Iterable[str]) -> tuple[Reader, ...]:
    """Return linear layers of a module as readers."""
    return tuple(Reader(linear=f"{module}.{name}") for name in names)


def modulation(linear: str, chunks: int, shift: int | None, scale: int) -> tuple[Modulation]:
    """Return a modulation as the only writer."""
    return (Modulation(linear=linear, chunks=chunks, shift=shift, scale=scale),)


def norm(name: str) -> tuple[Norm]:
    """Return a norm with weights as the only writer."""
    return (Norm(name=name),)


def input_of(module: str, writers: tuple[Writer, ...], names: Iterable[str] = QKV, what: str = "input") -> Fold:
    """Return the input of linear layers of a module, which a norm or a modulation writes."""
    return Fold(name=f"{module}.{what}", kind="norm", writers=writers, readers=readers(module, names))


def value(module: str, *, shift: bool = True, to_v: str = "to_v", out: str = "to_out.0") -> Fold:
    """Return the values of attention with one output projection.

    Further keys and values of an image (`add_v_proj`) have an attention of their own, whose output is added: they need
    the same scale, and no shift.
    """
    return Fold(
        name=f"{module}.value",
        kind="value",
        writers=(
            Projection(linear=f"{module}.{to_v}"),
            Projection(linear=f"{module}.add_v_proj", shifts=False),
        ),
        readers=readers(module, (out,)),
        shift=shift,
    )


def joint_value(module: str, *, shift: bool = True) -> Fold:
    """Return the values of joint attention: each query attends to the values of both streams."""
    return Fold(
        name=f"{module}.value",
        kind="value",
        writers=(Projection(linear=f"{module}.to_v"), Projection(linear=f"{module}.add_v_proj")),
        readers=readers(module, ("to_out.0", "to_add_out")),
        shift=shift,
    )


def query_key(module: str, *, paired: bool = True, joint: bool = False) -> Fold:
    """Return queries and keys: a norm follows their projections, or none.

    Args:
        module: the attention module.
        paired: whether rotary embeddings turn the channels 2i and 2i + 1 of a head.
        joint: whether the text has queries as well (`add_q_proj`).
    """
    writers = [
        Norm(name=f"{module}.norm_q", instead=f"{module}.to_q"),
        Norm(name=f"{module}.norm_k", instead=f"{module}.to_k", inverse=True),
        Norm(name=f"{module}.norm_added_k", instead=f"{module}.add_k_proj", inverse=True),
    ]
    if joint:
        writers.append(Norm(name=f"{module}.norm_added_q", instead=f"{module}.add_q_proj"))
    return Fold(name=f"{module}.query_key", kind="query_key", writers=tuple(writers), shift=False, paired=paired)


def gated(module: str, writer: Projection | None = None, down: str = "net.2") -> Fold:
    """Return the half without activation of a gated feed-forward network.

    Args:
        module: the feed-forward network.
        writer: the rows of this half; None is the first half of diffusers' GEGLU and SwiGLU.
        down: the last linear layer.
    """
    writer = writer or Projection(linear=f"{module}.{UP}", part=(0, 2))
    return Fold(
        name=f"{module}.hidden", kind="gated", writers=(writer,), readers=readers(module, (down,)), shift=False
    )


def double(
    first: str = "norm1.linear",
    first_text: str = "norm1_context.linear",
    ff: str = "ff",
    ff_text: str = "ff_context",
    *,
    shift_value: bool = True,
) -> tuple[Fold, ...]:
    """Return the rows of joint blocks with separate weights for latents and text, and a modulation of each stream.

    Args:
        first, first_text: modulation of latents and text, with 6 chunks: shift, scale and gate of attention, then
            those of the feed-forward network.
        ff, ff_text: feed-forward networks.
        shift_value: whether the weights of attention sum to 1 for every token.
    """
    return (
        input_of("attn", modulation(first, 6, 0, 1)),
        input_of("attn", modulation(first_text, 6, 0, 1), ADDED, "text_input"),
        joint_value("attn", shift=shift_value),
        query_key("attn", joint=True),
        input_of(ff, modulation(first, 6, 3, 4), (UP,)),
        input_of(ff_text, modulation(first_text, 6, 3, 4), (UP,)),
        gated(ff),
        gated(ff_text),
    )


SINGLE = (
    # Attention and the first layer of the feed-forward network read the same norm, and one layer reads their outputs.
    Fold(
        name="attn.input",
        kind="norm",
        writers=modulation("norm.linear", 3, 0, 1),
        readers=(*readers("attn", QKV), Reader(linear="proj_mlp")),
    ),
    Fold(
        name="attn.value",
        kind="value",
        writers=(Projection(linear="attn.to_v"),),
        readers=(Reader(linear="proj_out", first=True),),
    ),
    query_key("attn"),
)
"""Rows of blocks that process text and latents as one sequence with the same weights."""
