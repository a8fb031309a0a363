"""Attention readers: `read`, attention and `finish` together return the same bits as the processor of diffusers."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import postgen
from postgen.families import tokens_of
from postgen.families.attention import AttentionAnatomy, AttentionReader, attention_of, register_attention, registry
from postgen.families.attention.reading import AttentionCall, Norms, Reading, dispatched
from postgen.families.installed import processor_stack
from postgen.kernels.attention.ops import attention
from postgen.kernels.qk_norm_rope import naive
from tests.families.tiny_models import BLOCK_BUILDERS, BUILDERS, TinyModel, tiny_model
from tests.families.tiny_parts import COLUMNS, HEAD_DIM, HEADS, ROWS, TEXT_TOKENS, Size

FUSED = ("CogVideoX 1.5", "Wan", "Flux", "PixArt")
"""Models whose processors use fused projections."""
NAMES = [
    name
    for name, build in {**BUILDERS, **BLOCK_BUILDERS}.items()
    if build(Size(batch=1, frames=4, layers=1))[0].__name__ in registry.known_anatomies()
]
"""Every tiny model whose class has an attention file."""


class Seen:
    """A processor call in a forward pass: its arguments by name, and the output of diffusers."""

    def __init__(self, reader: AttentionReader, inner: Any, module: Any, args: Any, kwargs: Any) -> None:
        self.reader, self.inner, self.module = reader, inner, module
        names = list(inspect.signature(module.processor.__call__).parameters)[1:]
        self.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self.expected = self.stock()

    def stock(self, **changes: Any) -> Any:
        """Return the output of diffusers' processor."""
        return self.inner(self.module, **{**self.arguments, **changes})

    def read(self, **changes: Any) -> tuple[AttentionCall, Reading | None]:
        call = self.reader.bind(self.module, **{**self.arguments, **changes})
        return call, self.reader.read(call)


