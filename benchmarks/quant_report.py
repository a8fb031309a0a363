"""The result `results/quant.json` of `python -m benchmarks.quant`, its gates, and the comparisons with the papers.

python -m benchmarks.quant_report     # writes the tables and pictures of the page again from the existing results
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import quant_page
from benchmarks.command import without_options
from benchmarks.gates import RESULTS, Gate, gate, read_result, write_result
from benchmarks.lit_video_measure import Measured, compared
from benchmarks.quant_arms import BEGINS, CHECKS, CONTROLS, RECIPES
from benchmarks.quant_options import check_small
from postgen.errors import UserError
from postgen.metrics.bootstrap import bootstrap

SPEED, LAW = "quant_speed", "quant_law"
"""Other results whose gates belong to this one."""
_ABOVE_ZERO = 1e-9
"""Target of a gate that asks for more than 0."""
PROMPTS = 512
"""Prompts of the measurement, of which the rules of the experiment speak."""
_FREE = ("device",)
"""Settings in which rows may differ."""
Rows = dict[str, list[dict[str, Any]]]
"""RECIPE-FORMAT -> the rows of its seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A claim of a paper: one arm has a higher PSNR than another."""

    paper: str
    claim: str
    better: str
    worse: str


_OMNI, _EFFICIENT, _BPDQ = "OmniQuant", "EfficientQAT", "BPDQ"
_INT, _SOS, _FDDA = "INT vs FP", "I&S-ViT", "FDDA"
CLAIMS = tuple(
    Claim(paper=paper, claim=claim, better=better, worse=worse)
    for paper, claim, better, worse in (
        (_OMNI, "learned clips and folds beat rounding at W4A4", "omniquant-w4a4", "rtn-w4a4"),
        (_OMNI, "learned clips beat rounding at 3 bits", "omniquant-w3", "rtn-w3"),
        (_OMNI, "learned clips beat GPTQ at 2 bits", "omniquant-w2", "gptq-w2"),
        (_EFFICIENT, "training weights and ranges beats rounding at 2 bits", "block_ap-w2", "rtn-w2"),
        (_EFFICIENT, "it beats learned clips at 2 bits", "block_ap-w2", "omniquant-w2"),
        (_EFFICIENT, "training scales end to end adds to it, at 2 bits", "e2e_qp-w2", "block_ap-w2"),
        (_EFFICIENT, "and adds at 3 bits", "e2e_qp-w3", "block_ap-w3"),
        (_BPDQ, "2 planes beat GPTQ with no fewer bits", "bpdq-bp2", "gptq-w2g16"),
        (_BPDQ, "3 planes do", "bpdq-bp3", "gptq-w3g16"),
        (_BPDQ, "4 planes do", "bpdq-bp4", "gptq-w4g16"),
        (_INT, "MXINT8 beats MXFP8", "rtn-mxint8", "rtn-mxfp8"),
        (_INT, "MXFP4 beats MXINT4", "rtn-mxfp4", "rtn-mxint4"),
        (_INT, "NVFP4 beats NVINT4 without rotation", "rtn-nvfp4", "rtn-nvint4"),
        (_INT, "NVINT4 beats NVFP4 with rotation", "rtn-nvint4_rotated", "rtn-nvfp4_rotated"),
        (_INT, "rotation helps NVINT4", "rtn-nvint4_rotated", "rtn-nvint4"),
        (_SOS, "its three stages beat rounding at W4A4", "sos-w4a4", "rtn-w4a4"),
        (_SOS, "they beat learned clips and folds at W4A4", "sos-w4a4", "omniquant-w4a4"),
        (_FDDA, "matching statistics helps rounding at W4A4", "fdda-w4a4", "rtn-w4a4"),
        (_FDDA, "it helps rounding at 2 bits", "fdda-w2", "rtn-w2"),
        (_FDDA, "it helps OmniQuant at W4A4", "omniquant+fdda-w4a4", "omniquant-w4a4"),
        (_FDDA, "it helps OmniQuant at 2 bits", "omniquant+fdda-w2", "omniquant-w2"),
    )
)


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Return the measured rows of a folder by name.

    Raises:
        UserError: nothing was measured, or rows have different settings.
    """
    rows = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("rows/*.json"))}
    if "exact" not in rows:
        raise UserError(f"{out} has no results of the exact model: run --group plain first")
    wanted = _settings(rows["exact"])
    for name, row in rows.items():
        if _settings(row) != wanted:
            changed = [key for key, value in _settings(row).items() if wanted.get(key) != value]
            raise UserError(
                f"{out}/rows/{name}.json has other settings than exact.json ({', '.join(changed)}): remove the rows"
                " of one of the runs, or choose another --out"
            )
    return rows


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["settings"].items() if key not in _FREE}


