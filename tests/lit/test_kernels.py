"""Layers compute the same with the operations that are kernels on a GPU as with plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.families.attention.reading import Norms, Reading, Rope, Stream
from postgen.lit import features, tokens
from postgen.lit.layers import Shape, make_layer, window
from postgen.lit.options import AnchorOptions, ChunkOptions, LitOptions, MhlaOptions, WindowOptions
from postgen.lit.tokens import Tokens
from tests.lit.calls import CHANNELS, HEADS, HIDDEN, SHAPE, Call, drawn

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Make layers use the operations as on a GPU; return the number of calls of each operation."""
    counts: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        run = getattr(module, name)

        def counted(*args: Any, **given: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return run(*args, **given)

        monkeypatch.setattr(module, name, counted)

    count(features, "grid_convolution")
    count(window, "frame_sums")
    count(window, "frame_memories")
    count(window, "frame_reads")
    count(window, "gated_sum")
    count(tokens, "qk_norm_rope")
    count(features, "qk_norm_rope")
    monkeypatch.setattr(features, "takes", lambda x: True)
    monkeypatch.setattr(window, "takes", lambda *x: not torch.is_grad_enabled())
    for module in (tokens, features):
        monkeypatch.setattr(module, "for_triton", lambda *x: True)
    return counts


CALLS: tuple[dict[str, Any], ...] = ({"batch": 2}, {"text": 4, "lengths": [2]}, {"text": 4, "text_first": True})


@torch.no_grad()
def test_window_layers(request: pytest.FixtureRequest) -> None:
    options = (
        {"radius": 1},
        {"radius": 0, "anchors": "both", "scale_memory": False, "output": "shared"},
        {"radius": 1, "conv": False, "causal": True},
    )
    kinds = ("window_delta", "window_linear")
    layers = [drawn(make_layer(kind, SHAPE, WindowOptions(**each))) for kind in kinds for each in options]
    expected = [layer(Call(frames=5, **call).tokens()) for layer, call in itertools.product(layers, CALLS)]
    counts: dict[str, int] = request.getfixturevalue("operations")
    found = [layer(Call(frames=5, **call).tokens()) for layer, call in itertools.product(layers, CALLS)]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    # Causal layers scan frame by frame in plain torch.
    calls, scanned = len(found), len(found) * 2 // 3
    # Two of three layers have convolutions: of keys and of values, in space and in time.
    convolved = 4 * calls * 2 // 3
    assert counts == {
        "grid_convolution": convolved, "frame_sums": calls, "frame_reads": calls, "gated_sum": calls,
        "qk_norm_rope": calls, "frame_memories": scanned,
    }  # fmt: skip


def test_gradients_of_window_layers(request: pytest.FixtureRequest) -> None:
    """The kernels of sums and reads have no gradient, so plain torch computes them where a gradient is required."""
    layer = drawn(make_layer("window_delta", SHAPE, WindowOptions(radius=1)))

    def gradients() -> list[Tensor]:
        call: Any = Call(frames=4)
        inputs = [x.requires_grad_() for x in (call.query, call.key, call.value, call.hidden)]
        return list(torch.autograd.grad(layer(call.tokens()).square().sum(), [*inputs, *layer.parameters()]))

    expected = gradients()
    counts = request.getfixturevalue("operations")
    for x, y in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    assert counts == {"grid_convolution": 4, "qk_norm_rope": 1}


@torch.no_grad()
def test_layers_with_features(request: pytest.FixtureRequest) -> None:
    """One operation rotates the features of queries and keys; the kernel of the norms centres keys."""
    shape = Shape(heads=HEADS, channels=CHANNELS, hidden=HIDDEN, grid=Call().grid)
    layers: list[Any] = [
        drawn(make_layer(kind, shape, options))
        for kind, options in (
            ("lit", LitOptions(causal=True, center_keys=False)),
            ("lit", LitOptions()),
            ("mhla", MhlaOptions(blocks=(1, 2, 1))),
            ("chunk", ChunkOptions(frames=1)),
            ("anchor", AnchorOptions(every=3)),
        )
    ]
    norm = torch.nn.RMSNorm(HEADS * CHANNELS, eps=1e-6).double()
    norm.weight.uniform_(0.5, 2)

    def found(text: int) -> list[Tensor]:
        call = Call(text=text)
        stream = Stream(call.query, call.key, call.value, Norms(norm, norm, across_heads=True), call.rope)
        return [layer(Tokens(Reading(streams=(stream,), text=text), call.grid, call.hidden)) for layer in layers]

    expected = [found(text) for text in (0, 4)]
    counts = request.getfixturevalue("operations")
    for text, before in zip((0, 4), expected, strict=True):
        for x, y in zip(found(text), before, strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
    # The linear attention kernel has no tables for this rotation, so all five layers rotate features here. Without
    # text two layers centre keys, and two compute softmax. With text all five compute softmax, and none centres keys
    # in the kernel, because the text is among the tokens.
    assert counts["qk_norm_rope"] == 5 + 2 + 2 + 5 + 5


@torch.no_grad()
def test_the_convolution_of_lit_beside_text(request: pytest.FixtureRequest) -> None:
    layer: Any = drawn(make_layer("lit", SHAPE, LitOptions()))
    expected = layer(Call(text=4).tokens())
    counts = request.getfixturevalue("operations")
    torch.testing.assert_close(layer(Call(text=4).tokens()), expected, **CLOSE)
    assert counts["grid_convolution"] == 2


@torch.no_grad()
def test_norms_and_rotation_of_two_streams(request: pytest.FixtureRequest) -> None:
    """Text with its own norms and without rotation, before video with norms across heads; one norm has a hook."""
    call: Any = Call(text=4, text_first=True)
    rope = Rope(call.rope.cos, call.rope.sin, in_float32=False)
    width = call.query.shape[2] * call.query.shape[3]
    across, per_head = ([torch.nn.RMSNorm(n, eps=1e-6).double() for _ in range(2)] for n in (width, width // 2))
    for norm in (*across, *per_head):
        norm.weight.uniform_(0.5, 2)

    def found() -> tuple[Tensor, ...]:
        text, video = ([x[:, rows] for x in (call.query, call.key, call.value)] for rows in (slice(4), slice(4, None)))
        streams = (Stream(*text, Norms(*per_head)), Stream(*video, Norms(*across, across_heads=True), rope))
        return Tokens(Reading(streams=streams, text=4, text_first=True), call.grid, call.hidden).rotated()

    expected = found()
    counts = request.getfixturevalue("operations")
    for x, y in zip(found(), expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    called: list[int] = []
    across[0].register_forward_hook(lambda *_: called.append(1))
    for x, y in zip(found(), expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    assert called
    assert counts == {"qk_norm_rope": 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["window_delta", "window_linear", "lit"])
@torch.no_grad()
def test_layers_on_a_gpu(kind: str) -> None:
    """In bfloat16 the error against float64 is that of rounding, for sizes with full and with partial tiles."""
    shape = Shape(heads=3, channels=128, hidden=96)
    options: Any = LitOptions() if kind == "lit" else WindowOptions(radius=1)
    layer = make_layer(kind, shape, options)
    torch.manual_seed(1)
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    layer.bfloat16()
    call = Call(frames=5, rows=9, columns=13, rope=False)
    parts = [torch.randn(1, call.grid.tokens, 3, 128) for _ in range(3)]
    hidden = torch.randn(1, call.grid.tokens, 96)

    def out(device: str, dtype: torch.dtype) -> Tensor:
        stream = Stream(*(x.bfloat16().to(device, dtype) for x in parts), Norms(None, None))
        given = Tokens(Reading(streams=(stream,)), call.grid, hidden.bfloat16().to(device, dtype))
        found: Tensor = layer.to(device, dtype)(given)
        return found.double().cpu()

    found, expected = out("cuda", torch.bfloat16), out("cpu", torch.float64)
    assert (found - expected).norm() / expected.norm() < 2e-2
