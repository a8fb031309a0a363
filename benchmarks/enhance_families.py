"""The checks of Enhance-A-Video that every transformer class of diffusers must pass.

    python -m benchmarks.enhance_families

Runs tiny random models of the real classes. The checks show that the right attention is measured and scaled and that
nothing else changes. They do not measure quality.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgen.enhance.apply import apply_enhance_a_video
from postgen.enhance.config import EnhanceAVideoConfig
from postgen.enhance.state import NAME
from postgen.families import VideoTokens, video_tokens_of
from postgen.families.installed import installed
from tests.families.tiny_models import BUILDERS, TinyModel, tiny_model

STRONG = EnhanceAVideoConfig(weight=8.0)
"""A gain of about 3 at 4 frames: too strong for a good video, but clearly visible in the numbers."""

MILD = EnhanceAVideoConfig(weight=1.0)
"""Inactive if a frame gives 2/5 or more of its attention to itself, at 4 frames."""


def layers_are_found(tiny: TinyModel) -> None:
    """The self-attention of every block is measured, with one gain per sample."""
    handle = apply_enhance_a_video(tiny.transformer, STRONG)
    tiny()
    stats = handle.stats()
    assert len(stats) == tiny.attention_layers, f"{len(stats)} layers measured of {tiny.attention_layers}"
    batch = tiny.arguments["timestep"].shape[0]
    assert all(len(gains) == batch for gains in stats.values()), "the number of gains is not the batch size"


def frames_are_where_we_think(tiny: TinyModel) -> None:
    """A change of one frame (or location) changes the queries and keys of that frame (or location) only."""
    video = video_tokens_of(tiny.transformer)
    before = _first_tokens(tiny, tiny.arguments["hidden_states"])
    assert before[0].shape[1] == tiny.frames, f"{before[0].shape[1]} frames measured of {tiny.frames}"
    for frame in (1, tiny.frames - 1):
        after = _first_tokens(tiny, _changed(tiny, video, frame=frame))
        wanted = (torch.arange(tiny.frames) == frame)[:, None].expand(-1, before[0].shape[2])
        _assert_changed(before, after, wanted, f"frame {frame}")
    if video.factorised:
        return  # the attention within the frames comes first and mixes the locations
    for place in (1, before[0].shape[2] - 1):
        after = _first_tokens(tiny, _changed(tiny, video, place=place))
        wanted = (torch.arange(before[0].shape[2]) == place)[None].expand(tiny.frames, -1)
        _assert_changed(before, after, wanted, f"location {place}")


def gains_are_at_least_one(tiny: TinyModel) -> None:
    """A strong weight acts in every layer; with a very negative weight the gain is clipped to 1 and no bit changes."""
    before = tiny()
    handle = apply_enhance_a_video(tiny.transformer, STRONG)
    changed = tiny()
    assert all(gain > 1.5 for gains in handle.stats().values() for gain in gains), f"gains {handle.stats()}"
    assert not torch.allclose(changed, before, atol=1e-3), "nothing changes"
    handle.update(weight=-100.0)
    assert torch.equal(tiny(), before), "a gain of 1 changes the output"
    assert {gain for gains in handle.stats().values() for gain in gains} == {1.0}


def frames_on_their_own_gain_nothing(tiny: TinyModel) -> None:
    """The gain is 1 if every frame attends only to itself."""
    for attention in video_tokens_of(tiny.transformer).attention_modules(tiny.transformer).values():
        _attend_to_self(attention)
    before = tiny()
    handle = apply_enhance_a_video(tiny.transformer, MILD)
    assert torch.equal(tiny(), before), "the output changes"
    assert {gain for gains in handle.stats().values() for gain in gains} == {1.0}, f"gains {handle.stats()}"


def removal_leaves_no_trace(tiny: TinyModel) -> None:
    """After removal the output, the processors and the names of the weights are those of the plain model."""
    attention = video_tokens_of(tiny.transformer).attention_modules(tiny.transformer).values()
    processors, before = [module.processor for module in attention], tiny()
    names = list(tiny.transformer.state_dict())
    handle = apply_enhance_a_video(tiny.transformer, STRONG)
    tiny()
    assert list(tiny.transformer.state_dict()) == names, "the names of the weights have changed"
    handle.remove()
    assert torch.equal(tiny(), before), "the output has changed"
    assert all(module.processor is old for module, old in zip(attention, processors, strict=True))
    assert not tiny.transformer._forward_pre_hooks
    assert not tiny.transformer._forward_hooks


def saving_knows_nothing(tiny: TinyModel) -> None:
    """A model that is saved while the plug-in is on loads as the plain model."""
    transformer: Any = tiny.transformer
    before = tiny()
    handle = apply_enhance_a_video(transformer, STRONG)
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        tiny.transformer = type(transformer).from_pretrained(folder)
    assert type(tiny.transformer) is type(transformer)
    assert torch.equal(tiny(), before), "the loaded model differs"
    handle.remove()


CHECKS: tuple[Callable[[TinyModel], None], ...] = (
    layers_are_found,
    frames_are_where_we_think,
    gains_are_at_least_one,
    frames_on_their_own_gain_nothing,
    removal_leaves_no_trace,
    saving_knows_nothing,
)
"""The checks. Each takes a new model and raises AssertionError if it fails."""


def passing_families() -> dict[str, bool]:
    """Return for each transformer class whether all of its tiny models pass every check."""
    passing: dict[str, bool] = {}
    for name in BUILDERS:
        for check in CHECKS:
            tiny = tiny_model(name, batch=2)
            family = type(tiny.transformer).__name__
            passing.setdefault(family, True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # applying STRONG warns about its weight
                    check(tiny)
            except Exception as failure:
                passing[family] = False
                print(f"{name}: {check.__name__}: {failure}")
    return passing


def _first_tokens(tiny: TinyModel, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries and keys (1, T, S, heads, D) of the video that the measurement reads in the first layer."""
    handle = apply_enhance_a_video(tiny.transformer, STRONG)
    enhancement: Any = installed(tiny.transformer).plug_ins[NAME]
    locate, seen = enhancement.call.locate, []

    def look(*args: Any) -> Any:
        found = locate(*args)
        assert found is not None, "the tokens do not match the frames"
        seen.append(found)
        return found

    enhancement.call.locate = look
    tiny(hidden_states=latents)
    handle.remove()
    # Mochi calls attention once per sample, and the first sample is enough.
    return seen[0][0][:1], seen[0][1][:1]