def calls(tiny: TinyModel) -> list[Seen]:
    """Return all self-attention calls of one forward pass."""
    model, seen = tiny.transformer, []
    anatomy, modules = attention_of(model), tokens_of(model).attention_modules(model)

    def note(inner: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(Seen(anatomy.reader(module.processor), inner, module, args, kwargs))
        return seen[-1].expected

    stack = processor_stack(model)
    stack.push("note", dict.fromkeys(modules, note))
    tiny()
    stack.pop("note")
    assert len(seen) == tiny.attention_layers
    return seen


@pytest.fixture(scope="module", params=[*NAMES, *(f"{name}, fused projections" for name in FUSED)])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    name, _, fused = request.param.partition(", ")
    made = tiny_model(name, batch=2)
    if fused:
        made.transformer.fuse_qkv_projections()
    return made


def bits(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def again(seen: Seen, **changes: Any) -> Any:
    """Return the output of the call, computed from its reading."""
    call, reading = seen.read(**changes)
    assert reading is not None
    query, key, value = reading.joined()
    return seen.reader.finish(call, dispatched(seen.module, query, key, value, reading.mask), query.dtype)


def assert_same_bits(found: Any, expected: Any) -> None:
    assert len(bits(found)) == len(bits(expected))
    assert all(torch.equal(one, other) for one, other in zip(bits(found), bits(expected), strict=True))


def cast(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    return value.to(dtype) if floats else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_put_together_again(tiny: TinyModel, dtype: torch.dtype) -> None:
    other = copy.deepcopy(tiny)
    other.transformer.to(dtype)
    other.arguments = {name: cast(value, dtype) for name, value in tiny.arguments.items()}
    if tiny.name == "HunyuanVideo 1.5":  # its pipeline passes timesteps of the model's dtype
        other.arguments["timestep"] = tiny.arguments["timestep"].to(dtype)
    for seen in calls(other):
        assert bits(seen.expected)[0].dtype == dtype
        assert_same_bits(again(seen), seen.expected)


@torch.no_grad()
def test_one_contract_for_norms_and_rotations(tiny: TinyModel) -> None:
    """The kernels take exactly the norm values and the rotary tables; the fused operations have no other input."""
    for seen in calls(tiny):
        _, reading = seen.read()
        assert reading is not None
        assert len(reading.streams) == (2 if getattr(seen.module, "add_q_proj", None) is not None else 1)
        for stream in reading.streams:
            values, rope = stream.norms.values(), stream.rope
            assert values is not None
            assert (values.norm == "rms_norm_across_heads") == stream.norms.across_heads
            tables: dict[str, Any] = {}
            if rope is not None:
                batch, _, heads, half = rope.cos.shape
                assert rope.sin.shape == rope.cos.shape
                assert batch in (1, 2)
                assert heads in (1, HEADS)
                assert half == HEAD_DIM // 2
                tables = {"cos": rope.cos, "sin": rope.sin, "first_token": rope.first_token}
            query, key = stream.normed_and_rotated()
            for x, found, own in (
                (stream.query, query, {"weight": values.q_weight, "bias": values.q_bias}),
                (stream.key, key, {"weight": values.k_weight, "bias": values.k_bias}),
            ):
                exact = naive.norm_rope(x, norm=values.norm, eps=values.eps, **tables, **own)
                assert torch.allclose(found, exact, atol=1e-6)


@torch.no_grad()
def test_video_and_text_are_where_it_says(tiny: TinyModel) -> None:
    rows = tokens_of(tiny.transformer)
    order, grid = rows.token_order, rows.grid(tiny.transformer, **tiny.arguments)
    assert grid is not None
    texts = []
    for seen in calls(tiny):
        call, reading = seen.read()
        assert reading is not None
        assert reading.text_told or (reading.text == 0 and call.encoder_hidden_states is None)
        reading = reading.with_video(grid.tokens)
        texts.append(reading.text)
        assert reading.text == 0 or reading.text_first == (order == "text-video")
        _, key, value = reading.joined()
        assert value.shape == key.shape == (2, grid.tokens + reading.text, HEADS, HEAD_DIM)
        # A single block of FLUX receives the text tokens before those of the picture.
        video = seen.module.to_v(call.hidden_states[:, -grid.tokens :]).unflatten(2, (HEADS, -1))
        assert torch.allclose(value[:, reading.video], video, atol=1e-6)
        with pytest.raises(postgen.UserError, match=r"use the grid of the same call"):
            reading.with_video(grid.tokens + 1)
    alone = [0] if tiny.name == "Stable Diffusion 3" else []  # the second attention of its dual block
    told = 0 if order == "video" else TEXT_TOKENS
    if tiny.name == "HunyuanVideo 1.5":  # two texts and an image
        told = 2 * TEXT_TOKENS + 3
    assert sorted(texts) == alone + [told] * (len(texts) - len(alone))


@torch.no_grad()
def test_key_lengths_are_the_mask() -> None:
    """HunyuanVideo, with two samples whose texts have different lengths."""
    tiny = tiny_model("HunyuanVideo", batch=2)
    tiny.arguments["encoder_attention_mask"][1, 2:] = 0
    for seen in calls(tiny):
        call, reading = seen.read()
        assert reading is not None
        assert reading.mask is not None
        assert reading.key_lengths is not None
        tokens = call.hidden_states.shape[1]
        assert reading.key_lengths.tolist() == [tokens + TEXT_TOKENS - 1, tokens + 2]
        query, key, value = reading.joined()
        out = attention(query, key, value, key_lengths=reading.key_lengths)
        found = seen.reader.finish(call, out, query.dtype)
        assert all(torch.allclose(*each, atol=1e-6) for each in zip(found, seen.expected, strict=True))
        for unknown in (reading.mask.float(), reading.mask.expand(-1, -1, out.shape[1], -1)):
            _, other = seen.read(attention_mask=unknown)
            assert other is not None
            assert other.key_lengths is None
            assert other.mask is unknown


@torch.no_grad()
def test_masks_of_users() -> None:
    torch.manual_seed(3)
    joint = ("CogVideoX 1.5", "HunyuanVideo", "Flux", "Chroma")
    for name in (*joint, "Wan", "DiT", "PixArt"):
        seen = calls(tiny_model(name, batch=2))[0]
        tokens = seen.arguments["hidden_states"].shape[1] + TEXT_TOKENS * (name in joint)
        prepared = name in ("CogVideoX 1.5", "DiT", "PixArt")
        mask = torch.randn(2, tokens, tokens) if prepared else torch.rand(2, 1, tokens, tokens) > 0.3
        expected = seen.stock(attention_mask=mask)
        assert_same_bits(again(seen, attention_mask=mask), expected)
        assert not torch.equal(bits(expected)[0], bits(seen.expected)[0])


@torch.no_grad()
def test_mask_of_hunyuan_video_15() -> None:
    """The mask is made from the text masks of two texts; texts have different lengths, and valid tokens come first."""
    tiny = tiny_model("HunyuanVideo 1.5", batch=2)
    tiny.arguments["encoder_attention_mask"][1, 2:] = 0
    for seen in calls(tiny):
        call, reading = seen.read()
        assert reading is not None
        assert reading.mask is not None
        assert reading.key_lengths is None
        video, (first, second) = call.hidden_states.shape[1], call.attention_mask.sum(1).tolist()
        assert first == second + 2
        for mask, length in zip(reading.mask[:, 0], (first, second), strict=True):
            counts = torch.arange(video + reading.text) < video + length
            assert torch.equal(mask, counts[:, None] & counts)
        assert_same_bits(again(seen), seen.expected)


@torch.no_grad()
def test_mask_of_chroma() -> None:
    """The transformer makes a mask of pairs of tokens; the single blocks use it too."""
    tiny = tiny_model("Chroma", batch=2)
    mask = torch.ones(2, TEXT_TOKENS + ROWS * COLUMNS, dtype=torch.bool)
    mask[1, 2:TEXT_TOKENS] = False
    plain = tiny()
    tiny.arguments["attention_mask"] = mask
    assert not torch.equal(plain[1], tiny()[1])
    for seen in calls(tiny):
        _, reading = seen.read()
        assert reading is not None
        assert reading.mask is not None
        assert torch.equal(reading.mask[:, 0, 0], mask)
        assert_same_bits(again(seen), seen.expected)


@torch.no_grad()
def test_stable_diffusion_3_masks_nothing() -> None:
    """The processor ignores the mask. Version 3.0 has no norms."""
    seen = calls(tiny_model("Stable Diffusion 3", batch=2))[0]
    assert seen.read(attention_mask=torch.zeros(2, 1, 11))[1] is not None
    assert_same_bits(seen.stock(attention_mask=torch.full((2, 1, 11), -1e4)), seen.expected)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        setattr(seen.module, norm, None)
    assert_same_bits(again(seen), seen.stock())
    assert not torch.equal(bits(seen.stock())[0], bits(seen.expected)[0])


CROSS = {"encoder_hidden_states": torch.zeros(2, TEXT_TOKENS, HEADS * HEAD_DIM)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Wan", CROSS),
        ("Wan", {"rotary_emb": None}),
        ("LTX", CROSS),
        ("LTX", {"image_rotary_emb": None}),
        ("LTX", {"attention_mask": torch.zeros(2, 1, 24)}),
        ("Flux", {"encoder_hidden_states": None}),
        ("Flux", {"image_rotary_emb": None}),
        ("PixArt", CROSS),
        ("DiT", {"hidden_states": torch.zeros(2, HEADS * HEAD_DIM, 4, 4)}),
        ("HunyuanVideo", {"encoder_hidden_states": None}),
        ("HunyuanVideo", {"image_rotary_emb": None}),
        ("HunyuanVideo 1.5", {"encoder_hidden_states": None}),
        ("HunyuanVideo 1.5", {"attention_mask": None}),
    ],
)
def test_what_is_left_to_the_processor(name: str, changes: dict[str, Any]) -> None:
    seen = calls(tiny_model(name, batch=2))[0]
    assert seen.read()[1] is not None
    assert seen.read(**changes)[1] is None


def test_cross_attention_of_cogvideox_is_left() -> None:
    seen = calls(tiny_model("CogVideoX 1.0"))[0]
    seen.module.is_cross_attention = True
    assert seen.read()[1] is None


def test_fused_projections_of_cogvideox_with_a_mask_are_left() -> None:
    tiny = tiny_model("CogVideoX 1.5", batch=2)
    tiny.transformer.fuse_qkv_projections()
    seen = calls(tiny)[0]
    assert seen.read()[1] is not None
    assert seen.read(attention_mask=torch.zeros(2, 1, 29))[1] is None


def test_wan_reads_no_cross_attention() -> None:
    """Cross-attention to the text, also with an image, whose keys have projections of their own."""
    for name in ("Wan", "Wan image-to-video"):
        tiny = tiny_model(name)
        module: Any = tiny.transformer.get_submodule("blocks.0.attn2")
        reader, seen = attention_of(tiny.transformer).reader(module.processor), []

        def note(inner: Callable[..., Any], *args: Any, seen: Any = seen, reader: Any = reader, **kwargs: Any) -> Any:
            seen.append(reader.read(reader.bind(*args, **kwargs)))
            return inner(*args, **kwargs)

        processor_stack(tiny.transformer).push("note", {"blocks.0.attn2": note})
        tiny()
        assert seen == [None]


def test_norms_that_are_watched_must_be_called() -> None:
    norm, other = torch.nn.RMSNorm(4, eps=1e-6), torch.nn.RMSNorm(4, eps=1e-6)
    assert Norms(norm, other).values() is not None
    assert Norms(norm, torch.nn.RMSNorm(4, eps=1e-5)).values() is None
    assert Norms(norm, None).values() is None
    assert Norms(norm, torch.nn.LayerNorm(4)).values() is None
    assert Norms(torch.nn.LayerNorm(4), torch.nn.LayerNorm(4), across_heads=True).values() is None
    norm.register_forward_hook(lambda *_: None)
    assert Norms(norm, other).values() is None


def test_readers_are_found_through_wrappers_and_pickled() -> None:
    tiny = tiny_model("Wan")
    anatomy, module = attention_of(tiny.transformer), tiny.transformer.blocks[0].attn1
    reader = anatomy.reader(module.processor)
    processor_stack(tiny.transformer).push("note", {"blocks.0.attn1": print})
    assert type(module.processor).__call__ is not type(tiny.transformer.blocks[1].attn1.processor).__call__
    assert anatomy.reader(module.processor) is reader
    assert attention_of(torch.nn.parallel.DataParallel(tiny.transformer)) is anatomy
    assert pickle.loads(pickle.dumps(reader)) == reader


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(registry, "_anatomies", dict(registry._anatomies))
    return registry._anatomies


def test_what_is_unknown_or_has_changed_is_refused(table: dict[str, Any]) -> None:
    mochi, wan = tiny_model("Mochi").transformer, tiny_model("Wan").transformer
    known = (
        "ChromaTransformer2DModel, ChronoEditTransformer3DModel, CogVideoXTransformer3DModel, DiTTransformer2DModel"
    )
    with pytest.raises(postgen.UserError, match=f"MochiTransformer3DModel cannot be read. Known: {known}"):
        attention_of(mochi)
    anatomy, processor = attention_of(wan), wan.blocks[0].attn1.processor
    other = tiny_model("LTX").transformer.transformer_blocks[0].attn1.processor
    with pytest.raises(postgen.UserError, match=r"attention of LTXVideoAttnProcessor\. Known: .*WanAttnProcessor"):
        anatomy.reader(other)
    own = anatomy.readers["WanAttnProcessor"]
    older = AttentionReader(bind=own.bind, read=own.read, finish=own.finish, fingerprints=("0" * 16,))
    register_attention("WanTransformer3DModel", AttentionAnatomy(readers={"WanAttnProcessor": older}))
    message = r"WanAttnProcessor is not the one of diffusers 0\.42 .*fingerprint a2e019b02dcb5331, diffusers 0\.4\d"
    with pytest.raises(postgen.UserError, match=message):
        attention_of(wan).reader(processor)
    register_attention("MochiTransformer3DModel", anatomy)
    assert attention_of(mochi) is anatomy
    wan.__class__ = type("MyWan", (type(wan),), {})
    assert attention_of(wan) is table["WanTransformer3DModel"]
