"""Arms of the experiment: their settings are those of the recipe, and a run that fails says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.worldweaver_arms import ARMS, RECIPE, Run, main, table, train
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


def test_a_run_that_fails_ends_the_others_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arms", "e", "--gpus", "--out", str(tmp_path), "--", "--max_steps", "-3"]) == 1
    assert f"e.0: failed, see {tmp_path / 'e.0.log'}" in capsys.readouterr().out
    assert "max_steps" in (tmp_path / "e.0.log").read_text(encoding="utf-8")
    run = Run(arm="e", seed=1, out=tmp_path)
    run.log.write_text("step 3: what was trained is in x")
    assert run.done
    assert not train([run], [], 1, [])
