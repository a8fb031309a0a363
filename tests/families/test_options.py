"""Every option of `generate` has an effect in every family or is refused; playback rates; content of sidecars."""

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults_options import Outcome, outcomes, table
from postgen import UserError
from postgen.families.loading import inspect_model
from postgen.families.video_calls import ROWS, least_steps, rate_of, sizes_of
from postgen.generate import generate_video, load, prepare, run
from postgen.request import GenerateConfig, read_sidecar
from postgen.video import probe
from tests.families.tiny_videos import save_tiny_video

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 9, "num_inference_steps": 2}
OTHER_RATES = {
    "HunyuanVideo15Pipeline": (15, 24),
    "LTXConditionPipeline": (24, 25),
    "LTXImageToVideoPipeline": (24, 25),
    "LTXPipeline": (24, 25),
}
"""Playback rate of the class's example and of its row; `video_calls` has the reasons why they differ."""


@pytest.fixture(scope="module")
def every_outcome() -> list[Outcome]:
    return outcomes()


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_video("LTX", tmp_path_factory.mktemp("ltx"))


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_video("HunyuanVideo", tmp_path_factory.mktemp("hunyuan"))


def request(folder: Path, **changes: Any) -> GenerateConfig:
    return GenerateConfig(**{"prompt": "a red ball", "model": str(folder), "device": "cpu", **SMALL, **changes})


def test_every_option_acts_or_is_refused(every_outcome: list[Outcome]) -> None:
    assert [each for each in every_outcome if not each.holds] == []


def test_the_table_of_the_docs(every_outcome: list[Outcome]) -> None:
    assert table(every_outcome) in Path("docs/support.md").read_text(encoding="utf-8")


def test_every_video_pipeline_has_a_row_with_the_rate_of_its_example() -> None:
    import diffusers

    found = {}
    for name in dir(diffusers):
        kind: Any = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
            continue
        call: Any = kind.__dict__.get("__call__")
        parameters = {} if call is None else dict(inspect.signature(call).parameters)
        if "num_frames" not in parameters:
            continue
        rates = {float(rate) for rate in re.findall(r"export_to_video\([^)]*fps=(\d+)", call.__doc__ or "")}
        found[name] = rates or {
            float(parameters[each].default) for each in ("fps", "frame_rate") if each in parameters
        }
    assert found.keys() == ROWS.keys()
    wrong = {name: (*rates, ROWS[name].fps) for name, rates in found.items() if rates and rates != {ROWS[name].fps}}
    assert wrong == OTHER_RATES


@pytest.mark.parametrize(
    ("pipeline", "index", "network", "rate"),
    [
        ("WanPipeline", {}, {}, 16),
        ("WanPipeline", {"expand_timesteps": True}, {}, 24),
        ("WanImageToVideoPipeline", {"expand_timesteps": True}, {}, 24),
        ("CogVideoXPipeline", {}, {"patch_size_t": None}, 8),
        ("CogVideoXPipeline", {}, {"patch_size_t": 2}, 16),
        ("MochiPipeline", {}, {}, 30),
        ("StableVideoDiffusionPipeline", {}, {}, 7),
        ("MyPipeline", {}, {}, 8),
    ],
)
def test_rates(pipeline: str, index: dict[str, Any], network: dict[str, Any], rate: float) -> None:
    assert rate_of(pipeline, index, network) == rate


