"""Recording of blocks: the stored tensors, recording under wrappers, and the clean-up after a failure."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.recording import Recording, capture, replay
from postgen.families.recording_store import FolderStore, MemoryStore
from tests.families.test_blocks import same
from tests.families.tiny_models import TinyModel, tiny_model

BLOCKS = ("blocks.0", "blocks.1")


@pytest.fixture
def wan() -> TinyModel:
    return tiny_model("Wan", batch=2)


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_several_calls_of_chosen_blocks(wan: TinyModel) -> None:
    expected: list[Tensor] = []
    hook = wan.transformer.get_submodule("blocks.1").register_forward_hook(lambda m, a, out: expected.append(out))

    def twice() -> None:
        wan()
        wan(timestep=torch.full((2,), 100.0))

    recording = capture(wan.transformer, ["blocks.1"], twice)
    hook.remove()
    assert list(recording) == ["blocks.1"]
    assert [call.output().tolist() for call in recording["blocks.1"]] == [output.tolist() for output in expected]
    assert not same(*(call.output() for call in recording["blocks.1"]))
    assert hooks(wan.transformer) == 0
    assert ("blocks.1" in recording, "blocks.0" in recording) == (True, False)
    with pytest.raises(UserError, match=r"block blocks.0 was not recorded. Recorded: blocks.1"):
        recording["blocks.0"]


def test_a_folder_has_what_memory_has(wan: TinyModel, tmp_path: Path) -> None:
    blocks = blocks_of(wan.transformer)
    memory = capture(wan.transformer, blocks, wan)
    capture(wan.transformer, BLOCKS, wan, where=tmp_path / "kept")
    read = Recording.read(tmp_path / "kept")
    assert list(read) == list(memory) == list(BLOCKS)
    for block in blocks:
        (one,), (other,) = memory[block.name], read[block.name]
        assert same(one.inputs(), other.inputs())
        assert one.spec["inputs"].keys() == other.spec["inputs"].keys()
        with torch.no_grad():
            assert same(replay(block, other), one.output())
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert names == ["000000.safetensors", "000001.safetensors", "recording.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_a_folder_takes_each_block_as_it_ends(wan: TinyModel, tmp_path: Path) -> None:
    """Memory then holds one block at a time, whatever the number of recorded blocks."""
    written: list[int] = []

    def run() -> None:
        for _ in range(2):
            wan()
            written.append(len(list(tmp_path.glob(".kept.*.part/*.safetensors"))))

    capture(wan.transformer, BLOCKS, run, where=tmp_path / "kept")
    assert written == [2, 4]


def test_what_blocks_share_is_kept_once(wan: TinyModel) -> None:
    """Seven tensors: text, modulation, rotary cosines and sines, the first input, and the output of each block."""
    recording = capture(wan.transformer, BLOCKS, wan)
    store: Any = recording["blocks.0"][0].store
    assert len(store._kept) == 7
    # A caller may change the tensors that it reads.
    call = recording["blocks.0"][0]
    call.output().zero_()
    assert call.output().any()


def test_a_tensor_that_changed_in_place_is_kept_again() -> None:
    store = MemoryStore()
    x = torch.zeros(3)
    first = store.keep(x, "x")
    assert store.keep(x, "x") == first
    x += 1
    second = store.keep(x, "x")
    assert store.load([first, second][0], "cpu").tolist() == [0, 0, 0]
    assert store.load(second, "cpu").tolist() == [1, 1, 1]
    with torch.inference_mode():
        y = torch.zeros(2)
        kept = store.keep(y, "y")
        y += 1
        again = store.keep(y, "y")
    loaded = store.load({"tuple": [kept, again]}, "cpu")
    assert [each.tolist() for each in loaded] == [[0, 0], [1, 1]]
    assert not any(each.is_inference() for each in loaded)


TENSORS = {
    "contiguous": torch.randn(2, 3),
    "transposed": torch.randn(2, 3, 4).transpose(1, 2),
    "with gaps": torch.randn(2, 9, 4)[:, 2:5],
    "expanded": torch.randn(2, 1, 4).expand(2, 1000, 4),
    "channels last": torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "overlapping": torch.randn(9).unfold(0, 3, 1),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "complex": torch.randn(2, 3, dtype=torch.complex64),
    "complex with strides": torch.randn(2, 3, 4, dtype=torch.complex128).transpose(1, 2).conj(),
    "bfloat16": torch.randn(2, 3).bfloat16(),
    "mask": torch.tensor([[True, False]]),
    "with gradient": torch.randn(2, 3, requires_grad=True) * 2,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_type_shape_and_strides_come_back(kind: str, tmp_path: Path) -> None:
    x, store = TENSORS[kind], FolderStore(tmp_path)
    spec = json.loads(json.dumps(store.keep(x, "x")))
    store.flush()
    back = FolderStore(tmp_path).load(spec, "cpu")
    assert (back.dtype, back.requires_grad) == (x.dtype, False)
    assert torch.equal(back, x)
    if kind != "overlapping":
        assert back.stride() == x.stride()
    if kind == "expanded":
        assert store.get(spec["tensor"]).numel() == 8


def test_structures_come_back() -> None:
    store, x = MemoryStore(), torch.ones(2)
    value = {"a": (x, [x, None], torch.Size([2])), 3: {"b": True, "c": 1.5}, "e": "text", "n": float("inf")}
    back = store.load(json.loads(json.dumps(store.keep(value, "value"))), "cpu")
    assert same(back.pop("a"), (x, [x, None], (2,)))
    assert back == {3: {"b": True, "c": 1.5}, "e": "text", "n": float("inf")}
    again = store.load(store.keep((x, x), "value"), "cpu")
    assert again[0] is again[1]
    for value, kind in (({"x": nn.Linear(1, 1)}, "Linear"), (x.to_sparse(), "Tensor"), ({(1,): x}, "dict")):
        with pytest.raises(UserError, match=f"the value: a {kind}.* cannot be recorded"):
            store.keep(value, "the value")


def peft_wrapped(model: Any) -> Iterator[Any]:
    from peft import LoraConfig, get_peft_model

    yield get_peft_model(model, LoraConfig(target_modules=["to_q"], init_lora_weights=False))


def ddp_wrapped(model: Any) -> Iterator[Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


def offloaded(model: Any) -> Iterator[Any]:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    yield model


def cast_layer_by_layer(model: Any) -> Iterator[Any]:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    yield model


def compiled(model: Any) -> Iterator[Any]:
    yield torch.compile(model, backend="eager")


def compiled_blocks(model: Any) -> Iterator[Any]:
    for block in model.blocks:
        block.compile(backend="eager")
    yield model


@pytest.mark.parametrize(
    "wrap", [peft_wrapped, ddp_wrapped, offloaded, cast_layer_by_layer, compiled, compiled_blocks]
)
@torch.no_grad()
def test_wrappers_are_looked_through(wrap: Any, wan: TinyModel) -> None:
    with contextmanager(wrap)(wan.transformer) as wrapped:
        expected = wrapped(**wan.arguments, return_dict=False)[0]
        made: list[Tensor] = []
        before = hooks(wan.transformer)
        blocks = blocks_of(wrapped)
        assert [block.name for block in blocks] == list(BLOCKS)
        recording = capture(wrapped, blocks, lambda: made.append(wrapped(**wan.arguments, return_dict=False)[0]))
        assert torch.equal(made[0], expected)
        for block in blocks:
            (call,) = recording[block.name]
            assert same(replay(block, call), call.output())
        assert hooks(wan.transformer) == before


def test_gradients_are_left_alone(wan: TinyModel) -> None:
    """The run has gradients, recorded tensors have none, and a replay has gradients of the block's weights."""
    losses: list[Tensor] = []

    def run() -> None:
        losses.append(wan.transformer(**wan.arguments, return_dict=False)[0].square().mean())

    (block, *_) = blocks_of(wan.transformer)
    (call,) = capture(wan.transformer, [block], run)[block.name]
    losses[0].backward()  # type: ignore[no-untyped-call]
    weight: Any = block.module.get_submodule("attn1.to_q").weight
    assert weight.grad.any()
    weight.grad = None
    assert not call.output().requires_grad
    replay(block, call).square().mean().backward()
    assert weight.grad.any()


