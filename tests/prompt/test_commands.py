"""`--enhance-prompt` of `postgen generate` and `postgen compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import postgen
from postgen import cli
from postgen.errors import UserError
from postgen.request import GenerateConfig, carried, portable, without_places

SMALL = ("--size", "32x32", "--frames", "5", "--steps", "1")
ENHANCED = "a red ball stays still, static camera"


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    assert isinstance(left.value.code, int)
    return left.value.code


def settings(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text())["settings"]
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POSTGEN_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_the_sidecar_reproduces_the_video(tiny_wan: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ("--size", "32x16", "--frames", "5", "--steps", "1", "--model", str(tiny_wan))
    assert run("generate", "red ball", *small, "-o", "a.mp4", "--enhance-prompt") == 0
    made = settings("a.json")
    assert (made["prompt"], made["enhance_prompt"]) == ("red ball", "template")
    assert made["enhanced_prompt"].startswith("Red ball. ")
    assert f"Enhanced prompt: {made['enhanced_prompt']}\n" in capfd.readouterr().out
    assert run("generate", made["enhanced_prompt"], *small, "-o", "b.mp4") == 0
    assert _video("a.mp4") == _video("b.mp4")
    # The words of the sidecar are used, whatever the enhancer would say today.
    note = json.loads(Path("a.json").read_text())
    note["settings"] |= {"enhanced_prompt": "a blue cube falls", "enhance_prompt": "chat:/gone"}
    Path("a.json").write_text(json.dumps(note))
    assert run("generate", "--from", "a.json", "-o", "c.mp4") == 0
    assert settings("c.json")["enhanced_prompt"] == "a blue cube falls"
    assert run("generate", "--from", "a.json", "-o", "d.mp4", "--enhance-prompt", "none") == 0
    assert [settings("d.json")[name] for name in ("enhance_prompt", "enhanced_prompt")] == [None, None]
    assert run("generate", "a green ball", "--from", "a.json", "-o", "e.mp4", "--enhance-prompt=template") == 0
    assert settings("e.json")["enhanced_prompt"].startswith("A green ball. ")
    assert not Path("cache").exists()


def _video(path: str) -> list[float]:
    found: list[float] = postgen.read_video(path).flatten().tolist()
    return found


def test_compare_with_and_without(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "red ball", *SMALL, "--b", "enhance-prompt=template", "-o", "x.mp4") == 0
    assert settings("x-a.json")["enhanced_prompt"] is None
    assert settings("x-b.json")["enhanced_prompt"].startswith("a red ball stays still")
    assert "enhanced prompt: a red ball" in capfd.readouterr().out


def test_own_functions(capfd: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(
        f"def good(prompts):\n    return ['{ENHANCED}'] * len(prompts)\n"
        "def bad(prompts):\n    return ['a ball'] * len(prompts)\n"
        "def broken(prompts):\n    raise ValueError('two\\nlines')\n"
        "def none(prompts):\n    return None\n"
        "number = 3\n"
    )
    assert run("generate", "red ball", *SMALL, "-o", "a.mp4", "--enhance-prompt", "own.py:good") == 0
    made = settings("a.json")
    assert made["enhanced_prompt"] == ENHANCED
    assert made["enhance_prompt"] == f"{Path('own.py').resolve()}:good"
    capfd.readouterr()
    with pytest.warns(UserWarning, match="red is missing"):
        assert run("generate", "red ball", *SMALL, "-o", "b.mp4", "--enhance-prompt", "own.py:bad") == 0
    assert settings("b.json")["enhanced_prompt"].startswith("a red ball stays still")  # the template
    for name, message in (
        ("broken", "own.py:broken failed: ValueError: two lines"),
        ("none", "must return one text per prompt"),
        ("number", "is 3, not a rewriter"),
        ("missing", "has no missing"),
    ):
        _refused(capfd, ["--enhance-prompt", f"own.py:{name}"], message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--enhance-prompt", "tempalte"], "Did you mean 'template'?"),
        (["--enhance-prompt", "a prompt with words"], "Known: template, smollm2, chat:MODEL"),
        (["--enhance-prompt", ""], "--enhance-prompt is empty"),
        (["--enhance-prompt", "chat:"], "names no model"),
        (["--enhance-prompt", "chat:/nowhere"], "there is no chat model /nowhere"),
        (["--enhance-prompt", "chat:."], "no config.json"),
        (["--enhance-prompt", "api:m"], "needs a key: set the environment variable OPENAI_API_KEY"),
        (["--enhance-prompt", "api:m@"], "names no address"),
        (["--enhance-prompt", "api:@http://h"], "must be named"),
        (["--enhance-prompt", "api:m@ftp://h"], "is not the address of a server"),
        (["--enhance-prompt", "nothing.py:f"], "the file nothing.py does not exist"),
        (["--enhance-prompt", "nothing.f"], "cannot be imported"),
        (["--enhance-prompt", "--long", "1"], "--enhance-prompt cannot be used with a long video"),
    ],
)
def test_a_wrong_enhancer_is_one_line(capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    _refused(capfd, words, message)


def test_a_prompt_in_the_place_of_the_name(capfd: pytest.CaptureFixture[str]) -> None:
    """The word after the option is its name, also if it was meant as the prompt."""
    assert run("generate", "--enhance-prompt", "red ball", *SMALL, "-o", "z.mp4") == 2
    assert "'red ball' is the name of --enhance-prompt: put the prompt before it" in capfd.readouterr().err


def _refused(capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    before = set(Path().iterdir())
    size = () if "--long" in words else SMALL
    assert run("generate", "red ball", *size, "-o", "z.mp4", *words) == 2
    told = capfd.readouterr().err.splitlines()
    errors = [line for line in told if line.startswith("postgen: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert {path.name for path in set(Path().iterdir()) - before} <= {"__pycache__"}


def test_a_damaged_cache_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    Path("cache/prompts.jsonl").mkdir(parents=True)
    _refused(capfd, ["--enhance-prompt", "api:m@http://127.0.0.1:1/v1"], "it is a folder")


@pytest.mark.parametrize("name", ["chat:lm", "api:m@http://10.0.0.1/v1", "own.py:f", "template"])
def test_shared_files_name_no_place(name: str) -> None:
    Path("lm").mkdir()
    Path("own.py").write_text("")
    config = GenerateConfig(prompt="a", enhance_prompt=name, enhanced_prompt="b")
    long = portable(config)
    assert GenerateConfig.of({**long, "lora": ()}).enhanced_prompt == "b"
    told = without_places(long)["enhance_prompt"]
    assert told == name.partition("@")[0]
    note = {"settings": long, "plug_ins": {}, "format": "mp4", "pipeline": "x", "versions": {}}
    assert str(Path.cwd()) not in carried(note)


def test_settings_of_a_request() -> None:
    assert GenerateConfig(prompt="a", enhance_prompt="none").enhance_prompt is None
    for wrong in ({"enhanced_prompt": "b"}, {"enhance_prompt": "template", "enhanced_prompt": " "}):
        with pytest.raises(UserError, match="enhanced_prompt"):
            GenerateConfig(prompt="a", **wrong)  # type: ignore[arg-type]