def measured(row: Mapping[str, Any]) -> Measured:
    """Return the measurements of all groups of prompts of a row, joined."""
    parts = [Measured.from_json(each) for each in row["measured"].values()]
    keys = [field.name for field in dataclasses.fields(Measured)]
    return Measured(**{key: [value for part in parts for value in getattr(part, key)] for key in keys})


def arms_of(rows: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Return the rows of the arms, sorted by seed."""
    found: Rows = defaultdict(list)
    for name, row in rows.items():
        if name not in ("exact", *CHECKS):
            found[f"{row['recipe']}-{row['format']}"].append(dict(row))
    order = [f"{recipe}-{format}" for recipe, formats in RECIPES.items() for format in formats]
    return {name: sorted(found[name], key=lambda row: row["seed"]) for name in order if name in found}


def numbers_of(rows: Sequence[Mapping[str, Any]], exact: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of an arm over all its seeds, against the exact model."""
    numbers = compared([measured(row) for row in rows], [measured(exact)] * len(rows))
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "recipe": rows[0]["recipe"],
        "format": rows[0]["format"],
        "bits": rows[0]["bits"],
        "bytes": rows[0]["bytes"],
        "modes": rows[0]["modes"],
        "steps": rows[0].get("steps", []),
        "seconds": sum(seconds) / len(seconds) if seconds else None,
        "velocity": sum(row["velocity"] for row in rows) / len(rows),
        "psnr_by_seed": [sum(measured(row).psnr) / len(measured(row).psnr) for row in rows],
        "right_by_group": {
            group: sum(_share(row["measured"][group]["right"]) for row in rows) / len(rows)
            for group in exact["measured"]
        },
        **numbers,
    }


def _share(right: str) -> float:
    return right.count("1") / len(right)


def gain(arms: Rows, better: str, worse: str) -> dict[str, float] | None:
    """Return the difference of PSNR of two arms in dB, paired by prompt after the mean over seeds; None if unknown."""
    if better not in arms or worse not in arms:
        return None
    one, other = (
        torch.tensor([measured(row).psnr for row in arms[name]], dtype=torch.float64).mean(0)
        for name in (better, worse)
    )
    return dataclasses.asdict(bootstrap(one - other))


def verdict(low: float, high: float) -> str:
    """Return what an interval says about the claim that a number is above 0."""
    return "reproduced" if low > 0 else "refuted" if high < 0 else "undecided"


def claims_of(arms: Rows) -> list[dict[str, Any]]:
    """Return the measured claims of the papers."""
    found = []
    for each in CLAIMS:
        difference = gain(arms, each.better, each.worse)
        if difference is not None:
            said = verdict(difference["low"], difference["high"])
            found.append({**dataclasses.asdict(each), "gain_db": difference, "verdict": said})
    return found


