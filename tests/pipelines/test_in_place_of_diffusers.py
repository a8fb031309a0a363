"""Drop-in Wan, CogVideoX, HunyuanVideo and LTX pipelines in diffusers' place: folders, settings, options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import postgen
import postgen.pipelines as drop_ins
from postgen.enhance import handle_of
from postgen.families.progress import PipelineProgress
from tests.pipelines import more, others, wan_like  # noqa: F401 - they enter their builders into the table
from tests.pipelines.parts import TINY

pytestmark = pytest.mark.filterwarnings("ignore:Enhance-A-Video")

FOUR = ("WanPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline", "LTXPipeline")
CONFIG = postgen.EnhanceAVideoConfig(weight=8.0)


def run(pipe: Any, arguments: dict[str, Any], **settings: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**{**arguments, **settings}, generator=torch.Generator().manual_seed(0)).frames
    return torch.as_tensor(output)


@pytest.fixture(scope="module", params=FOUR)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name of a class, and a folder that diffusers saved."""
    folder = tmp_path_factory.mktemp("saved") / request.param
    getattr(diffusers, request.param)(**TINY[request.param]()[0]).save_pretrained(folder)
    return request.param, folder


def test_a_folder_goes_back_and_forth(saved: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = saved
    arguments = TINY[name]()[1]
    theirs = getattr(diffusers, name).from_pretrained(folder)
    ours = getattr(drop_ins, name).from_pretrained(folder)
    assert type(ours) is getattr(drop_ins, name)
    expected = run(theirs, arguments)
    assert torch.equal(run(ours, arguments), expected)
    assert not torch.equal(run(ours, arguments, enhance_a_video=CONFIG), expected)

    postgen.apply_enhance_a_video(ours, CONFIG)
    for pipe, place in ((theirs, "theirs"), (ours, "ours")):
        pipe.save_pretrained(tmp_path / place)
    indices = [(tmp_path / place / "model_index.json").read_text() for place in ("theirs", "ours")]
    assert indices[0] == indices[1]
    again = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(again) is getattr(diffusers, name)
    assert torch.equal(run(again, arguments), expected)


def test_from_pipe_shares_the_parts(saved: tuple[str, Path]) -> None:
    name, folder = saved
    arguments = TINY[name]()[1]
    theirs = DiffusionPipeline.from_pretrained(folder)
    ours = getattr(drop_ins, name).from_pipe(theirs)
    assert type(ours) is getattr(drop_ins, name)
    assert ours.transformer is theirs.transformer
    assert torch.equal(run(ours, arguments), run(theirs, arguments))
    back = getattr(diffusers, name).from_pipe(ours)
    assert type(back) is getattr(diffusers, name)
    assert back.transformer is theirs.transformer


@pytest.mark.parametrize("options", [{"return_dict": False}, {"output_type": "pt"}, {"output_type": "np"}])
def test_what_is_returned(saved: tuple[str, Path], options: dict[str, Any]) -> None:
    name, folder = saved
    arguments = {**TINY[name]()[1], **options}
    outputs = []
    for place in (diffusers, drop_ins):
        pipe = getattr(place, name).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        outputs.append(pipe(**arguments, generator=torch.Generator().manual_seed(0)))
    theirs, ours = outputs
    assert type(ours) is type(theirs)
    first, second = (torch.as_tensor(output[0]) for output in outputs)
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def wan() -> tuple[Any, dict[str, Any]]:
    components, arguments = TINY["WanPipeline"]()
    return drop_ins.WanPipeline(**components), arguments


@pytest.fixture
def outputs(wan: tuple[Any, dict[str, Any]]) -> dict[str, Tensor]:
    """What the pipeline makes without and with each of two weights, Enhance-A-Video not being on it."""
    pipe, arguments = wan
    return {
        "off": run(pipe, arguments),
        "weak": run(pipe, arguments, enhance_a_video=2.0),
        "strong": run(pipe, arguments, enhance_a_video=CONFIG),
    }


def test_a_setting_is_for_one_call(wan: tuple[Any, dict[str, Any]], outputs: dict[str, Tensor]) -> None:
    """None leaves what is on alone; anything else holds for the call, and what was on before comes back."""
    pipe, arguments = wan
    assert not torch.equal(outputs["weak"], outputs["strong"])
    handle = postgen.apply_enhance_a_video(pipe, CONFIG)
    try:
        for setting, wanted in ((None, "strong"), (2.0, "weak"), (0, "off"), (False, "off"), (None, "strong")):
            settings = {} if setting is None else {"enhance_a_video": setting}
            assert torch.equal(run(pipe, arguments, **settings), outputs[wanted]), setting
            assert handle.enabled
            assert handle.config == CONFIG
        handle.disable()
        assert torch.equal(run(pipe, arguments, enhance_a_video=2.0), outputs["weak"])
        assert torch.equal(run(pipe, arguments), outputs["off"])
    finally:
        handle.remove()
    assert torch.equal(run(pipe, arguments), outputs["off"])


@pytest.mark.parametrize("before", [None, CONFIG])
def test_an_error_leaves_everything_as_it_was(
    wan: tuple[Any, dict[str, Any]], outputs: dict[str, Tensor], before: Any
) -> None:
    pipe, arguments = wan
    handle = postgen.apply_enhance_a_video(pipe, before) if before is not None else None

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    for wrong in ({"callback_on_step_end": stop}, {"height": 17}):
        with pytest.raises((KeyboardInterrupt, ValueError)):
            run(pipe, arguments, enhance_a_video=2.0, **wrong)
        assert (handle_of(pipe) is None) == (before is None)
        assert torch.equal(run(pipe, arguments), outputs["off" if before is None else "strong"])
    if handle is not None:
        handle.remove()


def test_a_wrong_setting_is_refused_before_anything_runs(wan: tuple[Any, dict[str, Any]]) -> None:
    pipe, arguments = wan
    called: list[int] = []
    for wrong in ("often", float("nan"), "", []):
        with pytest.raises(postgen.UserError, match="weight must be"):
            run(pipe, arguments, enhance_a_video=wrong, callback_on_step_end=lambda *_: called.append(1))
    assert not called
    assert handle_of(pipe) is None


@pytest.mark.parametrize("name", FOUR)
def test_fused_operations_for_one_call(name: str) -> None:
    """As `apply_fused_ops` before the call; beside Enhance-A-Video; off and left out are the stock bits."""
    components, arguments = TINY[name]()
    pipe = getattr(drop_ins, name)(**components)
    config = postgen.FusedOpsConfig(attention=None)
    stock, both = run(pipe, arguments), run(pipe, arguments, fused_ops=config, enhance_a_video=CONFIG)
    for_call = run(pipe, arguments, fused_ops=config)
    torch.testing.assert_close(for_call, stock, rtol=0, atol=1e-4)
    assert not torch.equal(both, for_call)
    handle = postgen.apply_fused_ops(pipe, config)
    assert torch.equal(run(pipe, arguments), for_call)
    assert torch.equal(run(pipe, arguments, enhance_a_video=CONFIG), both)
    assert torch.equal(run(pipe, arguments, fused_ops=0), stock)
    assert handle.enabled
    handle.remove()
    assert torch.equal(run(pipe, arguments, fused_ops=False), stock)


def test_fused_operations_are_refused_where_they_are_not_known() -> None:
    components, arguments = TINY["MochiPipeline"]()
    pipe = drop_ins.MochiPipeline(**components)
    for setting, message in ((True, "no fused operations for MochiTransformer3DModel"), ("auto", "FusedOpsConfig")):
        with pytest.raises(postgen.UserError, match=message):
            run(pipe, arguments, fused_ops=setting)


def test_callbacks_and_arguments_by_position(wan: tuple[Any, dict[str, Any]], outputs: dict[str, Tensor]) -> None:
    pipe, arguments = wan
    steps: list[int] = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert handle_of(pipe) is not None
        assert tensors["latents"].shape[0] == 1
        steps.append(step)
        return tensors

    rest = {name: value for name, value in arguments.items() if name != "prompt"}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipe(arguments["prompt"], **rest, generator=generator, callback_on_step_end=watch, enhance_a_video=2.0)
    assert torch.equal(made.frames, outputs["weak"])
    assert steps == [0, 1]


def test_lora_and_moving(tiny_lora: Path, tiny_wan: Path) -> None:
    theirs, ours = (place.WanPipeline.from_pretrained(tiny_wan) for place in (diffusers, drop_ins))
    arguments = {**TINY["WanPipeline"]()[1]}
    plain = run(ours, arguments)
    for pipe in (theirs, ours):
        pipe.load_lora_weights(tiny_lora)
    expected = run(theirs, arguments)
    assert not torch.equal(expected, plain)
    assert torch.equal(run(ours, arguments), expected)
    assert not torch.equal(run(ours, arguments, enhance_a_video=CONFIG), expected)
    ours.unload_lora_weights()
    assert torch.equal(run(ours, arguments), plain)
    assert next(ours.to(torch.bfloat16).transformer.parameters()).dtype is torch.bfloat16


def test_offload(tiny_wan: Path) -> None:
    """On one device there is nowhere to go: the hooks are what is tested, and that a call's setting survives them."""
    arguments = TINY["WanPipeline"]()[1]
    pipe = drop_ins.WanPipeline.from_pretrained(tiny_wan)
    expected = run(pipe, arguments, enhance_a_video=CONFIG)
    pipe.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(run(pipe, arguments, enhance_a_video=CONFIG), expected)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe, arguments, enhance_a_video=CONFIG), expected)


