"""Agreement of the judge with people on all draws of generated clips, with edge networks trained on other cubes.

    python -m benchmarks.world_cube_cross FOLDER --cubes FOLDER --generated FOLDER --generated-fresh FOLDER
        --generated-third FOLDER --generated-fourth FOLDER --generated-fifth FOLDER

FOLDER is the folder of `postgen.judges.world_edges`, with first.safetensors and looked.safetensors. --cubes is the
folder of `benchmarks.world_cube_clips`, with the new cubes. Each clip is judged once, and the inputs of the network
are recorded, so that other networks can be tried in seconds. The recorded windows of the new cubes are also training
data. The limit of a network that was trained on the new cubes is chosen on them by cross-validation: the value of each
cube comes from a network that was trained without it. The command prints a table and writes
benchmarks/results/world_cubes.json.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gates import write_result
from benchmarks.world_cube_clips import kept, labels
from benchmarks.world_edge_windows import LEARNED
from benchmarks.world_eye import SETS, eye_verdicts, judged, passes
from benchmarks.world_eye_clips import kept_clips
from postgen.judges.edge_clips import as_bytes
from postgen.judges.world_edges import Bag, learn_looked, read_bags, read_net, write_net
from postgen.world.check import edges, steady
from postgen.world.check.tracks import Track
from postgen.world.parse import read
from postgen.world.spec import COLOURS

#: Number of folds of the new cubes in the cross-validation, and the limits that are tried.
_FOLDS, _LIMITS = 5, [k / 20 for k in range(-40, 61)]
#: Recorded in place of the network's output: `_SURE` minus the number of the window. So no window counts as round.
_SURE = -1_000_000
#: Smallest number of frames for which the judge uses the network.
_LEAST = 4


@dataclass(frozen=True, slots=True)
class Cube:
    """Inputs of the network for one cube: windows (n,2,CELLS,CELLS), their areas, and `facets.roundness` of each."""

    window: Tensor
    area: Tensor
    facets: Tensor


@dataclass(frozen=True, slots=True)
class Shot:
    """A judged clip: whether the judge passes it when the network finds nothing round, and its cubes by colour."""

    passes: bool
    cubes: dict[str, Cube]


@contextmanager
def using(**changed: Any) -> Iterator[None]:
    """Replace attributes of the module `edges` inside the `with` block."""
    before = {name: getattr(edges, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(edges, name, value)
        edges.network.cache_clear()
        yield
    finally:
        for name, value in before.items():
            setattr(edges, name, value)
        edges.network.cache_clear()


def recorded(clip_F3HW: Tensor, prompt: str) -> Shot:
    """Judge a clip (uint8) as if the network found nothing round, and record the inputs of the network."""
    asked: list[tuple[Tensor, Tensor]] = []
    tracks: list[Track] = []

    def answer(window: Tensor, area: Tensor) -> Tensor:
        start = sum(len(one) for one, _ in asked)
        asked.append((window, area))
        return _SURE - torch.arange(start, start + len(window), dtype=torch.float32)

    real = steady.edges

    def spy(track: Track, name: str) -> float:
        if name == "cube":
            tracks.append(track)
        return real(track, name)

    # Judge the clip with the recording functions in place.
    steady.edges = spy  # the judge reads `edges` from this module at every call
    try:
        with using(roundness=answer):
            right = passes(judged(clip_F3HW.float() / 255, prompt))
    finally:
        steady.edges = real
    # Collect the recorded inputs of each cube in the prompt.
    reading = read(prompt)
    names = [body.colour for body in reading.scene.bodies if body.shape == "cube"] if reading else []
    cubes = {}
    for name in names:
        own = [steady.looked_at(track) for track in tracks if track.colour == list(COLOURS).index(name)]
        pieces = max(own, key=len, default=[])
        if len(pieces) >= _LEAST:
            numbers = [round(_SURE - p.soft) for p in pieces if p.soft is not None]
            window, area = (torch.cat(part)[numbers] for part in zip(*asked, strict=True))
            cubes[name] = Cube(window, area, torch.tensor([p.round[0] for p in pieces if p.round is not None]))
    return Shot(right, cubes)


def values(weights: Path, cubes: Iterable[Cube]) -> list[float]:
    """Return for each cube the value that `steady.edges` compares with its limits, with the given weights."""
    with using(WEIGHTS=weights):
        return [steady.soft_value(edges.roundness(c.window, c.area).tolist(), c.facets.tolist()) for c in cubes]


def mistakes(weights: Path, limit: float, shots: dict[str, Shot], eye: dict[str, bool]) -> dict[str, int]:
    """Count the clips, and those on which the judge differs from a person (`eye`: name of the clip -> right)."""
    said = iter(values(weights, (cube for name in eye for cube in shots[name].cubes.values())))
    wrong_passed = right_failed = 0
    for name, right in eye.items():
        round_ones = [value > limit for value in (next(said) for _ in shots[name].cubes)]
        good = shots[name].passes and not any(round_ones)
        wrong_passed += good and not right
        right_failed += right and not good
    return {"clips": len(eye), "wrong_passed": wrong_passed, "right_failed": right_failed}


def pairs_right(good: Sequence[float], bad: Sequence[float]) -> float:
    """Return the share of pairs (cube, no cube) in which the cube has the lower value; ties count half."""
    more = torch.tensor(bad)[:, None] - torch.tensor(good)
    return float(((more > 0).float() + 0.5 * (more == 0)).mean())


def best_limit(good: Sequence[float], bad: Sequence[float]) -> float:
    """Return the limit with the fewest mistakes; of several such limits, the middle one."""
    count = [sum(v > limit for v in good) + sum(v <= limit for v in bad) for limit in _LIMITS]
    best = [limit for limit, wrong in zip(_LIMITS, count, strict=True) if wrong == min(count)]
    return best[len(best) // 2]


@contextmanager
def learned(first: Path, bags: Sequence[Bag]) -> Iterator[Path]:
    """Train the second stage on `bags` and yield the path of the weights; without bags, those of the first stage."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        write_net(learn_looked(read_net(first), bags) if bags else read_net(first), path)
        yield path


