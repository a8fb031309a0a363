"""Run arms on parts of the scenes as jobs, which any number of processes share through their output folder.

A job is one arm on `batch` scenes. A process locks a job while it runs (the lock ends with the process) and writes
OUT/parts/ARM.FIRST.json at the end. Other processes skip jobs that are locked or complete. Processes begin at
different parts of the scenes. A process renders a part once and then runs all arms on it. The process that finds all
parts of an arm complete joins them to OUT/ARM.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gates import device as hardware
from benchmarks.worldweaver import Arm, given_latents, load_arm, make_clips, measured
from benchmarks.worldweaver_along import rounded
from benchmarks.worldweaver_baselines import KINDS, kind_of, stock_arm, stock_clips
from benchmarks.worldweaver_pictures import keep_pictures
from postgen import world
from postgen.errors import UserError
from postgen.files import replacing
from postgen.info import versions
from postgen.training.run_folder import RunLock

SHARED = ("frames", "given", "size", "first", "worlds", "batch", "captions", "guidance")
"""Options that must be the same for all arms in a folder."""


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that must be the same for all files in a folder."""
    return {name: getattr(options, name) for name in SHARED}


@dataclasses.dataclass(slots=True)
class Part:
    """Some of the scenes with their render, and their true latents, which several arms share."""

    seeds: Sequence[int]
    specs: Sequence[world.Spec]
    truth: world.Frames
    _latents: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, low: int, options: argparse.Namespace, device: torch.device) -> Part:
        """Draw and render the scenes from `low` on."""
        count = min(options.batch, options.worlds - low)
        seeds = range(options.first + low, options.first + low + count)
        specs = [world.sample_long(seed, num_frames=options.frames) for seed in seeds]
        return cls(seeds, specs, world.render(specs, num_frames=options.frames, size=options.size, device=device))

    def latents(self, arm: Arm, given: int) -> Tensor:
        """Return the true latents for the modalities and scale of an arm. Arms with the same ones share them."""
        # The key contains the scale, because an adapter may scale the latents of a modality.
        key = json.dumps([arm.model.modalities, arm.settings.get("latent_scale")])
        if key not in self._latents:
            self._latents[key] = given_latents(arm, self.truth, self.truth.rgb_BF3HW.shape[1], given)[0]
        return self._latents[key]


@dataclasses.dataclass(slots=True)
class Loaded:
    """A loaded arm."""

    arm: Arm
    kind: str | None
    """One of `KINDS`; None: an arm with an adapter."""
    adapter_mb: float | None
    """Size of all files of the adapter in 10^6 bytes."""

    @classmethod
    def of(cls, name: str, word: str, options: argparse.Namespace, device: torch.device) -> Loaded:
        """Load an arm.

        Raises:
            UserError: an arm without folder that is not one of `KINDS`, or a context that is not a number.
        """
        kind = kind_of(name)
        if kind is None:
            if not word:
                raise UserError(f"arm {name} needs a folder: give NAME=FOLDER; only {', '.join(KINDS)} need no folder")
            arm = load_arm(name, word, device, guidance=options.guidance)
            _merge(arm)
            files = [path for path in Path(word).rglob("*") if path.is_file()]
            return cls(arm, None, sum(path.stat().st_size for path in files) / 1e6)
        if word and not word.isdigit():
            raise UserError(f"{name}={word}: give a number of latent frames, or nothing, after the =")
        arm = stock_arm(kind, device, context=int(word) if word else None)
        guidance = arm.guidance if options.guidance is None else options.guidance
        return cls(dataclasses.replace(arm, name=name, guidance=guidance), kind, None)

    def rows(self, part: Part, low: int, options: argparse.Namespace) -> list[dict[str, Any]]:
        """Generate and measure the clips of a part, and write pictures of the first scenes.

        Returns:
            The result of `measured` for each scene, with its seed as `world_seed`. Files of older versions lack it.
        """
        given, words = options.given, {"seed": low, "captions": options.captions}
        if self.kind is None:
            made = make_clips(self.arm, part.specs, part.truth, given=given, **words)
        else:
            made = stock_clips(self.kind, self.arm, part.specs, part.truth, given=given, **words)
        if not low:
            keep_pictures(options.out, self.arm.name, made.frames, made.disparity, part.truth)
        found = measured(self.arm, part.specs, part.truth, made, given, part.latents(self.arm, given))
        return [{"world_seed": seed, **row} for seed, row in zip(part.seeds, found, strict=True)]


