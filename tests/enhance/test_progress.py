"""Which step it is: that of the pipeline that calls, whoever else has the transformer."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import postgen
from postgen.families.installed import installed
from postgen.pipelines import WanPipeline
from tests.tiny_wan import wan_components

LATER = postgen.EnhanceAVideoConfig(relative_weight=0.4, start=0.5)


@pytest.fixture
def pipes() -> Any:
    """Two pipelines of diffusers with one transformer, and a scheduler each."""
    parts = wan_components()
    parts["transformer"].eval()
    made = [diffusers.WanPipeline(**{**parts, "scheduler": copy.deepcopy(parts["scheduler"])}) for _ in range(2)]
    yield made
    if "enhance_a_video" in installed(made[0].transformer).plug_ins:
        postgen.remove_enhance_a_video(made[0])


def make(pipe: Any, steps: int = 4, **more: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 9, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(steps)
    call = {**size, "num_inference_steps": steps, "generator": generator, "output_type": "latent", **more}
    frames: Tensor = pipe("a ball", **call).frames
    return frames


def test_a_later_pipeline_has_its_own_steps(pipes: Any) -> None:
    first, second = pipes
    plain = make(second)
    handle = postgen.apply_enhance_a_video(second, LATER)
    expected = make(second)
    assert not torch.equal(expected, plain)
    handle.remove()
    postgen.apply_enhance_a_video(first, LATER)
    assert torch.equal(make(first), expected)
    assert torch.equal(make(second), expected)  # the first one's scheduler is at its end


def test_a_pipeline_in_the_middle_of_another_ones_call(pipes: Any) -> None:
    first, second = pipes
    postgen.apply_enhance_a_video(first, LATER)
    alone = make(first, 4), make(second, 3)
    within: list[Tensor] = []

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        within.append(make(second, 3))
        return tensors

    assert torch.equal(make(first, 4, callback_on_step_end=after_step), alone[0])
    assert len(within) == 4
    assert all(torch.equal(each, alone[1]) for each in within)


def test_two_pipelines_at_once(pipes: Any) -> None:
    postgen.apply_enhance_a_video(pipes[0], LATER)
    steps = (4, 6)
    alone = [make(*job) for job in zip(pipes, steps, strict=True)]
    barrier, count = threading.Barrier(2, timeout=20), threading.local()

    def meet(*_: Any) -> None:
        count.calls = getattr(count, "calls", 0) + 1
        if count.calls <= min(steps):
            barrier.wait()

    hook = pipes[0].transformer.blocks[1].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(make, pipes, steps))
    hook.remove()
    assert all(map(torch.equal, found, alone))


def test_a_pipeline_that_failed_is_not_read(pipes: Any) -> None:
    first, second = pipes
    postgen.apply_enhance_a_video(first, LATER)
    expected = make(second)

    def fail(*_: Any) -> Any:
        raise RuntimeError("after the first step")

    with pytest.raises(RuntimeError, match="after the first step"):
        make(first, callback_on_step_end=fail)
    assert torch.equal(make(second), expected)
    assert torch.equal(make(first), expected)


def test_a_drop_in_call_on_another_pipelines_transformer(pipes: Any) -> None:
    """The call brings the steps; the settings that stand there came from a transformer alone."""
    first = pipes[0]
    drop_in = WanPipeline(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)})
    expected = make(drop_in, enhance_a_video=LATER)
    postgen.apply_enhance_a_video(first.transformer, postgen.EnhanceAVideoConfig(relative_weight=0.1))
    assert torch.equal(make(drop_in, enhance_a_video=LATER), expected)


def test_without_a_pipeline_the_step_is_not_guessed(pipes: Any) -> None:
    """A loop written by hand on the pipeline's scheduler goes; after the pipeline's own last step nobody knows."""
    pipe = pipes[0]
    handle = postgen.apply_enhance_a_video(pipe, LATER)
    x, text = torch.randn(1, 4, 3, 2, 4), torch.randn(1, 6, 16)
    acted = []
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            for layer in installed(pipe.transformer).plug_ins["enhance_a_video"].layers.values():
                layer.gain = None
            step = pipe.transformer(x, t.expand(1), text, return_dict=False)[0]
            acted.append(bool(handle.stats()))
            x = pipe.scheduler.step(step, t, x, return_dict=False)[0]
        assert acted == [False, False, True, True]
        with pytest.raises(postgen.UserError, match=r"the WanPipeline that .* has finished"):
            pipe.transformer(x, t.expand(1), text, return_dict=False)
    handle.update(start=0.0)
    pipe.transformer(x, t.expand(1), text, return_dict=False)


def test_stats_of_another_thread(pipes: Any) -> None:
    """Whoever made no call sees the last one of all; whoever made one sees its own."""
    pipe = pipes[0]
    handle = postgen.apply_enhance_a_video(pipe, postgen.EnhanceAVideoConfig(relative_weight=0.4))

    def work() -> dict[str, tuple[float, ...]]:
        make(pipe)
        return handle.stats()

    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(work).result()
    assert theirs
    assert handle.stats() == theirs
    assert "last gains 1." in str(postgen.summary(pipe))
    handle.update(relative_weight=0.1)
    make(pipe)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handle.stats).result() == handle.stats() != theirs
