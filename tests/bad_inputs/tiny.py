"""The tiny models of the matrix, each written once per process, and functions that write changed copies."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.families.tiny_videos import save_tiny_video
from tests.tiny_wan import LATENT_CHANNELS, wan_components

NAMES = ("wan", "image", "hunyuan")


@functools.cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="postgen-matrix-")


@functools.cache
def folder(name: str) -> Path:
    """Return the folder of a model of `NAMES`: text-to-video, image-to-video, or with distilled guidance."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    target = Path(_place().name) / name
    if name == "wan":
        WanPipeline(**wan_components()).save_pretrained(target)
    elif name == "image":
        WanImageToVideoPipeline(**wan_components(in_channels=2 * LATENT_CHANNELS + 4)).save_pretrained(target)
    else:
        save_tiny_video("HunyuanVideo", target)
    return target


def copied(
    name: str = "wan",
    json_files: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes | Callable[[Path], object] | None] | None = None,
) -> Callable[[Path], object]:
    """Return a function that copies a model with changed JSON entries, and with replaced or (None) removed files."""

    def make(target: Path) -> None:
        shutil.copytree(folder(name), target, copy_function=os.link)
        for file, changes in (json_files or {}).items():
            whole = json.loads((target / file).read_text(encoding="utf-8"))
            (target / file).unlink()
            (target / file).write_text(json.dumps({**whole, **changes}), encoding="utf-8")
        for file, content in (files or {}).items():
            (target / file).unlink(missing_ok=True)
            if callable(content):
                content(target / file)
            elif content is not None:
                (target / file).parent.mkdir(exist_ok=True)
                (target / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def tensors(change: Callable[[dict[str, Any]], object], part: str = "transformer") -> Callable[[Path], object]:
    """Return a function that writes changed weights of a component of the text-to-video model."""

    def make(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        (source,) = (folder("wan") / part).glob("*.safetensors")
        state = load_file(source)
        change(state)
        save_file(state, path)

    return make
