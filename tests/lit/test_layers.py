"""Layers with one state, with states of blocks, and hybrid layers equal an explicit N x N attention in float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Grid
from postgen.families.attention.reading import Rope
from postgen.kernels.attention.ops import attention
from postgen.lit.features import FixedMap, centered, feature
from postgen.lit.layers import LitLayer, Shape, make_layer
from postgen.lit.layers.mhla import mixed
from postgen.lit.options import AnchorOptions, ChunkOptions, LitOptions, MhlaOptions, WindowOptions
from postgen.lit.tables import SeparableRope
from tests.lit.calls import CHANNELS, HEADS, HIDDEN, SHAPE, Call, applied, drawn

GRID = Shape(heads=HEADS, channels=CHANNELS, hidden=HIDDEN, grid=Grid(frames=3, height=2, width=3))
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def lit(**options: Any) -> Any:
    return drawn(make_layer("lit", SHAPE, LitOptions(**options)))


def linear_weights(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return products of features with and without rotation, each (B, H, N, N)."""
    turned = torch.einsum("bnhd,bmhd->bhnm", call.rotated(q), call.rotated(k))
    return turned, torch.einsum("bnhd,bmhd->bhnm", q, k)


def explicit_lit(call: Call, feature_map: str, center: bool, allowed: Tensor | None = None) -> Tensor:
    query, key = call.tokens().normed()
    k = feature(centered(key) if center else key, feature_map)
    turned, plain = linear_weights(call, feature(query, feature_map), k)
    if allowed is not None:
        turned, plain = turned * allowed, plain * allowed
    numerator, divisor = applied(turned, call.value[:, call.video]), plain.sum(dim=-1) + 1e-15
    if call.text:
        rows = call.tokens().text_rows
        scores = call.scores()[..., rows]
        numerator, divisor = numerator + applied(scores, call.value[:, rows]), divisor + scores.sum(dim=-1)
    return numerator / divisor.transpose(1, 2)[..., None]


@pytest.mark.parametrize("options", [{}, {"feature_map": "elu"}, {"center_keys": False}])
@pytest.mark.parametrize("given", [{}, {"rope": False}, {"text": 4, "text_first": True}, {"text": 4, "batch": 2}])
def test_lit_is_the_explicit_form(given: dict[str, Any], options: dict[str, Any]) -> None:
    call, layer = Call(**given), lit(conv_space=0, conv_time=0, **options)
    expected = explicit_lit(call, layer.options.feature_map, layer.options.center_keys)
    torch.testing.assert_close(layer(call.tokens()), expected, **CLOSE)


def test_lit_adds_a_convolution_of_the_values() -> None:
    call, layer = Call(), lit()
    plain = lit(conv_space=0, conv_time=0)
    video = call.value.view(1, 3, 2, 3, -1).permute(0, 4, 1, 2, 3)
    kernel = torch.zeros(HEADS * CHANNELS, 1, 3, 5, 5, dtype=torch.float64)
    kernel[:, 0, 1] += layer.conv.space
    kernel[:, 0, :, 2, 2] += layer.conv.time
    conv = F.conv3d(video, kernel, padding=(1, 2, 2), groups=HEADS * CHANNELS).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(layer(call.tokens()), plain(call.tokens()) + conv.reshape(call.value.shape), **CLOSE)


def test_a_new_convolution_adds_nothing() -> None:
    call = Call()
    new, none = (make_layer("lit", SHAPE, LitOptions(conv_space=side, conv_time=side)).double() for side in (3, 0))
    assert torch.equal(new(call.tokens()), none(call.tokens()))
    random = make_layer("lit", SHAPE, LitOptions(conv_init="default")).double()
    assert not torch.allclose(random(call.tokens()), none(call.tokens()))


def test_the_kernel_takes_a_rotation_by_axes() -> None:
    call = Call(frames=2)
    places = torch.cartesian_prod(*(torch.arange(n).double() for n in (2, 2, 3)))
    for angles, pairs in (
        (torch.stack([places[:, 0], places[:, 2]], dim=1), (1, 0, 1)),
        (torch.stack([places[:, 1], places[:, 2]], dim=1), (0, 1, 1)),
        (torch.stack([places[:, 2], places[:, 1]], dim=1), None),
        (torch.stack([places[:, 0] + places[:, 1], places[:, 2]], dim=1), None),
    ):
        call.rope = Rope(angles[None, :, None].cos(), angles[None, :, None].sin(), in_float32=False)
        found = SeparableRope().table(call.rope, call.grid)
        assert (found and found[1]) == pairs
        layer = lit(conv_space=0, conv_time=0)
        torch.testing.assert_close(layer(call.tokens()), explicit_lit(call, "relu", True), **CLOSE)


