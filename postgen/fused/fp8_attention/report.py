"""The report of calibration: the error of each layer and step, and the settings that follow from the errors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from postgen.errors import UserError, first_line, is_number, is_whole, shown
from postgen.files import check_place, replacing
from postgen.fused.fp8_attention.config import FP8AttentionConfig
from postgen.reading import parse_json, read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRow:
    """One layer at one step: the worst of all calls (prompts, guidance passes, transformers of a pipeline)."""

    layer: str
    step: int
    error: float
    """Relative L2 error of the FP8 output over all heads, with the chosen preparation."""
    worst_head: float
    """Relative L2 error of the worst head."""
    preparation: str
    """The preparation that calibration chose for the layer, the same in every step."""
    exact_ms: float | None = None
    """Milliseconds of one call of exact attention with the fastest installed kernel; None if it was not timed."""
    fp8_ms: float | None = None
    """Milliseconds of one call of FP8 attention, rounding included; None if it was not timed."""

    @property
    def slower(self) -> bool:
        """Return whether both were timed and FP8 attention is not faster than exact attention."""
        return self.exact_ms is not None and self.fp8_ms is not None and self.fp8_ms >= self.exact_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8AttentionReport:
    """The result of `calibrate_fp8_attention`."""

    rows: tuple[ReportRow, ...]
    max_error: float
    """Layers with a larger error in any step stay exact."""
    steps: int
    """The number of denoising steps of the measured calls."""

    @property
    def exact_layers(self) -> tuple[str, ...]:
        """The layers that stay exact: their error is above `max_error` or NaN, or FP8 attention was not faster."""
        return tuple(dict.fromkeys(row.layer for row in self.rows if not row.error <= self.max_error or row.slower))

    def config(self, **changes: Any) -> FP8AttentionConfig:
        """Return the settings that follow from the report.

        Args:
            changes: fields of `FP8AttentionConfig` that replace the computed ones.

        Raises:
            UserError: a field is unknown, or a value is invalid.
        """
        known = [each.name for each in fields(FP8AttentionConfig)]
        if unknown := sorted(changes.keys() - known):
            raise UserError(f"unknown settings {', '.join(unknown)}. Known: {', '.join(known)}")
        preparations = {re.escape(row.layer): row.preparation for row in self.rows}
        found: dict[str, Any] = {"exact_layers": tuple(map(re.escape, self.exact_layers)), "preparation": preparations}
        if self.rows and all(row.fp8_ms is not None for row in self.rows):
            found["min_tokens"] = 0  # the measured times already keep slower layers exact
        return FP8AttentionConfig(**{**found, **changes})

    def table(self) -> str:
        """Return the report as a text table with one line per layer and step."""
        head = ("layer", "step", "error", "worst head", "exact ms", "fp8 ms", "kept", "preparation")
        exact = self.exact_layers
        lines = [head, *(_cells(row, row.layer in exact) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def save(self, path: Path | str) -> None:
        """Write the report as JSON; an existing file is replaced only when the new one is complete.

        Raises:
            UserError: the file cannot be written.
        """
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"path must be the path of the report file, got {shown(path)}")
        check_place(Path(path), folder=False)
        try:
            with replacing(Path(path)) as part:
                part.write_text(json.dumps(asdict(self), indent=1, allow_nan=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"the report cannot be written to {path}: {first_line(error)}") from error

    @classmethod
    def load(cls, path: Path | str) -> FP8AttentionReport:
        """Read a report that `save` has written.

        Raises:
            UserError: the file does not exist, or it is not such a report.
        """
        none = f"{path} is not a report of FP8 attention"
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"{none}: pass the path of a file")
        found = parse_json(read_text(path, f"the report {path} cannot be read"), none)
        try:
            known = [each.name for each in fields(cls)]
            if not isinstance(found, dict) or set(known) - found.keys() or not isinstance(found["rows"], list):
                raise ValueError(f"it must be a JSON object with a list of rows, and with {' and '.join(known[1:])}")
            rows = tuple(_row(each) for each in found["rows"])
            report = cls(rows=rows, max_error=_number(found["max_error"], 0.0), steps=_whole(found["steps"], 1))
            if not rows or not 0 < report.max_error < math.inf:
                raise ValueError("it has no rows, or its max_error is not a number above 0")
            report.config()  # refuses unknown preparations
        except ValueError as error:
            raise UserError(f"{none} ({first_line(error)}): make one with calibrate_fp8_attention") from error
        return report


def _row(values: Any) -> ReportRow:
    known = [each.name for each in fields(ReportRow)]
    if not isinstance(values, dict) or values.keys() ^ known:
        raise ValueError(f"each row must have exactly the fields {', '.join(known)}")
    if not all(isinstance(values[name], str) and values[name] for name in ("layer", "preparation")):
        raise ValueError("layer and preparation must be texts")
    times = {name: None if values[name] is None else _number(values[name], 0.0) for name in ("exact_ms", "fp8_ms")}
    return ReportRow(
        layer=values["layer"],
        step=_whole(values["step"], 0),
        error=_number(values["error"], 0.0),
        worst_head=_number(values["worst_head"], 0.0),
        preparation=values["preparation"],
        **times,
    )


def _number(value: Any, least: float) -> float:
    """Return a number of a report, which may be infinite or NaN, because calibration writes what it measured."""
    if not (isinstance(value, float) or is_number(value)) or value < least:
        raise ValueError(f"expected a number of at least {least:g}, got {shown(value)}")
    return float(value)


def _whole(value: Any, least: int) -> int:
    if not is_whole(value, least):
        raise ValueError(f"expected a whole number of at least {least}, got {shown(value)}")
    return int(value)


def _cells(row: ReportRow, exact: bool) -> tuple[str, ...]:
    times: Iterable[str] = ("-" if ms is None else f"{ms:.3g}" for ms in (row.exact_ms, row.fp8_ms))
    kept = "exact" if exact else "fp8"
    return (row.layer, str(row.step), f"{row.error:.4f}", f"{row.worst_head:.4f}", *times, kept, row.preparation)
