"""Wrong input and signals on the command line: one line, the right exit code, no file."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import postgen.generate
from tests.children import run

SMALL = ["--size", "32x16", "--frames", "5", "--steps", "2"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lora_that_does_not_fit(cli: Any, tiny_wan: Path, tiny_lora: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_lora)
    other = tmp_path / "other.safetensors"
    words = ["generate", "a ball", "-o", tmp_path / "x.mp4", "--model", tiny_wan, *SMALL, "--lora"]
    save_file({name.replace("blocks", "layers"): value for name, value in state.items()}, other)
    assert "0 of its 8 layer names match, these match no layer: transformer.layers.0" in cli(*words, other).err
    save_file({name.replace("blocks.1", "blocks.7"): value for name, value in state.items()}, other)
    assert "4 of its 8 layer names match" in cli(*words, other).err
    save_file({name: value * torch.nan for name, value in state.items()}, other)
    assert "NaN or infinity in 16 tensors: " in cli(*words, other).err
    assert "the scale of the LoRA a is nan" in cli(*words, "a:nan").err
    save_file({"transformer.blocks.0.attn1.to_q.weight": torch.ones(2)}, other)
    assert "is not a LoRA" in cli(*words, other).err
    other.write_text("nothing")
    assert "cannot read the LoRA" in cli(*words, other).err
    assert "it is not a safetensors file, or it is damaged" in cli(*words, other).err
    assert f"the scale of the LoRA {other} is 'abc', it must be a number" in cli(*words, f"{other}:abc").err
    assert f"unknown network 'unet' of the LoRA {other}. Known: transformer" in cli(*words, f"unet={other}").err
    done = cli(*words, tmp_path / "absent.safetensors:0.5")
    assert done.code == 2
    assert f"there is no LoRA file {tmp_path / 'absent.safetensors'}" in done.err
    assert names(tmp_path) == ["other.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "a", "--guidence", "3"], "No such option: --guidence, did you mean --guidance?"),
        (["generate", "--prompt", "a"], "give the prompt without an option name: postgen generate "),
        (["generate", "a", "red", "ball"], 'put it in quotes: postgen generate "a red ball"'),
        (["generate", "a", "--fps", "fast"], "--fps must be a number, got 'fast'"),
        (["convert", "lora", "x", "-o", "y"], "Missing option '--format': comfyui, kohya"),
        (
            ["convert", "lit", "x", "-o", "y", "--layers", "every", "2nd:lit"],
            "put words that belong together in quotes",
        ),
        (["convert", "lit", "x", "-o", "y", "--layers", "every2nd:lit"], "--layers has 'every2nd' in place of blocks"),
        (["convert", "lit", "x", "-o", "y", "--layers", "all:lit", "--inherit", "none"], "--inherit must be one of"),
        (["convert", "lit", "x", "-o", "y", "--budget", "2"], "--budget must be at least"),
        (["generate", "a", "--from", "{code}"], "it is not valid JSON"),
        (["generate", "a", "--lit", "{model}"], "has no adapter.safetensors: it is a model, use it with --model"),
        (["generate", "a", "-o", "{model}"], "it is a folder, give the name of a file"),
        (["compare", "a"], "there is nothing to compare"),
        (["compare", "a", "-o", "{model}", "--b", "steps=1"], "it is a folder, give the name of a file"),
        (["generate", "--continue", "x.state", "--long", "2", "--enhance", "auto"], "--enhance cannot be used with a"),
        (["generate", "--continue", "x.state", "--size", "32x32"], "the size (--size, --width, --height) is stored"),
        (["generate", "--continue", "", "--long", "2"], "the state: its name is empty"),
        (["generate", "a", "--stream", "--count", "3"], "--count cannot be used with a long video"),
    ],
)
def test_wrong_words_name_what_was_typed(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"{model}": str(tiny_wan), "{code}": __file__}
    done = cli(*(places.get(word, word) for word in words))
    assert (done.code, message in done.err, done.err.count("\n"), names(tmp_path)) == (2, True, 1, []), done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--a", "steps=1", "--b", "steps=1"], "--a and --b are the same"),
        (["--a", "stepz=1"], "'stepz=1' is not a setting. Did you mean 'steps'? Known keys: model, lora"),
        (["--a", "seed=1"], "both videos must have the same seed, set it with --seed"),
        (["--a", "steps"], "'steps' must be key=value"),
        (["--a", "steps=many"], "the value must be a whole number"),
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
        (["a", "--size", "96x96", "--width", "96"], "set the same size"),
        (["a", "--steps", "0"], "--steps must be above 0"),
        (["a", "--steps", "many"], "--steps must be a whole number, got 'many'"),
        (["a", "--guidance", "nan"], "--guidance must be a number, got nan"),
        (["a", "--guidance", "0", "--negative-prompt", "b"], "a negative prompt needs guidance above 1, got 0"),
        (["a", "--seed", "-1"], "--seed must be between 0 and 9223372036854775807"),
        (["a", "--count", "0"], "--count must be at least 1"),
        (["a", "--dtype", "float8"], "unknown --dtype 'float8'. Known: auto, float32, bfloat16, float16"),
        (["a", "--device", "tpu"], "unknown --device 'tpu'"),
        (["a", "--offload", "disk"], "unknown --offload 'disk'"),
        (["a", "--format", "mov"], "unknown video format 'mov'"),
        (["a", "--image", "absent.png"], "WanPipeline takes text only"),
        (["a", "--model", "./absent"], "there is no model folder ./absent"),
        (["a", "--frobnicate", "1"], "--frobnicate"),
        (["a", "--prompts", "absent.txt"], "not both"),
        (["--prompts", "absent.txt"], "the prompts absent.txt cannot be read"),
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
        "nobody/nothing": "there is no model folder nobody/nothing, and it cannot be read from the hub",
    }.items():
        done = cli("generate", "a", "--model", model, "-o", tmp_path / "x.mp4", *SMALL)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert not list(tmp_path.glob("x*"))


def test_missing_embedded_model(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import postgen.assets

    def missing() -> Path:
        raise postgen.UserError("the embedded model is missing")

    # Access the name through the package first, because the package imports it from the module on first use.
    monkeypatch.setattr(postgen, "embedded_model", missing)
    monkeypatch.setattr(postgen.assets, "embedded_model", missing)
    assert "the embedded model is missing" in cli("generate", "a", "-o", tmp_path / "x.mp4").err


def test_devices_that_are_absent(cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["generate", "a", "--model", tiny_wan, "-o", tmp_path / "x.mp4", *SMALL]
    assert "the device is cuda, but torch finds no CUDA GPU on this machine" in cli(*words, "--device", "cuda").err
    assert "moves components to a GPU" in cli(*words, "--device", "cpu", "--offload", "model").err
    assert names(tmp_path) == []


def test_places_that_cannot_be_written(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    for out, message in {
        tmp_path / "file" / "x.mp4": "is not a folder",
        tmp_path / "folder.mp4": "it is a folder",
        tmp_path / "x.mov": "unknown video format '.mov'",
        Path("/proc/x.mp4"): "cannot write /proc/x.mp4",
    }.items():
        done = cli("generate", "a", "--model", tiny_wan, "-o", out, *SMALL)
        assert (done.code, message in done.err) == (2, True), done.err
    assert names(tmp_path) == ["file", "folder.mp4"]


def test_pictures(cli: Any, tiny_wan_image: Path, tmp_path: Path) -> None:
    words = ["generate", "a", "--model", tiny_wan_image, "-o", tmp_path / "x.mp4", *SMALL]
    assert "generates video from an image: give one with --image" in cli(*words).err
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    for name in ("bad.png", "absent.png"):
        assert "cannot read the picture" in cli(*words, "--image", tmp_path / name).err
    assert names(tmp_path) == ["bad.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the sidecar"),
        ("[1]", "is not a sidecar of postgen"),
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_the_terminal(tiny_wan: Path, tmp_path: Path, number: signal.Signals) -> None:
    words = ["generate", "a", "--model", str(tiny_wan), "-o", str(tmp_path / "x.mp4"), "--size", "32x16"]
    command = [sys.executable, "-m", "postgen", *words, "--frames", "5", "--steps", "1000000"]

    # Child processes of a shell in the background ignore Ctrl-C.
    def hear() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        assert process.stderr is not None
        watch = threading.Timer(60, process.kill)
        watch.start()
        while process.poll() is None and not _listens(process.pid):
            time.sleep(0.05)
        time.sleep(1)  # during the imports
        process.send_signal(number)
        told = process.stderr.read()
        watch.cancel()
    assert process.returncode == 128 + number, told
    assert told.rstrip().endswith("postgen: stopped; no half-written file was left")
    assert "Traceback" not in told
    assert names(tmp_path) == []


def _listens(process: int) -> bool:
    """Return whether a process has a handler of SIGTERM, which only postgen installs. If unknown, wait 3 s."""
    status = Path("/proc", str(process), "status")
    if not status.exists():
        time.sleep(3)
        return True
    caught = next((line for line in status.read_text().splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


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


def test_warnings_are_one_line(tiny_wan: Path, tmp_path: Path) -> None:
    words = ["generate", "a", "--model", str(tiny_wan), "-o", str(tmp_path / "x.mp4"), *SMALL, "--enhance", "9"]
    code, said = run("postgen", *words)
    assert code == 0, said
    assert "postgen: warning: Enhance-A-Video on WanTransformer3DModel: weight 9 is strong" in said
    assert "UserWarning" not in said


def test_control_c_while_an_object_is_deleted() -> None:
    """Python ignores an exception that is raised there, but the command must end."""
    script = """
import time, typer
from postgen import cli

class Held:
    def __del__(self):
        raise KeyboardInterrupt

cli.app = typer.Typer()

@cli.app.command()
def wait(seconds: float):
    Held()
    time.sleep(seconds)

cli.main(["30"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=25)
    assert (done.returncode, done.stderr) == (130, "postgen: stopped; no half-written file was left\n")


@pytest.mark.parametrize(
    ("words", "help_of"),
    [
        (["paint"], "postgen"),
        (["--frobnicate"], "postgen"),
        (["generate", "a", "--frobnicate"], "postgen generate"),
        (["generate", "a", "--steps", "many"], "postgen generate"),
        (["compare"], "postgen compare"),
        (["score"], "postgen score"),
        (["info", "--frobnicate"], "postgen info"),
        (["convert", "lora"], "postgen convert lora"),
        (["export-lora", "--frobnicate"], "postgen export-lora"),
    ],
)
def test_a_usage_error_points_to_the_help_of_its_command(cli: Any, words: list[str], help_of: str) -> None:
    done = cli(*words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.endswith(f"(see {help_of} --help)\n")
    assert cli(*help_of.split()[1:], "--help").code == 0
