"""Agreement of the judge of the synthetic world with people on constructed, generated and mirrored clips.

The verdicts of people are in benchmarks/data. `benchmarks.world_constructions` and `benchmarks.world_eye_clips`
describe how people give them. They were written before the judge was applied to the clips, and those of the fresh draw
of constructions after the judge was frozen. There are five draws of generated clips: the judge was improved on the
first four, one after the other, and is measured on the last.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import world_eye_clips
from benchmarks.gates import gate
from benchmarks.world_constructions import SEED, Construction, draw, verdicts
from benchmarks.world_eye_clips import FIRST, FIRST_FIFTH, FIRST_FOURTH, FIRST_FRESH, FIRST_THIRD, weights_of
from benchmarks.world_kinds.motion import turned
from postgen import world
from postgen.errors import UserError
from postgen.world.check import Report, check, check_batch
from postgen.world.spec import COLOURS, Spec

DATA = Path(__file__).with_name("data")
#: Sets of clips of the embedded model that a person judged: file of the verdicts and first seed. The judge was
#: improved on all sets except the last, which nobody used to change the judge. So the gate uses only the last set.
SETS = {
    "generated": ("world_generated.json", FIRST),
    "generated_fresh": ("world_generated_fresh.json", FIRST_FRESH),
    "generated_third": ("world_generated_third.json", FIRST_THIRD),
    "generated_fourth": ("world_generated_fourth.json", FIRST_FOURTH),
    "generated_fifth": ("world_generated_fifth.json", FIRST_FIFTH),
}
#: The set that a second person judged too.
TWO_PERSONS = "generated_third"
#: Seed of the fresh draw. To avoid a choice, it is the first six digits of the hash of the commit that froze the
#: judge.
FRESH_SEED = 0x702D60

COLUMNS = ("wrong", "wrong_passed", "right", "right_failed", "unclear")
Table = dict[str, dict[str, int]]


def judged(clip: Tensor, prompt: str) -> Report | None:
    """Return the report of the judge on a clip, or None if the judge refuses the prompt; `passes` is False then."""
    try:
        return check(clip, prompt)
    except UserError:
        return None


def passes(report: Report | None) -> bool:
    """Return whether the judge calls the clip fully right."""
    return report is not None and report.all_right


def constructed(clips: Iterable[Construction], device: str) -> tuple[Table, list[dict[str, Any]], float]:
    """Compare the judge with a person's verdicts on constructed clips.

    Returns:
        The table of counts by kind, the clips on which judge and person differ, and the share of clips whose mirror
        image gets the same verdict from the judge.
    """
    said, table, apart = verdicts(), {}, []
    alike: list[bool] = []
    for made in clips:
        eye = said[made.name].partition(":")[0]
        row = table.setdefault(made.kind, dict.fromkeys(COLUMNS, 0))
        row[eye] += 1
        clip = made.clip.to(device)
        report = judged(clip, made.prompt)
        alike.append(passes(report) == passes(judged(clip.flip(-1), turned(made.prompt))))
        row["wrong_passed"] += eye == "wrong" and passes(report)
        row["right_failed"] += eye == "right" and not passes(report)
        if (eye == "wrong" and passes(report)) or (eye == "right" and not passes(report)):
            score = None if report is None else round(report.score, 3)
            apart.append({"clip": made.name, "prompt": made.prompt, "eye": said[made.name], "score": score})
    return table, apart, sum(alike) / len(alike)


def share(table: Table, part: str, whole: str) -> float:
    """Return the sum of column `part` over all kinds, divided by the sum of column `whole`."""
    return sum(row[part] for row in table.values()) / max(1, sum(row[whole] for row in table.values()))


def check_model(kept: Mapping[str, Path | None], model: Path) -> None:
    """Check that people judged the clips of this model.

    Args:
        kept: for each set of `SETS` the folder that holds its clips or will hold them, or None.
        model: folder of the model.

    Raises:
        UserError: if people judged the clips of another model, if a folder holds clips of another model or of other
            seeds, or if verdicts are missing.
    """
    for name in SETS:
        told, folder = eye_verdicts(name), kept.get(name)
        known = told["denoiser_sha256"]
        if folder is None or not (folder / "rows.json").is_file():
            if weights_of(model) != known:
                raise UserError(
                    f"people did not judge the clips of {model}: give the model whose denoiser has a SHA-256 that"
                    f" begins with {known}"
                )
            continue
        there = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        if there["denoiser_sha256"] != known:
            raise UserError(
                f"{folder} holds clips of another model (denoiser {there['denoiser_sha256']}): give clips of the"
                f" model that people judged (denoiser {known})"
            )
        if any(there["clips"].get(clip, {}).get("seed") != row["seed"] for clip, row in told["clips"].items()):
            raise UserError(
                f"{folder} holds clips with other seeds than {name}: make them with"
                f" `python -m benchmarks.world_eye_clips FOLDER --first {SETS[name][1]}`"
            )


def eye_verdicts(name: str) -> Any:
    """Read a person's verdicts on a set of `SETS`: the denoiser's hash, and prompt, seed and verdict of each clip.

    Raises:
        UserError: if the file of the verdicts does not exist.
    """
    file, first = SETS[name]
    if not (DATA / file).is_file():
        raise UserError(
            f"{DATA / file} is missing: make clips with `python -m benchmarks.world_eye_clips FOLDER --first {first} "
            f"--sheets`, and write a person's verdicts into this file in the form of {SETS['generated'][0]}"
        )
    return json.loads((DATA / file).read_text(encoding="utf-8"))


def generated(name: str, device: str, kept: Path | None, model: Path) -> dict[str, Any]:
    """Return the agreement of the judge with a person on the set `name` of `SETS`.

    The clips are those in the folder `kept`. If it is None or has no clips, the clips are generated with `model`.
    """
    rows = eye_verdicts(name)["clips"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = kept or Path(temporary)
        if not (folder / "rows.json").is_file():
            world_eye_clips.make(folder, model, device, SETS[name][1])
        clips = world_eye_clips.kept_clips(folder)
    apart, agree, pairs = [], [], 0
    seen: Counter[str] = Counter()
    for clip, row in rows.items():
        eye = row["verdict"].partition(":")[0]
        seen[eye] += 1
        report = judged(clips[clip].to(device).float() / 255, row["prompt"])
        if eye != "unclear":
            agree.append((eye == "right") == passes(report))
            pairs += clip.startswith("2")
            if not agree[-1]:
                apart.append({"clip": clip, "prompt": row["prompt"], "eye": row["verdict"], "judge": passes(report)})
    return {
        "clips": len(rows),
        "judged": len(agree),
        "of_two": pairs,
        "by_eye": dict(seen),
        "agree": sum(agree) / len(agree),
        "apart": apart,
    }


def second_eye() -> dict[str, float]:
    """Return how often two people agree on the set `TWO_PERSONS`, which is an upper bound for any judge.

    Clips that either person calls unclear do not count.
    """
    rows = eye_verdicts(TWO_PERSONS)["clips"].values()
    said = [tuple(row[who].partition(":")[0] for who in ("verdict", "second")) for row in rows]
    sure = [first == second for first, second in said if "unclear" not in (first, second)]
    return {"clips": len(sure), "agree": sum(sure) / len(sure)}


_EXCHANGED = {"left": "right", "right": "left", "closer": "away", "away": "closer"}


def invariance(specs: Sequence[Spec], clips: Tensor, make: Any) -> dict[str, float]:
    """Return the share of true clips whose verdict stays the same after a change of both the clip and the prompt.

    `mirror` flips the clip from left to right, `palette` exchanges the colours of the bodies, and `time` plays the
    clip backwards (only clips whose bodies stay or move).
    """
    before = [r.all_right for r in check_batch(clips, specs)]
    captions = [world.simple_caption(spec) for spec in specs]
    mirrored = check_batch(clips.flip(-1), [turned(text) for text in captions])
    names = list(COLOURS)
    other = {name: names[(k + 3) % len(names)] for k, name in enumerate(names)}
    permuted = [replace(s, bodies=tuple(replace(b, colour=other[b.colour]) for b in s.bodies)) for s in specs]
    repainted = check_batch(make(permuted, clips.shape[1]), permuted)
    back = [k for k, s in enumerate(specs) if all(b.event == "stays" or b.event.startswith("moves") for b in s.bodies)]
    asked = [" ".join(_EXCHANGED.get(word, word) for word in captions[k].split()) for k in back]
    reversed_ = check_batch(clips[back].flip(1), asked)
    return {
        "mirror": _alike(before, mirrored),
        "palette": _alike(before, repainted),
        "time": _alike([before[k] for k in back], reversed_),
    }


def _alike(before: Sequence[bool], after: Sequence[Report]) -> float:
    return sum(a == b.all_right for a, b in zip(before, after, strict=True)) / len(before)


def measure(device: str, kept: Mapping[str, Path | None], model: Path) -> dict[str, Any]:
    """Return all tables: constructions of both draws, the previous judge's results on them, clips of all `SETS`."""
    first, apart, mirror = constructed(draw(SEED), device)
    fresh, apart_fresh, mirror_fresh = constructed(draw(FRESH_SEED, fresh=True), device)
    return {
        "constructed": first,
        "constructed_fresh": fresh,
        "apart": apart + apart_fresh,
        "mirror": min(mirror, mirror_fresh),
        "before": json.loads((DATA / "world_before.json").read_text(encoding="utf-8")),
        **{name: generated(name, device, kept.get(name), model) for name in SETS},
        "second_eye": second_eye(),
    }


def gates(eye: dict[str, Any], same: dict[str, float], true_right: float) -> list[dict[str, Any]]:
    """Return the gates. `eye_agreement` uses only the last set of `SETS`, on which the judge was not improved."""
    tables = (eye["constructed"], eye["constructed_fresh"])
    right = sum(row["right"] for table in tables for row in table.values())
    failed = sum(row["right_failed"] for table in tables for row in table.values())
    return [
        gate("wrong_passed", share(tables[0], "wrong_passed", "wrong"), "<=", 0.03),
        gate("wrong_passed_fresh", share(tables[1], "wrong_passed", "wrong"), "<=", 0.05),
        gate("right_failed", failed / right, "<=", 0.03),
        gate("mirror_invariance", min(eye["mirror"], same["mirror"]), "==", 1),
        gate("eye_agreement", eye[[*SETS][-1]]["agree"], ">=", 0.95),
        gate("true_clips_right", true_right, ">=", 0.98),
        gate("constructions", len(verdicts()), ">=", 400),
    ]
