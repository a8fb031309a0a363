"""Measure one run of `python -m benchmarks.sft`, or the base model, in its own process.

OUT/measured/NAME.json has the measures of every clip: groups `new` (prompts with the new names), `old` (prompts of the
old world), the loss of `valid` clips of the new world, and, for the arms of `benchmarks.merging`, the same of each
checkpoint, of each merge and of the annealed run. An interrupted command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.arm_runs import run_job, use_fast_matmul
from benchmarks.dancegrpo_clips import Bench, Rows, Sizes
from benchmarks.dancegrpo_measure import read_file, write_file
from benchmarks.embedded_sampling import load
from benchmarks.embedded_sheets import bytes_of, sheet
from benchmarks.gates import device
from benchmarks.sft_arms import ARMS, BASE, OUT, Run
from benchmarks.sft_clips import PALETTE, Scene, digest, rendered, scenes
from postgen.assets import embedded_model
from postgen.files import replacing
from postgen.info import versions
from postgen.merging import MergeConfig, merge
from postgen.tensor_files import read_tensors
from postgen.training.run_curves import read_metrics

PROTOCOL = 2
COUNTS = {"new": 128, "old": 512, "valid": 64}
"""Number of prompts of each group. `valid` chooses among checkpoints; its scenes are those of the loss, too."""
TINY_COUNTS = {"new": 2, "old": 2, "valid": 2}
MERGES = ("linear", "wma", "ema", "cosine", "1-sqrt")
"""Averages of the checkpoints. `linear` is `sma`: the decay of the annealed run, which the gate compares with it."""
SHOWN, FRAMES_SHOWN = 4, 5


class SftBench(Bench):
    """The embedded model with the prompts of both worlds; clips of the new world are judged after `unpaint`.

    Args:
        device_name: device of all networks.
        tiny: tiny sizes.
    """

    def __init__(self, device_name: str, *, tiny: bool = False) -> None:
        usual = Sizes.of(tiny=tiny)
        # Users run a fine-tuned model with the guidance scale and steps of its folder.
        guidance = 1.0 if tiny else usual.guided
        sizes = replace(usual, guidance=guidance, steps=usual.guided_steps, test=1, valid=1)
        super().__init__(sizes, device_name)
        counts = TINY_COUNTS if tiny else COUNTS
        groups = {"new": ("test", True), "old": ("test", False), "valid": ("valid", True)}
        self.scenes = {
            name: scenes(source, counts[name], sizes.frames, new=new) for name, (source, new) in groups.items()
        }
        self.prompts = {name: [scene.prompt for scene in found] for name, found in self.scenes.items()}
        self.sizes = replace(sizes, clean=counts["valid"])

    def group(self, name: str) -> tuple[Rows, Tensor]:
        """Draw and measure a group; return the measures and the clips as they are."""
        clips = self.decode(self.draw(name)[0])
        return self.judged(clips, self.scenes[name]), clips

    def judged(self, clips: Tensor, wanted: Sequence[Scene]) -> Rows:
        """Return the measures of clips of one world, after `unpaint` for the new one."""
        plain = PALETTE.unpaint(clips) if wanted[0].new else clips
        return self.measured(plain, [scene.plain for scene in wanted])

    def rendered(self, prompts: Sequence[str]) -> Tensor:
        """Return the exact clips of the `valid` scenes, which the loss reads."""
        return self.rendered_of("valid")[: len(prompts)]

    def rendered_of(self, name: str) -> Tensor:
        """Return the exact clips of the scenes of a group, on the device: the judge is slow on a CPU."""
        return rendered(self.scenes[name], self.sizes.size, self.sizes.frames, self.device.type)

    @torch.no_grad()
    def autoencoded(self, clips: Tensor) -> Tensor:
        """Return clips as the autoencoder shows them: no weights of the transformer can do better."""
        parts = [self.decode(self.denoiser.encode_video(part)) for part in clips.split(self.sizes.clean)]
        return torch.cat(parts)

    def put(self, weights: dict[str, Tensor]) -> None:
        """Set the weights of the transformer; names without `transformer.`"""
        with torch.no_grad():
            for name, value in self._weights().items():
                value.copy_(weights[name.partition(".")[2]].to(value))


def settings_of(bench: SftBench, out: Path) -> dict[str, Any]:
    """Return what must be equal for all files of a report."""
    counts = {name: len(found) for name, found in bench.scenes.items()}
    sizes = {name: getattr(bench.sizes, name) for name in ("size", "frames", "steps", "guidance")}
    return {"protocol": PROTOCOL, "counts": counts, **sizes, "clips": digest(out / "data")}


def exported(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the transformer in an export; a LoRA is fused into the base model."""
    if (folder / "transformer").is_dir():
        return _joined(folder / "transformer")
    pipe = load(embedded_model(), "cpu")
    pipe.load_lora_weights(str(folder))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {name: value.detach().clone() for name, value in pipe.transformer.named_parameters()}