def test_merged_heads_share_a_state() -> None:
    call, layer = Call(), lit(conv_space=0, conv_time=0, merge_heads=2)
    q, k = call.tokens().normed()
    q, k = q.relu(), centered(k).relu()
    turned, plain = (weights.sum(dim=1, keepdim=True) for weights in linear_weights(call, q, k))
    expected = (
        applied(turned.expand(-1, 2, -1, -1), call.value) / (plain.sum(dim=-1) + 1e-15).transpose(1, 2)[..., None]
    )
    torch.testing.assert_close(layer(call.tokens()), expected, **CLOSE)


def test_dead_queries_give_the_convolution_alone() -> None:
    call, layer = Call(), lit()
    call.query[:, 4] = -call.query[:, 4].abs()
    call.query.requires_grad_()
    out = layer(call.tokens())
    conv = layer.conv.in_space(call.value, call.grid) + layer.conv.in_time(call.value, call.grid)
    assert torch.equal(out[:, 4], conv[:, 4])
    out.sum().backward()
    assert call.query.grad is not None
    assert call.query.grad.isfinite().all()
    assert not call.query.grad[:, 4].any()


@pytest.mark.parametrize("pieces", [(0, 1, 2, 3, 4, 5), (0, 2, 5), (0, 5)])
def test_causal_lit_in_pieces(pieces: tuple[int, ...]) -> None:
    call, layer = Call(frames=5), lit(causal=True, center_keys=False)
    frame = call.frames_of_tokens()
    plain = lit(conv_space=0, conv_time=0, causal=True, center_keys=False)
    allowed = (frame[:, None] >= frame).double()
    torch.testing.assert_close(plain(call.tokens()), explicit_lit(call, "relu", False, allowed), **CLOSE)
    found, state = [], None
    for first, stop in itertools.pairwise(pieces):
        out, state = layer.stream(call.part(first, stop), state)
        found.append(out)
        assert {name: tuple(x.shape) for name, x in state.items()} == {
            "sum": (1, HEADS, CHANNELS, CHANNELS), "key_sum": (1, HEADS, CHANNELS), "last": (1, 12, HEADS, CHANNELS),
        }  # fmt: skip
    torch.testing.assert_close(torch.cat(found, dim=1), layer(call.tokens()), **CLOSE)


@pytest.mark.parametrize("given", [{}, {"text": 4}])
def test_mhla_with_one_block_is_lit(given: dict[str, Any]) -> None:
    call = Call(**given)
    one = make_layer("mhla", GRID, MhlaOptions(blocks=(1, 1, 1))).double()
    same = lit(conv_space=0, conv_time=0)
    torch.testing.assert_close(one(call.tokens()), same(call.tokens()), **CLOSE)


@pytest.mark.parametrize("blocks", [(3, 1, 2), (2, 2, 3), (3, 2, 3)])
@pytest.mark.parametrize("divisor", [True, False])
def test_mhla_is_the_explicit_form(blocks: tuple[int, int, int], divisor: bool) -> None:
    call: Any = Call(batch=2)
    layer: Any = drawn(make_layer("mhla", GRID, MhlaOptions(blocks=blocks, divisor=divisor)))
    places = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(3))
    block = [places[:, axis] * blocks[axis] // size for axis, size in enumerate((3, 2, 3))]
    number = (block[0] * blocks[1] + block[1]) * blocks[2] + block[2]
    weights = mixed(layer.mixing, blocks, blocks)[number[:, None], number]
    q, k = call.tokens().normed()
    turned, plain = linear_weights(call, q.relu(), centered(k).relu())
    expected = applied(turned * weights, call.value)
    total: Any = (plain * weights).sum(dim=-1).transpose(1, 2)[..., None] + 1e-15 if divisor else call.grid.tokens
    torch.testing.assert_close(layer(call.tokens()), expected / total, **CLOSE)


def test_mhla_on_other_grids() -> None:
    layer: Any = drawn(make_layer("mhla", GRID, MhlaOptions(blocks=(3, 1, 1))))
    assert layer.blocks_on(Grid(frames=6, height=2, width=3)) == (6, 1, 1)
    assert layer.blocks_on(Grid(frames=1, height=4, width=3)) == (1, 2, 1)
    weights = mixed(layer.mixing, (3, 1, 1), (6, 1, 1))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6, dtype=torch.float64))
    # Interpolation between centres is linear, and constant beyond the outer centres.
    ramp = torch.tensor([[0.2, 0.4, 0.6]] * 3, dtype=torch.float64)
    row = mixed(ramp, (3, 1, 1), (6, 1, 1))[0]
    torch.testing.assert_close(row / row[0], torch.tensor([1, 1.25, 1.75, 2.25, 2.75, 3], dtype=torch.float64))
    assert layer(Call(frames=6).tokens()).isfinite().all()
    strict = make_layer("mhla", GRID, MhlaOptions(blocks=(3, 1, 1), interpolate=False))
    with pytest.raises(UserError, match=r"made for a grid of \(3, 2, 3\) tokens .*, got \(6, 2, 3\)"):
        strict.blocks_on(Grid(frames=6, height=2, width=3))


