"""Streaming merge of folders: equal to a merge in memory, small memory, all files, nothing after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from postgen.merging import MergeConfig, Rule, merge, merge_tensors
from postgen.merging.methods import source_factors
from postgen.tensor_files import TensorBlocks, TensorRow, writing_blocks, written_order
from tests.children import Child
from tests.merging.models import FILE, linked, moved, network, networks, tensors, weights_in

FFN = (8960, 1536)
"""Shape of the largest tensors of Wan 1.3B."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sma", "wma", "cosine"])
def test_streaming_is_bitwise_the_merge_in_memory(tmp_path: Path, dtype: torch.dtype, method: str) -> None:
    sources = [{**tensors(seed, dtype), "long": torch.randn(700_001).to(dtype)} for seed in range(3)]
    folders = [network(tmp_path / f"n{number}", weights) for number, weights in enumerate(sources)]
    config = MergeConfig(method=method)
    merge(folders, tmp_path / "out", config)
    wanted = merge_tensors(sources, Rule(factors=source_factors(config, 3)))
    found = weights_in(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_interpolation_streams_like_memory(tmp_path: Path) -> None:
    folders = networks(tmp_path, 3)
    report = merge(folders[1:], tmp_path / "out", MergeConfig(eta=0.25), base=folders[0])
    wanted = merge_tensors([tensors(1), tensors(2)], Rule(factors=[0.75, 0.125, 0.125]), tensors(0))
    assert all(torch.equal(value, wanted[name]) for name, value in weights_in(tmp_path / "out").items())
    assert report.base is not None
    assert report.base.weight == 0.75


def test_one_source_is_itself(tmp_path: Path, tiny_wan: Path) -> None:
    merge([tiny_wan], tmp_path / "out")
    for file in (file for file in tiny_wan.rglob("*") if file.is_file()):
        copy = tmp_path / "out" / file.relative_to(tiny_wan)
        if file.suffix != ".safetensors":
            assert copy.read_bytes() == file.read_bytes()
            continue
        before, after = load_file(file), load_file(copy)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_are_those_of_the_first_source(tmp_path: Path, tiny_wan: Path) -> None:
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    model.save_pretrained(tmp_path / "one", max_shard_size="30KB")
    model.save_pretrained(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted([*names, "merge.json"])
    for place in ("one", "two"):
        assert all(
            torch.equal(value, weights_in(tmp_path / "out")[k]) for k, value in weights_in(tmp_path / place).items()
        )
    again: Any = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    report = merge([tmp_path / "two", tmp_path / "one"], tmp_path / "other", MergeConfig(dtype="bfloat16"))
    assert report.sources[0].digest == report.sources[1].digest
    half = merge([tmp_path / "one", tmp_path / "two"], tmp_path / "half", MergeConfig(dtype="bfloat16"))
    assert half.sources[0].digest == report.sources[0].digest
    assert {value.dtype for value in weights_in(tmp_path / "half").values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "half" / f"{FILE}.index.json").read_text())
    assert "total_size" not in index["metadata"]


def test_shards_of_a_variant(tmp_path: Path, tiny_wan: Path) -> None:
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer", torch_dtype=torch.float16)
    for place in ("one", "two"):
        model.save_pretrained(tmp_path / place, max_shard_size="30KB", variant="fp16")
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "half")
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert sorted(file.name for file in (tmp_path / "half").iterdir()) == sorted([*names, "merge.json"])
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", MergeConfig(dtype="float32"))
    index = json.loads((tmp_path / "out" / f"{FILE}.index.fp16.json").read_text())
    assert "total_size" not in index["metadata"]
    again: Any = WanTransformer3DModel.from_pretrained(tmp_path / "out", variant="fp16")
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_network_may_have_a_part_of_its_own_name(tmp_path: Path) -> None:
    save_file({"a.b.x": torch.zeros(2), "b.x": torch.ones(3)}, tmp_path / "a.safetensors")
    for prefix, name, count in (("a.", "b.x", 2), ("b.", "x", 3)):
        blocks = TensorBlocks([tmp_path / "a.safetensors"], prefix)
        assert {key: row.count for key, row in blocks.rows.items()} == {name: count}
        blocks.close()


