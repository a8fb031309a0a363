"""Rows of `postgen.families.folds` by class of the block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from postgen.families.folds import EmbeddingShape, Fold, Modulation, Norm, Projection, Reader, Table, Writer

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_UP = "net.0.proj"
"""First linear layer of diffusers' `FeedForward`."""


def _reads(module: str, names: Iterable[str]) -> tuple[Reader, ...]:
    return tuple(Reader(linear=f"{module}.{name}") for name in names)


def _input(module: str, writers: tuple[Writer, ...], names: Iterable[str] = _QKV, what: str = "input") -> Fold:
    return Fold(name=f"{module}.{what}", kind="norm", writers=writers, readers=_reads(module, names))


def _value(module: str, *, shift: bool = True, unless: str = "") -> Fold:
    """Return the values of attention with one output projection.

    Further keys and values of an image (`add_v_proj`) have an attention of their own, whose output is added: they need
    the same scale, and no shift.
    """
    writers = (Projection(linear=f"{module}.to_v"), Projection(linear=f"{module}.add_v_proj", shifts=False))
    readers = (Reader(linear=f"{module}.to_out.0"),)
    return Fold(name=f"{module}.value", kind="value", writers=writers, readers=readers, shift=shift, unless=unless)


def _joint_value(module: str) -> Fold:
    """Return the values of joint attention: each query attends to the values of both streams."""
    writers = (Projection(linear=f"{module}.to_v"), Projection(linear=f"{module}.add_v_proj"))
    return Fold(
        name=f"{module}.value", kind="value", writers=writers, readers=_reads(module, ("to_out.0", "to_add_out"))
    )


def _query_key(module: str, *, paired: bool = True, joint: bool = False) -> Fold:
    """Return queries and keys: a norm follows their projections, or none."""
    writers = [
        Norm(name=f"{module}.norm_q", instead=f"{module}.to_q"),
        Norm(name=f"{module}.norm_k", instead=f"{module}.to_k", inverse=True),
        Norm(name=f"{module}.norm_added_k", instead=f"{module}.add_k_proj", inverse=True),
    ]
    if joint:
        writers.append(Norm(name=f"{module}.norm_added_q", instead=f"{module}.add_q_proj"))
    return Fold(name=f"{module}.query_key", kind="query_key", writers=tuple(writers), shift=False, paired=paired)


def _gated(module: str) -> Fold:
    """Return the first half of `FeedForward` with GEGLU or SwiGLU; other activations have no such half."""
    writers = (Projection(linear=f"{module}.{_UP}", part=(0, 2)),)
    return Fold(
        name=f"{module}.hidden",
        kind="gated",
        writers=writers,
        readers=(Reader(linear=f"{module}.net.2"),),
        shift=False,
    )


def _wan(shape: EmbeddingShape = "slots") -> tuple[Fold, ...]:
    return (
        _input("attn1", (Table(shift=0, scale=1, shape=shape),)),
        _value("attn1"),
        _query_key("attn1"),
        # The keys and values of the second attention read the text, which all blocks share.
        _input("attn2", (Norm(name="norm2"),), ("to_q",), "query_input"),
        _value("attn2"),
        _query_key("attn2", paired=False),
        _input("ffn", (Table(shift=3, scale=4, shape=shape),), (_UP,)),
    )


def _table_blocks(embedding: str, ff: str = "ff") -> tuple[Fold, ...]:
    """Return the rows of blocks with a flat embedding, whose second attention reads the latents without a norm."""
    attention, feed_forward = (
        Table(shift=shift, scale=shift + 1, embedding=embedding, shape="flat") for shift in (0, 3)
    )
    return (
        _input("attn1", (attention,)),
        _value("attn1"),
        _query_key("attn1"),
        _value("attn2"),
        _query_key("attn2", paired=False),
        _input(ff, (feed_forward,), (_UP,)),
        _gated(ff),
    )


def _double(
    first: str = "norm1.linear", first_text: str = "norm1_context.linear", ff: str = "ff", ff_text: str = "ff_context"
) -> tuple[Fold, ...]:
    """Return the rows of joint blocks with separate weights for latents and text, and a modulation for each."""

    def six(linear: str, shift: int) -> tuple[Modulation]:
        return (Modulation(linear=linear, chunks=6, shift=shift, scale=shift + 1),)

    return (
        _input("attn", six(first, 0)),
        _input("attn", six(first_text, 0), _ADDED, "text_input"),
        _joint_value("attn"),
        _query_key("attn", joint=True),
        _input(ff, six(first, 3), (_UP,)),
        _input(ff_text, six(first_text, 3), (_UP,)),
    )


