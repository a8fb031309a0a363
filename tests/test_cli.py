"""The command line as a user sees it: its files and its output."""

import json
import os
import shutil
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen import probe, read_video

ACTIVE = {"OMP_WAIT_POLICY": "active"}
SMALL = ["--size", "32x16", "--frames", "5", "--steps", "2"]


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
    assert note["settings"]["guidance_scale"] == 5.0  # the default of the family, written explicitly
    assert note["settings"]["model"] == str(tiny_wan)
    assert note["seconds"] > 0
    assert note["versions"]["torch"] == version("torch")


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
    assert "line 2 has no column 'prompt', it has text" in cli("generate", "--prompts", prompts, *words).err


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


def test_help_and_version(cli: Any) -> None:
    assert "generate" in cli().out
    assert cli("generate", "--help").code == 0
    assert cli("--version").out.startswith("postgen 0")
    done = cli("paint")
    assert (done.code, "No such command 'paint'" in done.err, done.err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_help_says_what_is_taken_where_an_option_is_left_out(cli: Any, command: str) -> None:
    # rich reads square brackets as markup, and removes unknown markup.
    words = " ".join(cli(command, "--help").out.replace("│", " ").split())
    for text in ("[default: the embedded model]", "[default: off]", "[default: auto]"):
        assert text in words


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom postgen.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'gradio', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("said", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), (ACTIVE, "30000000000")])
def test_threads_sleep_where_they_wait(said: dict[str, str], spins: str) -> None:
    library = next(iter(sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))), None)
    if library is None:
        pytest.skip("this torch has another OpenMP")
    code = "import ctypes\nfrom postgen.cli import main\ntry:\n    main(['--version'])\n"
    code += f"except SystemExit:\n    ctypes.CDLL({str(library)!r})\n"  # torch loads OpenMP, which reads it
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = {**kept, "OMP_DISPLAY_ENV": "verbose", **said}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_info(cli: Any) -> None:
    text = cli("info")
    assert text.code == 0
    assert version("torch") in text.out
    report = json.loads(cli("info", "--json").out)
    assert report["devices"]["cpu"]["usable"] is True
    assert report["devices"].get("cuda", report["devices"].get("cuda:0"))["usable"] == torch.cuda.is_available()
    assert report["optional"]["ffmpeg"]["usable"] is True
    if not torch.cuda.is_available():
        assert report["optional"]["triton"]["usable"] is False


def test_train_hands_its_words_on(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    trainer = types.ModuleType("postgen.train")
    trainer.main = lambda words: seen.extend(words) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "postgen.train", trainer)
    assert cli("train", "recipe.yaml", "--learning_rate", "1e-4", "--resume").code == 3
    assert seen == ["recipe.yaml", "--learning_rate", "1e-4", "--resume"]