def _changed(tiny: TinyModel, video: VideoTokens, *, frame: int | None = None, place: int | None = None) -> Tensor:
    """Return latents in which one frame of tokens, or one location of every frame, is changed."""
    latents: Tensor = tiny.arguments["hidden_states"].clone()
    grid: Any = video.grid(tiny.transformer, **tiny.arguments)
    if video.latent_axes == "packed":
        view = latents.unflatten(1, (grid.frames, grid.height, grid.width))
    else:
        order = [video.latent_axes.index(axis) for axis in "BTHWC"]
        view = latents.permute(order)
    sizes = (grid.frames, grid.height, grid.width)
    patch = [length // count for length, count in zip(view.shape[1:4], sizes, strict=True)]
    where = [frame, None, None] if place is None else [None, place // grid.width, place % grid.width]
    index = [
        slice(None) if at is None else slice(at * step, (at + 1) * step) for at, step in zip(where, patch, strict=True)
    ]
    view[:, *index] += torch.randn_like(view[:, *index])
    return latents


def _assert_changed(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], wanted: Tensor, what: str) -> None:
    for kind, old, new in zip(("queries", "keys"), before, after, strict=True):
        changed = (old != new).any(-1).any(-1)[0]
        assert torch.equal(changed, wanted), f"{what} changes other {kind}: {changed.int().tolist()}"


def _attend_to_self(attention: Any) -> None:
    """Make keys equal to queries and attention sharp, so that each token attends only to itself."""
    for query, key in (("to_q", "to_k"), ("to_query", "to_key")):
        if hasattr(attention, query):
            projection = getattr(attention, query)
            getattr(attention, key).load_state_dict(projection.state_dict())
    norms = [getattr(attention, name, None) for name in ("norm_q", "query_norm")]
    weights = [norm.weight for norm in norms if norm is not None and norm.weight is not None]
    with torch.no_grad():
        for weight in weights or projection.parameters():
            weight.mul_(100)


if __name__ == "__main__":
    results = passing_families()
    print(f"{sum(results.values())} of {len(results)} transformer classes pass")