@pytest.mark.parametrize("given", [{}, {"text": 4, "lengths": [2]}, {"text": 4, "text_first": True}])
@pytest.mark.parametrize("kind", ["anchor 1", "anchor 3", "chunk 2 0", "chunk 2 1", "causal 2 1", "chunk 9 0"])
def test_hybrids_are_the_explicit_form(kind: str, given: dict[str, Any]) -> None:
    call, (name, *numbers) = Call(frames=5, **given), kind.split()
    token, frame = torch.arange(call.grid.tokens), call.frames_of_tokens()
    if name == "anchor":
        layer: Any = drawn(make_layer("anchor", SHAPE, AnchorOptions(every=int(numbers[0]))))
        soft = (token % int(numbers[0]) == 0).expand(len(token), -1)
        far = ~soft
    else:
        size, overlap = map(int, numbers)
        options = ChunkOptions(frames=size, overlap=overlap, causal=name == "causal")
        layer = drawn(make_layer("chunk", SHAPE, options))
        first = frame // size * size
        soft = (frame >= first[:, None] - overlap) & (frame < first[:, None] + size)
        far = (frame < first[:, None] - overlap) if name == "causal" else ~soft
    query, key = call.tokens().normed()
    turned, plain = linear_weights(call, layer.map_query(query), layer.map_key(key))
    scores = call.scores()
    of_video = scores[..., call.video] * soft
    numerator = applied(of_video + turned * far, call.value[:, call.video])
    divisor = (of_video + plain * far).sum(dim=-1)
    if call.text:
        rows = call.tokens().text_rows
        numerator, divisor = (
            numerator + applied(scores[..., rows], call.value[:, rows]),
            divisor + scores[..., rows].sum(dim=-1),
        )
    expected = numerator / divisor.transpose(1, 2)[..., None]
    torch.testing.assert_close(layer(call.tokens()), expected, **CLOSE)
    if kind in ("anchor 1", "chunk 9 0"):
        q, k, v = call.tokens().rotated()
        full = attention(q, k, v, key_lengths=call.lengths)[:, call.video]
        assert layer.covers(call.grid)
        torch.testing.assert_close(layer(call.tokens()), full, **CLOSE)


@pytest.mark.parametrize("pieces", [(0, 2, 4, 5), (0, 4, 5), (0, 5)])
def test_causal_chunks_in_pieces(pieces: tuple[int, ...]) -> None:
    call, layer = Call(frames=5), drawn(make_layer("chunk", SHAPE, ChunkOptions(frames=2, overlap=1, causal=True)))
    found, state = [], None
    for first, stop in itertools.pairwise(pieces):
        out, state = layer.stream(call.part(first, stop), state)
        found.append(out)
        assert state["key"].shape[1] == 6
    torch.testing.assert_close(torch.cat(found, dim=1), layer(call.tokens()), **CLOSE)
    with pytest.raises(UserError, match="not a multiple of the chunk size 2"):
        layer.stream(call.part(4, 5), state)


