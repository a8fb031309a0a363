"""Saved states continue bit by bit; damaged states and states of other models are errors of one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys

import pytest
import torch

from postgen.errors import UserError
from postgen.reading import read_json
from postgen.worldweaver import rollout as rollout_module
from postgen.worldweaver import state as state_module
from postgen.worldweaver.memory import MemoryBank
from postgen.worldweaver.state import RolloutState
from tests.worldweaver.oracle import Mixer, begun, generators, prompt, rollout

MODEL = {"class": "WanTransformer3DModel", "channels": 4}


def beginning(made, rows=1, policy="logspace"):
    bank = MemoryBank(long=3, short=2, capacity=7, policy=policy, dtype=torch.bfloat16)
    told = [(0, prompt(1.0, rows)), (9, prompt(2.0, rows))]
    return begun(made, rows=rows, bank=bank, prompts=told, num_latents=19, model=MODEL)


@pytest.mark.parametrize("policy", ["logspace", "depth_sim"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_resume_is_the_uninterrupted_run(tmp_path, policy, guidance):
    """Resuming from any saved chunk is exact, with two rows, a new prompt, a full bank and half precision."""
    made = rollout(Mixer(), guidance=guidance)
    whole = [group.latents for group in made.groups(beginning(made, 2, policy))]
    state = beginning(made, 2, policy)
    state.save(tmp_path / "0")
    for number, _ in enumerate(made.groups(state), 1):
        state.save(tmp_path / str(number))
    for number in range(len(whole) + 1):
        again = RolloutState.load(tmp_path / str(number), model=MODEL)
        rest = [group.latents for group in rollout(Mixer(), guidance=guidance).groups(again)]
        assert len(rest) == len(whole) - number
        assert all(torch.equal(one, other) for one, other in zip(rest, whole[number:], strict=True))
    assert (again.calls, again.finished) == (made.segments.calls(10), 19)


def test_a_branch_goes_its_own_way():
    made = rollout(Mixer())
    whole = [group.latents for group in made.groups(beginning(made))]
    state = beginning(made)
    groups = made.groups(state)
    for _ in range(3):
        next(groups)
    same, other, told = state.branch(), state.branch(generators(99)), state.branch()
    told.tell([(0, prompt(9.0))])
    futures = [[group.latents for group in made.groups(each)] for each in (same, other, told)]
    rest = [group.latents for group in groups]  # the branches did not change the first stream
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(futures[0], whole[3:], strict=True))
    assert not torch.allclose(futures[1][-1], whole[-1])
    assert not torch.allclose(futures[2][0], whole[3])
    with pytest.raises(UserError, match="2 generators for 1 videos"):
        state.branch(generators(1, 2))


def test_a_video_is_made_longer():
    """An extension before the end changes no latents; after the end the window fills again behind the memory."""
    made = rollout(Mixer())
    whole = torch.cat([group.latents for group in made.groups(begun(made, num_latents=16))], 2)
    state = begun(made, num_latents=12)
    groups = made.groups(state)
    found = [next(groups).latents for _ in range(3)]
    state.extend(4)
    found += [group.latents for group in groups]
    assert torch.equal(torch.cat(found, 2), whole)
    assert list(made.groups(state)) == []
    state.extend(5)
    later = list(made.groups(state))
    assert [group.start_frame for group in later] == [16, 18, 20]
    assert later[-1].latents.shape[2] == 1
    state.extend(None)
    with pytest.raises(UserError, match="a video without end cannot be extended"):
        state.extend(3)


def test_load_state_dict_is_a_copy():
    made = rollout(Mixer())
    state, other = beginning(made), begun(made, num_latents=4)
    next(made.groups(state))
    other.load_state_dict(state.state_dict())
    first, second = ([group.latents for group in made.groups(each)] for each in (state, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_save_replaces_the_old_state_in_one_step(tmp_path, monkeypatch):
    made = rollout(Mixer())
    state = beginning(made)
    groups = made.groups(state)
    next(groups)
    state.extra["disparity.low"] = torch.tensor([0.25])
    state.save(tmp_path)
    state.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    before = state.finished
    next(groups)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state_module.json, "dumps", killed)
        with pytest.raises(KeyboardInterrupt):
            state.save(tmp_path)
    found = RolloutState.load(tmp_path)
    assert found.finished == before
    assert torch.equal(found.extra["disparity.low"], torch.tensor([0.25]))
    state.save(tmp_path)  # saving deletes the files of the killed process
    assert len(list(tmp_path.iterdir())) == 2
    assert RolloutState.load(tmp_path).finished == state.finished


def test_states_that_cannot_be_gone_on_from_are_refused(tmp_path):
    made = rollout(Mixer())
    state = beginning(made)
    next(made.groups(state))
    state.save(tmp_path)
    with pytest.raises(UserError, match="is of a model with channels 4, the current model has channels 8"):
        RolloutState.load(tmp_path, model={**MODEL, "channels": 8})
    with pytest.raises(UserError, match="holds no state of a rollout"):
        RolloutState.load(tmp_path / "nothing")
    head = tmp_path / "state.json"
    text = head.read_text()
    (tensors,) = tmp_path.glob("*.safetensors")
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is damaged: state-.* does not match its digest"):
        RolloutState.load(tmp_path)
    tensors.write_bytes(data[:-100])
    with pytest.raises(UserError, match="is damaged: state-"):
        RolloutState.load(tmp_path)
    tensors.write_bytes(data)
    head.write_text(text.replace('"next_frame": 6', '"next_frame": 8'))
    with pytest.raises(UserError, match=r"is damaged: the digest of state.json does not match"):
        RolloutState.load(tmp_path)
    head.write_text(json.dumps({**json.loads(text), "format": 2}))
    with pytest.raises(UserError, match=r"has format 2 \(postgen .*torch .*\): this version reads 1") as error:
        RolloutState.load(tmp_path)
    assert "\n" not in str(error.value)
    head.write_text("[]")
    with pytest.raises(UserError, match="has no entry 'format'"):
        RolloutState.load(tmp_path)


def test_a_rollout_refuses_the_state_of_another():
    made = rollout(Mixer())
    state = beginning(made)
    with pytest.raises(
        UserError,
        match="6 steps in 3 segments and groups of 2 frames, this rollout has 6 steps in 2 segments and groups of 2",
    ):
        next(rollout(Mixer(), groups=2).groups(state))
    other = rollout(Mixer())
    other.schedule.sigmas[1] -= 0.01
    with pytest.raises(UserError, match="other noise levels"):
        next(other.groups(state))


def test_whoever_saves_beside_another_leaves_its_files_alone(tmp_path, monkeypatch):
    """Saving deletes only the file of the previous state and old files, because new files may be in use."""
    made = rollout(Mixer())
    state = beginning(made)
    state.save(tmp_path)
    young, old, part = (tmp_path / name for name in ("state-1.safetensors", "state-2.safetensors", ".state-3.part"))
    for file in (young, old, part):
        file.write_bytes(b"half")
    for file in (old, part):
        os.utime(file, (0, 0))
    next(made.groups(state))
    state.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert young.is_file()
    # If the disk is full when state.json is written, the folder keeps only the earlier state.
    before = sorted(tmp_path.iterdir())
    next(made.groups(state))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(state_module.Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            state.save(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_state_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    made = rollout(Mixer())
    state = beginning(made)
    state.save(tmp_path)
    next(made.groups(state))
    read = []

    def meanwhile(path, said):
        found = read_json(path, said)
        read.append(path)
        if len(read) == 1:
            state.save(tmp_path)
        return found

    monkeypatch.setattr(state_module, "read_json", meanwhile)
    assert RolloutState.load(tmp_path).calls == state.calls


def test_an_interrupt_never_tears_a_shift():
    """After Ctrl-C at any line of the rollout, the state continues to the same video."""
    made = rollout(Mixer())
    whole = torch.cat([group.latents for group in made.groups(beginning(made))], 2)
    for line in range(1, 200, 3):
        state, left = beginning(made), [line]

        def trace(frame, event, _, left=left):
            if frame.f_code.co_filename != rollout_module.__file__:
                return None
            left[0] -= event == "line"
            if not left[0]:
                left[0] = -1
                signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            for _ in made.groups(state):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert left[0] < 0
        start = state.finished
        rest = [group.latents for group in made.groups(state)]
        assert torch.equal(torch.cat(rest, 2), whole[:, :, start:]), line


def test_a_state_says_where_it_is_in_one_line():
    state = beginning(rollout(Mixer()), rows=2)
    assert repr(state).startswith(f"RolloutState(2 videos, {state.finished} latent frames finished")
    assert "tensor" not in repr(state)
