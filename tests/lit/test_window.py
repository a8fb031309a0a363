"""Window layers in float64: the window, the ridge problem of the memory, separation of both, and streams."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Grid
from postgen.kernels.attention.ops import attention
from postgen.lit.layers import make_layer
from postgen.lit.layers.memory import Writes, decayed, inverse_of, scan, step, written
from postgen.lit.options import WindowOptions
from tests.lit.calls import CHANNELS, HEADS, SHAPE, Call, applied, drawn

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def window(kind: str = "window_delta", **options: Any) -> Any:
    return make_layer(kind, SHAPE, WindowOptions(**options)).double()


def allowed(call: Call, layer: Any) -> Tensor:
    """Return which video tokens attend to which by softmax, (N, N)."""
    frames, options = call.grid.frames, layer.options
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for t in range(frames):
        for s in range(frames):
            distance = s // options.chunk - t // options.chunk
            mask[t, s] = abs(distance) <= options.radius and not (options.causal and distance > 0)
    dense = {"none": [], "first": [0], "both": [0, frames - 1]}[options.anchors]
    mask[dense], mask[:, dense] = True, True
    frame = call.frames_of_tokens()
    return mask[frame[:, None], frame]


TEXTS: tuple[dict[str, Any], ...] = ({}, {"text": 4, "batch": 2, "lengths": [2, 4]}, {"text": 4, "text_first": True})


@pytest.mark.parametrize("anchors", ["none", "first", "both"])
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("radius", [0, 1, 7])
def test_a_new_layer_is_masked_softmax(radius: int, chunk: int, anchors: str) -> None:
    layer = window(radius=radius, chunk=chunk, anchors=anchors)
    for frames, given in itertools.product((1, 2, 5), TEXTS):
        call = Call(frames=frames, **given)
        mask = allowed(call, layer)
        scores = call.scores()
        scores[..., call.video] = scores[..., call.video] * mask
        expected = applied(scores / scores.sum(dim=-1, keepdim=True), call.value)
        torch.testing.assert_close(layer(call.tokens()), expected, **CLOSE)
        assert layer.covers(call.grid) == bool(mask.all())
        if layer.covers(call.grid):
            assert layer.flops(call.grid, 0) == 4 * call.grid.tokens**2 * HEADS * CHANNELS


def test_step_zero_has_the_bits_of_softmax_in_the_window() -> None:
    """A new layer has gate g_s = 1 and matrix W' = 0, so its output is softmax in the window for any memory."""
    call, layer = Call(frames=4), window(radius=1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith(("mix", "soft_gate")):
                parameter.add_(torch.randn_like(parameter))
    q, k, v = (x.unflatten(1, (4, -1)) for x in call.tokens().softmax_parts())
    rows = []
    for frame in range(4):
        seen = slice(max(0, frame - 1), frame + 2)
        rows.append(attention(q[:, frame], k[:, seen].flatten(1, 2), v[:, seen].flatten(1, 2)))
    assert torch.equal(layer(call.tokens()), torch.cat(rows, dim=1))


def memory(frames: int = 4, places: int = 3, *, delta: bool = True, scale: bool = True) -> tuple[Any, Writes]:
    torch.manual_seed(0)
    key, value = (torch.randn(2, frames, places, HEADS, CHANNELS, dtype=torch.float64) for _ in range(2))
    key = torch.nn.functional.normalize(key, dim=-1)
    strength, log_decay = (
        torch.rand(2, frames, places, HEADS).double(),
        -torch.rand(2, frames, HEADS, CHANNELS).double(),
    )
    return (key, value, strength, log_decay), written(key, value, strength, log_decay, delta=delta, scale=scale)


@pytest.mark.parametrize(("places", "scale"), [(3, True), (9, True), (9, False)])
def test_a_frame_solves_its_ridge_problem(places: int, scale: bool) -> None:
    (key, value, strength, log_decay), writes = memory(places=places, scale=scale)
    states = scan(writes)
    c = min(1.0, CHANNELS / places) if scale else 1.0
    for frame in range(4):
        state = states[frame + 1].clone().requires_grad_()
        kept = states[frame] * log_decay[:, frame].exp()[..., None, :]
        read = torch.einsum("bhde,bshe->bshd", state, c**0.5 * key[:, frame])
        error = (read - value[:, frame]).square().sum(dim=-1) * strength[:, frame]
        loss = (state - kept).square().sum() + error.sum()
        (gradient,) = torch.autograd.grad(loss, state)
        assert gradient.abs().max() < 1e-12
    order = torch.randperm(places)
    turned = written(key[:, :, order], value[:, :, order], strength[:, :, order], log_decay, delta=True, scale=scale)
    torch.testing.assert_close(scan(turned)[-1], states[-1], **CLOSE)


def test_without_a_gram_matrix_it_is_a_decayed_sum() -> None:
    (key, value, strength, log_decay), plain = memory(delta=False)
    _, full = memory()
    nothing = inverse_of(torch.zeros_like(full.content))
    zero = Writes(inverse=nothing, content=full.content, log_decay=full.log_decay)
    torch.testing.assert_close(scan(zero)[-1], scan(plain)[-1], **CLOSE)
    total = torch.zeros_like(plain.content[:, 0])
    for frame in range(4):
        since = log_decay[:, frame + 1 :].sum(dim=1).exp()
        for s in range(3):
            outer = value[:, frame, s, :, :, None] * key[:, frame, s, :, None, :]
            total = total + strength[:, frame, s, :, None, None] * outer * since[:, :, None, :]
    # The scale min(1, D / S) is 1, because a frame has fewer tokens than channels.
    torch.testing.assert_close(scan(plain)[-1], total, **CLOSE)


@pytest.mark.parametrize("backward", [False, True])
def test_gathered_memories_are_scans_that_skip_the_window(backward: bool) -> None:
    _, writes = memory(frames=5)
    for low, high, frame in ((1, 3, 2), (2, 5, 3), (0, 2, 0)):
        skipped = writes.without([*range(low, high)])
        if backward:
            gathered = decayed(scan(writes, backward=True)[high], writes.log_decay[:, frame:high])
            expected = scan(skipped, backward=True)[frame]
        else:
            gathered = decayed(scan(writes)[low], writes.log_decay[:, low : frame + 1])
            expected = scan(skipped)[frame + 1]
        torch.testing.assert_close(gathered, expected, **CLOSE)


def test_the_gradient_through_the_solve() -> None:
    (key, value, strength, log_decay), _ = memory(frames=1, places=7)
    start = torch.randn(2, HEADS, CHANNELS, CHANNELS, dtype=torch.float64, requires_grad=True)

    def run(key: Tensor, strength: Tensor, start: Tensor) -> Tensor:
        return step(start, written(key, value, strength, log_decay, delta=True, scale=True), 0)

    torch.autograd.gradcheck(run, (key.requires_grad_(), strength.requires_grad_(), start), fast_mode=True)


def parts(call: Call, layer: Any, frame: int) -> tuple[Tensor, Tensor]:
    """Return the contributions of softmax and of the memory to the output of a frame."""
    rows = call.frames_of_tokens() == frame
    with torch.no_grad():
        weight, layer.mix.weight[:] = layer.mix.weight.clone(), 0
        near = layer(call.tokens())[:, rows]
        layer.mix.weight[:] = weight
        far = layer(call.tokens())[:, rows] - near
    return near, far


@pytest.mark.parametrize("kind", ["window_delta", "window_linear"])
@pytest.mark.parametrize("conv", [False, True])
def test_poison_stays_on_its_side(kind: str, conv: bool) -> None:
    """For frame 3 of 8, softmax reads only the window (frames 2 to 4), and the memory only the frames outside."""
    layer: Any = drawn(window(kind, radius=1, conv=conv))
    near, far = parts(Call(frames=8), layer, 3)
    outside, inside = Call(frames=8), Call(frames=8)
    frame = outside.frames_of_tokens()
    for x in (outside.key, outside.value):
        x[:, (frame < 2) | (frame > 4)] = 1e30
    torch.testing.assert_close(parts(outside, layer, 3)[0], near, rtol=0, atol=0)
    # The convolution in time carries values of the window to frames outside it, two frames far.
    places = [3] if conv else [2, 3, 4]
    for x in (inside.key, inside.value):
        x[:, sum(frame == place for place in places).bool()] = 1e6
    if conv:
        assert not torch.allclose(parts(inside, layer, 3)[1], far)
        layer.conv_key.time.data[:, [0, 1, 3, 4]] = layer.conv_value.time.data[:, [0, 1, 3, 4]] = 0
        clean = parts(Call(frames=8), layer, 3)[1]
        torch.testing.assert_close(parts(inside, layer, 3)[1], clean, rtol=1e-6, atol=1e-8)
    else:
        torch.testing.assert_close(parts(inside, layer, 3)[1], far, rtol=1e-6, atol=1e-8)
        assert not torch.allclose(parts(outside, layer, 3)[1], far)


def test_dense_frames_are_not_in_the_memory() -> None:
    layer: Any = drawn(window(radius=0, anchors="both", conv=False))
    far = parts(Call(frames=6), layer, 2)[1]
    poisoned = Call(frames=6)
    frame = poisoned.frames_of_tokens()
    poisoned.value[:, (frame == 0) | (frame == 5)] = 1e6
    torch.testing.assert_close(parts(poisoned, layer, 2)[1], far, rtol=1e-6, atol=1e-8)
    assert far.any()
    assert not parts(poisoned, layer, 0)[1].any()


def test_a_frame_does_not_know_the_order_of_its_tokens() -> None:
    """Frames that only the memory reads may permute their tokens, if there are no convolutions on the grid."""
    layer: Any = drawn(window(radius=0, conv=False))
    call, turned = Call(frames=3, rope=False), Call(frames=3, rope=False)
    order = torch.cat([torch.randperm(6), 6 + torch.arange(12)])
    for name in ("query", "key", "value", "hidden"):
        setattr(turned, name, getattr(turned, name)[:, order])
    torch.testing.assert_close(layer(turned.tokens())[:, 6:], layer(call.tokens())[:, 6:], **CLOSE)


def test_a_new_convolution_changes_nothing() -> None:
    with_conv, without = window(radius=0), window(radius=0, conv=False)
    weights = {name: torch.randn_like(weight) for name, weight in without.state_dict().items()}
    without.load_state_dict(weights)
    with_conv.load_state_dict(weights, strict=False)
    assert torch.equal(with_conv(Call().tokens()), without(Call().tokens()))


def test_an_empty_memory_is_read_as_zero() -> None:
    call, layer = Call(frames=2, batch=2), drawn(window(radius=0, conv=False))
    call.value[:, :] = 0
    call.value.requires_grad_()
    out = layer(call.tokens())
    out.sum().backward()
    assert not out.any()
    assert call.value.grad is not None
    assert call.value.grad.isfinite().all()
    # The size of the stored values does not matter either.
    full, scaled = Call(frames=2), Call(frames=2)
    layer.soft_gate.weight.data.zero_(), layer.soft_gate.bias.data.fill_(-1e9)
    with torch.no_grad():
        query, writes, _ = layer._written(full.tokens())
        once = layer._finished(full.tokens(), full.value, query, 1e3 * torch.stack(scan(writes)[1:], dim=1))
        twice = layer._finished(scaled.tokens(), full.value, query, 1e6 * torch.stack(scan(writes)[1:], dim=1))
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["window_delta", "window_linear"])
@pytest.mark.parametrize(("chunk", "radius"), [(1, 0), (1, 2), (2, 1)])
def test_causal_windows_in_pieces(chunk: int, radius: int, kind: str) -> None:
    call, layer = Call(frames=7), drawn(window(kind, chunk=chunk, radius=radius, causal=True))
    whole = layer(call.tokens())
    changed = Call(frames=7)
    for x in (changed.key, changed.value, changed.hidden):
        x[:, 6 * 6 :] = 3.0
    torch.testing.assert_close(layer(changed.tokens())[:, : 6 * 6], whole[:, : 6 * 6], **CLOSE)
    for pieces in ((0, 2, 4, 6, 7), (0, 4, 7), (0, 6, 7)):
        found, state, sizes = [], None, []
        for first, stop in itertools.pairwise(pieces):
            out, state = layer.stream(call.part(first, stop), state)
            found.append(out)
            sizes.append(sum(x.numel() for x in state.values()))
        torch.testing.assert_close(torch.cat(found, dim=1), whole, **CLOSE)
        assert len(set(sizes)) == 1 or radius * chunk > pieces[1]
    if chunk == 2:
        with pytest.raises(UserError, match="not a multiple of the chunk size 2"):
            layer.stream(call.part(6, 7), state)


