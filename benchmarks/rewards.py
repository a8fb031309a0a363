"""Quality and speed of the rewards: exact rewards on true and corrupted clips, learned rewards on unseen clips, time.

    python -m benchmarks.rewards [--quick] [--device cuda] [--clip FOLDER] [--judge FOLDER] [--before FOLDER]
                                 [--seeds FOLDER ...] [--scenes 256] [--parts exact clip judge single times]

The command prints the numbers and writes benchmarks/results/rewards.json. With --quick it only prints. With --before
and --seeds, the tables of the judge also have columns for the weights in these folders, measured in the same run. With
--parts, only these parts are measured and replaced in the file. The key `remeasured` records their date, device and
weights; the date and the device at the head of the file apply to all other parts. Times are measured only on a GPU,
with random weights in the published shapes of CLIP L/14, CLIP H/14 and Qwen2-VL-2B.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import judge_kinds
from benchmarks.gates import amend_result, gate, read_result, write_result
from benchmarks.reward_shapes import VIT_L_14, RandomClip, shapes
from postgen import world
from postgen.errors import UserError
from postgen.judges.spoil import LEVELS, Takes, render_takes
from postgen.judges.world_clip import evaluation_groups
from postgen.judges.world_judge import pair_accuracy
from postgen.rewards import Reward, RewardRunner, get_reward
from postgen.rewards.world_net import reward_folder
from postgen.world.scenes import specs_of

PARTS = ("exact", "clip", "judge", "single", "times")
EXACT = ("world", "parabola", "permanence", "depth_consistency")
#: First seed of the scenes. The training uses seeds from 1,000,000 on.
FIRST = 300_000
LEVEL = 2
#: Frames and pixels of the clips, equal to those of the training of the learned rewards and of the embedded model's RL
#: recipes. The default size of the embedded model is larger.
FRAMES, SIZE = 17, 96


def exact_rows(count: int, device: str) -> dict[str, dict[str, Any]]:
    """Return for each exact reward the mean scores of the corruption that it should detect, by strength.

    Strength 0 means true clips.
    """
    specs = [world.sample(FIRST + k, camera="static", split="all") for k in range(count)]
    frames = world.render(specs, num_frames=FRAMES, size=SIZE, device=device)
    empty = [world.Spec(bodies=(world.Body(colour="red", shape="ball", position=(0.0, 900.0, 0.6)),))] * count
    ground = world.render(empty, num_frames=FRAMES, size=SIZE, geometry=False, device=device).rgb_BF3HW
    flying = [world.sample(FIRST + k, event=("falls", "bounces")[k % 2], camera="static") for k in range(count)]
    flights = world.render(flying, num_frames=FRAMES, size=SIZE, geometry=False, device=device).rgb_BF3HW
    rng = torch.Generator(device).manual_seed(0)
    noise = torch.randn(frames.rgb_BF3HW.shape, generator=rng, device=device)

    def vanished(gone: float) -> Tensor:
        clips = frames.rgb_BF3HW.clone()
        keep = FRAMES - int(gone)
        clips[:, keep:] = ground[:, keep:]
        return clips

    def judder(part: float) -> Tensor:
        """Return the clips with a share `part` of the frames in random order."""
        order = torch.arange(FRAMES).repeat(count, 1)
        for row in range(count):
            own = torch.Generator().manual_seed(row)
            some = torch.randperm(FRAMES, generator=own)[: round(part * FRAMES)]
            order[row, some] = order[row, some[torch.randperm(len(some), generator=own)]]
        return flights[torch.arange(count, device=device)[:, None], order.to(device)]

    # For each reward: the strengths of its corruption, and the batch at a strength.
    depth, flow = frames.depth_BFHW, frames.flow_BF2HW
    assert depth is not None
    assert flow is not None
    flicker = torch.randn(count, FRAMES, 1, 1, generator=rng, device=device)
    graded: dict[str, tuple[tuple[float, ...], Callable[[float], dict[str, Any]]]] = {
        "world": (
            (0.0, 0.1, 0.2, 0.5),
            lambda s: {"completions": (frames.rgb_BF3HW + s * noise).clamp(0, 1), "spec": specs},
        ),
        "parabola": ((0.0, 0.25, 0.5, 1.0), lambda s: {"completions": judder(s), "spec": flying}),
        "permanence": ((0, 2, 4, 8), lambda s: {"completions": vanished(s), "spec": specs}),
        "depth_consistency": (
            (0.0, 0.03, 0.1, 0.3),
            lambda s: {
                "completions": frames.rgb_BF3HW,
                "depth": depth * (s * flicker).exp(),
                "flow": flow,
            },
        ),
    }
    return {
        name: {"strengths": strengths, "scores": [mean_score(name, count, spoil(s)) for s in strengths]}
        for name, (strengths, spoil) in graded.items()
    }


def mean_score(name: str, count: int, batch: dict[str, Any]) -> float:
    """Return the mean of a reward over a batch.

    Raises:
        RuntimeError: if a clip has no score.
    """
    columns: dict[str, Any] = {key: list(value) for key, value in batch.items()}
    values = RewardRunner([name], reward_error="raise")(prompts=[""] * count, **columns).values
    if bool(values.isnan().any()):
        raise RuntimeError(f"{name} returned no score for {int(values.isnan().sum())} of {count} clips")
    return float(values.mean())


def retrieval(reward: Reward, groups: int, device: str) -> dict[str, float]:
    """Return the share of unseen clips for which their own caption ranks first among 32 with different meanings."""
    hits: dict[str, list[float]] = {"seen combinations": [], "held-out combinations": []}
    model: Any = reward.function
    for number, specs in enumerate(evaluation_groups(groups)):
        clips = world.render(specs, num_frames=FRAMES, size=SIZE, geometry=False, device=device).rgb_BF3HW
        with torch.no_grad():
            scores = model.embed_video(list(clips)) @ model.embed_text([world.simple_caption(s) for s in specs]).T
        right = scores.argmax(1).cpu() == torch.arange(len(specs))
        hits[("seen combinations", "held-out combinations")[number % 2]].append(float(right.float().mean()))
    means = {name: sum(values) / len(values) for name, values in hits.items() if values}
    return {"all": sum(map(sum, hits.values())) / groups, **means}


def judged_pairs(reward: Reward, takes: Takes, levels: Iterable[int]) -> dict[str, dict[str, float | None]]:
    """Return the accuracy of the judge on pairs of a clean clip and its corruption, by level and kind."""

    def score(clips: Tensor) -> Tensor:
        return torch.tensor(reward([""] * len(clips), list(clips)))

    found = {f"level {level}": pair_accuracy(score, takes, level) for level in levels}
    table: dict[str, dict[str, float | None]] = {
        level: {kind: None if value != value else value for kind, value in row.items()} for level, row in found.items()
    }
    table["pairs"] = {kind: float(len(takes.rows(kind))) for kind in LEVELS}
    return table


def judge_tables(judges: dict[str, Reward], count: int, device: str, quick: bool) -> dict[str, Any]:
    """Return the tables of the judge "now" and of other judges: pairs of held-out combinations, and constructions.

    To save time, the other judges are measured only on the pairs of the level that the gate uses.
    """
    if "now" not in judges:
        return {"judge_pairs": {}, "judge_pairs_others": {}, "judge_constructions": {}}
    specs = specs_of(FIRST, count, FRAMES, "held_out")
    # Some kinds of corruption need a collision, which only one scene in ten has. So add scenes with collisions.
    specs += [world.sample(FIRST + k, event="collides", split="held_out") for k in range(count // 4)]
    takes = render_takes(specs, SIZE, device)
    others = {name: judged_pairs(judge, takes, (LEVEL,)) for name, judge in judges.items() if name != "now"}
    return {
        "judge_pairs": judged_pairs(judges["now"], takes, range(1, 5)),
        "judge_pairs_others": others,
        "judge_constructions": judge_kinds.table(judges, quick),
    }


def single_gap(rewards: list[Any], device: str, count: int = 8) -> dict[str, float]:
    """Return for each reward the largest difference between scores in a batch and scores of the same clips one by one.

    The batch has clips of two lengths.

    Raises:
        RuntimeError: if a clip has a score only in the batch or only alone.
    """
    specs = [world.sample(FIRST + k, camera="static", split="all") for k in range(count)]
    frames = world.render(specs, num_frames=FRAMES, size=SIZE, device=device)
    cut = [9 if k % 3 == 2 else FRAMES for k in range(count)]
    assert frames.depth_BFHW is not None
    assert frames.flow_BF2HW is not None
    columns: dict[str, Any] = {
        "prompts": [world.simple_caption(spec) for spec in specs],
        "completions": [clip[:n] for clip, n in zip(frames.rgb_BF3HW, cut, strict=True)],
        "depth": [d[:n] for d, n in zip(frames.depth_BFHW, cut, strict=True)],
        "flow": [f[: n - 1] for f, n in zip(frames.flow_BF2HW, cut, strict=True)],
        "spec": specs,
    }
    runner = RewardRunner(rewards, device=device, reward_error="raise")
    together = runner(**columns, must_score=False).values
    rows: list[dict[str, Any]] = [{key: [values[k]] for key, values in columns.items()} for k in range(count)]
    alone = torch.cat([runner(**row, must_score=False).values for row in rows])
    if not torch.equal(together.isnan(), alone.isnan()):
        raise RuntimeError("a clip has a score alone but not in a batch, or in a batch but not alone")
    gaps = (together - alone).abs().nan_to_num().amax(0).tolist()
    return dict(zip(runner.names, gaps, strict=True))


def times(device: str, clips: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return clips per second of whole rewards and of only their networks, and the peak memory in GiB, in bfloat16."""
    rng = torch.Generator(device).manual_seed(0)
    videos = [torch.rand(FRAMES, 3, 480, 832, generator=rng, device=device) for _ in range(clips)]
    prompts = [f"a red ball rolls left behind {k} blue cubes" for k in range(clips)]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in shapes(Path(folder), " ".join(prompts), device, torch.bfloat16).items():
            model.load()
            torch.cuda.reset_peak_memory_stats()
            extra = {"fps": 8.0} if name.startswith("qwen") else {}
            with torch.no_grad():
                whole = _rate(lambda m=model, e=extra: m(prompts, videos, **e), clips, repeats)  # type: ignore[misc]
                peak = torch.cuda.max_memory_allocated() / 2**30
                alone = _rate(model.forward_only(videos, prompts), clips, repeats)
            rows[name] = {"clips_per_s": whole, "forward_only_clips_per_s": alone, "peak_gib": peak}
            del model
            torch.cuda.empty_cache()
    return rows


