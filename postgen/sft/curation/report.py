"""The report of a curation: counts as JSON, pictures of the funnel and of the measurements, and contact sheets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.files import replacing
from postgen.sft.faults import Fault

from .charts import funnel_chart, histogram_chart
from .config import BANDS, CurationConfig
from .funnel import Funnel
from .sheets import draw_removed


def funnel_table(funnel: Funnel) -> list[dict[str, Any]]:
    """Return the steps of a funnel as JSON values."""
    return [{**dataclasses.asdict(step), "removed": step.removed} for step in funnel.steps]


def write_report(
    folder: Path,
    funnel: Funnel,
    config: CurationConfig,
    faults: Sequence[Fault] = (),
    report: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write the report of a curation to a folder, which is replaced as a whole.

    - `funnel.json`: the settings, the counts at each step, and each removed clip with its reason.
    - `funnel.svg`: the counts as bars.
    - `measures.svg`: a histogram of each measured value over all readable clips, with its thresholds.
    - `removed-FILTER.png`: a contact sheet for each filter that removed clips, those nearest to the threshold first.

    Args:
        folder: the folder.
        funnel: the result.
        config: its settings.
        faults: rows that were left out before the funnel.
        report: called with the finished and the total number of contact sheets.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        with replacing(folder) as part:
            part.mkdir()
            part.joinpath("funnel.json").write_text(_json(funnel, config, faults), encoding="utf-8")
            part.joinpath("funnel.svg").write_text(funnel_chart(funnel.steps), encoding="utf-8")
            part.joinpath("measures.svg").write_text(_histograms(funnel, config), encoding="utf-8")
            draw_removed(part, funnel, config, report)
    except OSError as error:
        raise UserError(f"cannot write the report {folder}: {error.strerror or error}") from error


def _json(funnel: Funnel, config: CurationConfig, faults: Sequence[Fault]) -> str:
    removed = [
        {
            "key": one.item.key,
            "shot": one.number,
            "removed_by": one.removed,
            "value": one.value,
            "why": one.why,
            "measures": None if one.shot is None else one.shot.values,
        }
        for one in funnel.candidates
        if one.removed is not None
    ]
    told = {
        "settings": dataclasses.asdict(config),
        "steps": funnel_table(funnel),
        "kept": len(funnel.kept),
        "left_out": [{"key": fault.key, "why": fault.reason} for fault in faults],
        "removed": removed,
    }
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _histograms(funnel: Funnel, config: CurationConfig) -> str:
    shots = [one.shot for one in funnel.candidates if one.shot is not None]
    values = {name: [value for shot in shots if (value := shot.values[name]) is not None] for name in BANDS}
    return histogram_chart({name: found for name, found in values.items() if found}, config)