def _merge(arm: Arm) -> None:
    """Merge the LoRA of an arm: the result is the same, and a forward pass launches half as many kernels."""
    pipe: Any = getattr(arm.model.denoiser, "pipe", None)
    if getattr(arm.model.transformer, "peft_config", None):
        pipe.fuse_lora()
        pipe.unload_lora_weights()


def run(words: Sequence[str], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run all jobs that no other process runs, and return the rows of the complete arms.

    Args:
        words: NAME=FOLDER of each arm.
        options: options of the benchmark.

    Raises:
        UserError: files with other settings in the folder, an arm that cannot be loaded, or a process that failed.
    """
    arms = dict(word.partition("=")[::2] for word in words)
    for name in arms:
        read_arm(options.out / f"{name}.json", settings_of(options))
    (options.out / "parts").mkdir(parents=True, exist_ok=True)
    if options.workers > 1:
        context = get_context("spawn")
        processes = [
            context.Process(target=work, args=(arms, options, number), daemon=True)
            for number in range(options.workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if failed := sum(process.exitcode != 0 for process in processes):
            raise UserError(f"{failed} of {len(processes)} processes failed: see above; complete jobs are kept")
    else:
        work(arms, options, 0)
    found = {name: _joined(name, options) for name in arms}
    return {name: rows for name, rows in found.items() if rows is not None}


def work(arms: Mapping[str, str], options: argparse.Namespace, number: int) -> None:
    """Run jobs until none is left, beginning with the jobs of the process's own part.

    Args:
        arms: name of an arm -> folder.
        options: options of the benchmark.
        number: rank of the process among `options.workers`.
    """
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif options.workers > 1:
        torch.set_num_threads(1)
    lows = list(range(0, options.worlds, options.batch))
    begin = number * len(lows) // max(1, options.workers)
    loaded: dict[str, Loaded] = {}
    for low in lows[begin:] + lows[:begin]:
        part: Part | None = None
        for name, word in arms.items():
            with _claimed(options, name, low) as place:
                if place is None:
                    continue
                part = part or Part.of(low, options, device)
                if name not in loaded:
                    loaded[name] = Loaded.of(name, word, options, device)
                clock = time.perf_counter()
                rows = loaded[name].rows(part, low, options)
                _write(place, loaded[name], rows, options)
                seconds = time.perf_counter() - clock
                print(f"{name}: scenes {low} to {low + len(rows) - 1} in {seconds:.1f} s", flush=True)


@contextmanager
def _claimed(options: argparse.Namespace, name: str, low: int) -> Iterator[Path | None]:
    """Lock a job and yield the file for its rows; yield None if the job is complete or another process runs it."""
    place = options.out / "parts" / f"{name}.{low:05d}.json"
    done = [options.out / f"{name}.json", place]
    lock = RunLock(place.parent, f"{place.stem}.lock", "--out")
    if any(path.is_file() for path in done):
        yield None
        return
    try:
        lock.acquire()
    except UserError:
        yield None
        return
    try:
        yield None if any(path.is_file() for path in done) else place
    finally:
        lock.release()


def _write(place: Path, loaded: Loaded, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    payload = {
        "settings": settings_of(options),
        "told": dict(loaded.arm.settings),
        "guidance": loaded.arm.guidance,
        "modalities": list(loaded.arm.model.modalities),
        "adapter_mb": loaded.adapter_mb,
        "device": hardware(),
        "versions": versions(),
        "rows": [rounded(row) for row in rows],
    }
    _put(place, payload)


def _put(place: Path, payload: Mapping[str, Any]) -> None:
    with replacing(place) as part:
        part.write_text(json.dumps(payload, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def _joined(name: str, options: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Return the rows of an arm, joining its parts if all are complete; None: some parts are missing."""
    place = options.out / f"{name}.json"
    if (whole := read_arm(place, settings_of(options))) is None:
        lows = range(0, options.worlds, options.batch)
        found = [read_arm(options.out / "parts" / f"{name}.{low:05d}.json", settings_of(options)) for low in lows]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            print(f"{name}: {len(parts)} of {len(found)} parts are complete, other processes run the others")
            return None
        whole = {**parts[0], "rows": [row for part in parts for row in part["rows"]]}
        _put(place, whole)
    rows: list[dict[str, Any]] = whole["rows"]
    return rows


def read_arm(place: Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the file of an arm or of one of its parts; None: there is no file.

    Args:
        place: path of the file.
        settings: settings that the file must have; None: accept any.

    Raises:
        UserError: the file has other settings.
    """
    if not place.is_file():
        return None
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    if settings is not None and found["settings"] != dict(settings):
        raise UserError(
            f"{place} was measured with {found['settings']}, not with {dict(settings)}: give another --out"
        )
    return found