def test_sizes_of_the_published_models() -> None:
    """The arguments are configs of published autoencoders and networks."""
    cog = {"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [128, 256, 256, 512]}
    assert sizes_of("CogVideoXPipeline", cog, {"patch_size": 2}) == (16, 16, 8)
    ltx = {"_class_name": "AutoencoderKLLTXVideo", "patch_size": 4, "patch_size_t": 1}
    ltx["spatio_temporal_scaling"] = [True, True, True, False]
    assert sizes_of("LTXPipeline", ltx, {"patch_size": 1, "patch_size_t": 1}) == (32, 32, 8)
    hunyuan = {"_class_name": "AutoencoderKLHunyuanVideo", "spatial_compression_ratio": 8}
    hunyuan["temporal_compression_ratio"] = 4
    assert sizes_of("HunyuanVideoPipeline", hunyuan, {"patch_size": 2, "patch_size_t": 1}) == (16, 16, 4)
    assert sizes_of("MochiPipeline", {"_class_name": "AutoencoderKLMochi"}, {"patch_size": 2}) == (16, 16, 6)
    image = {"_class_name": "AutoencoderKLTemporalDecoder", "block_out_channels": [128, 256, 512, 512]}
    assert sizes_of("StableVideoDiffusionPipeline", image, {}) == (8, 8, 1)
    assert sizes_of("LTXPipeline", {"_class_name": "Unheard"}, {}) is None
    assert sizes_of("LTXPipeline", {**ltx, "spatio_temporal_scaling": "x"}, {}) is None
    assert least_steps("MochiPipeline", {}) == 2


def test_refusals_name_the_number(ltx: Path, hunyuan: Path) -> None:
    with pytest.raises(UserError, match=r"the number of frames must be 4n\+1, got 10: use 9 or 13"):
        prepare(request(hunyuan, num_frames=10))
    with pytest.raises(UserError, match="LTXPipeline needs at least 2 denoising steps with its scheduler, got 1"):
        prepare(request(ltx, num_inference_steps=1))
    with pytest.raises(UserError, match=r"needs true_cfg_scale \(--true-cfg\) above 1 in HunyuanVideoPipeline"):
        prepare(request(hunyuan, negative_prompt="ugly", guidance_scale=6.0))
    with pytest.raises(UserError, match="LTXPipeline has no true_cfg_scale: omit it"):
        prepare(request(ltx, true_cfg_scale=3.0))


def test_cogvideox_makes_8n_plus_1(tmp_path: Path) -> None:
    """For 13 requested frames, the pipeline makes 16 without a warning."""
    folder = save_tiny_video("CogVideoX", tmp_path)
    job = prepare(request(folder, num_frames=17, num_inference_steps=1))
    pipe = load(job)
    assert len(run(pipe, job)) == 17
    size = {**SMALL, "num_inference_steps": 1}
    assert pipe("a", **{**size, "num_frames": 13}, output_type="pt").frames.shape[1] == 16
    with pytest.raises(UserError, match=r"the number of frames must be 8n\+1, got 13: use 9 or 17"):
        prepare(request(folder, num_frames=13))


def test_the_rate_that_is_written_is_told(ltx: Path, tmp_path: Path) -> None:
    own = prepare(request(ltx))
    pipe = load(own)

    def called(**changes: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        clip: torch.Tensor = pipe("a red ball", **SMALL, **changes, generator=generator, output_type="pt").frames[0]
        return clip

    assert torch.equal(run(pipe, own), called())
    assert torch.equal(run(pipe, prepare(request(ltx, fps=12.5))), called(frame_rate=12.5))
    assert not torch.equal(called(), called(frame_rate=12.5))
    files = generate_video(own.config, tmp_path / "x.mp4", pipe=pipe)
    assert probe(files.video).fps == 25
    assert read_sidecar(files.sidecar)[0]["fps"] == 25


def test_true_guidance_is_the_pipelines_own(hunyuan: Path) -> None:
    job = prepare(request(hunyuan, negative_prompt="ugly", true_cfg_scale=4.0))
    pipe = load(job)
    call = {**SMALL, "negative_prompt": "ugly", "true_cfg_scale": 4.0, "output_type": "pt"}
    expected = pipe("a red ball", **call, generator=torch.Generator().manual_seed(0)).frames[0]
    assert torch.equal(run(pipe, job), expected)
    empty = prepare(request(hunyuan, true_cfg_scale=4.0))
    assert empty.config.negative_prompt == ""
    assert prepare(request(hunyuan)).config.true_cfg_scale is None


def test_sidecar_says_what_was_used(tmp_path: Path) -> None:
    """The sidecar also has values that the pipeline takes from the model: CogVideoX's size and length."""
    folder = save_tiny_video("CogVideoX", tmp_path / "model")
    bare = GenerateConfig(prompt="a", model=str(folder), device="cpu", num_inference_steps=1)
    files = generate_video(bare, tmp_path / "x.mp4")
    settings, _ = read_sidecar(files.sidecar)
    assert [settings[name] for name in ("width", "height", "num_frames", "fps")] == [32, 32, 9, 8]
    assert settings["guidance_scale"] == 6  # the default of the pipeline's call
    note = json.loads(files.sidecar.read_text())
    assert (note["frames"], note["width"], note["height"]) == (9, 32, 32)


def test_a_folder_says_its_own_rate(ltx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ltx, tmp_path / "model")
    (folder / "postgen.json").write_text('{"fps": 12}')
    assert inspect_model(folder).defaults.fps == 12


def test_pipelines_that_need_more(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "LucyEditPipeline"}')
    with pytest.raises(UserError, match="LucyEditPipeline needs video, for which this command has no option"):
        prepare(GenerateConfig(prompt="a", model=str(tmp_path)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "AllegroPipeline"}')
    with pytest.raises(UserError, match="AllegroPipeline is not supported here: its autoencoder decodes in tiles"):
        prepare(GenerateConfig(prompt="a", model=str(tmp_path)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "HeliosPipeline"}')
    facts = prepare(GenerateConfig(prompt="a", model=str(tmp_path))).facts
    assert (facts.takes_image, facts.needs_image) == (True, False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "HunyuanVideo15Pipeline"}')
    assert "callback_on_step_end" not in inspect_model(tmp_path).arguments


def test_a_pipeline_is_shared_by_jobs_of_its_class_only(tmp_path: Path) -> None:
    """`compare --b image=...` loads both pipelines if a folder can be loaded as two classes."""
    from PIL import Image

    folder = save_tiny_video("Wan, text or first frame", tmp_path / "model")
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    text, image = prepare(request(folder)), prepare(request(folder, image=str(tmp_path / "x.png")))
    assert text.loading != image.loading
    assert text.loading == prepare(request(folder, seed=3)).loading


def test_number_of_frames_that_a_pipeline_changes_is_said(tiny_wan: Path, tmp_path: Path) -> None:
    from postgen.generate import output_paths, write

    job = prepare(request(tiny_wan))
    paths, kind = output_paths(tmp_path / "x.mp4")
    with pytest.warns(UserWarning, match="WanPipeline made 5 frames instead of the requested 9"):
        write(torch.rand(5, 3, 32, 32), job, paths, kind, seconds=0.0, place="cpu")
    note = json.loads(paths.sidecar.read_text())
    assert (note["frames"], note["settings"]["num_frames"]) == (5, 9)