def test_recorded_in_inference_mode_and_trained_on(wan: TinyModel) -> None:
    (block, *_) = blocks_of(wan.transformer)

    def run() -> None:
        with torch.inference_mode():
            wan()

    (call,) = capture(wan.transformer, [block], run)[block.name]
    replay(block, call).square().mean().backward()
    weight: Any = block.module.get_submodule("attn1.to_q").weight
    assert weight.grad.any()


def test_a_block_that_mutates_its_arguments_is_recorded_as_it_was_called(wan: TinyModel) -> None:
    block: Any = blocks_of(wan.transformer)[0]
    forward = block.module.forward

    def mutating(hidden_states: Tensor, *args: Any) -> Any:
        output = forward(hidden_states, *args)
        hidden_states.zero_()
        return output

    block.module.forward = mutating
    with torch.no_grad():
        (call,) = capture(wan.transformer, [block], wan)[block.name]
        assert call.inputs()[0][0].any()
        assert same(replay(block, call), call.output())
        assert same(replay(block, call), call.output())


@pytest.mark.parametrize("where", ["cpu", "folder"])
def test_nothing_is_left_when_the_run_fails(where: str, wan: TinyModel, tmp_path: Path) -> None:
    def run() -> None:
        wan()
        raise KeyError("enough")

    place = "cpu" if where == "cpu" else tmp_path / "kept"
    with pytest.raises(KeyError, match="enough"):
        capture(wan.transformer, BLOCKS, run, where=place)
    assert hooks(wan.transformer) == 0
    assert not list(tmp_path.iterdir())
    block: Any = wan.transformer.get_submodule("blocks.1")
    block.ffn.forward = None
    with pytest.raises(TypeError):
        capture(wan.transformer, BLOCKS, wan, where=place)
    assert hooks(wan.transformer) == 0
    assert not list(tmp_path.iterdir())


