"""How good and how fast the rewards are: exact ones on true and spoilt clips, our learned ones on unseen clips, time.

    python -m benchmarks.rewards [--quick] [--device cuda] [--clip FOLDER] [--judge FOLDER] [--before FOLDER]
                                 [--seeds FOLDER ...] [--scenes 256] [--parts exact clip judge single times]

Prints the numbers and writes benchmarks/results/rewards.json (with --quick only prints). With --before and --seeds the
tables of the judge are also made for the weights of those folders, in the same run. With --parts only these are
measured and replaced in the file, and `remeasured` says when, where and with which weights; all the rest keeps the
date and the device at the head of the file. Times are taken on a GPU only, with the published shapes of CLIP L/14,
CLIP H/14 and Qwen2-VL-2B and random weights.
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
#: First seed of the scenes; training takes seeds from 1,000,000 on.
FIRST = 300_000
LEVEL = 2
#: What the learned rewards were trained on and the recipes of the embedded model train at, whatever its own size is.
FRAMES, SIZE = 17, 96


def exact_rows(count: int, device: str) -> dict[str, dict[str, Any]]:
    """Mean score of true clips and of the corruption that each exact reward is made for, by strength."""
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
        """Some of the frames in random order."""
        order = torch.arange(FRAMES).repeat(count, 1)
        for row in range(count):
            own = torch.Generator().manual_seed(row)
            some = torch.randperm(FRAMES, generator=own)[: round(part * FRAMES)]
            order[row, some] = order[row, some[torch.randperm(len(some), generator=own)]]
        return flights[torch.arange(count, device=device)[:, None], order.to(device)]

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
    """Mean of a reward over a batch; a clip without a score is an error."""
    columns: dict[str, Any] = {key: list(value) for key, value in batch.items()}
    values = RewardRunner([name], reward_error="raise")(prompts=[""] * count, **columns).values
    if bool(values.isnan().any()):
        raise RuntimeError(f"{name} gave no score to {int(values.isnan().sum())} of {count} clips")
    return float(values.mean())


def retrieval(reward: Reward, groups: int, device: str) -> dict[str, float]:
    """Share of unseen clips that rank their own caption first among 32 of different sense."""
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
    """Accuracy of the judge on pairs of a clean clip and its corruption, by level and kind."""

    def score(clips: Tensor) -> Tensor:
        return torch.tensor(reward([""] * len(clips), list(clips)))

    found = {f"level {level}": pair_accuracy(score, takes, level) for level in levels}
    table: dict[str, dict[str, float | None]] = {
        level: {kind: None if value != value else value for kind, value in row.items()} for level, row in found.items()
    }
    table["pairs"] = {kind: float(len(takes.rows(kind))) for kind in LEVELS}
    return table


def judge_tables(judges: dict[str, Reward], count: int, device: str, quick: bool) -> dict[str, Any]:
    """What is measured of the judge "now" and of others: pairs of held-out combinations, and constructions.

    Of the others the pairs of all levels are not worth their time: those of the level that the gate reads.
    """
    if "now" not in judges:
        return {"judge_pairs": {}, "judge_pairs_others": {}, "judge_constructions": {}}
    specs = specs_of(FIRST, count, FRAMES, "held_out")
    # Some kinds are seen on collisions alone, which one scene in ten shows.
    specs += [world.sample(FIRST + k, event="collides", split="held_out") for k in range(count // 4)]
    takes = render_takes(specs, SIZE, device)
    others = {name: judged_pairs(judge, takes, (LEVEL,)) for name, judge in judges.items() if name != "now"}
    return {
        "judge_pairs": judged_pairs(judges["now"], takes, range(1, 5)),
        "judge_pairs_others": others,
        "judge_constructions": judge_kinds.table(judges, quick),
    }


def single_gap(rewards: list[Any], device: str, count: int = 8) -> dict[str, float]:
    """Largest difference between a batch of clips (of two sizes) and the same clips one by one, by reward."""
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
        raise RuntimeError("a clip is scored alone but not in a batch, or the other way round")
    gaps = (together - alone).abs().nan_to_num().amax(0).tolist()
    return dict(zip(runner.names, gaps, strict=True))


def times(device: str, clips: int, repeats: int) -> dict[str, dict[str, float]]:
    """Clips a second of whole rewards and of their networks alone, and peak memory, in bfloat16."""
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
    """One of our own learned rewards; None where there are no weights yet."""
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
    """The numbers asked for, as gates; what could not be measured misses its gate."""
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
    parser.add_argument("--quick", action="store_true", help="few clips, no result file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clip", help="export of the method world_clip (default: the shipped weights)")
    parser.add_argument("--judge", help="export of the method world_judge (default: the shipped weights)")
    parser.add_argument("--before", help="another export of world_judge, for a second column of its tables")
    parser.add_argument("--seeds", nargs="*", default=[], help="exports of other runs of the recipe, a column each")
    parser.add_argument(
        "--scenes", type=int, default=256, help="of the judge's pairs, besides a quarter of collisions"
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="measure these again, keep the rest of the file")
    parser.add_argument("--output", default="rewards", help="name or path of the result file")
    return parser.parse_args()


def fingerprint(reward: Reward | None) -> str | None:
    """First digits of the SHA-256 of a learned reward's weights; None without weights."""
    if reward is None:
        return None
    model: Any = reward.function
    file = reward_folder(model.model, model.name.replace("_", "-")) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def measure(args: argparse.Namespace, clip: Reward | None, judges: dict[str, Reward]) -> dict[str, Any]:
    """The parts that are asked for, by the keys of the result file."""
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
    """Measure and print; write the result file unless --quick."""
    args = options()
    if args.parts and "times" in args.parts and not args.device.startswith("cuda"):
        raise SystemExit("times are taken on a GPU only: leave 'times' out of --parts, its old rows then stay")
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
