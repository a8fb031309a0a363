"""Averages of a run's checkpoints: the merge at the end of a run, and greedy soups.

Weights are averaged one tensor at a time, with the arithmetic of `postgen merge` (`postgen.training.weighted`). The
two matrices of a LoRA adapter are not averaged: the sum of their products is computed exactly and cut to the rank of
the adapter (`postgen.families.lora_sums`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from postgen.errors import UserError
from postgen.families.lora_layers import Layer
from postgen.families.lora_sums import low_rank_sum, padded, shaped
from postgen.tensor_files import opened

from . import checkpoint
from .averages_checks import check_metric, metric_name
from .checkpoint_head import DamagedCheckpoint, Span, check_contents, in_spans, read_head
from .config import TrainingConfig
from .curves import weights_of
from .logging import say
from .run_state import RunState
from .swap import HostCopy
from .weighted import finite_sum, is_finite, working_dtype

T = TypeVar("T")
WEIGHTS = "weights.safetensors"
"""File of the trained weights in a checkpoint."""
REPORT = "merge_last.json"
"""Name of the report in an export."""
_UP = ".lora_B."


class Average(NamedTuple):
    """An average of checkpoints."""

    tensors: dict[str, Tensor]
    """The trained parameters by name, on the CPU."""
    retained: float
    """Share of the squared norm of the LoRA changes that their rank holds, in [0, 1]; 1 without LoRA."""


def kept(args: TrainingConfig) -> int | None:
    """Return the number of checkpoints to keep: `save_total_limit`, or more if averages need them; None keeps all."""
    if args.save_total_limit is None:
        return None
    # Checkpoints that are written during the spikes must not replace those before them.
    during = 1 + (args.rescue_patience // args.save_steps if args.save_steps else 0)
    return max(args.save_total_limit, args.merge_last, args.rescue_last + during if args.rescue_spike else 0)


def sound(
    folder: Path,
    count: int,
    before: int | None = None,
    *,
    trained: Collection[str] = (),
    spiked: Sequence[Span] = (),
    main: bool = True,
) -> list[Path]:
    """Return the newest undamaged checkpoints of a run, the oldest first.

    Args:
        folder: folder of the run.
        count: largest number of checkpoints.
        before: only checkpoints of earlier steps than this one; None takes all.
        trained: names of the trained parameters, which must be finite.
        spiked: spans of steps whose checkpoints are left out.
        main: whether this process prints a warning for each damaged checkpoint.
    """
    found: list[Path] = []
    for path in reversed(checkpoint.named(folder)):
        if len(found) == count:
            break
        try:
            head = read_head(path)
            if (before is None or head.step < before) and not in_spans(head.step, spiked):
                check_contents(path, head)
                _check_values(path, trained)
                found.insert(0, path)
        except DamagedCheckpoint as error:
            if main:
                say(f"postgen: warning: {error}; it is left out of the average.")
    return found


def _check_values(folder: Path, trained: Collection[str]) -> None:
    """Check that the weights of a checkpoint can be read and are finite: a step may break them with a finite loss.

    Buffers may hold infinite values, such as masks.
    """
    try:
        with opened(folder / WEIGHTS) as file:
            for name in file.keys():  # noqa: SIM118
                value = _read(folder, file, name)
                if name in trained and value.is_floating_point() and not is_finite(value):
                    raise DamagedCheckpoint(f"{folder} is damaged: {name} in {WEIGHTS} holds infinite values")
    except DamagedCheckpoint:
        raise
    except UserError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from error


def average(folders: Sequence[Path], weights: Sequence[float], names: Iterable[str]) -> Average:
    """Return the weighted sum of the trained parameters in checkpoints of one run.

    One checkpoint of weight 1 is returned bit by bit.

    Args:
        folders: the checkpoints.
        weights: weight of each checkpoint.
        names: names of the trained parameters.

    Raises:
        DamagedCheckpoint: a checkpoint does not have a parameter, or it contains NaN.
    """
    names = list(names)
    downs = {name.replace(_UP, ".lora_A."): name for name in names if _UP in name and name.endswith(".weight")}
    pairs = {down: up for down, up in downs.items() if down in names}
    tensors: dict[str, Tensor] = {}
    held: list[tuple[float, float]] = []
    with ExitStack() as stack:
        files = [stack.enter_context(opened(folder / WEIGHTS)) for folder in folders]
        places = list(zip(folders, files, strict=True))
        for name in names:
            if list(weights) == [1] or name not in {*pairs, *pairs.values()}:
                tensors[name] = _sum(name, _each(places, name), weights, [folder.name for folder in folders])
            elif name in pairs:
                up, down, energy = _product(_each(places, pairs[name]), _each(places, name), weights)
                tensors |= {pairs[name]: up, name: down}
                held.append(energy)
    kept_, whole = (math.fsum(each) for each in zip(*held, strict=True)) if held else (1.0, 1.0)
    return Average({name: tensors[name] for name in names}, kept_ / whole if whole else 1.0)


def _each(places: Sequence[tuple[Path, Any]], name: str) -> list[Tensor]:
    return [_read(folder, file, name) for folder, file in places]


def _read(folder: Path, file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except Exception as error:  # safetensors raises its own error type
        raise DamagedCheckpoint(f"{folder} is damaged: {name} cannot be read") from error
    if tensor.is_floating_point() and tensor.itemsize > 1 and bool(tensor.isnan().any()):
        raise DamagedCheckpoint(f"{folder} is damaged: {name} in {WEIGHTS} holds NaN")
    return tensor


def _sum(name: str, tensors: Sequence[Tensor], weights: Sequence[float], labels: Sequence[str]) -> Tensor:
    last = tensors[-1]
    if not last.is_floating_point():
        return last
    wide = working_dtype([last.dtype])
    return finite_sum(name, [tensor.to(wide) for tensor in tensors], weights, labels).to(last.dtype)


def _product(
    ups: Sequence[Tensor], downs: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Return up and down whose product is the weighted sum of the products, cut to their rank, and its energies."""
    rank, like = len(downs[0]), Layer(downs[0], ups[0])
    low = low_rank_sum([(up.flatten(1), down.flatten(1)) for up, down in zip(ups, downs, strict=True)], weights)
    # A weight that is narrower than the rank has fewer singular values.
    merged = padded(shaped(low, rank, like), rank)
    return merged.up.to(ups[0]), merged.down.to(downs[0]), low.energy(rank)