def test_one_divisor_holds_at_any_scale() -> None:
    call: Any = Call()
    layer: Any = drawn(make_layer("anchor", SHAPE, AnchorOptions(every=3, feature_map="elu")))
    assert isinstance(layer.map_key, FixedMap)
    call.query = call.query * 300  # logits in the hundreds, of both signs
    call.query.requires_grad_()
    out = layer(call.tokens())
    out.sum().backward()
    assert out.isfinite().all()
    assert call.query.grad.isfinite().all()


LAYERS = {
    "lit": ("lit", LitOptions()),
    "lit with heads merged": ("lit", LitOptions(merge_heads=2)),
    "mhla": ("mhla", MhlaOptions(blocks=(2, 1, 2), conv_space=3)),
    "anchor": ("anchor", AnchorOptions(every=2)),
    "chunk": ("chunk", ChunkOptions(frames=2)),
    "window_delta": ("window_delta", WindowOptions(radius=0, anchors="first")),
    "window_linear": ("window_linear", WindowOptions(radius=0, output="shared")),
}


def made(name: str) -> LitLayer:
    kind, options = LAYERS[name]
    layer: Any = drawn(make_layer(kind, GRID, options))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_samples_of_a_batch_do_not_meet(name: str) -> None:
    call, layer = Call(batch=2, text=3), made(name)
    both = layer(call.tokens())
    for row in range(2):
        one = Call(batch=2, text=3)
        for part in ("query", "key", "value", "hidden"):
            setattr(one, part, getattr(one, part)[row : row + 1])
        torch.testing.assert_close(layer(one.tokens()), both[row : row + 1], **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str) -> None:
    call, layer = Call(frames=2, rows=1, columns=3, text=2), made(name)
    call.query.requires_grad_(), call.key.requires_grad_(), call.value.requires_grad_(), call.hidden.requires_grad_()

    def run(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        call.query, call.key, call.value, call.hidden = query, key, value, hidden
        names = dict(zip(dict(layer.named_parameters()), weights, strict=True))
        out: Tensor = torch.func.functional_call(layer, names, (call.tokens(),))
        return out

    weights = [weight.detach().requires_grad_() for weight in layer.parameters()]
    torch.autograd.gradcheck(
        run, (call.query, call.key, call.value, call.hidden, *weights), fast_mode=True, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", LAYERS)
def test_one_frame(name: str) -> None:
    call, layer = Call(frames=1), made(name)
    assert layer(call.tokens()).isfinite().all()
    if name.startswith("window"):
        assert layer.covers(call.grid)


def test_refused() -> None:
    call = Call(text=2)
    call.grid = Grid(frames=2, height=2, width=3)
    with pytest.raises(UserError, match="has 18 video tokens, but the grid 2 x 2 x 3"):
        call.tokens()
    with pytest.raises(UserError, match="does not divide 2 heads"):
        lit(merge_heads=3)
    with pytest.raises(UserError, match="mhla needs the grid of tokens"):
        make_layer("mhla", SHAPE, MhlaOptions())
    with pytest.raises(UserError, match="do not fit into a grid"):
        make_layer("mhla", GRID, MhlaOptions(blocks=(4, 1, 1)))
    with pytest.raises(UserError, match="reads later frames"):
        lit().stream(Call().tokens(), None)


@pytest.mark.parametrize("rope", [False, True])
def test_autocast_does_not_reach_the_sums(rope: bool) -> None:
    """Float32 inputs are summed in float32 under autocast too: the results are bitwise equal."""
    call: Any = Call(rope=rope)
    for name in ("query", "key", "value"):
        setattr(call, name, getattr(call, name).float())
    larger = dataclasses.replace(GRID, grid=Grid(frames=6, height=2, width=3))
    layers = [
        make_layer("lit", SHAPE, LitOptions(conv_space=0, conv_time=0)),
        make_layer("lit", SHAPE, LitOptions(conv_space=0, conv_time=0, center_keys=False, causal=True)),
        make_layer("mhla", GRID, MhlaOptions(blocks=(3, 1, 2))),
        make_layer("mhla", larger, MhlaOptions(blocks=(6, 1, 1))),
    ]
    anchor: Any = make_layer("anchor", SHAPE, AnchorOptions())
    plain = [layer(call.tokens()) for layer in layers] + [anchor.map_key(call.key)]
    with torch.autocast("cpu", torch.bfloat16):
        low = [layer(call.tokens()) for layer in layers] + [anchor.map_key(call.key)]
    assert all(torch.equal(a, b) for a, b in zip(plain, low, strict=True))
