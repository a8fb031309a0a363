"""The library functions of `generate` and `compare`, and the properties of a model that are known before loading."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen import UserError, read_video
from postgen.compare import compare_videos, pair_paths
from postgen.families.loading import check_device, inspect_model, load_pipeline
from postgen.families.lora import LoraChoice, check_lora, parse_lora
from postgen.generate import generate_video, load, output_paths, prepare, run
from postgen.request import GenerateConfig, read_sidecar

SMALL: dict[str, Any] = {"width": 32, "height": 16, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0}


def test_clip_is_the_pipelines_own(tiny_wan: Path) -> None:
    from diffusers import DiffusionPipeline

    job = prepare(GenerateConfig(prompt="a red ball", negative_prompt="dark", model=str(tiny_wan), seed=4, **SMALL))
    seen: list[tuple[int, int]] = []
    clip = run(load(job), job, lambda done, total: seen.append((done, total)))
    plain = DiffusionPipeline.from_pretrained(tiny_wan)
    generator = torch.Generator().manual_seed(4)
    expected = plain("a red ball", negative_prompt="dark", generator=generator, output_type="pt", **SMALL).frames[0]
    assert clip.shape == (5, 3, 16, 32)
    assert torch.equal(clip, expected)
    assert seen == [(1, 2), (2, 2)]


def test_a_loaded_pipeline_can_be_used_again(tiny_wan: Path, tmp_path: Path) -> None:
    config = GenerateConfig(prompt="a red ball", model=str(tiny_wan), **SMALL)
    pipe = load(prepare(config))
    first = generate_video(config, tmp_path / "one", format="frames", pipe=pipe)
    second = generate_video(config, tmp_path / "two", format="frames")
    assert torch.equal(read_video(first.video), read_video(second.video))
    settings, kind = read_sidecar(first.sidecar)
    assert kind == "frames"
    assert GenerateConfig.of(settings) == prepare(config).config


def test_interrupt_from_the_step_callback_leaves_nothing(tiny_wan: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    config = GenerateConfig(prompt="a red ball", model=str(tiny_wan), **SMALL)
    with pytest.raises(KeyboardInterrupt):
        generate_video(config, tmp_path / "x.mp4", on_step=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_sidecar_names_files_from_every_folder(
    tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_wan, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    files = generate_video(GenerateConfig(prompt="a", model="model", **SMALL), "x.gif")
    assert read_sidecar(files.sidecar)[0]["model"] == str(tmp_path / "model")


def test_values_that_are_no_numbers_are_refused(tiny_wan: Path, tmp_path: Path) -> None:
    config = GenerateConfig(prompt="a", model=str(tiny_wan), **SMALL)
    pipe = load(prepare(config))
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="nan"):
        generate_video(config, tmp_path / "x.mp4", pipe=pipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "text", "transformer"),
    [
        ("auto", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
    ],
)
def test_every_part_gets_its_dtype(
    tiny_wan: Path, tmp_path: Path, dtype: str, text: torch.dtype, transformer: torch.dtype
) -> None:
    from diffusers import DiffusionPipeline

    # The file of the text encoder has half precision, and loading without a dtype would keep it.
    half = DiffusionPipeline.from_pretrained(tiny_wan, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    pipe = load_pipeline(inspect_model(tmp_path / "half"), dtype=dtype, device="cpu")
    assert (pipe.text_encoder.dtype, pipe.transformer.dtype) == (text, transformer)
    assert pipe.vae.dtype == torch.float32


def test_low_precision_runs(tiny_wan: Path) -> None:
    job = prepare(GenerateConfig(prompt="a", model=str(tiny_wan), dtype="bfloat16", device="cpu", **SMALL))
    assert torch.isfinite(run(load(job), job)).all()


def test_facts_of_wan(tiny_wan: Path, tiny_wan_image: Path) -> None:
    facts = inspect_model(tiny_wan)
    assert (facts.pipeline, facts.takes_image, facts.multiples) == ("WanPipeline", False, (16, 16, 4))
    assert inspect_model(str(tiny_wan_image)).takes_image
    defaults = facts.defaults
    assert (defaults.width, defaults.height, defaults.num_frames, defaults.fps) == (832, 480, 81, 16)


def test_facts_match_the_signature() -> None:
    import inspect

    from diffusers import WanImageToVideoPipeline, WanPipeline

    from postgen.families.loading import _WAN_ARGUMENTS

    for pipeline in (WanPipeline, WanImageToVideoPipeline):
        assert set(inspect.signature(pipeline.__call__).parameters) >= _WAN_ARGUMENTS
        assert ("image" in inspect.signature(pipeline.__call__).parameters) == (pipeline is WanImageToVideoPipeline)


def test_pipelines_of_other_families(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    facts = inspect_model(tmp_path)
    assert (facts.takes_image, facts.multiples) == (False, None)
    assert "num_inference_steps" in facts.arguments
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    with pytest.raises(UserError, match="StableVideoDiffusionPipeline has no guidance_scale"):
        prepare(GenerateConfig(prompt="a", model=str(tmp_path), guidance_scale=2))


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": 3}'])
def test_damaged_model_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=r"model_index\.json"):
        inspect_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "prompt must be str, got 3"),
        ({"width": 16.5}, "width must be int, got 16.5"),
        ({"seed": True}, "seed must be int, got True"),
        ({"seed": None}, "seed must be int, got None"),
        ({"lora": ["x"]}, "lora must be tuple"),
        ({"fps": 0}, "fps must be above 0"),
    ],
)
def test_config_checks_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerateConfig(**{"prompt": "a", **changes})


def test_check_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_device("auto") == "cuda"
    assert check_device("cuda:0") == "cuda:0"
    with pytest.raises(UserError, match="there is no device cuda:1: torch finds 1"):
        check_device("cuda:1")
    with pytest.raises(UserError, match="unknown device 'cpu:1'"):
        check_device("cpu:1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="the device is mps"):
        check_device("mps")


def test_output_paths(tmp_path: Path) -> None:
    names, kind = output_paths(tmp_path / "v1.2.webm")
    assert (names.sheet.name, names.sidecar.name, kind) == ("v1.2.png", "v1.2.json", "webm")
    names, kind = output_paths(tmp_path / "v1.2", "frames")
    assert (names.video.name, names.sheet.name, kind) == ("v1.2", "v1.2.png", "frames")
    assert output_paths(tmp_path / "clip", "gif")[0].video.name == "clip.gif"
    pair = pair_paths(tmp_path / "clip", "gif")
    assert (pair.both.name, pair.a.video.name, pair.b.sidecar.name) == ("clip.gif", "clip-a.gif", "clip-b.json")


def test_parse_lora() -> None:
    assert parse_lora("a/b") == LoraChoice("a/b", 1.0)
    assert parse_lora("a.safetensors:-0.5") == LoraChoice("a.safetensors", -0.5)
    assert parse_lora(r"C:\x.safetensors") == LoraChoice(r"C:\x.safetensors", 1.0)
    assert parse_lora("transformer_2=a:b=c:2") == LoraChoice("a:b=c", 2.0, "transformer_2")
    for text in ("a:0.1234567890123", "transformer=a/b:1", r"C:\x.safetensors:-1000"):
        assert str(parse_lora(text)) == text  # the settings that a sidecar stores
    for scale in ("nan", "inf", "-inf", "1e400", "1001"):
        with pytest.raises(UserError, match=rf"the scale of the LoRA a is {scale}, it must be from -1000 to 1000"):
            parse_lora(f"a:{scale}")
    check_lora("owner/name")  # a Hub id is only checked when the model is loaded
    with pytest.raises(UserError, match="there is no LoRA file"):
        check_lora("name")


def test_lora_needs_one_transformer(tiny_lora: Path) -> None:
    from postgen.families.lora import load_loras

    class Two:
        load_lora_weights = transformer = transformer_2 = True

    with pytest.raises(UserError, match="two transformers"):
        load_loras(Two(), [str(tiny_lora)])
    with pytest.raises(UserError, match="object supports no LoRA"):
        load_loras(object(), ["x"])
    load_loras(object(), [])


def test_comparing_clips_of_different_size(tiny_wan: Path, tmp_path: Path) -> None:
    jobs = [
        prepare(GenerateConfig(prompt="a", model=str(tiny_wan), **{**SMALL, **change}))
        for change in ({"num_frames": 9}, {"height": 32})
    ]
    seen: list[tuple[int, int]] = []
    paths = pair_paths(tmp_path / "x", "frames")
    compare_videos(*jobs, paths, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert read_video(paths.both).shape == (9, 3, 32, 72)
    assert paths.sheet.is_file()
    other = prepare(GenerateConfig(prompt="a", model=str(tiny_wan), seed=1, **SMALL))
    with pytest.raises(UserError, match="must have one seed, got 0 and 1"):
        compare_videos(jobs[0], other, paths)


def test_sidecar_is_plain_json(tiny_wan: Path, tmp_path: Path) -> None:
    files = generate_video(
        GenerateConfig(prompt='a "quoted" prompt', model=str(tiny_wan), **SMALL), tmp_path / "x.mp4"
    )
    note = json.loads(files.sidecar.read_text())
    assert note["prompt"] == 'a "quoted" prompt'
    assert note["device"] in ("cpu", "cuda", "cuda:0", "mps", "mps:0")
    assert (note["frames"], note["width"], note["height"]) == (5, 32, 16)


def test_embedded_names_the_embedded_model(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()  # a folder of this name does not hide the embedded model
    named, unnamed = (prepare(GenerateConfig(prompt="a ball", model=model)) for model in ("embedded", None))
    assert (named.config, named.facts, named.loading) == (unnamed.config, unnamed.facts, unnamed.loading)
    same = cli("compare", "a red ball rolls left", "--model", "embedded", "--vs", "embedded")
    assert "embedded is the same model as the embedded model" in same.err
    done = cli("convert", "lit", "embedded", "--layers", "1:window_delta", "-o", "lit")
    assert (done.code, (tmp_path / "lit" / "transformer").is_dir()) == (0, True), done.err