def alike(found: Average, device: torch.device) -> Average:
    """Return the average of the first process in all processes: decompositions may differ between hosts."""
    return found._replace(
        tensors={
            name: broadcast(value.to(device)).cpu() if ".lora_" in name else value
            for name, value in found.tensors.items()
        }
    )


def greedy(candidates: Sequence[T], score: Callable[[Sequence[T]], float]) -> tuple[list[T], float]:
    """Choose the members of a mean greedily (model soups, arXiv:2203.05482).

    The candidate with the best score is the first member. The others follow in the order of their scores, and each is
    added if the score of the mean does not fall.

    Args:
        candidates: at least one candidate.
        score: returns the held-out score of the mean of some candidates; larger is better, NaN is the worst.

    Returns:
        The members, the best first, and the score of their mean.

    Raises:
        UserError: there are no candidates.
    """
    if not candidates:
        raise UserError("a greedy average needs at least one candidate")
    scores = [_real(score([candidate])) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda number: -scores[number])
    chosen, best = [candidates[order[0]]], scores[order[0]]
    for number in order[1:]:
        found = _real(score([*chosen, candidates[number]]))
        if found >= best:
            chosen, best = [*chosen, candidates[number]], found
    return chosen, best


def _real(value: float) -> float:
    return -math.inf if math.isnan(value) else value