@contextmanager
def learned_each(first: Path, bags: dict[str, list[Bag]]) -> Iterator[dict[str, Path]]:
    """Call `learned` for each draw, and yield the paths of the weights by draw."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(learned(first, part)) for name, part in bags.items()}


@dataclass(frozen=True, slots=True)
class Held:
    """All data: the draws with a person's verdicts, and the new cubes whose label is not "unclear"."""

    first: Path
    draws: dict[str, tuple[dict[str, Shot], dict[str, bool]]]
    cubes: list[Cube]
    bags: list[Bag]

    def chosen(self, said: Sequence[float]) -> tuple[float, float]:
        """Return the best limit for the values `said` of the new cubes, and the share of pairs in the right order."""
        both = list(zip(said, [none for _, none in self.bags], strict=True))
        good, bad = [value for value, none in both if not none], [value for value, none in both if none]
        return best_limit(good, bad), pairs_right(good, bad)


def hold(args: argparse.Namespace) -> Held:
    """Judge and record all clips."""
    draws = {}
    for name in SETS:
        clips, told = kept_clips(getattr(args, name)), eye_verdicts(name)["clips"]
        eye = {k: row["verdict"] == "right" for k, row in told.items() if not row["verdict"].startswith("unclear")}
        draws[name] = ({k: recorded(clips[k], told[k]["prompt"]) for k in eye}, eye)
    said, cubes, bags = labels(), [], []
    for row, clip in kept(args.cubes):
        wanted = [colour for colour in row.cubes if said.get((row.name, colour), "unclear") != "unclear"]
        shot = recorded(clip, row.prompt) if wanted else Shot(False, {})
        for colour in wanted:
            if colour in shot.cubes:
                cubes.append(shot.cubes[colour])
                bags.append((as_bytes(cubes[-1].window), said[row.name, colour] == "not"))
    return Held(args.folder / "first.safetensors", draws, cubes, bags)


def out_of_fold(held: Held, more: Sequence[Bag]) -> list[float]:
    """Return the value of each new cube from a network trained on the other folds and on `more`."""
    order, found = list(range(len(held.bags))), [0.0] * len(held.bags)
    random.Random(0).shuffle(order)
    for fold in range(_FOLDS):
        out = order[fold::_FOLDS]
        with learned(held.first, [*more, *(bag for k, bag in enumerate(held.bags) if k not in out)]) as weights:
            for k, value in zip(out, values(weights, [held.cubes[k] for k in out]), strict=True):
                found[k] = value
    return found


def judged_with(held: Held, weights: dict[str, Path], limit: float) -> dict[str, Any]:
    """Return the mistakes of each draw, judged with its own weights, and the sum over all draws."""
    rows = {name: mistakes(weights[name], limit, *held.draws[name]) for name in held.draws}
    rows["all"] = {key: sum(row[key] for row in rows.values()) for key in ("clips", "wrong_passed", "right_failed")}
    agree = {name: 1 - (row["wrong_passed"] + row["right_failed"]) / row["clips"] for name, row in rows.items()}
    return {"limit": limit, "draws": rows, "agree": agree}


def table(held: Held, looked: Path) -> dict[str, Any]:
    """Measure networks that were trained on different data in addition to prisms.

    Each network is measured with the limit of the judge and with the best limit on the new cubes.
    """
    usual, rows = sum(steady._SOFT) / 2, {}

    def add(name: str, weights: dict[str, Path], said: Sequence[float]) -> None:
        limit, pairs = held.chosen(said)
        for by in (usual, limit):
            rows[f"{name}, limit {by:.2f}"] = judged_with(held, weights, by) | {"pairs": pairs}

    add("shipped", dict.fromkeys(held.draws, edges.WEIGHTS), values(edges.WEIGHTS, held.cubes))
    with learned(held.first, []) as weights:
        add("prisms alone", dict.fromkeys(held.draws, weights), values(weights, held.cubes))
    with learned(held.first, held.bags) as weights:
        add("new cubes", dict.fromkeys(held.draws, weights), out_of_fold(held, []))
    draws = {name: read_bags(looked, but=_number(name)) for name in held.draws}
    with learned(held.first, read_bags(looked)) as weights:
        said = values(weights, held.cubes)
    with learned_each(held.first, draws) as by_draw:
        add("other draws", by_draw, said)
    with learned_each(held.first, {name: [*bags, *held.bags] for name, bags in draws.items()}) as by_draw:
        add("other draws, new cubes", by_draw, out_of_fold(held, read_bags(looked)))
    return rows


def _number(draw: str) -> int | None:
    return LEARNED.index(draw) if draw in LEARNED else None


def main() -> None:
    """Record the clips, train the networks, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of postgen.judges.world_edges")
    parser.add_argument("--cubes", type=Path, required=True, help="folder of benchmarks.world_cube_clips")
    for name in SETS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=Path, required=True, help="folder of the clips of this set"
        )
    args = parser.parse_args()
    torch.set_num_threads(1)
    held = hold(args)
    rows = table(held, args.folder / "looked.safetensors")
    for name, row in rows.items():
        print(name, round(row["pairs"], 3), row["draws"]["all"], {k: round(v, 3) for k, v in row["agree"].items()})
    none = sum(wrong for _, wrong in held.bags)
    write_result("world_cubes", {"cubes": len(held.bags), "none": none, "networks": rows, "gates": []})


if __name__ == "__main__":
    main()
