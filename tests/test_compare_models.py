"""`postgen compare --vs`: a teacher and its student, side by side and with measurements."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.compare import difference, motion_of, student
from postgen.errors import UserError
from postgen.families.exports import write_note
from postgen.families.loading import inspect_model, load_pipeline
from postgen.generate import prepare
from postgen.lit import LitConfig, MhlaOptions, WindowOptions, convert, save
from postgen.request import GenerateConfig
from postgen.video import probe, read_video
from tests.test_cli_errors import names
from tests.test_first_frame import changed

SIZE = ("--size", "32x16", "--steps", "1", "--frames", "9")


@pytest.fixture
def half(tiny_wan: Path, tmp_path: Path) -> Path:
    """Output of `convert lit`: block 1 of 2 uses softmax for its own frame, and linear attention for other frames."""
    return converted(tiny_wan, tmp_path / "half", LitConfig(layers="1:window_delta", window=WindowOptions(radius=0)))


def converted(model: Path, place: Path, config: LitConfig) -> Path:
    pipe = load_pipeline(inspect_model(model), device="cpu")
    convert(pipe.transformer, config)
    save(pipe.transformer, place / "transformer")
    write_note(place, pipe, ["transformer"])
    return place


def own_reward(folder: Path) -> str:
    """Brightness of clips that are long enough."""
    text = "def light(completions):\n    return [float(c.mean()) if len(c) > 5 else None for c in completions]\n"
    (folder / "own.py").write_text(text)
    return f"{folder / 'own.py'}:light"


def test_teacher_and_student(cli: Any, tiny_wan: Path, half: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    reward = own_reward(tmp_path)
    words = ("--model", tiny_wan, "--vs", half, *SIZE, "--seed", 3, "--reward", reward, "-o", out / "c.gif")
    done = cli("compare", "a red ball", *words)
    assert done.code == 0, done.err
    videos = ["c-a.gif", "c-a.json", "c-a.png", "c-b.gif", "c-b.json", "c-b.png", "c.gif", "c.json", "c.png"]
    assert names(out) == videos
    assert probe(out / "c.gif").width == 32 + 8 + 32
    told = json.loads((out / "c.json").read_text())
    assert (told["seed"], told["prompt"]) == (3, "a red ball")
    assert [told[side]["model"] for side in "ab"] == [str(tiny_wan), str(half)]
    sides = [json.loads((out / f"c-{side}.json").read_text()) for side in "ab"]
    for key in ("model", "dtype"):
        assert sides[0]["settings"].pop(key) != sides[1]["settings"].pop(key) or key == "dtype"
    assert sides[0]["settings"] == sides[1]["settings"]
    assert [told[side]["seconds"] for side in "ab"] == [side["seconds"] for side in sides]
    assert 0 < told["largest_difference"] < 1
    assert 10 < told["psnr"] < 90
    assert all(told[side]["motion"] >= 0 and 0 < told[side]["rewards"]["light"] < 1 for side in "ab")
    for text in (f"PSNR {told['psnr']:.2f} dB", "motion", "light", "seconds"):
        assert text in done.out
    assert (read_video(out / "c-a.gif") - read_video(out / "c-b.gif")).abs().max() > 0


def test_a_student_that_is_its_teacher_makes_its_clip(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    """The window is the whole clip. Both models use the same settings, also if the student has other defaults."""
    same = converted(tiny_wan, tmp_path / "same", LitConfig(layers="1:window_delta"))
    pipe = load_pipeline(inspect_model(same), device="cpu")
    pipe.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "postgen.json").write_text('{"width": 64, "num_inference_steps": 7}')
    for vs in ("same", "whole"):
        # The cast moves the weights out of the mapped file: rounding on the CPU depends on the alignment of the
        # operands.
        more = ("--dtype", "bfloat16", "-o", tmp_path / f"{vs}.gif")
        words = ("--model", tiny_wan, "--vs", tmp_path / vs, *SIZE, *more)
        done = cli("compare", "a", *words)
        assert done.code == 0, done.err
        told = json.loads((tmp_path / f"{vs}.json").read_text())
        assert (told["psnr"], told["largest_difference"], "the same clip" in done.out) == (None, 0.0, True)
        assert "rewards" not in told["a"]


def test_other_models(tiny_wan: Path, half: Path, tmp_path: Path) -> None:
    def refused(text: str, vs: Path, model: Path = tiny_wan, **more: Any) -> None:
        request = {"num_frames": 9, "height": 16, "width": 32, "device": "cpu", **more}
        with pytest.raises(UserError, match=text):
            student(prepare(GenerateConfig(prompt="a", model=str(model), **request)), str(vs))

    refused("half is the same model as .*: give another model", half, model=half)
    twin = shutil.copytree(tiny_wan, tmp_path / "twin")
    refused(rf"half was made from {tiny_wan}, but the comparison is with .*twin: give --model {tiny_wan}", half, twin)
    changed(half, "transformer/config.json", num_layers=4)
    refused("half cannot be compared with .*: num_layers of its transformer is 4, and in .* it is 2", half)
    changed(twin, "vae/config.json", z_dim=8)
    refused("twin cannot be compared with .*: z_dim of its vae is 8, and in .* it is 4", twin)
    changed(twin, "model_index.json", _class_name="WanImageToVideoPipeline")
    refused("twin cannot be compared with .*: it is a WanImageToVideoPipeline with a WanTr", twin)
    bound = LitConfig(layers="1:mhla", grid=(3, 1, 2), mhla=MhlaOptions(blocks=(1, 1, 2), interpolate=False))
    fixed = converted(tiny_wan, tmp_path / "fixed", bound)
    refused(r"fixed/transformer: this mhla layer is made for a grid of \(3, 1, 2\) tokens .* got \(2, 1, 2\)", fixed,
            num_frames=5)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--b", "steps=1"], "omit --a and --b, or omit --vs"),
        (["--reward", "nope"], "unknown reward 'nope'"),
        (["--reward", "depth_consistency"], "needs the column 'depth'"),
        (["--vs", "absent"], "there is no model folder absent"),
    ],
)
def test_wrong_words(cli: Any, tiny_wan: Path, half: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = cli("compare", "a", "--model", tiny_wan, "--vs", half, *SIZE, "-o", tmp_path / "x.mp4", *words)
    assert (done.code, message in done.err, names(tmp_path)) == (2, True, ["half"]), done.err


def test_rewards_without_a_student(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    reward = own_reward(tmp_path)
    words = ("--model", tiny_wan, "--b", "frames=5", *SIZE, "--reward", reward, "-o", tmp_path / "x.gif")
    done = cli("compare", "a red ball", *words)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "x.json").read_text())
    assert (told["psnr"], told["largest_difference"], "clips of other sizes" in done.out) == (None, None, True)
    assert told["a"]["rewards"]["light"] > 0
    assert told["a"]["no_score"] == {}
    assert told["b"]["rewards"]["light"] is None
    assert told["b"]["no_score"]["light"] in done.err
    assert told["prompt"] == "a red ball"
    again = cli("compare", "a red ball", *words[:2], "--b", "prompt=two", *words[4:])
    assert again.code == 0, again.err
    told = json.loads((tmp_path / "x.json").read_text())
    assert (told["prompt"], told["seed"]) == (None, 0)


def test_difference_and_motion() -> None:
    a = torch.rand(6, 3, 48, 600, generator=torch.Generator().manual_seed(0))
    told = difference(a, a + 0.1)
    assert told == {"psnr": pytest.approx(20, abs=1e-4), "largest_difference": pytest.approx(0.1, abs=1e-6)}
    large = torch.nn.functional.avg_pool2d(a, 9, stride=1, padding=4)  # blobs that move 3 pixels per frame
    moved = torch.stack([large[0].roll(3 * t, dims=-1) for t in range(6)])
    assert motion_of(moved) == pytest.approx(3, rel=0.35)
    assert motion_of(large[:1].expand(6, -1, -1, -1)) == 0
    assert (motion_of(large[:1]), motion_of(large[:, :, :4])) == (None, None)
