"""The tab "Before and after": two jobs with one prompt and seed, their measurements, and their display."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from postgen.apps.comparing import KIND, PairForm, labels_of, made_of, measured, pair_of, rewards_here, work_of
from postgen.apps.making import Form
from postgen.apps.players import Clip, downloads, shown
from postgen.apps.settings import AppSettings
from postgen.apps.state import App
from postgen.compare import compare_videos, difference, pair_paths
from postgen.errors import UserError
from postgen.video import probe, read_video

SIZE = {"width": 32, "height": 16, "frames": 9, "steps": 2, "guidance": 1.0}


@pytest.fixture
def app(tiny_wan: Path, tmp_path: Path) -> Iterator[App]:
    made = App(AppSettings(outputs=tmp_path, model=str(tiny_wan), device="cpu"))
    yield made
    made.close()


def before(app: App, **changes: Any) -> Form:
    return Form(**{"prompt": "a red ball", "model": app.model_names[0], "seed": 3, **SIZE, **changes})


def ended(app: App, task: Any) -> Any:
    while not (progress := app.jobs.progress(task)).ended:
        time.sleep(0.02)
    return progress


def test_both_are_made_measured_and_kept(app: App) -> None:
    form = PairForm(before=before(app), changes={"steps": 1, "plug_ins": {"enhance": "4"}}, reward="motion_floor")
    pair = pair_of(app, form)
    assert pair.labels == ("2 steps, without Enhance-A-Video", "1 step, Enhance-A-Video 4")
    seen: list[tuple[int, int]] = []
    task = app.jobs.submit("two", work_of(app, pair))
    step = task.step

    def watched(done: int, total: int, unit: str = "step") -> None:
        seen.append((done, total))
        step(done, total, unit)

    task.step = watched  # type: ignore[method-assign]
    progress = ended(app, task)
    assert progress.state == "done", progress.error
    assert seen == [(1, 3), (2, 3), (3, 3)]
    made = made_of(app.history.get(progress.result))
    assert len(made.files) == 9
    assert downloads(made.files).count("<a href") == 9
    assert made.labels == pair.labels
    a, b = (read_video(side.video) for side in (made.paths.a, made.paths.b))
    assert a.shape == b.shape == (9, 3, 16, 32)
    assert made.report["largest_difference"] > 0
    assert difference(a, b)["psnr"] < made.report["psnr"]  # the report compares the clips before compression
    assert probe(made.paths.both).width == 32 + 8 + 32
    told = measured(made)
    assert f"{made.report['psnr']:.1f} dB" in told
    assert f"{made.report['a']['rewards']['motion_floor']:.3f}" in told


def test_what_was_made_is_there_after_a_restart_and_what_is_damaged_says_so(app: App) -> None:
    progress = ended(app, app.jobs.submit("two", work_of(app, pair_of(app, steps_of(app)))))
    again = App(app.settings)
    (entry,) = again.history.entries(KIND)
    assert entry.id == progress.result
    report = made_of(entry).paths.report
    assert report is not None
    report.write_text('{"a": 1}')
    with pytest.raises(UserError, match="cannot be read"):
        made_of(entry)
    report.unlink()
    with pytest.raises(UserError, match="removed"):
        made_of(entry)
    again.close()


def steps_of(app: App) -> PairForm:
    return PairForm(before=before(app), changes={"steps": 1})


def test_a_cancelled_comparison_leaves_nothing_and_the_next_one_runs(app: App) -> None:
    task = app.jobs.submit("two", work_of(app, pair_of(app, steps_of(app))))
    step = task.step

    def stop(done: int, total: int, unit: str = "step") -> None:
        if done == 2:
            app.jobs.cancel(task.id)
        step(done, total, unit)

    task.step = stop  # type: ignore[method-assign]
    assert ended(app, task).state == "cancelled"
    assert [*app.history.folder.iterdir()] == []
    assert ended(app, app.jobs.submit("two", work_of(app, pair_of(app, steps_of(app))))).state == "done"


@pytest.mark.parametrize(
    ("changes", "reward", "message"),
    [
        ({}, None, "the same"),
        ({"steps": 2.0, "plug_ins": {}}, None, "the same"),
        ({"steps": "many"}, None, "the After video: steps must be a whole number"),
        ({"model": "/etc"}, None, "the After video: this server has no model"),
        ({"lora": "/etc/passwd"}, None, "the After video: this server has no LoRA"),
        ({"lora_scale": 0.5}, None, "the After video: the LoRA scale is 0.5, but no LoRA is chosen"),
        ({"prompt": "a blue ball"}, None, "cannot differ in prompt"),
        ({"steps": 1}, "os.remove", "no reward of that name"),
        ({"steps": 1}, "pickscore", "no reward of that name"),
    ],
)
def test_what_is_wrong_is_said_before_the_queue(
    app: App, changes: dict[str, Any], reward: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        pair_of(app, PairForm(before=before(app), changes=changes, reward=reward))


def test_rewards_that_score_here_need_neither_a_download_nor_columns() -> None:
    assert {"world", "world_judge", "world_clip", "motion_floor", "brisque"} <= {*rewards_here()}
    assert not {"depth_consistency", "geneval_hf"} & {*rewards_here()}


def test_models_are_lent_one_at_a_time(app: App, tmp_path: Path) -> None:
    pair = pair_of(app, steps_of(app))
    lent: list[str] = []

    @contextmanager
    def lend(job: Any) -> Iterator[Any]:
        lent.append(f"in {job.config.dtype}")
        with app.models.pipeline(job) as pipe:
            yield pipe
        lent.append("out")

    compare_videos(pair.a, pair.b, pair_paths(tmp_path / "one.gif"), lend=lend)
    assert lent == ["in auto", "out"]
    import dataclasses

    other = dataclasses.replace(pair.b, config=dataclasses.replace(pair.b.config, dtype="float32"))
    compare_videos(pair.a, other, pair_paths(tmp_path / "two.gif"), lend=lend)
    assert lent[2:] == ["in auto", "out", "in float32", "out"]


def test_labels_name_what_differs_and_no_folder_of_the_server(tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    a: dict[str, Any] = {"model": None, "guidance_scale": 3.0, "lora": []}
    b = {"model": str(tmp_path), "guidance_scale": None, "lora": [f"{lora}:0.5"]}
    assert labels_of(a, b) == (
        "guidance 3, embedded model, no LoRA",
        f"default guidance scale, {tmp_path.name}, LoRA lora at 0.5",
    )


def test_players_take_nothing_of_a_text_as_html(tmp_path: Path) -> None:
    html = shown([Clip(label='<b> "x"', path=tmp_path / "a b'.mp4", version=3)], fps=8.0, key='"k"')
    assert "<b>" not in html
    assert html.count("<video") == 1
    assert "a%20b%27.mp4?v=3" in html
    assert 'data-key="&quot;k&quot;"' in html


def test_every_number_on_the_page_has_a_value(tiny_wan: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """The browser turns an empty number field into 0; the LoRA scale of After was refused for that."""
    gr = pytest.importorskip("gradio")
    from postgen.apps.demo import build

    settings = AppSettings(outputs=tmp_path, model=str(tiny_wan), loras=(str(tiny_lora),), device="cpu")
    page = build(settings)
    numbers = [block for block in page.blocks.values() if isinstance(block, gr.Number) and block.visible]
    assert {"after-lora-scale", "long-steps", "guidance"} <= {block.elem_id for block in numbers}
    assert [block.elem_id for block in numbers if block.value is None] == []


def test_the_page_builds_with_the_tab_and_no_event_of_it_is_public(app: App) -> None:
    pytest.importorskip("gradio")
    from postgen.apps.demo import build

    page = build(app=app)
    assert any(block.elem_id == "compare-players" for block in page.blocks.values())
    places = ("postgen.apps.tabs.compare", "postgen.apps.tabs.earlier")
    ours = [fn for fn in page.fns.values() if fn.fn and getattr(fn.fn, "__module__", "") in places]
    assert len(ours) >= 8
    assert all(fn.api_visibility == "private" for fn in ours)