_SINGLE = (
    # Attention and the first layer of the feed-forward network read the same norm, and one layer reads their outputs.
    Fold(
        name="attn.input",
        kind="norm",
        writers=(Modulation(linear="norm.linear", chunks=3, shift=0, scale=1),),
        readers=(*_reads("attn", _QKV), Reader(linear="proj_mlp")),
    ),
    Fold(
        name="attn.value",
        kind="value",
        writers=(Projection(linear="attn.to_v"),),
        readers=(Reader(linear="proj_out", first=True),),
    ),
    _query_key("attn"),
)

_SD3 = (
    *(each for each in _double() if each.name != "attn.query_key"),
    _query_key("attn", paired=False, joint=True),
    # SD 3.5 has blocks with a second attention, and its modulation in the same layer.
    *(
        _input(module, (Modulation(linear="norm1.linear", chunks=9, shift=shift, scale=shift + 1),), names)
        for module, names, shift in (("attn", _QKV, 0), ("ff", (_UP,), 3), ("attn2", _QKV, 6))
    ),
    _value("attn2"),
    _query_key("attn2", paired=False),
    # The last block does not change the text; its modulation has the scale first.
    _input("attn", (Modulation(linear="norm1_context.linear", chunks=2, shift=1, scale=0),), _ADDED, "text_input"),
)


def _both_streams(module: str, norm: str, names: Iterable[str]) -> Fold:
    writers = tuple(Modulation(linear=f"{norm}.linear", chunks=6, shift=shift, scale=shift + 1) for shift in (0, 3))
    return _input(module, writers, names)


_COGVIDEOX = (
    _both_streams("attn1", "norm1", _QKV),
    _value("attn1"),
    _query_key("attn1"),
    _both_streams("ff", "norm2", (_UP,)),
)


def _only(norm_type: str, folds: Iterable[Fold]) -> tuple[Fold, ...]:
    return tuple(replace(fold, when=("norm_type", norm_type)) for fold in folds)


_BASIC = (
    # PixArt and Latte.
    *_only("ada_norm_single", _table_blocks("timestep")),
    # DiT.
    *_only(
        "ada_norm_zero",
        (
            _input("attn1", (Modulation(linear="norm1.linear", chunks=6, shift=0, scale=1),)),
            _value("attn1"),
            _query_key("attn1", paired=False),
            _input("ff", (Modulation(linear="norm1.linear", chunks=6, shift=3, scale=4),), (_UP,)),
            _gated("ff"),
        ),
    ),
)

_SANA = (
    # The feed-forward network is made of convolutions. Linear attention has no norm of its weights to rely on.
    _input("attn1", (Table(shift=0, scale=1, embedding="timestep", shape="flat"),)),
    _value("attn1", shift=False),
    _value("attn2"),
    _query_key("attn2", paired=False),
)

ROWS: Mapping[str, tuple[Fold, ...]] = {
    **dict.fromkeys(
        (
            "AnyFlowTransformerBlock",
            "HeliosTransformerBlock",
            "WanTransformerBlock",
            "WanVACETransformerBlock",
        ),
        _wan(),
    ),
    "SkyReelsV2TransformerBlock": _wan("slots_first"),
    "LTXVideoTransformerBlock": _table_blocks("temb"),
    # Rotary embeddings of Allegro turn other pairs of channels, a third of them for each axis.
    "AllegroTransformerBlock": tuple(fold for fold in _table_blocks("temb") if fold.name != "attn1.query_key"),
    "BasicTransformerBlock": _BASIC,
    **dict.fromkeys(("SanaTransformerBlock", "SanaVideoTransformerBlock"), _SANA),
    "CogVideoXBlock": _COGVIDEOX,
    **dict.fromkeys(
        (
            "FluxTransformerBlock",
            "HunyuanVideoTransformerBlock",
            "HunyuanVideoTokenReplaceTransformerBlock",
        ),
        _double(),
    ),
    # Padding attends to nothing here, so its outputs would miss the shift.
    "HunyuanVideo15TransformerBlock": tuple(
        replace(fold, shift=fold.shift and fold.kind != "value") for fold in _double()
    ),
    **dict.fromkeys(
        (
            "FluxSingleTransformerBlock",
            "HunyuanVideoSingleTransformerBlock",
            "HunyuanVideoTokenReplaceSingleTransformerBlock",
        ),
        _SINGLE,
    ),
    "JointTransformerBlock": _SD3,
    "QwenImageTransformerBlock": _double("img_mod.1", "txt_mod.1", "img_mlp", "txt_mlp"),
}
"""Class name of a block -> its rows. A class that is derived from one of these has its rows."""
