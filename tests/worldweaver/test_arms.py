"""`benchmarks.worldweaver_arms`: the settings of arms, the order of jobs, time limits and failed runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.worldweaver_arms import ARMS, RECIPE, Run, main, table
from postgen.training.recipe import load_recipe


@pytest.mark.parametrize("arm", ARMS)
def test_settings_of_every_arm_are_settings_of_the_recipe(arm: str, tmp_path: Path) -> None:
    words = Run(arm=arm, seed=3, out=tmp_path).command(["--max_steps", "7"])[5:]
    config = load_recipe(RECIPE, words)[1]
    assert config.output_dir == str(tmp_path / f"{arm}.3")
    assert (config.seed, config.max_steps) == (3, 7)


def test_the_page_has_the_arms() -> None:
    page = Path(__file__).parents[2] / "docs" / "worldweaver_training.md"
    assert table() in page.read_text(encoding="utf-8")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake interpreter that prints its arguments. It fails for `broken` and waits for a signal for `long`."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho "$@"\ncase "$*" in *broken*) exit 2;; *max_steps\\ 1\\ *) exit 0;; esac\n'
        'case "$*" in *long*) trap "echo saved; exit 143" TERM; while :; do sleep 0.1; done;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.usefixtures("python")
def test_clips_are_rendered_before_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step of the arm that needs most inputs renders the clips first. Finished runs are not repeated."""
    words = ["--arms", "a", "e", "j", "--gpus", "--each", "2", "--out", str(tmp_path / "out")]
    assert main([*words, "--", "--max_steps", "7"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": done")]
    assert (said[0], sorted(said[1:])) == ("pool: done", ["a.0: done", "e.0: done", "j.0: done"])
    rendered = (tmp_path / "out" / "pool-run" / "j.0.log").read_text(encoding="utf-8")
    assert rendered.startswith(f"-m postgen train {RECIPE} --output_dir {tmp_path / 'out' / 'pool-run' / 'j.0'} ")
    assert f"--max_steps 7 --device cpu --pool_dir {tmp_path / 'out' / 'pool'} --max_steps 1" in rendered
    log = (tmp_path / "out" / "a.0.log").read_text(encoding="utf-8")
    assert log.splitlines()[0].endswith("--max_steps 7 --device cpu --resume_from_checkpoint auto")
    (tmp_path / "out" / "e.0.done").unlink()
    (tmp_path / "out" / "a.0.done").unlink()
    assert main([*words, "--", "--max_steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("begins on the CPU") == 2  # the clips exist, and one of the runs is finished


@pytest.mark.usefixtures("python")
def test_a_call_ends_in_time_and_the_next_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is stopped saves its checkpoint, does not count as finished, and is resumed."""
    words = ["--arms", "a", "e", "--gpus", "--each", "1", "--out", str(tmp_path / "out")]
    assert main([*words, "--seconds", "2", "--", "--long", "1"]) == 3
    assert capsys.readouterr().out.splitlines()[-2:] == ["a.0: stopped", "e.0: not begun"]
    log = tmp_path / "out" / "a.0.log"
    assert log.read_text(encoding="utf-8").endswith("saved\n")
    assert main([*words, "--", "--max_steps", "7"]) == 0
    assert (
        log.read_text(encoding="utf-8")
        .splitlines()[-1]
        .endswith("--max_steps 7 --device cpu --resume_from_checkpoint auto")
    )


@pytest.mark.usefixtures("python")
def test_a_run_that_fails_ends_the_others_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arms", "e", "--gpus", "--out", str(tmp_path), "--", "--broken", "1"]) == 1
    assert f"e.0: failed, see {tmp_path / 'e.0.log'}" in capsys.readouterr().out
    assert "broken" in (tmp_path / "e.0.log").read_text(encoding="utf-8")
    assert main(["--arms", "a", "e", "--gpus", "--out", str(tmp_path / "two"), "--", "--broken", "1"]) == 1
    assert f"the clips could not be rendered: see {tmp_path}/two/pool-run/e.0.log" in capsys.readouterr().out
    assert not (tmp_path / "two" / "a.0.log").exists()