def test_a_subclass_of_a_users_own(tiny_wan: Path) -> None:
    class Mine(drop_ins.WanPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, enhance_a_video=8.0, **kwargs)

    arguments = TINY["WanPipeline"]()[1]
    ours, mine = drop_ins.WanPipeline.from_pretrained(tiny_wan), Mine.from_pretrained(tiny_wan)
    assert torch.equal(run(mine, arguments), run(ours, arguments, enhance_a_video=8.0))


@pytest.mark.parametrize(
    ("name", "fractions"),
    [
        ("WanPipeline", [0.0, 0.5]),
        # It begins where its video is noised to, and the scheduler learns that only after the first step.
        ("WanVideoToVideoPipeline", [0.25, 0.5, 0.75]),
        ("CogVideoXVideoToVideoPipeline", [0.25, 0.5, 0.75]),
        # Every frame has a scheduler of its own, the pipeline's never counts.
        ("SkyReelsV2DiffusionForcingPipeline", [0.0, 0.5]),
        # Its time is not that of the schedule.
        ("CosmosTextToWorldPipeline", [0.0, 0.5]),
        ("LTXPipeline", [0.0, 0.5]),
        ("HunyuanVideoPipeline", [0.0, 0.5]),
    ],
)
def test_start_and_stop_know_the_step(name: str, fractions: list[float]) -> None:
    components, arguments = TINY[name]()
    pipe = getattr(drop_ins, name)(**components)
    progress, found = PipelineProgress(pipe), []

    def watch(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(progress(kwargs))

    pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    run(pipe, arguments)
    assert list(dict.fromkeys(found)) == fractions
