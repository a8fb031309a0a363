"""Settings of `for_call` apply only to their own calls: threads, tasks, nested blocks, errors; for every plug-in."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import postgen
from postgen.families.installed import installed, processor_stack
from postgen.plug_ins import PlugIn, known_plug_ins, resolve
from tests.families.tiny_models import TinyModel, tiny_model

SETTINGS: dict[str, tuple[Any, Any]] = {
    "enhance_a_video": (
        postgen.EnhanceAVideoConfig(relative_weight=0.4),
        postgen.EnhanceAVideoConfig(weight={r"transformer_blocks\.1\..*": 1.5}),
    ),
    "fp8_linears": (postgen.FP8LinearConfig(attention=False), postgen.FP8LinearConfig(feed_forward=False)),
    "fp8_attention": (
        postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True),
        postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True, preparation="plain"),
    ),
    "fused_ops": (
        postgen.FusedOpsConfig(adaln=False, attention=None),
        postgen.FusedOpsConfig(norm_rope=False, attention=None),
    ),
}
"""Two settings of each plug-in. Their outputs differ from each other and from that of the stock model."""


@pytest.fixture(params=known_plug_ins(), ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> PlugIn:
    return request.param  # type: ignore[no-any-return]


MODEL = "CogVideoX 1.5"


@pytest.fixture
def tiny() -> TinyModel:
    return tiny_model(MODEL)


class Calls:
    """A model, several settings, and the output for each setting when no other thread calls the model."""

    def __init__(self, row: PlugIn, tiny: TinyModel, settings: tuple[Any, ...]) -> None:
        self.tiny, self.model = tiny, tiny.transformer
        self.name, self.within = row.name, resolve(row.for_call)
        self.settings = (*settings, False, None)
        self.alone = [self(setting) for setting in self.settings]
        *on, off, plain = self.alone
        assert torch.equal(off, plain)
        assert not any(torch.equal(x, y) for x, y in combinations((*on, off), 2))

    def predict(self) -> Tensor:
        with torch.no_grad():
            return self.tiny()

    def __call__(self, setting: Any) -> Tensor:
        with self.within(self.model, setting):
            return self.predict()

    def nothing_is_left(self) -> bool:
        return not installed(self.model).plug_ins and not processor_stack(self.model).names


@pytest.fixture
def calls(row: PlugIn, tiny: TinyModel) -> Calls:
    return Calls(row, tiny, SETTINGS[row.name])


@contextmanager
def meeting(model: Any, count: int, times: int = 1) -> Iterator[None]:
    """Let `count` threads wait for one another in the middle of the model, in the first `times` calls of each."""
    barrier, met = threading.Barrier(count, timeout=20), threading.local()

    def meet(*_: Any) -> None:
        met.times = getattr(met, "times", 0) + 1
        if met.times <= times:
            barrier.wait()

    hook = model.transformer_blocks[1].register_forward_pre_hook(meet)
    try:
        yield
    finally:
        hook.remove()


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [each.result() for each in [pool.submit(function) for function in functions]]


@pytest.mark.parametrize("applied", [False, True])
def test_threads_have_their_own_settings(calls: Calls, row: PlugIn, applied: bool) -> None:
    if applied:
        resolve(row.apply)(calls.model, calls.settings[1])
        calls.alone[3] = calls.alone[1]
    with meeting(calls.model, 4, times=3):
        found = in_threads(*(lambda setting=s: [calls(setting) for _ in range(3)] for s in calls.settings))
    for results, expected in zip(found, calls.alone, strict=True):
        assert all(torch.equal(each, expected) for each in results)
    if applied:
        assert torch.equal(calls.predict(), calls.alone[1])
    else:
        assert calls.nothing_is_left()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_overlapping_blocks_end_in_any_order(calls: Calls, order: tuple[int, ...]) -> None:
    blocks = [calls.within(calls.model, setting) for setting in calls.settings[:3]]
    for block, expected in zip(blocks, calls.alone, strict=False):
        block.__enter__()
        assert torch.equal(calls.predict(), expected)
    still = [0, 1, 2]
    for number in order:
        blocks[number].__exit__(None, None, None)
        still.remove(number)
        assert torch.equal(calls.predict(), calls.alone[still[-1] if still else 3])
    assert calls.nothing_is_left()


def test_blocks_of_threads_end_in_any_order(calls: Calls) -> None:
    """The thread that put the plug-in on the model ends its block first; the other thread keeps its settings."""
    first, second = calls.within(calls.model, calls.settings[0]), threading.Event()
    joined = threading.Event()

    def other() -> list[Tensor]:
        with calls.within(calls.model, calls.settings[1]):
            joined.set()
            assert second.wait(20)
            inside = calls.predict()
        return [inside, calls.predict()]

    first.__enter__()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(other)
        assert joined.wait(20)
        first.__exit__(None, None, None)
        assert torch.equal(calls.predict(), calls.alone[3])
        assert not postgen.summary(calls.model).transformers[0].plug_ins
        second.set()
        inside, after = running.result()
    assert torch.equal(inside, calls.alone[1])
    assert torch.equal(after, calls.alone[3])
    assert calls.nothing_is_left()


def test_an_error_in_the_middle_ends_one_call_only(calls: Calls) -> None:
    failing = threading.local()

    def fail(*_: Any) -> None:
        if getattr(failing, "now", False):
            raise RuntimeError("in the middle")

    def broken() -> Tensor:
        failing.now = True
        with pytest.raises(RuntimeError, match="in the middle"):
            calls(calls.settings[1])
        failing.now = False
        return calls.predict()

    calls.model.transformer_blocks[1].register_forward_pre_hook(fail)
    with meeting(calls.model, 2):
        after, good = in_threads(broken, lambda: calls(calls.settings[0]))
    assert torch.equal(good, calls.alone[0])
    assert torch.equal(after, calls.alone[3])
    with calls.within(calls.model, calls.settings[0]):
        assert torch.equal(broken(), calls.alone[0])
    assert calls.nothing_is_left()


def test_a_handle_acts_on_the_settings_it_stands_in(calls: Calls, row: PlugIn) -> None:
    handle = resolve(row.apply)(calls.model, calls.settings[0])
    with calls.within(calls.model, calls.settings[1]):
        handle.disable()
        assert torch.equal(calls.predict(), calls.alone[3])
        assert torch.equal(in_threads(calls.predict)[0], calls.alone[0])
        handle.enable()
        assert (handle.config, in_threads(lambda: handle.config)) == (calls.settings[1], [calls.settings[0]])
        assert torch.equal(calls.predict(), calls.alone[1])
        in_threads(handle.disable)
        assert torch.equal(calls.predict(), calls.alone[1])
    assert not handle.enabled
    assert torch.equal(calls.predict(), calls.alone[3])


def test_what_another_thread_calls_with_is_not_here(calls: Calls, row: PlugIn) -> None:
    handles = type(resolve(row.apply)(tiny_model(MODEL).transformer, SETTINGS[row.name][0]))
    with calls.within(calls.model, calls.settings[0]):
        assert in_threads(lambda: handles.of(calls.model)) == [None]
        assert not in_threads(lambda: postgen.summary(calls.model).transformers[0].plug_ins)[0]
        with pytest.raises(postgen.UserError, match=f"a call in another thread uses {row.name} on this transformer"):
            in_threads(lambda: resolve(row.apply)(calls.model, calls.settings[0]))
        # Another thread has the settings of this thread if it runs in a copy of this context.
        context = contextvars.copy_context()
        told = in_threads(lambda: context.run(calls.predict))
        assert torch.equal(told[0], calls.alone[0])
        assert torch.equal(asyncio.run(asyncio.to_thread(calls.predict)), calls.alone[0])
    assert calls.nothing_is_left()


def test_tasks_have_their_own_settings(calls: Calls) -> None:
    async def task(setting: Any) -> Tensor:
        with calls.within(calls.model, setting):
            await asyncio.sleep(0.01)  # lets the other tasks open their blocks
            here = calls.predict()
            assert torch.equal(await asyncio.to_thread(calls.predict), here)
        return here

    async def all_of_them() -> list[Tensor]:
        return await asyncio.gather(*map(task, calls.settings))

    assert all(map(torch.equal, asyncio.run(all_of_them()), calls.alone))
    assert calls.nothing_is_left()


def test_a_copy_made_in_a_block_keeps_its_settings(calls: Calls, row: PlugIn) -> None:
    with calls.within(calls.model, calls.settings[0]):
        twin = TinyModel(**{**vars(calls.tiny), "transformer": copy.deepcopy(calls.model)})
    with torch.no_grad():
        assert torch.equal(twin(), calls.alone[0])
        handles = type(resolve(row.apply)(tiny_model(MODEL).transformer, SETTINGS[row.name][0]))
        handles.of(twin.transformer).remove()  # type: ignore[union-attr]
        assert torch.equal(twin(), calls.alone[3])


def test_layers_that_autograd_runs_again_know_their_call(calls: Calls) -> None:
    """Gradient checkpointing recomputes blocks outside a forward pass; here, as on a GPU, in another thread."""
    weight, found = calls.model.transformer_blocks[0].attn1.to_v.weight, []
    calls.model.enable_gradient_checkpointing()
    for checkpointing in (False, True):
        calls.model.gradient_checkpointing = checkpointing
        calls.model.zero_grad()
        calls.model.train()
        with ExitStack() as stack:
            setting = calls.settings[0]
            if calls.name == "enhance_a_video":
                setting = postgen.EnhanceAVideoConfig(relative_weight=0.4, train=True)
            stack.enter_context(calls.within(calls.model, setting))
            loss = calls.model(**calls.tiny.arguments, return_dict=False)[0].square().sum()
            in_threads(loss.backward)
        found.append(weight.grad.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("value", ["another", "wrapped"])
def test_a_transformer_that_is_exchanged_is_told_of_once(row: PlugIn, value: str) -> None:
    from diffusers import CogVideoXPipeline

    from tests.pipelines.others import cogvideox_parts

    pipe = CogVideoXPipeline(**cogvideox_parts(MODEL))
    handle = resolve(row.apply)(pipe, SETTINGS[row.name][0])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if value == "wrapped":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
            handle.remove()
            pipe.transformer = tiny_model(MODEL).transformer
            assert not told
            return
        pipe.transformer = tiny_model(MODEL).transformer
        pipe.register_modules(transformer=tiny_model(MODEL).transformer)
    (text,) = [str(each.message) for each in told]
    assert f"transformer of CogVideoXPipeline was replaced after {row.name} was applied" in text


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_code_has_the_settings_of_its_thread(row: PlugIn, whole: bool) -> None:
    """The model that is compiled as a whole has one block, because compilation traces every block anew."""
    calls = Calls(row, tiny_model(MODEL, layers=1 if whole else 2), SETTINGS[row.name][:1])
    torch._dynamo.reset()
    settings = (calls.settings[0], None)
    try:
        if whole:
            calls.model.compile(fullgraph=True, backend="eager")
        else:
            for block in calls.model.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
        alone = [calls(setting) for setting in settings]
        for got, expected in zip(alone, (calls.alone[0], calls.alone[-1]), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)
        assert not torch.equal(*alone)
        # The block of this thread keeps the plug-in on the model: modules must not change during compilation.
        with calls.within(calls.model, calls.settings[0]):
            found = in_threads(*(lambda setting=s: [calls(setting) for _ in range(3)] for s in settings))
        for results, expected in zip(found, alone, strict=True):
            assert all(torch.equal(each, expected) for each in results)
    finally:
        torch._dynamo.reset()