@dataclass
class LastCheckpoints:
    """The merge of the last checkpoints of a run, and the decision whether to export it.

    Args:
        args: the configuration.
        parts: the state of the run; the merged weights become its `merged`.
        evaluate: evaluates the weights that would be exported; every process calls it.
        accelerator: the processes of the run; the main one prints messages.
        spiked: spans of steps in which the loss had spiked before a rescue: their checkpoints are left out.
    """

    args: TrainingConfig
    parts: RunState
    evaluate: Callable[[], Mapping[str, float]]
    accelerator: Accelerator
    spiked: Sequence[Span] = ()

    def merge(self) -> dict[str, float]:
        """Merge, compare and decide; return metrics for the log, empty if there is nothing to merge.

        The merged weights replace the trained ones in evaluations and exports afterwards, unless the metric disagrees.

        Raises:
            UserError: the evaluation does not have the metric.
        """
        args, parts = self.args, self.parts
        folders = sound(
            args.folder,
            args.merge_last,
            trained=parts.named,
            spiked=self.spiked,
            main=self.accelerator.is_main_process,
        )
        if len(folders) < 2:
            self._say(f"merge_last: {args.folder} holds {len(folders)} checkpoint: nothing is merged")
            return {}
        before = self._measured() if args.merge_metric else None
        if args.merge_kind == "greedy":
            folders = sorted(greedy(folders, self._score)[0], key=folders.index)
        kind = "sma" if args.merge_kind == "greedy" else args.merge_kind
        weights = weights_of(kind, len(folders), alpha=args.merge_alpha)
        retained = self._put(folders, weights)
        after = self._measured() if args.merge_metric else None
        good = before is None or after is None or self._better(after, before)
        if not (good or args.merge_keep == "always"):
            parts.merged = None
        parts.merge_report = {
            "exported": "merged" if parts.merged else "last",
            "kind": args.merge_kind,
            "steps": [int(folder.name.rpartition("-")[2]) for folder in folders],
            "weights": weights,
            "metric": args.merge_metric or None,
            "greater_is_better": args.metric_rises if args.merge_metric else None,
            "last": _finite(before),
            "merged": _finite(after),
            "retained": retained,
        }
        self._tell(before, after, good)
        values = {"merge/last": before, "merge/merged": after, "merge/exported": float(parts.merged is not None)}
        return {name: value for name, value in {**values, "merge/retained": retained}.items() if value is not None}

    def _put(self, folders: Sequence[Path], weights: Sequence[float]) -> float:
        """Make the average of some checkpoints the weights of evaluations and exports; return the retained energy."""
        found = alike(average(folders, weights, self.parts.named), self.accelerator.device)
        if self.parts.merged is None:
            self.parts.merged = HostCopy(self.parts.modules)
        self.parts.merged.load(found.tensors)
        return found.retained

    def _score(self, folders: Sequence[Path]) -> float:
        self._put(folders, [1 / len(folders)] * len(folders))
        return self._measured() * (1 if self.args.metric_rises else -1)

    def _measured(self) -> float:
        values = self.evaluate()
        remedy = "The last checkpoint is complete: correct merge_metric or set merge_last 0, and use --resume."
        check_metric(self.args, values, remedy)
        return values[metric_name(self.args)]

    def _better(self, after: float, before: float) -> bool:
        if math.isnan(after):
            return False
        return math.isnan(before) or (after >= before if self.args.metric_rises else after <= before)

    def _tell(self, before: float | None, after: float | None, good: bool) -> None:
        steps = ", ".join(map(str, self.parts.merge_report["steps"]))
        text = f"merged the checkpoints of steps {steps} ({self.args.merge_kind})"
        if before is not None and after is not None:
            text += f": {self.args.merge_metric} {before:.6g} -> {after:.6g}, {'not worse' if good else 'worse'}"
        end = "merged weights" if self.parts.merged else "last weights, without the merge"
        self._say(f"{text}; the export has the {end}")

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say(text)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def write_report(folder: Path, parts: RunState) -> None:
    """Write the report about the merge, if there was one, into an export."""
    if parts.merge_report:
        (folder / REPORT).write_text(json.dumps(parts.merge_report, indent=1) + "\n")