def test_causal_far_is_the_forward_scan() -> None:
    """The memory of a causal layer is a forward scan over the frames before its window."""
    call, layer = Call(frames=5), drawn(window(radius=1, causal=True))
    query, writes, _ = layer._written(call.tokens())
    reads = []
    for frame in range(5):
        low = max(0, frame - 1)
        reads.append(scan(writes.without([*range(low, frame + 1)]))[frame + 1])
    mask = allowed(call, layer)
    scores = call.scores() * mask
    near = applied(scores / scores.sum(dim=-1, keepdim=True), call.value)
    expected = layer._finished(call.tokens(), near, query, torch.stack(reads, dim=1))
    torch.testing.assert_close(layer(call.tokens()), expected, **CLOSE)


def test_density_of_the_published_windows() -> None:
    """The published shares of frame pairs are .309, .111 and .63 for 9 frames, and .224 and .138 for 21 frames."""
    for frames, radius, anchors, density in (
        (9, 1, "none", 0.309), (9, 0, "none", 0.111), (9, 1, "both", 0.63),
        (21, 2, "none", 0.224), (21, 1, "none", 0.138),
    ):  # fmt: skip
        call, layer = Call(frames=frames, rows=1, columns=1), window(radius=radius, anchors=anchors)
        assert float(allowed(call, layer).double().mean()) == pytest.approx(density, abs=1e-3)
        bare = window(radius=radius, anchors=anchors, conv=False, output="shared")
        more = bare.flops(Grid(frames=frames, height=64, width=64), 0) / (4 * frames**2 * 4096**2 * HEADS * CHANNELS)
        assert more == pytest.approx(density, abs=0.01)


def test_a_frame_that_is_not_finite_stays_so_and_leaves_the_others_alone() -> None:
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 1] = torch.nan
    found = inverse_of(gram)
    assert found[0].isnan().any()
    torch.testing.assert_close(found[1], torch.eye(3, dtype=torch.float64) / 2)