def test_a_merged_pipeline_generates(tmp_path: Path, tiny_wan: Path, cli: Any) -> None:
    first, second = (moved(tiny_wan, tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    pictures = "![after](after.png) <img src='curve.png'> ![far](https://a.b/c.png)"
    (first / "README.md").write_bytes(f"---\nlicense: mit\n---\n\n# A model\n{pictures}\n".encode() + b"caf\xe9")
    for name in ("after.png", "curve.png", "clip.MP4"):
        (first / name).write_bytes(b"0")
    (first / "merge_last.json").write_text("{}")
    report = merge([first, second], tmp_path / "out", MergeConfig(method="soup", weights=(3.0, 1.0)))
    assert [source.weight for source in report.sources] == [0.75, 0.25]
    assert 0 < (report.relative_change or 0) < 0.1
    assert all(name.startswith("transformer/") for name in report.largest_changes)
    card = (tmp_path / "out" / "README.md").read_bytes().decode("latin-1")
    assert card.startswith("---\nlicense: mit\n---\n\n## Merge\n")
    assert card.index("first source") < card.index("# A model")
    assert "(picture of the first source, left out: after)* *(picture of the first source, left out)* ![far]" in card
    assert card.endswith("caf\xe9")
    assert not {"after.png", "curve.png", "clip.MP4"} & {file.name for file in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "merge_last.json").exists()
    words = ["--size", "32x16", "--frames", "5", "--steps", "1", "-o", tmp_path / "x.gif"]
    assert cli("generate", "a", "--model", tmp_path / "out", *words).code == 0


def _memory(name: str) -> int:
    """Return a number of bytes from the kernel: VmRSS is the memory now, VmHWM the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_is_below_three_times_the_largest_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("needs /proc/self/clear_refs of Linux, to measure the largest memory")
    weights = {"ffn": torch.full(FFN, 0.1, dtype=dtype)}
    one = network(tmp_path / "one", weights)
    folders = [one, *(linked(one, tmp_path / f"n{number}") for number in range(2))]
    largest = weights["ffn"].numel() * weights["ffn"].itemsize
    merge(networks(tmp_path / "small", 2), tmp_path / "warm")
    del weights
    before = _memory("VmRSS")
    reset.write_text("5")
    merge(folders, tmp_path / "out", MergeConfig(method="wma"))
    added = _memory("VmHWM") - before
    assert added < 3 * largest
    assert added < 64e6  # the blocks, which do not grow with the tensor


def test_a_kill_leaves_nothing_and_the_next_merge_is_whole(tmp_path: Path) -> None:
    folders = [
        network(tmp_path / f"n{seed}", {"ffn": torch.full((1500, 1000), seed / 7), "a": torch.randn(3)})
        for seed in range(2)
    ]
    child = Child("tests.merging.killed", [tmp_path / "out", *folders])
    assert child.wait() == -9
    assert [part.stat().st_size > 10**6 for part in tmp_path.glob(f".out.*.part/{FILE}")] == [True]
    assert not (tmp_path / "out").exists()
    merge(folders, tmp_path / "out")
    merge(folders, tmp_path / "whole")
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_files_of_many_dtypes_are_read_and_written_in_blocks(tmp_path: Path) -> None:
    values = {
        "f64": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "b": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "e4m3": torch.randn(6).to(torch.float8_e4m3fn),
        "one": torch.tensor(3.0).bfloat16(),
    }
    save_file(values, tmp_path / "a.safetensors", metadata={"x": "y"})
    blocks = TensorBlocks([tmp_path / "a.safetensors"])
    assert blocks.metadata == [{"x": "y"}]
    rows: dict[str, TensorRow] = {name: blocks.rows[name] for name in written_order(blocks.rows)}
    with writing_blocks(tmp_path / "b.safetensors", rows, {"x": "y"}) as write:
        for name, row in rows.items():
            for start in range(0, row.count, 2):
                write(blocks.read(name, start, min(start + 2, row.count)))
    blocks.close()
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == values.keys()
    assert all(torch.equal(again[name].view(torch.uint8), values[name].view(torch.uint8)) for name in ("half", "b"))
    assert all(again[name].shape == value.shape and again[name].dtype == value.dtype for name, value in values.items())
