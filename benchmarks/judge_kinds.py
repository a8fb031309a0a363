"""How well the learned `world_judge` separates right clips from clips that are wrong for any prompt.

The clips are the constructions of `benchmarks.world_kinds`, with a person's verdicts. They are not in the training
data of the judge, which is trained on corrupted renders (`postgen.judges.spoil`); other code makes these, with other
faults. `benchmarks.rewards` writes the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.world_constructions import SEED, Construction, draw, verdicts
from benchmarks.world_eye import FRESH_SEED
from postgen.rewards import Reward

#: Kinds of clips that are wrong for any prompt -> the training corruption with a similar fault, or "" if there is
#: none.
WRONG = {
    **dict.fromkeys(("jumps once", "jumps closer", "leaps on its way"), "teleport"),
    **dict.fromkeys(("trembles", "shaky way"), "tremble"),
    **dict.fromkeys(("shuffled frames", "swapped blocks"), ""),
    **dict.fromkeys(("extra grey", "extra light grey", "extra black", "extra white", "extra dull"), "dull"),
    **dict.fromkeys(("extra small", "many small coloured", "many small grey"), "specks"),
    **dict.fromkeys(("extra in changing colours", "extra flashes"), "iridescent"),
    **dict.fromkeys(("extra at the end", "size swells", "fades out"), ""),
    "extra flat patch": "outline",
    "ghost": "ghost",
    **dict.fromkeys(("flickers", "blinks", "vanishes"), "vanishing"),
    "strobes": "strobe",
    "picture strobes": "flicker",
    "size flickers": "size jitter",
    **dict.fromkeys(("shape alternates", "shape turns"), "shape jitter"),
    **dict.fromkeys(("colour turns", "colour flickers", "colours exchanged"), "recolouring"),
    **dict.fromkeys(("stops in mid air", "hangs in the air", "bounces on nothing", "floats along"), "floating"),
    "slides after landing": "slides off",
    **dict.fromkeys(("rises", "only rises and sinks"), ""),
    "hits without contact": "gap",
    **dict.fromkeys(("hit moves late", "hit moves early"), "mistimed hit"),
    **dict.fromkeys(("runs through", "passes through", "movers run through each other"), "overlap"),
    **dict.fromkeys(("triangle for ball", "square for ball", "pentagon for ball", "hexagon for ball"), "outline"),
    **dict.fromkeys(("ring for ball", "star for ball", "egg for ball", "ellipse for ball"), "outline"),
    **dict.fromkeys(("half disc for ball", "flat ellipse for cylinder", "tall ellipse for cylinder"), "outline"),
    **dict.fromkeys(("cross for cube", "star for cube"), "outline"),
    **dict.fromkeys(("off the palette", "grey for colour"), "dull"),
    **dict.fromkeys(("random patch", "random splice"), ""),
}
#: Kinds of right clips that look like renders of the world, and kinds of right clips that look different.
PLAIN = ("true clip", "mirrored with words", "backwards with words", "true fall", "true collision", "true passing")
PLAIN += ("true bounce", "two of a kind", "place named", "camera as named")
UNUSUAL = ("short clip", "still picture", "held frames", "eased", "painted ball", "shade of its name")
UNUSUAL += ("saturated ground", "green ground", "very large", "very small", "soft and noisy", "another exposure")
UNUSUAL += ("behind its own colour", "two of one colour")


def constructions(names: Sequence[str]) -> Iterator[Construction]:
    """Yield the clips of these kinds from both draws whose verdict by a person is the intended one."""
    said = verdicts()
    for name in names:
        for made in (*draw(SEED, only=name), *draw(FRESH_SEED, fresh=True, only=name)):
            eye = said[made.name].partition(":")[0]
            if made.kind == name and eye == ("right" if made.right else "wrong"):
                yield made


def separation(right: Tensor, wrong: Tensor) -> float:
    """Return the AUC: the share of pairs of a right and a wrong clip in which the right one has the higher score.

    Ties count half.
    """
    gap = right[:, None] - wrong[None, :]
    return float((gap > 0).float().mean() + 0.5 * (gap == 0).float().mean())


def table(judges: dict[str, Reward], quick: bool = False) -> dict[str, Any]:
    """Measure for each wrong kind how well each judge separates it from plain right clips and from all right clips.

    Args:
        judges: judges by the name of their column.
        quick: use only a few kinds.
    """
    wrong, plain, unusual = (list(names)[:: 12 if quick else 1] for names in (WRONG, PLAIN, UNUSUAL))
    scores: dict[str, dict[str, list[float]]] = {}
    for made in constructions([*plain, *unusual, *wrong]):
        row = scores.setdefault(made.kind, {name: [] for name in judges})
        for name, judge in judges.items():
            row[name] += [float(value) for value in judge([""], [made.clip])]  # type: ignore[arg-type]
    rows: dict[str, Any] = {}
    for kind in (kind for kind in wrong if kind in scores):
        rows[kind] = {"clips": len(next(iter(scores[kind].values()))), "trained": WRONG[kind]}
        for name in judges:
            found = torch.tensor(scores[kind][name])
            for label, kinds in (("plain", plain), ("right", [*plain, *unusual])):
                right = [value for one in kinds if one in scores for value in scores[one][name]]
                rows[kind][f"{name}_{label}"] = separation(torch.tensor(right), found)
    return {"kinds": rows, "means": {name: _means(rows, name) for name in judges}}


def _means(rows: dict[str, Any], name: str) -> dict[str, float | None]:
    """Return means over all kinds, over those with a similar training corruption, and over the other kinds.

    Each mean is given against plain right clips and against all right clips.
    """
    result: dict[str, float | None] = {}
    for part, chosen in (
        ("all", list(rows.values())),
        ("trained", [row for row in rows.values() if row["trained"]]),
        ("untrained", [row for row in rows.values() if not row["trained"]]),
    ):
        for label in ("plain", "right"):
            values = [row[f"{name}_{label}"] for row in chosen]
            result[f"{part}_{label}"] = sum(values) / len(values) if values else None
    return result