def _rate(call: Callable[[], Any], clips: int, repeats: int) -> float:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return clips * repeats / (time.perf_counter() - start)


def learned(name: str, folder: str | None) -> Reward | None:
    """Load one of postgen's own learned rewards.

    Returns None after a printed line if `folder` is None and the reward has no weights yet.
    """
    reward = get_reward(name, **({} if folder is None else {"model": folder}))
    try:
        reward.load()
    except UserError as error:
        if folder is not None:
            raise
        print(f"{name} is not measured: {error}")
        return None
    return reward


def gates(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gates. A gate without a measurement has the value None and is not met."""
    pairs, found = result["judge_pairs"], result["world_clip_retrieval"]
    weakest = min(value for value in pairs[f"level {LEVEL}"].values() if value is not None) if pairs else None
    rows = [
        gate("judge_pair_accuracy_min", weakest, ">=", 0.9),
        gate("world_clip_retrieval_at_1", found["all"] if found else None, ">=", 0.8),
        gate("batch_equals_single", max(result["batch_equals_single"].values()), "<=", 1e-4),
    ]
    for name in ("clip_l", "clip_h", "qwen2_vl_2b"):
        row = result["times"].get(name, {})
        rows.append(
            gate(f"clips_per_s_{name}", row.get("clips_per_s"), ">=", 0.5 * row.get("forward_only_clips_per_s", 1.0))
        )
    for name, row in result["exact"].items():
        rows += [
            gate(f"{name}_true_clips", row["scores"][0], ">=", 0.95),
            gate(f"{name}_spoilt_clips", row["scores"][-1], "<=", 0.2),
        ]
    return rows


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use few clips and write no result file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clip", help="folder exported by the method world_clip (default: the shipped weights)")
    parser.add_argument("--judge", help="folder exported by the method world_judge (default: the shipped weights)")
    parser.add_argument("--before", help="another folder exported by world_judge, for a second column of its tables")
    parser.add_argument("--seeds", nargs="*", default=[], help="exports of other runs of the recipe, one column each")
    parser.add_argument(
        "--scenes", type=int, default=256, help="scenes for the judge's pairs; a quarter as many collisions are added"
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="measure only these parts and keep the others")
    parser.add_argument("--output", default="rewards", help="name or path of the result file")
    return parser.parse_args()


def fingerprint(reward: Reward | None) -> str | None:
    """Return the first 12 digits of the SHA-256 of a learned reward's weights, or None for no reward."""
    if reward is None:
        return None
    model: Any = reward.function
    file = reward_folder(model.model, model.name.replace("_", "-")) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def measure(args: argparse.Namespace, clip: Reward | None, judges: dict[str, Reward]) -> dict[str, Any]:
    """Measure the requested parts (default: all); return them under the keys of the result file."""
    quick, device = args.quick, args.device
    own = [reward for reward in (clip, judges.get("now")) if reward is not None]
    shape = {"width": 64, "layers": 2} if quick else {}
    random = {**VIT_L_14, "vision_cfg": {**VIT_L_14["vision_cfg"], **shape}}
    alike: list[Any] = [*EXACT, "motion_floor", "brightness_band", "sharpness_band", RandomClip(random), *own]

    def timed() -> dict[str, Any]:
        return times(device, 4 if quick else 16, 2 if quick else 5) if device.startswith("cuda") else {}

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "exact": lambda: {"exact": exact_rows(4 if quick else 48, device)},
        "clip": lambda: {"world_clip_retrieval": retrieval(clip, 2 if quick else 16, device) if clip else {}},
        "judge": lambda: judge_tables(judges, 8 if quick else args.scenes, device, quick),
        "single": lambda: {"batch_equals_single": single_gap(alike, device)},
        "times": lambda: {"times": timed()},
    }
    result: dict[str, Any] = {}
    for part in args.parts or PARTS:
        result |= parts[part]()
    return result