def test_the_run_may_change_the_folder(wan: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    recording = capture(wan.transformer, "blocks.0", lambda: (wan(), monkeypatch.chdir("other")), where="kept")
    assert (tmp_path / "kept" / "recording.json").exists()
    assert not list((tmp_path / "other").iterdir())
    assert recording["blocks.0"][0].output().shape == (2, 24, 32)
    with pytest.raises(UserError, match="a recording replaces its folder"):
        capture(wan.transformer, "blocks.0", wan, where=".")


def test_a_full_disk_leaves_nothing(wan: TinyModel, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    import signal

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"cannot be written to {tmp_path} .*free some space"):
            capture(wan.transformer, BLOCKS, wan, where=tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_recording_in_memory_is_copied_and_pickled(wan: TinyModel) -> None:
    recording = capture(wan.transformer, BLOCKS, wan)
    for other in (copy.deepcopy(recording), pickle.loads(pickle.dumps(recording))):
        assert same(other["blocks.1"][0].inputs(), recording["blocks.1"][0].inputs())


def test_what_cannot_be_recorded_is_said(wan: TinyModel, tmp_path: Path) -> None:
    model = wan.transformer
    with pytest.raises(UserError, match=r"no block blocks.7 in WanTransformer3DModel. Known: blocks.0, blocks.1"):
        capture(model, ["blocks.7"], wan)
    with pytest.raises(UserError, match="no blocks to record"):
        capture(model, [], wan)
    with pytest.raises(UserError, match=r"block blocks.0, blocks.1 did not run"):
        capture(model, BLOCKS, lambda: None)
    with pytest.raises(UserError, match=r"where='cuda:0' cannot keep a recording"):
        capture(model, BLOCKS, wan, where="cuda:0")
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        capture(model, BLOCKS, wan, where=tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"
    with pytest.raises(UserError, match="has no recording of blocks"):
        Recording.read(tmp_path)
    capture(model, BLOCKS, wan, where=tmp_path / "kept")
    recording = Recording.read(tmp_path / "kept")
    (tmp_path / "kept" / "000000.safetensors").unlink()
    with pytest.raises(UserError, match="is not a complete recording"):
        recording["blocks.0"][0].output()
    index = tmp_path / "kept" / "recording.json"
    index.write_text(index.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, this version reads format 1"):
        Recording.read(tmp_path / "kept")
    index.write_text('{"format": 1, "blocks": [1]}')
    with pytest.raises(UserError, match="has no recording of blocks"):
        Recording.read(tmp_path / "kept")
