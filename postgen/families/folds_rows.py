"""Rows of `postgen.families.folds` by class of the block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from postgen.families.folds import EmbeddingShape, Fold, Modulation, Norm, Projection, Reader, Table
from postgen.families.folds_parts import (
    ADDED,
    QKV,
    SINGLE,
    UP,
    double,
    gated,
    input_of,
    joint_value,
    modulation,
    norm,
    query_key,
    readers,
    value,
)


def _wan(shape: EmbeddingShape = "slots") -> tuple[Fold, ...]:
    return (
        input_of("attn1", (Table(shift=0, scale=1, shape=shape),)),
        value("attn1"),
        query_key("attn1"),
        # The keys and values of the second attention read the text, which all blocks share.
        input_of("attn2", norm("norm2"), ("to_q",), "query_input"),
        value("attn2"),
        query_key("attn2", paired=False),
        input_of("ffn", (Table(shift=3, scale=4, shape=shape),), (UP,)),
    )


def _table_blocks(embedding: str) -> tuple[Fold, ...]:
    """Return the rows of blocks with a flat embedding, whose second attention reads the latents without a norm."""
    attention, feed_forward = (
        Table(shift=shift, scale=shift + 1, embedding=embedding, shape="flat") for shift in (0, 3)
    )
    return (
        input_of("attn1", (attention,)),
        value("attn1"),
        query_key("attn1"),
        value("attn2"),
        query_key("attn2", paired=False),
        input_of("ff", (feed_forward,), (UP,)),
        gated("ff"),
    )


def _ltx2(stream: str, embedding: str, flag: str) -> Iterable[Fold]:
    """Return the rows of the video or the audio of LTX-2; the attention between the two streams has no rows."""
    tables = [
        Table(name=f"{stream}scale_shift_table", shift=slot, scale=slot + 1, embedding=embedding, shape="flat")
        for slot in (0, 3, 6)
    ]
    first, second = f"{stream}attn1", f"{stream}attn2"
    yield input_of(first, (tables[0],), (*QKV, "to_gate_logits"))
    yield input_of(f"{stream}ff", (tables[1],), (UP,))
    query = input_of(second, (tables[2],), ("to_q", "to_gate_logits"), "query_input")
    yield replace(query, when=(flag, True))
    for module in (first, second):
        # A gate on the output of attention also scales what the shift left out.
        yield replace(value(module), absent=f"{module}.to_gate_logits")
        yield replace(value(module, shift=False), present=f"{module}.to_gate_logits")
    yield replace(query_key(first), when=(f"{first}.rope_type", "interleaved"))
    yield query_key(second, paired=False)


_SD3 = (
    *(each for each in double() if each.name != "attn.query_key"),
    query_key("attn", paired=False, joint=True),
    # SD 3.5 has blocks with a second attention, and its modulation in the same layer.
    *(
        input_of(module, modulation("norm1.linear", 9, shift, shift + 1), names)
        for module, names, shift in (("attn", QKV, 0), ("ff", (UP,), 3), ("attn2", QKV, 6))
    ),
    value("attn2"),
    query_key("attn2", paired=False),
    # The last block does not change the text; its modulation has the scale first.
    input_of("attn", modulation("norm1_context.linear", 2, 1, 0), ADDED, "text_input"),
)


def _both(
    module: str, linear: str, names: Iterable[str], chunks: int = 6, steps: tuple[int, int, int] = (0, 3, 1)
) -> Fold:
    """Return an input that is the latents and the text in one sequence, with a modulation of each in one layer.

    Args:
        module, linear, names: the readers' module, the modulation, and the readers.
        chunks: chunks of the modulation.
        steps: chunk of the latents' shift, of the text's shift, and the distance from a shift to its scale.
    """
    shift, text, step = steps
    writers = tuple(
        Modulation(linear=linear, chunks=chunks, shift=place, scale=place + step) for place in (shift, text)
    )
    return input_of(module, writers, names)


_COGVIDEOX = (
    _both("attn1", "norm1.linear", QKV),
    value("attn1"),
    query_key("attn1"),
    _both("ff", "norm2.linear", (UP,)),
)

_EASYANIMATE = (
    # The first blocks have weights for the text, the others do not.
    replace(_both("attn1", "norm1.linear", QKV), absent="attn1.add_q_proj"),
    replace(input_of("attn1", modulation("norm1.linear", 6, 0, 1)), present="attn1.add_q_proj"),
    input_of("attn1", modulation("norm1.linear", 6, 3, 4), ADDED, "text_input"),
    # Without weights for the text, the text gets the output of attention without a projection that reads it.
    replace(joint_value("attn1"), present="attn1.add_q_proj"),
    query_key("attn1", joint=True),
    replace(_both("ff", "norm2.linear", (UP,)), absent="txt_ff"),
    replace(input_of("ff", modulation("norm2.linear", 6, 0, 1), (UP,)), present="txt_ff"),
    input_of("txt_ff", modulation("norm2.linear", 6, 3, 4), (UP,)),
)

_MOCHI = (
    # All modulation is by a scale alone.
    input_of("attn1", modulation("norm1.linear", 4, None, 0)),
    input_of("attn1", modulation("norm1_context.linear", 4, None, 0), ADDED, "text_input"),
    input_of("attn1", modulation("norm1_context.linear_1", 1, None, 0), ADDED, "text_input"),
    joint_value("attn1", shift=False),
    query_key("attn1", joint=True),
    input_of("ff", modulation("norm1.linear", 4, None, 2), (UP,)),
    input_of("ff_context", modulation("norm1_context.linear", 4, None, 2), (UP,)),
    gated("ff"),
    gated("ff_context"),
)

_MOTIF = (
    *(each for each in double() if each.name != "attn.text_input"),
    # A further attention to the text reads the same norm.
    replace(
        input_of("attn", modulation("norm1_context.linear", 6, 0, 1), ADDED, "text_input"),
        readers=(*readers("attn", ADDED), *readers("cross_attn", ("to_k", "to_v"))),
    ),
    value("cross_attn", shift=False),
)

_MOTIF_SINGLE = (
    replace(SINGLE[0], readers=(*SINGLE[0].readers, *readers("cross_attn", ("to_k", "to_v")))),
    # The further attention reads the output of the first one, and the sum of both is projected.
    replace(
        SINGLE[1],
        writers=(*SINGLE[1].writers, Projection(linear="cross_attn.to_out.0", shifts=False)),
        readers=(*SINGLE[1].readers, Reader(linear="cross_attn.to_q")),
    ),
    query_key("attn"),
    value("cross_attn", shift=False),
)


def _kandinsky(module: str, reads: tuple[Reader, ...] = ()) -> Iterable[Fold]:
    """Return the rows of a stream of Kandinsky.

    Args:
        module: prefix of the stream's modules.
        reads: further layers that read the input of the attention to the text.
    """
    linear = f"{module}visual_modulation.out_layer"
    attention, cross = f"{module}self_attention", f"{module}cross_attention"
    yield input_of(attention, modulation(linear, 9, 0, 1), ("to_query", "to_key", "to_value"))
    query = input_of(cross, modulation(linear, 9, 3, 4), ("to_query",), "query_input")
    yield replace(query, readers=(*query.readers, *reads))
    for each in (attention, cross):
        yield value(each, to_v="to_value", out="out_layer")
    for up in ("in_layer", UP):
        yield input_of(f"{module}feed_forward", modulation(linear, 9, 6, 7), (up,))


_KANDINSKY6 = tuple(
    fold
    for stream, other in (("video_dec_block.", "av"), ("audio_dec_block.", "va"))
    for fold in _kandinsky(stream, readers(f"{other}_cross_attention", ("to_key", "to_value")))
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
            input_of("attn1", modulation("norm1.linear", 6, 0, 1)),
            value("attn1"),
            query_key("attn1", paired=False),
            input_of("ff", modulation("norm1.linear", 6, 3, 4), (UP,)),
            gated("ff"),
        ),
    ),
)

_SANA = (
    # The feed-forward network is made of convolutions. Weights of linear attention sum to 1 only up to its epsilon.
    input_of("attn1", (Table(shift=0, scale=1, embedding="timestep", shape="flat"),)),
    value("attn1", shift=False),
    value("attn2"),
    query_key("attn2", paired=False),
)

_LUMINA2 = (
    input_of("attn", norm("norm1.norm")),
    input_of("attn", norm("norm1")),
    value("attn"),
    query_key("attn"),
    input_of("feed_forward", norm("ffn_norm1"), ("linear_1", "linear_3")),
    gated("feed_forward", Projection(linear="feed_forward.linear_3"), "linear_2"),
)

_Z_IMAGE = (
    input_of("attention", norm("attention_norm1")),
    value("attention"),
    query_key("attention"),
    input_of("feed_forward", norm("ffn_norm1"), ("w1", "w3")),
    gated("feed_forward", Projection(linear="feed_forward.w3"), "w2"),
)

_AURAFLOW = tuple(
    # The modulation has no bias, so it cannot absorb a scale.
    [joint_value("attn")]
    + [gated(ff, Projection(linear=f"{ff}.linear_2"), "out_projection") for ff in ("ff", "ff_context")]
)

_FLUX2 = (
    # A modulation outside the blocks serves all of them.
    joint_value("attn"),
    query_key("attn", joint=True),
    *(gated(ff, Projection(linear=f"{ff}.linear_in", part=(1, 2)), "linear_out") for ff in ("ff", "ff_context")),
)

_JOYIMAGE = (
    # The modulations of both streams add the same embedding, so one gain of a block cannot serve both.
    Fold(
        name="attn.value",
        kind="value",
        writers=tuple(Projection(linear=f"attn.{stream}_attn_qkv", part=(2, 3)) for stream in ("img", "txt")),
        readers=readers("attn", ("img_attn_proj", "txt_attn_proj")),
        shift=False,
    ),
    Fold(
        name="attn.query_key",
        kind="query_key",
        writers=tuple(
            Norm(name=f"attn.{stream}_attn_{what}_norm", inverse=what == "k")
            for stream in ("img", "txt")
            for what in ("q", "k")
        ),
        shift=False,
        paired=True,
    ),
)

_CHROMA = (joint_value("attn"), query_key("attn", joint=True))
"""A network outside the blocks computes the modulation of all of them."""

_PRX = (
    input_of("attention", modulation("modulation.lin", 6, 0, 1), ("img_qkv_proj",)),
    Fold(
        name="attention.value",
        kind="value",
        writers=(
            Projection(linear="attention.img_qkv_proj", part=(2, 3)),
            Projection(linear="attention.txt_kv_proj", part=(1, 2)),
        ),
        readers=readers("attention", ("to_out.0",)),
    ),
    query_key("attention"),
    Fold(
        name="mlp.input",
        kind="norm",
        writers=modulation("modulation.lin", 6, 3, 4),
        readers=(Reader(linear="gate_proj"), Reader(linear="up_proj")),
    ),
    Fold(
        name="mlp.hidden",
        kind="gated",
        writers=(Projection(linear="up_proj"),),
        readers=(Reader(linear="down_proj"),),
        shift=False,
    ),
)

_HUNYUAN_DIT = (
    # The first norm is shifted by the timestep after its weights, which no row describes.
    value("attn1"),
    input_of("attn2", norm("norm2"), ("to_q",), "query_input"),
    value("attn2"),
    input_of("ff", norm("norm3"), (UP,)),
    gated("ff"),
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
    # One timestep per frame: (B, 6, tokens, C).
    "SkyReelsV2TransformerBlock": _wan("slots_first"),
    "LTXVideoTransformerBlock": _table_blocks("temb"),
    "LTX2VideoTransformerBlock": (
        *_ltx2("", "temb", "video_cross_attn_adaln"),
        *_ltx2("audio_", "temb_audio", "audio_cross_attn_adaln"),
    ),
    # Rotary embeddings of Allegro turn other pairs of channels, a third of them for each axis.
    "AllegroTransformerBlock": tuple(fold for fold in _table_blocks("temb") if fold.name != "attn1.query_key"),
    "BasicTransformerBlock": _BASIC,
    **dict.fromkeys(("SanaTransformerBlock", "SanaVideoTransformerBlock"), _SANA),
    **dict.fromkeys(("CogVideoXBlock", "ConsisIDBlock"), _COGVIDEOX),
    "CogView3PlusTransformerBlock": (
        _both("attn1", "norm1.linear", QKV, 12, (0, 6, 1)),
        value("attn1"),
        _both("ff", "norm1.linear", (UP,), 12, (3, 9, 1)),
    ),
    "CogView4TransformerBlock": (
        _both("attn1", "norm1.linear", QKV, 12, (0, 1, 2)),
        value("attn1"),
        _both("ff", "norm1.linear", (UP,), 12, (6, 7, 2)),
    ),
    "CosmosTransformerBlock": (
        # The modulation has no bias, and its rotary embeddings turn the channels i and i + half.
        value("attn1"),
        replace(value("attn2"), absent="attn2.v_img"),
        query_key("attn2", paired=False),
    ),
    "EasyAnimateTransformerBlock": _EASYANIMATE,
    **dict.fromkeys(
        (
            "FluxTransformerBlock",
            "HunyuanImageTransformerBlock",
            "HunyuanVideoTransformerBlock",
            "HunyuanVideoTokenReplaceTransformerBlock",
            "LongCatImageTransformerBlock",
            "OvisImageTransformerBlock",
        ),
        double(),
    ),
    # Padding attends to nothing here, so its outputs would miss the shift.
    "HunyuanVideo15TransformerBlock": double(shift_value=False),
    **dict.fromkeys(
        (
            "FluxSingleTransformerBlock",
            "HunyuanImageSingleTransformerBlock",
            "HunyuanVideoSingleTransformerBlock",
            "HunyuanVideoTokenReplaceSingleTransformerBlock",
            "LongCatImageSingleTransformerBlock",
            "OvisImageSingleTransformerBlock",
        ),
        SINGLE,
    ),
    "AuraFlowJointTransformerBlock": _AURAFLOW,
    "AuraFlowSingleTransformerBlock": (value("attn"), _AURAFLOW[1]),
    "ChromaTransformerBlock": _CHROMA,
    "ChromaSingleTransformerBlock": SINGLE[1:],
    "Flux2TransformerBlock": _FLUX2,
    # One layer is the queries, keys, values and the feed-forward network.
    "Flux2SingleTransformerBlock": (query_key("attn"),),
    "HunyuanDiTBlock": _HUNYUAN_DIT,
    "JointTransformerBlock": _SD3,
    **dict.fromkeys(("JoyImageEditPlusTransformerBlock", "JoyImageTransformerBlock"), _JOYIMAGE),
    # Rotary embeddings of Kandinsky 5 are rounded to bfloat16, so queries and keys cannot be scaled exactly.
    "Kandinsky5TransformerDecoderBlock": tuple(_kandinsky("")),
    "Kandinsky6FusedTransformerDecoderBlock": _KANDINSKY6,
    "Lumina2TransformerBlock": _LUMINA2,
    "MochiTransformerBlock": _MOCHI,
    "MotifVideoTransformerBlock": _MOTIF,
    "MotifVideoSingleTransformerBlock": _MOTIF_SINGLE,
    "PRXBlock": _PRX,
    "QwenImageTransformerBlock": double("img_mod.1", "txt_mod.1", "img_mlp", "txt_mlp"),
    "ZImageTransformerBlock": _Z_IMAGE,
}
"""Class name of a block -> its rows. A class that is derived from one of these has its rows."""
