"""The Rewards tab: available rewards, and the scores of a clip."""

import json
import threading
from pathlib import Path

import pytest
import torch

from postgen import world
from postgen.apps import scoring
from postgen.apps.jobs import Task
from postgen.apps.settings import AppSettings
from postgen.apps.state import App
from postgen.apps.tabs import rewards as tab
from postgen.errors import UserError
from postgen.rewards import get_reward, known_rewards
from postgen.rewards.about import ABOUT
from postgen.rewards.weights import absent
from postgen.video import Footage, write_video

SPEC = world.sample(7)
PROMPT = world.simple_caption(SPEC)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_video(path, world.render([SPEC]).rgb_BF3HW[0], fps=8)
    return path


@pytest.fixture
def app(tmp_path):
    app = App(AppSettings(outputs=tmp_path, device="cpu"))
    yield app
    app.close()


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """Hide all published weights on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def done(work):
    """Run the work of a job and return its final state."""
    task = Task("a job", work)
    task.run()
    return task.progress()


def scored(app, clip, prompt, *names):
    work = scoring.work_of(app, Footage(clip), prompt, scoring.chosen_rewards(list(names)))
    progress = done(work)
    assert progress.state == "done", progress.error
    return progress.result


def test_every_reward_has_its_meaning():
    assert {*ABOUT} == {*known_rewards()}
    assert all(about.says.endswith(".") and len(about.says) < 100 and about.range for about in ABOUT.values())


def test_those_that_need_a_download_say_so_and_are_not_offered(nothing_here):
    lacks = {one.name: one.lacks for one in scoring.known()}
    for name in ("world", "world_judge", "motion_floor", "brisque", "permanence", "vbench_flicker"):
        assert lacks[name] is None
    for name, told in (
        ("clip_score", "hf download openai/clip-vit-large-patch14"),
        ("hps_v2_1", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"),
        ("videoalign_mq", "hf download KwaiVGI/VideoReward"),
        ("depth_consistency", "more data than a clip and a prompt"),
    ):
        assert told in lacks[name]
        with pytest.raises(UserError, match=f"{name} is not available on this machine"):
            scoring.chosen_rewards(["world", name])
    shown = tab.away_of([one for one in scoring.known() if one.lacks])
    assert "xswu/HPSv2" in shown


def test_weights_that_are_here_are_seen_without_a_network(nothing_here):
    assert "is not here" in absent("some/model")
    assert "is not here" in absent("https://example.org/head.pth")
    assert "no weights.pt" in absent(str(nothing_here / "weights.pt"))
    assert "neither a folder nor a Hub id" in absent("a b/c?")
    (nothing_here / "torch" / "checkpoints").mkdir(parents=True)
    (nothing_here / "torch" / "checkpoints" / "head.pth").write_bytes(b"1")
    assert absent("https://example.org/head.pth") is None
    folder = nothing_here / "model"
    folder.mkdir()
    assert "no net.pt" in absent(str(folder), "net.pt")
    (folder / "net.pt").write_bytes(b"1")
    assert absent(str(folder), "net.pt") is None
    assert get_reward("hps_v2_1", model=str(folder), file="net.pt").lacking() is None
    cached = nothing_here / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    assert "is not here" in absent("some/model")
    (cached / "snapshots" / "abc" / "model.safetensors").write_bytes(b"1")
    assert absent("some/model") is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no reward is chosen"),
        ("world", "no reward is chosen"),
        (["os.system"], "unknown reward 'os.system'"),
        (["http://127.0.0.1:1"], "unknown reward"),
        (["world(workers=4)"], "unknown reward"),
        ([f"{__file__}:done"], "unknown reward"),
    ],
)
def test_only_names_are_taken_never_code_or_addresses(names, message):
    with pytest.raises(UserError, match=message):
        scoring.chosen_rewards(names)


def test_prompts_are_checked_before_the_queue():
    needing, free = [get_reward("world")], [get_reward("motion_floor")]
    assert scoring.checked_prompt("  a ball ", needing) == "a ball"
    assert scoring.checked_prompt(None, free) is None
    assert scoring.checked_prompt("", [*needing, *free]) is None
    for prompt, message in (("", "need a prompt"), ("x" * 3000, "at most 2,000"), (3, "must be a text")):
        with pytest.raises(UserError, match=message):
            scoring.checked_prompt(prompt, needing)


def test_scores_are_those_of_the_rewards_and_of_the_judge(app, clip):
    from postgen.rewards import RewardRunner
    from postgen.video import read_video
    from postgen.world.check import check

    names = ("motion_floor", "world", "world_judge_motion", "world_judge_visual")
    found = scored(app, clip, PROMPT, *names)
    frames = read_video(clip)
    own = RewardRunner(list(names), device="cpu")(prompts=[PROMPT], completions=[frames], fps=[8.0])
    assert list(found.scores) == list(names)
    assert list(found.scores.values()) == pytest.approx(own.values[0].tolist(), abs=1e-6)
    report = check(frames, PROMPT)
    assert found.all_right is report.all_right is True
    assert all(one["right"] for one in found.checks)
    assert found.clauses == [(clause.text, clause.why) for clause in report.clauses]
    json.dumps(found.to_dict())


def test_the_judge_says_what_is_wrong_and_what_it_cannot_read(app, clip):
    other = "green" if SPEC.bodies[0].colour != "green" else "blue"
    prompt = PROMPT.replace(SPEC.bodies[0].colour, other) + ", without any clouds"
    found = scored(app, clip, prompt, "world")
    wrong = [one["what"] for one in found.checks if not one["right"]]
    assert any("colour" in what for what in wrong)
    assert found.all_right is False
    assert any(why for _, why in found.clauses)
    page = tab.judge_of(found)
    assert "wrong" in page
    assert SPEC.bodies[0].colour in page


def test_what_has_no_score_says_why(app, clip, tmp_path):
    found = scored(app, clip, "a cat sits on a wall", "world", "motion_floor", "ocr")
    assert found.scores["world"] is None
    assert "no scene of the world" in found.notes["world"]
    assert "quotes" in found.notes["ocr"]
    assert found.scores["motion_floor"] is not None
    assert (found.clauses, found.checks, found.all_right) == ([], [], None)
    small = tmp_path / "short.mp4"
    write_video(small, torch.rand(2, 3, 64, 64), fps=8)
    found = scored(app, small, PROMPT, "world")
    assert "5 frames" in found.notes["world"]
    assert "too short" in tab.judge_of(found)
    known = {one.name: one for one in scoring.known()}
    assert "5 frames" in tab.scores_of(found, known)


def test_what_others_wrote_is_shown_as_text(app, clip):
    found = scored(app, clip, f"{PROMPT}, <script>alert(1)</script>", "world")
    assert "<script>" not in tab.judge_of(found)


def test_a_job_is_cancelled_between_rewards_and_inside_a_long_clip(app, clip, monkeypatch):
    work = scoring.work_of(app, Footage(clip), PROMPT, scoring.chosen_rewards(["motion_floor", "world"]))
    task = Task("a job", work)
    task.cancel()
    task.run()
    assert task.progress().state == "cancelled"

    monkeypatch.setattr(scoring, "_IN_MEMORY", 0)
    footage = Footage(clip)
    reading = threading.Event()
    windows = footage.windows

    def slow(overlap=0, step=1):
        for window in windows(overlap, step):
            reading.set()
            while not footage.closed:
                threading.Event().wait(0.02)
            yield window
            yield from windows(overlap, step)

    footage.windows = slow
    task = Task("a job", scoring.work_of(app, footage, None, scoring.chosen_rewards(["motion_floor"])))
    thread = threading.Thread(target=task.run)
    thread.start()
    assert reading.wait(20)
    task.cancel()
    thread.join(20)
    assert task.progress().state == "cancelled"


def test_a_long_clip_gets_the_scores_of_a_short_one(app, clip, monkeypatch):
    short = scored(app, clip, PROMPT, "world", "motion_floor")
    monkeypatch.setattr(scoring, "_IN_MEMORY", 0)
    long = scored(app, clip, PROMPT, "world", "motion_floor")
    assert long.scores == pytest.approx(short.scores, abs=1e-4)


def test_uploads_are_held_to_the_limits_before_the_queue(app, clip, tmp_path):
    with pytest.raises(UserError, match="there is no clip"):
        tab._submitted(app, None, "", PROMPT, ["world"])
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video at all" * 100)
    with pytest.raises(UserError, match="the clip is refused") as told:
        tab._submitted(app, str(bad), "", PROMPT, ["world"])
    assert str(tmp_path) not in str(told.value)
    with pytest.raises(UserError, match="no such result"):
        tab._submitted(app, None, "../clip", PROMPT, ["world"])
    small = App(AppSettings(outputs=tmp_path / "small", upload_seconds=1.0))
    with pytest.raises(UserError, match=r"at most 1 are allowed"):
        tab._submitted(small, str(clip), "", PROMPT, ["world"])
    small.close()


def test_a_result_of_the_history_is_scored_and_brings_its_prompt(app, clip):
    with app.history.adding("generate") as new:
        (new.folder / "video.mp4").write_bytes(Path(clip).read_bytes())
        (new.folder / "video.json").write_text(json.dumps({"prompt": PROMPT, "settings": {"prompt": PROMPT}}))
    assert [id for _, id in tab._results(app)] == ["", new.id]
    task = tab._submitted(app, None, new.id, PROMPT, ["motion_floor"])
    while not app.jobs.progress(task).ended:
        threading.Event().wait(0.02)
    assert app.jobs.progress(task).result.scores["motion_floor"] > 0.5