def law_claims(law: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the claims of the QAT law: the loss that quantisation adds falls with parameters, grows with the rest."""
    texts = {
        "parameters": "the added loss falls with the number of parameters",
        "tokens": "it grows with the number of training tokens",
        "group": "it grows with the size of the groups",
    }
    found = []
    for name, claim in texts.items() if law is not None and law.get("exponents") else ():
        each = law["exponents"][name]  # type: ignore[index]
        said = verdict(each["low"], each["high"])
        found.append({"paper": "QAT scaling law", "claim": claim, "exponent": each, "verdict": said})
    return found


def other(name: str) -> dict[str, Any] | None:
    """Return another result, or None if it was not measured."""
    return read_result(name) if (RESULTS / f"{name}.json").is_file() else None


def value_in(result: Mapping[str, Any] | None, name: str) -> float | None:
    """Return the value of a gate of another result; None if it was not measured."""
    rows: Iterable[Mapping[str, Any]] = () if result is None else result["gates"]
    return next((row["value"] for row in rows if row["name"] == name), None)


def gates_of(section: Mapping[str, Any], arms: Rows) -> list[Gate]:
    """Return all gates; a value that was not measured is None."""
    checks, numbers = section["checks"], section["arms"]

    def decibels(better: str, worse: str) -> float | None:
        found = gain(arms, better, worse)
        return None if found is None else found["value"]

    ends = [decibels(f"e2e_qp-{format}", f"{recipe}-{format}") for format, recipe in BEGINS.items()]
    least = min((each for each in ends if each is not None), default=None) if None not in ends else None
    three = [each for each in numbers.values() if each["format"] == "w3"]
    best = max(three, key=lambda each: each["psnr"]["value"], default=None)
    w4a8, speed, law = numbers.get("omniquant-w4a8"), other(SPEED), other(LAW)
    return [
        gate("vectors_exact", None if checks is None else int(not checks["wrong_vectors"]), "==", 1),
        gate("let_identity", None if checks is None else checks["let_identity"], "<=", 1e-6),
        gate("omniquant_w4a4_gain_db", decibels("omniquant-w4a4", "rtn-w4a4"), ">=", 2),
        gate("block_ap_w2_gain_db", decibels("block_ap-w2", "rtn-w2"), ">=", 4),
        gate("e2e_qp_gain_db", least, ">=", _ABOVE_ZERO),
        gate("bpdq_vs_gptq_w2_db", decibels("bpdq-bp2", f"gptq-{CONTROLS['bp2']}"), ">=", 1),
        gate("w4a8_judge_drop", None if w4a8 is None else w4a8["drop"]["high"], "<=", 0.02),
        gate("w3_judge", None if best is None else best["student_right"], ">=", 0.9),
        gate("fp8_linear_speedup", value_in(speed, "fp8_linear_speedup"), ">=", 1.6),
        gate("w4_fp8_linear_vs_fp8", value_in(speed, "w4_fp8_linear_vs_fp8"), ">=", 0.9),
        gate("wan14b_memory_ratio_w4", value_in(speed, "wan14b_memory_ratio_w4"), "<=", 0.32),
        gate("law_heldout_error", value_in(law, "law_heldout_error"), "<=", 0.1),
        gate("roundtrip_bitwise", None if checks is None else checks["roundtrip_bitwise"], "==", 1),
    ]


def section_of(rows: Mapping[str, dict[str, Any]], arms: Rows) -> dict[str, Any]:
    """Return the content of the result, with everything that has been measured so far."""
    exact = rows["exact"]
    told = measured(exact)
    return {
        "settings": exact["settings"],
        "measured_on": exact["device"],
        "exact": {
            "right": sum(told.right) / len(told.right),
            "right_by_group": {name: _share(each["right"]) for name, each in exact["measured"].items()},
            "bytes": exact["bytes"],
        },
        "arms": {name: numbers_of(parts, exact) for name, parts in arms.items()},
        "claims": [*claims_of(arms), *law_claims(other(LAW))],
        "checks": _of(rows, "checks", ("vectors", "wrong_vectors", "folds", "let_identity", "round_trips",
                                       "roundtrip_bitwise")),
        "advice": _advice(rows.get("advice")),
    }  # fmt: skip


def _of(rows: Mapping[str, Mapping[str, Any]], name: str, keys: Sequence[str]) -> dict[str, Any] | None:
    return {key: rows[name][key] for key in keys} if name in rows else None


def _advice(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    layers = []
    for each in row["layers"]:
        crest = {
            f"{kind}{'_rotated' if size else ''}": each[kind][f"mxint4.{size}"][0]
            for kind in ("inputs", "weight")
            for size in (0, 32)
        }
        kept = {key: each[key] for key in ("layer", "choice", "choice_without_rotation")}
        layers.append({**kept, "crest": crest})
    return {"pairs": row["pairs"], "layers": layers}


def write(out: Path, output: str, *, docs: bool) -> None:
    """Write the result, and with `docs` also the page.

    Raises:
        UserError: see `read_rows`; or the results are from a small test, which must not replace those of the page.
    """
    rows = read_rows(out)
    if (prompts := rows["exact"]["settings"]["prompts"]) < PROMPTS:
        check_small(f"{prompts} prompts, not {PROMPTS}", output, docs=docs)
    arms = arms_of(rows)
    section = section_of(rows, arms)
    found = gates_of(section, arms)
    print(write_result(output, {**section, "gates": found}))
    for row in found:
        value = "none" if row["value"] is None else f"{row['value']:.6g}"
        print(f"{row['name']:24s} {value} {row['op']} {row['target']:g} {'ok' if row['ok'] else 'MISSED'}")
    if docs:
        quant_page.copy_sheets(out)
        quant_page.write(read_result(output), other(LAW))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page again."""
    without_options("benchmarks.quant_report", __doc__, argv)
    quant_page.write(other("quant"), other(LAW))
    return 0


if __name__ == "__main__":
    sys.exit(main())