def _joined(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in read_tensors(file).items()}


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """Return the trained weights in a checkpoint of a run that trains all weights."""
    return {name.partition(".")[2]: value for name, value in read_tensors(folder / "weights.safetensors").items()}


def merged(run: Run, method: str) -> dict[str, Tensor]:
    """Merge the checkpoints of a run with `postgen.merging` and return the weights."""
    place = run.out / "merged" / f"{run.name}.{method}"
    merge(run.checkpoints, place, MergeConfig(method=method))
    return next(_joined(path.parent) for path in place.rglob("*.safetensors"))


class Measuring:
    """Measurement of one run.

    Args:
        bench: the model with its judges.
        name: name of the run, or `base`.
        out: output folder.
        tiny: whether the run is one of `--tiny`.
    """

    def __init__(self, bench: SftBench, name: str, out: Path, *, tiny: bool) -> None:
        self.bench, self.name, self.out = bench, name, out
        self.run = None if name == BASE else Run.named(name, out, tiny=tiny)
        self.place = out / "measured" / f"{name}.json"
        self.found = read_file(self.place, settings_of(bench, out))

    def __call__(self) -> None:
        """Measure what is not measured yet, and write the file after each set of weights."""
        for label, groups, weights in self._points():
            if label not in self.found["points"]:
                if weights is None:
                    self.bench.use(None)
                else:
                    self.bench.put(weights())
                self.found["points"][label] = self._point(label, groups)
                write_file(self.place, self.found)
        if self.run is None:
            clips, wanted = self.bench.rendered_of("new"), self.bench.scenes["new"]
            self.found["exact"] = self.bench.judged(clips, wanted)
            self.found["autoencoded"] = self.bench.judged(self.bench.autoencoded(clips), wanted)
        else:
            self.found["training"] = json.loads(self.run.done.read_text(encoding="utf-8"))
            rows = read_metrics(self.run.folder / "metrics.jsonl")
            self.found["held_out"] = [[row["step"], row["eval_loss"]] for row in rows if "eval_loss" in row]
        self.found |= {"complete": True, "device": device(), "versions": versions()}
        write_file(self.place, self.found)

    def _points(self) -> Iterator[tuple[str, tuple[str, ...], Any]]:
        """Yield the name of each set of weights, the groups to measure, and a function that returns the weights."""
        run = self.run
        if run is None:
            yield BASE, ("new", "old", "valid"), None
            return
        if run.arm != "constant":
            groups = ("new", "valid") if ARMS[run.arm].forks else ("new", "old")
            yield "last", groups, lambda: exported(run.folder / "export")
            return
        for folder in run.checkpoints:
            yield folder.name, ("new", "valid"), lambda folder=folder: checkpoint_weights(folder)
        for method in MERGES:
            yield method, ("new", "valid"), lambda method=method: merged(run, method)

    def _point(self, label: str, groups: Sequence[str]) -> Rows:
        point: Rows = {}
        for group in groups:
            point[group], clips = self.bench.group(group)
            right = point[group]["right"]
            print(f"{self.name}, {label}, {group}: {right.count('1')} of {len(right)} right", flush=True)
            if group in ("new", "old") and label in (BASE, "last"):
                self._sheet(group, clips[:SHOWN])
        point["clean"] = self.bench.flow_matching()
        return point

    def _sheet(self, group: str, clips: Tensor) -> None:
        """Draw the first clips of base and tuned model, same prompts and noise, or keep those of the base model."""
        place = self.out / "measured" / f"base-{group}.safetensors"
        place.parent.mkdir(parents=True, exist_ok=True)
        if self.name == BASE:
            with replacing(place) as part:
                save_file({"clips": bytes_of(clips)}, part)
            return
        theirs, pairs, said = load_file(place)["clips"], [], []
        for row, prompt in enumerate(self.bench.prompts[group][: len(clips)]):
            pairs += [theirs[row], bytes_of(clips[row : row + 1])[0]]
            said += [f"base: {prompt}", self.name]
        target = self.out / "measured" / f"{self.name}.{group}.png"
        sheet(pairs, said, target, columns=1, shown=min(FRAMES_SHOWN, clips.shape[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""

    def work(options: argparse.Namespace) -> None:
        use_fast_matmul()
        Measuring(SftBench(options.device, tiny=options.tiny), options.name, options.out, tiny=options.tiny)()

    return run_job("benchmarks.sft_measure", __doc__, "name of the run, ARM.SEED, or base", OUT, work, argv)


if __name__ == "__main__":
    sys.exit(main())