def main() -> None:
    """Measure and print the rewards; write the result file, except with --quick."""
    args = options()
    if args.parts and "times" in args.parts and not args.device.startswith("cuda"):
        raise SystemExit(
            f"--device {args.device}: times are measured on a GPU only. Leave 'times' out of --parts; the file keeps"
            " the old times"
        )
    # Load the learned rewards, and record which weights they have.
    clip = learned("world_clip", args.clip)
    folders = {"now": args.judge, "before": args.before, **{f"seed {k + 1}": f for k, f in enumerate(args.seeds)}}
    found = {name: learned("world_judge", f) for name, f in folders.items() if name == "now" or f}
    judges = {name: reward for name, reward in found.items() if reward is not None}
    for reward in judges.values():
        reward.load(args.device)
    if clip:
        clip.load(args.device)
    settings = {"device": args.device, "first_seed": FIRST, "frames": FRAMES, "size": SIZE, "level": LEVEL}
    weights = {"world_clip": fingerprint(clip), **{f"world_judge {n}": fingerprint(j) for n, j in judges.items()}}
    settings |= {"scenes": args.scenes, "weights": weights}
    # With --parts, the gates also use the stored values of the other parts.
    measured = measure(args, clip, judges)
    result = {**read_result(args.output), **measured} if args.parts and not args.quick else measured
    for key, value in measured.items():
        print(key, value)
    rows = gates(result) if not (args.quick and args.parts) else []
    for row in rows:
        print("ok " if row["ok"] else "NO ", row["name"], row["value"], row["op"], row["target"])
    if args.quick:
        return
    if args.parts:
        amend_result(args.output, measured, settings, rows)
    else:
        write_result(args.output, {"settings": settings, **measured, "gates": rows})


if __name__ == "__main__":
    main()
