"""`postgen generate --from` with a sidecar that names files without folders, as sidecars of the app do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from postgen import UserError
from postgen.request import GenerateConfig, portable, read_sidecar, with_places, without_places


def sidecar(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = GenerateConfig(prompt="a ball", num_inference_steps=1, width=32, height=16, num_frames=5)
    note = {"settings": without_places(portable(config)) | settings, "format": "mp4"}
    (folder / "x.json").write_text(json.dumps(note))
    return folder / "x.json"


@pytest.mark.parametrize(
    ("settings", "missing", "again"),
    [
        ({"model": "my-wan"}, "the model my-wan", "--model PATH"),
        ({"image": "0a1b.png"}, "the first frame 0a1b.png", "--image PATH"),
        ({"lora": ["style:0.5"]}, "the LoRA style", "--lora PATH:0.5"),
        ({"lora": ["transformer_2=style:2"]}, "the LoRA style", "--lora transformer_2=PATH:2"),
        (
            {"lora": ["owner/style:1", "mine:1"]},
            "the LoRA mine",
            "--lora PATH:1, and with another --lora for each of its 2",
        ),
    ],
)
def test_what_is_missing_is_said_and_where_it_was_looked_for(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], missing: str, again: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = sidecar(tmp_path / "kept", **settings)
    told = cli("generate", "--from", "kept/x.json", "-o", "y.mp4")
    assert told.code == 2
    assert told.err == (
        f"postgen: error: the sidecar kept/x.json names {missing} without a folder, and it is not in {tmp_path}"
        f" nor in {file.parent}: give its path with {again}\n"
    )
    assert not (tmp_path / "y.mp4").exists()


def test_a_place_that_is_no_more_is_said(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=f"names the model {gone}, which does not exist: give its path with --model"):
        with_places({"model": gone}, sidecar(tmp_path, model=gone))


def test_what_stands_beside_the_sidecar_or_is_given_is_used(
    cli: Any, tiny_wan: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = sidecar(tmp_path / "kept", model="wan", lora=["style.safetensors:0.5"])
    os.symlink(tiny_wan, file.parent / "wan")
    given = cli("generate", "--from", file, "--lora", f"{tiny_lora}:0.5", "-o", "given.mp4")
    assert given.code == 0, given.err
    shutil.copy(tiny_lora, file.parent / "style.safetensors")
    found = cli("generate", "--from", file, "-o", "found.mp4")
    assert found.code == 0, found.err
    assert Path("given.mp4").read_bytes() != b""
    one, two = (read_sidecar(f"{name}.json")[0] for name in ("given", "found"))
    assert one["model"] == two["model"] == str(tiny_wan.resolve())
    assert two["lora"] == (f"{file.parent / 'style.safetensors'}:0.5",)


def test_ids_of_the_hub_stay(tmp_path: Path) -> None:
    settings = {"model": "owner/name", "lora": ("owner/style:1",), "prompt": "a"}
    assert with_places(settings, tmp_path / "x.json") == settings
    with pytest.raises(UserError, match="the first frame owner/name"):
        with_places({"image": "owner/name"}, tmp_path / "x.json")
