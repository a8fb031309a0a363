"""The command line from outside: what it writes, what it says, how it ends."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import postgen.commands.progress
import postgen.generate
from postgen import probe, read_video
from postgen.cli import main

SMALL = ["--size", "32x16", "--frames", "5", "--steps", "2"]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(left.value.code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny_lora(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose weights are not zero, as training leaves it."""
    from diffusers import WanPipeline, WanTransformer3DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) for name, value in get_peft_model_state_dict(transformer).items()}
    folder = tmp_path_factory.mktemp("lora")
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=state)
    return folder / "pytorch_lora_weights.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def frames_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("frame_*.png"))]


def test_generate_writes_video_sheet_and_sidecar(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "ball.mp4"
    done = cli("generate", "a red ball", "-o", out, "--model", tiny_wan, "--seed", "7", "--fps", "12", *SMALL)
    assert done.code == 0, done.err
    assert names(out.parent) == ["ball.json", "ball.mp4", "ball.png"]
    for name in names(out.parent):
        assert name in done.out
    info = probe(out)
    assert (info.width, info.height, info.frames, info.fps) == (32, 16, 5, 12)
    note = json.loads((out.parent / "ball.json").read_text())
    assert (note["prompt"], note["seed"], note["format"]) == ("a red ball", 7, "mp4")
    assert note["settings"]["num_inference_steps"] == 2
    assert note["settings"]["guidance_scale"] == 5.0  # the family's default, written out
    assert note["settings"]["model"] == str(tiny_wan)
    assert note["seconds"] > 0
    assert note["versions"]["torch"] == torch.__version__


def test_sidecar_makes_the_same_video_again(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    words = ["--model", tiny_wan, "--seed", "3", "--guidance", "2", "--format", "frames", *SMALL]
    assert cli("generate", "a red ball", "-o", tmp_path / "first", *words).code == 0
    again = cli("generate", "--from", tmp_path / "first.json", "-o", tmp_path / "second")
    assert again.code == 0, again.err
    first = frames_of(tmp_path / "first")
    assert len(first) == 5
    assert frames_of(tmp_path / "second") == first
    assert cli("generate", "--from", tmp_path / "first.json", "--seed", "4", "-o", tmp_path / "third").code == 0
    assert frames_of(tmp_path / "third") != first
    assert cli("generate", "--from", tmp_path / "first.json").code == 0
    assert frames_of(tmp_path / "first-again") == first


def test_model_folder_gives_the_defaults(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    own = {"width": 32, "height": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0, "fps": 6}
    (model / "postgen.json").write_text(json.dumps(own))
    monkeypatch.chdir(tmp_path)
    assert cli("generate", "A red ball, rolling!", "--model", "model").code == 0
    info = probe(tmp_path / "a-red-ball-rolling.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (32, 32, 9, 6)
    settings = json.loads((tmp_path / "a-red-ball-rolling.json").read_text())["settings"]
    assert {name: settings[name] for name in own} == own
    (model / "postgen.json").write_text('{"widht": 3}')
    assert "widht" in cli("generate", "a", "--model", "model").err


def test_count_and_prompts_number_the_files(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n\n  a blue cube \n")
    out = tmp_path / "out" / "clip.gif"
    words = ["--model", tiny_wan, "--guidance", "1", "--seed", "5", *SMALL]
    assert cli("generate", "--prompts", prompts, "--count", "2", "-o", out, *words).code == 0
    notes = [json.loads((out.parent / f"clip-00{n}.json").read_text()) for n in range(4)]
    pairs = [(note["prompt"], note["seed"]) for note in notes]
    assert pairs == [("a red ball", 5), ("a red ball", 6), ("a blue cube", 5), ("a blue cube", 6)]
    assert len(names(out.parent)) == 12


def test_prompts_as_jsonl(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red ball", "id": 1}\n{"prompt": "a cone"}\n')
    words = ["--model", tiny_wan, "-o", tmp_path / "x.webm", "--guidance", "1", *SMALL]
    assert cli("generate", "--prompts", prompts, *words).code == 0
    assert json.loads((tmp_path / "x-001.json").read_text())["prompt"] == "a cone"
    prompts.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2 has no prompt" in cli("generate", "--prompts", prompts, *words).err


def test_image_to_video(cli: Any, tiny_wan_image: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (40, 30), "red").save(tmp_path / "start.png")
    words = ["--model", tiny_wan_image, "-o", tmp_path / "x.mp4", *SMALL]
    done = cli("generate", "it moves", "--image", tmp_path / "start.png", *words)
    assert done.code == 0, done.err
    assert probe(tmp_path / "x.mp4").frames == 5


def test_lora_changes_the_video_by_its_scale(cli: Any, tiny_wan: Path, tiny_lora: Path, tmp_path: Path) -> None:
    words = ["--model", tiny_wan, "--guidance", "1", "--format", "frames", *SMALL]
    for name, lora in {"none": [], "off": ["--lora", f"{tiny_lora}:0"], "on": ["--lora", f"{tiny_lora}:2"]}.items():
        done = cli("generate", "a ball", "-o", tmp_path / name, *words, *lora)
        assert done.code == 0, done.err
    assert frames_of(tmp_path / "off") == frames_of(tmp_path / "none")
    assert frames_of(tmp_path / "on") != frames_of(tmp_path / "none")
    two = ["--lora", tiny_lora, "--lora", f"{tiny_lora}:1"]
    assert cli("generate", "a ball", "-o", tmp_path / "two", *words, *two).code == 0
    assert (read_video(tmp_path / "two") - read_video(tmp_path / "on")).abs().max() <= 1.01 / 255
    assert cli("generate", "--from", tmp_path / "on.json", "-o", tmp_path / "again").code == 0
    assert frames_of(tmp_path / "again") == frames_of(tmp_path / "on")


def test_lora_that_does_not_fit(cli: Any, tiny_wan: Path, tiny_lora: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_lora)
    other = tmp_path / "other.safetensors"
    words = ["generate", "a ball", "-o", tmp_path / "x.mp4", "--model", tiny_wan, *SMALL, "--lora"]
    save_file({name.replace("blocks", "layers"): value for name, value in state.items()}, other)
    assert "0 of its 8 layer names match, these match no layer: transformer.layers.0" in cli(*words, other).err
    save_file({name.replace("blocks.1", "blocks.7"): value for name, value in state.items()}, other)
    assert "4 of its 8 layer names match" in cli(*words, other).err
    save_file({"transformer.blocks.0.attn1.to_q.weight": torch.ones(2)}, other)
    assert "is no LoRA" in cli(*words, other).err
    other.write_text("nothing")
    assert "cannot read the LoRA" in cli(*words, other).err
    done = cli(*words, tmp_path / "absent.safetensors:0.5")
    assert done.code == 2
    assert f"there is no LoRA file {tmp_path / 'absent.safetensors'}" in done.err
    assert names(tmp_path) == ["other.safetensors"]


def test_compare(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.mp4"
    words = ["--model", tiny_wan, "--seed", "2", "--size", "32x16", "--frames", "5", "-o", out]
    done = cli(
        "compare", "a ball", "--a", "guidance=1", "--a", "steps=1", "--b", "guidance=4", "--b", "steps=2", *words
    )
    assert done.code == 0, done.err
    assert names(tmp_path) == ["c-a.json", "c-a.mp4", "c-a.png", "c-b.json", "c-b.mp4", "c-b.png", "c.mp4", "c.png"]
    assert probe(out).width == 32 + 8 + 32
    settings = [json.loads((tmp_path / f"c-{side}.json").read_text())["settings"] for side in "ab"]
    assert [side["guidance_scale"] for side in settings] == [1.0, 4.0]
    assert [side["num_inference_steps"] for side in settings] == [1, 2]
    assert [side["seed"] for side in settings] == [2, 2]
    difference = (read_video(tmp_path / "c-a.mp4") - read_video(tmp_path / "c-b.mp4")).abs().max()
    assert difference > 0.01


def test_compare_with_and_without_lora(cli: Any, tiny_wan: Path, tiny_lora: Path, tmp_path: Path) -> None:
    words = ["--model", tiny_wan, "--guidance", "1", "--format", "frames", *SMALL]
    done = cli("compare", "a ball", "--b", f"lora={tiny_lora}:2", "-o", tmp_path / "c", *words)
    assert done.code == 0, done.err
    assert frames_of(tmp_path / "c-a") != frames_of(tmp_path / "c-b")
    assert cli("generate", "a ball", "-o", tmp_path / "plain", *words).code == 0
    assert frames_of(tmp_path / "plain") == frames_of(tmp_path / "c-a")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--a", "steps=1", "--b", "steps=1"], "--a and --b say the same"),
        (["--a", "stepz=1"], "'stepz=1' must be key=value. Known keys: model, lora"),
        (["--a", "steps"], "'steps' must be key=value"),
        (["--a", "steps=many"], "the value must be int"),
        (["--a", "steps=1", "--a", "steps=2"], "gives steps twice"),
    ],
)
def test_compare_wrong(cli: Any, tiny_wan: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = cli("compare", "a ball", "--model", tiny_wan, "-o", tmp_path / "c.mp4", *words)
    assert (done.code, message in done.err, names(tmp_path)) == (2, True, []), done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["  "], "the prompt is empty"),
        ([], "there is no prompt"),
        (["a", "--frames", "6"], "the number of frames must be 4n+1, got 6: use 5 or 9"),
        (["a", "--width", "100"], "width must be a multiple of 16, got 100: use 96 or 112"),
        (["a", "--height", "-16"], "height must be above 0, got -16"),
        (["a", "--size", "96"], "--size must look like 96x96"),
        (["a", "--size", "96x96", "--width", "96"], "say the same"),
        (["a", "--steps", "0"], "num_inference_steps must be above 0"),
        (["a", "--steps", "many"], "Invalid value for '--steps'"),
        (["a", "--guidance", "nan"], "guidance_scale must be at least 0, got nan"),
        (["a", "--seed", "-1"], "seed must be between 0"),
        (["a", "--count", "0"], "--count must be at least 1"),
        (["a", "--dtype", "float8"], "unknown dtype 'float8'. Known: auto, float32, bfloat16, float16"),
        (["a", "--device", "tpu"], "unknown device 'tpu'"),
        (["a", "--offload", "disk"], "unknown offload 'disk'"),
        (["a", "--format", "mov"], "unknown video format 'mov'"),
        (["a", "--image", "absent.png"], "WanPipeline takes text only"),
        (["a", "--model", "./absent"], "there is no model folder ./absent"),
        (["a", "--frobnicate", "1"], "No such option: --frobnicate"),
        (["a", "--prompts", "absent.txt"], "not both"),
        (["--prompts", "absent.txt"], "cannot read the prompts absent.txt"),
        (["--from", "absent.json"], "cannot read the sidecar absent.json"),
    ],
)
def test_wrong_input_is_one_line_and_no_file(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(postgen.generate, "load", lambda job: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in words else ["--model", tiny_wan]
    done = cli("generate", *words, *model, "-o", "x.mp4")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert names(tmp_path) == []


def test_models_that_are_none(cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    broken = shutil.copytree(tiny_wan, tmp_path / "broken")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_text("no weights")
    image = shutil.copytree(tiny_wan, tmp_path / "image")
    (image / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    unknown = shutil.copytree(tiny_wan, tmp_path / "unknown")
    (unknown / "model_index.json").write_text('{"_class_name": "NobodysPipeline"}')
    for model, message in {
        tmp_path / "empty": "it has no model_index.json",
        tmp_path / "file": "is a file",
        broken: "cannot load",
        image: "FluxPipeline, which makes no video",
        unknown: "NobodysPipeline, which the installed diffusers",
        "nobody/nothing": "there is no model folder nobody/nothing, and the hub does not give it",
    }.items():
        done = cli("generate", "a", "--model", model, "-o", tmp_path / "x.mp4", *SMALL)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert not list(tmp_path.glob("x*"))


def test_missing_embedded_model(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import postgen.assets

    def missing() -> Path:
        raise postgen.UserError("the embedded model is missing")

    monkeypatch.setattr(postgen.assets, "embedded_model", missing)
    monkeypatch.setattr(postgen, "embedded_model", missing, raising=False)
    assert "the embedded model is missing" in cli("generate", "a", "-o", tmp_path / "x.mp4").err


def test_devices_that_are_absent(cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["generate", "a", "--model", tiny_wan, "-o", tmp_path / "x.mp4", *SMALL]
    assert "cuda was asked for, but torch finds no CUDA GPU here" in cli(*words, "--device", "cuda").err
    assert "moves parts to a GPU" in cli(*words, "--device", "cpu", "--offload", "model").err
    assert names(tmp_path) == []


def test_places_that_cannot_be_written(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    for out, message in {
        tmp_path / "file" / "x.mp4": "is not a folder",
        tmp_path / "folder.mp4": "it is a folder",
        tmp_path / "x.mov": "unknown video format '.mov'",
    }.items():
        done = cli("generate", "a", "--model", tiny_wan, "-o", out, *SMALL)
        assert (done.code, message in done.err) == (2, True), done.err
    assert names(tmp_path) == ["file", "folder.mp4"]


def test_pictures(cli: Any, tiny_wan_image: Path, tmp_path: Path) -> None:
    words = ["generate", "a", "--model", tiny_wan_image, "-o", tmp_path / "x.mp4", *SMALL]
    assert "makes video from a picture: name one with --image" in cli(*words).err
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    for name in ("bad.png", "absent.png"):
        assert "cannot read the picture" in cli(*words, "--image", tmp_path / name).err
    assert names(tmp_path) == ["bad.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the sidecar"),
        ("[1]", "is no sidecar of postgen"),
        ('{"settings": {"prompt": "a", "hight": 3}, "format": "mp4"}', "unknown settings hight"),
        ('{"settings": {"prompt": "a", "height": "tall"}, "format": "mp4"}', "height must be int"),
        ('{"settings": {"prompt": "a", "lora": "x"}, "format": "mp4"}', "lora must be a list"),
        ('{"settings": {"height": 16}, "format": "mp4"}', "is damaged: the prompt is empty"),
    ],
)
def test_corrupt_sidecars(cli: Any, tmp_path: Path, text: str, message: str) -> None:
    sidecar = tmp_path / "x.json"
    sidecar.write_text(text)
    done = cli("generate", "--from", sidecar, "-o", tmp_path / "y.mp4")
    assert (done.code, message in done.err, names(tmp_path)) == (2, True, ["x.json"]), done.err


def test_interrupt_while_generating(cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.progress.Progress.update", interrupt)
    done = cli("generate", "a", "--model", tiny_wan, "-o", tmp_path / "x.mp4", *SMALL)
    assert done.code == 130
    assert "postgen: stopped" in done.err
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["postgen.video.contact_sheet", "postgen.generate.versions"])
def test_interrupt_while_writing(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "x.mp4").write_text("old")

    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    assert cli("generate", "a", "--model", tiny_wan, "-o", tmp_path / "x.mp4", *SMALL).code == 130
    assert names(tmp_path) == ["x.mp4"]
    assert (tmp_path / "x.mp4").read_text() == "old"


def test_help_and_version(cli: Any) -> None:
    assert "generate" in cli().out
    assert cli("generate", "--help").code == 0
    assert cli("--version").out.startswith("postgen 0")
    done = cli("paint")
    assert (done.code, "No such command 'paint'" in done.err, done.err.count("\n")) == (2, True, 1)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom postgen.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'gradio', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_info(cli: Any) -> None:
    text = cli("info")
    assert text.code == 0
    assert torch.__version__ in text.out
    report = json.loads(cli("info", "--json").out)
    assert report["devices"]["cpu"]["usable"] is True
    assert report["devices"].get("cuda", report["devices"].get("cuda:0"))["usable"] == torch.cuda.is_available()
    assert report["optional"]["ffmpeg"]["usable"] is True
    if not torch.cuda.is_available():
        assert report["optional"]["triton"]["usable"] is False


def test_train_hands_its_words_on(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    trainer = types.ModuleType("postgen.train")
    trainer.main = seen.extend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "postgen.train", trainer)
    assert cli("train", "recipe.yaml", "--learning_rate", "1e-4", "--resume").code == 0
    assert seen == ["recipe.yaml", "--learning_rate", "1e-4", "--resume"]
