"""The folder of a run: its lock, full disks, and damaged, foreign or wrong files."""

import errno
import fcntl
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from postgen.errors import UserError
from postgen.training import checkpoint
from postgen.training.run_folder import RunLock
from tests.full_disk import files_of_at_most
from tests.training.test_checkpoint import make


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with two runs of networks of different width, with checkpoints after 5 and 10 steps."""
    folder = tmp_path_factory.mktemp("runs")
    make(folder / "run", max_steps=10).train()
    make(folder / "other", max_steps=10, width=5).train()
    return folder


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / "run", tmp_path / "run")


def resumed(run, **settings):
    trainer = make(run, **{"max_steps": 12, "resume_from_checkpoint": "latest", **settings})
    trainer.train()
    return trainer


def noted(folder, **changes):
    """Write the current sizes of the files, and other changes, into state.json."""
    path = folder / "state.json"
    head = json.loads(path.read_text())
    head["files"] = {name: (folder / name).stat().st_size for name in head["files"] if (folder / name).exists()}
    path.write_text(json.dumps({**head, **changes}))


def cut(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        noted(folder)

    return damage


def holding(name, data):
    def damage(folder):
        (folder / name).write_bytes(data)
        if name != "state.json":
            noted(folder)

    return damage


def tensors(name, change):
    def damage(folder):
        save_file(change(load_file(folder / name)), folder / name)
        noted(folder)

    return damage


def saying(**changes):
    return lambda folder: noted(folder, **changes)


def meta(**changes):
    def damage(folder):
        noted(folder, meta={**json.loads((folder / "state.json").read_text())["meta"], **changes})

    return damage


def a_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def foreign(name):
    def damage(folder):
        shutil.copy(folder.parent.parent / "other" / "checkpoint-10" / name, folder / name)
        noted(folder)

    return damage


def nan(found):
    return {key: value * torch.nan if value.is_floating_point() else value for key, value in found.items()}


def without(key):
    return lambda found: {name: value for name, value in found.items() if name != key}


WEIGHTS, EMA, OPTIMIZER, RANK = (f"{name}.safetensors" for name in ("weights", "ema", "optimizer", "rank-0"))
DAMAGES = {
    "weights cut": (cut(WEIGHTS), "weights.safetensors cannot be read"),
    "weights of no bytes": (holding(WEIGHTS, b""), "weights.safetensors cannot be read"),
    "weights of NaN": (tensors(WEIGHTS, nan), "in weights.safetensors holds NaN"),
    "weights of another model": (foreign(WEIGHTS), "weights.safetensors is not the file that the run wrote"),
    "weights as integers": (
        tensors(WEIGHTS, lambda found: {k: v.long() for k, v in found.items()}),
        "is not the file",
    ),
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), "weights.safetensors is missing"),
    "weights a folder": (a_folder(WEIGHTS), "weights.safetensors is missing"),
    "average of NaN": (tensors(EMA, nan), "in ema.safetensors holds NaN"),
    "average of another model": (foreign(EMA), "ema.safetensors is not the file"),
    "optimiser without tensors": (tensors(OPTIMIZER, lambda found: {}), "optimizer.safetensors is not the file"),
    "optimiser of another model": (foreign(OPTIMIZER), "optimizer.safetensors is not the file"),
    "optimiser of NaN": (tensors(OPTIMIZER, nan), "in optimizer.safetensors holds NaN"),
    "no random state": (tensors(RANK, without("rng.torch")), "rank-0.safetensors is not the file"),
    "process binary": (holding("rank-0.json", b"\xff\xfe"), "rank-0.json is not the file"),
    "process missing": (lambda folder: (folder / "rank-0.json").unlink(), "rank-0.json is missing"),
    "state binary": (holding("state.json", b"\xff\xfe{"), "state.json cannot be read"),
    "state nested": (holding("state.json", b"[" * 100_000), "state.json cannot be read"),
    "state empty": (holding("state.json", b""), "state.json cannot be read"),
    "state a list": (holding("state.json", b"[]"), "state.json has no format number"),
    "state a folder": (a_folder("state.json"), "state.json cannot be read"),
    "step below 0": (saying(step=-7), "has no valid step"),
    "step of another": (saying(step=12), "has no valid step"),
    "step a text": (saying(step="10"), "has no valid step"),
    "no processes": (saying(ranks=0), "has no valid ranks"),
    "no meta": (saying(meta=None), "has no valid meta"),
    "seconds a text": (meta(seconds="x"), "has no valid meta.seconds"),
    "optimiser's groups": (meta(optimizer={"groups": "ab"}), "has no valid meta.optimizer"),
    "optimiser's values": (meta(optimizer={"groups": [{"betas": "x"}, {}]}), "its optimiser state has betas 'x'"),
    "optimiser's names": (
        meta(optimizer={"parameters": {"x|y": 1}, "groups": [{}, {}]}),
        "parameters that this model does not have",
    ),
    "a file elsewhere": (lambda folder: noted(folder, contents={"../x": ""}), "has no valid contents"),
    "a file in its place": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
        "not a complete checkpoint",
    ),
    "nothing in it": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "not a complete checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(runs, run, capsys, kind):
    damage, message = DAMAGES[kind]
    shutil.copytree(runs / "other", run.parent / "other")
    damage(run / "checkpoint-10")
    trainer = resumed(run)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert message in said[0]
    assert "it is renamed to checkpoint-10.damaged, and the run resumes an earlier checkpoint" in said[0]
    assert (len(trainer.history), (run / "checkpoint-10.damaged").exists()) == (7, True)


def test_no_run_begins_with_weights_that_are_no_numbers(run, tmp_path):
    save_file(nan(load_file(run / "export" / "net.safetensors")), run / "export" / "net.safetensors")
    with pytest.raises(UserError, match=r"does not fit: 0\.weight holds NaN; .* and 1 more"):
        make(tmp_path / "second", init_from=str(run / "export")).train()


def test_where_no_checkpoint_is_sound_nothing_is_touched(run):
    for folder in checkpoint.find(run):
        cut(WEIGHTS)(folder)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UserError, match=r"checkpoint-10 is damaged: .* \(and 1 before it\)") as raised:
        resumed(run)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in run.iterdir()) == before
    with pytest.raises(UserError, match="holds the checkpoints of an earlier run"):
        make(run).train()


def test_a_checkpoint_that_was_named_is_taken_or_refused(run):
    tensors(WEIGHTS, nan)(run / "checkpoint-10")
    with pytest.raises(UserError, match=r"checkpoint-10 is damaged: .* holds NaN"):
        resumed(run, resume_from_checkpoint=str(run / "checkpoint-10"))


def test_a_checkpoint_before_digests_is_read_and_checked(run):
    """If a checkpoint has no digests, names and shapes of its tensors are compared with the model."""
    noted(run / "checkpoint-10", contents={})
    assert len(resumed(run).history) == 2
    for name, key in ((EMA, "net.0.weight"), (OPTIMIZER, "net.0.weight|exp_avg"), (RANK, "rng.generator")):
        newest = checkpoint.find(run)[-1]
        tensors(name, lambda found, key=key: {**without(key)(found), f"x{key}": found[key]})(newest)
        noted(newest, contents={})
        with pytest.raises(UserError, match="is damaged"):
            resumed(run, resume_from_checkpoint=str(newest), max_steps=20)
        shutil.rmtree(newest)


def test_a_checkpoint_of_another_method_is_no_damage(run):
    config = json.loads((run / "checkpoint-10" / "state.json").read_text())["meta"]["config"]
    meta(config={**config, "method": "dancegrpo"})(run / "checkpoint-10")
    with pytest.raises(
        UserError, match=r"written by method dancegrpo, but this run has method text_to_video: load its weights"
    ):
        resumed(run, method="text_to_video")


def test_state_that_the_trainer_cannot_take_is_damage(run):
    trainer = make(run, max_steps=12, resume_from_checkpoint=str(run / "checkpoint-10"))
    trainer.load_state_dict = lambda state: state["tail"]
    with pytest.raises(UserError, match=r"rank-0 does not hold the state of TinyTrainer \(KeyError: 'tail'\)"):
        trainer.train()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_folder_in_a_files_place_is_one_line(run, name):
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(UserError, match=rf"cannot be written: .*{name}"):
        resumed(run)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100, "the run in .*File too large"),  # config.yaml cannot be written before the first step
        (10_000, "checkpoint-14 cannot be written: .*File too large"),  # the file of the RNG states cannot be written
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(run, size, message):
    before = (run / "checkpoint-10" / WEIGHTS).read_bytes()
    with files_of_at_most(size), pytest.raises(UserError, match=message) as raised:
        resumed(run, max_steps=14)
    assert "\n" not in str(raised.value)
    assert [path.name for path in checkpoint.find(run)] == ["checkpoint-5", "checkpoint-10"]
    assert [path.name for path in run.glob(".*")] == [".run.lock"]
    assert (run / "checkpoint-10" / WEIGHTS).read_bytes() == before
    assert len(resumed(run).history) == 2


def test_a_full_disk_while_exporting_is_one_line(run):
    trainer = make(run, max_steps=12, resume_from_checkpoint="latest")

    def export(folder, weights):
        (folder / "half").write_bytes(b"half")
        save_file({"big": torch.zeros(10_000)}, folder / "net.safetensors")

    trainer.export = export
    # The limit is larger than the files of a checkpoint.
    with files_of_at_most(30_000), pytest.raises(UserError, match=r"the run in .*cannot be written"):
        trainer.train()
    assert [path.name for path in (run / "export").iterdir()] == ["net.safetensors"]


def test_one_run_in_a_folder(tmp_path):
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .* since 20"):
        make(tmp_path, max_steps=2).train()
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    first.release()
    make(tmp_path, max_steps=2).train()
    make(tmp_path, max_steps=3, resume_from_checkpoint="latest").train()


def test_a_killed_process_holds_no_lock(tmp_path):
    ready, told = os.pipe()
    if not (child := os.fork()):
        RunLock(tmp_path).acquire()
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    lock = RunLock(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {child} on"):
        lock.acquire()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock.acquire()
    lock.release()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def none(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    make(tmp_path, max_steps=1).train()
    assert "does not support locks (No locks available), so a second run is not detected" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["export", "samples", "evaluation"])
def test_a_file_in_the_place_of_a_later_folder_is_told_before_the_first_step(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    trainer = make(tmp_path / "run")
    with pytest.raises(UserError, match=f"{name} is a file, but the run writes a folder there") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.global_step == 0
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_an_export_that_no_run_wrote_is_not_replaced(tmp_path):
    mine = tmp_path / "run" / "export" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"holds files that the run would replace, but .* is not"):
        make(tmp_path / "run").train()
    assert mine.read_text() == "mine"
    mine.unlink()
    make(tmp_path / "run").train()  # an empty folder may be replaced
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    make(tmp_path / "run").train()  # and the export of an earlier run without checkpoints
