"""Measure how much each layer type changes the attention of each block. A plan is made from these scores."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, did_you_mean, shown
from postgen.families import layout_of, tokens_of
from postgen.families.installed import processor_stack
from postgen.lit.config import LitConfig
from postgen.lit.conversion import Converted, compute_layer
from postgen.lit.convert import layers_of, modules_of_blocks, new_layers, readers_for, stock_transformer
from postgen.lit.layers import LitLayer
from postgen.lit.options import LINEAR_TYPES
from postgen.lit.record import Record, read_record


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores(Record):
    """Errors of layer types, block by block. `print` shows a table."""

    transformer: str
    """Class name of the transformer."""
    errors: Mapping[str, tuple[float, ...]]
    """Layer type -> error of each block: sum |y - y'| / sum |y - mean of y over the tokens|, averaged over calls. y is
    the output of softmax attention, y' the output of the layer."""
    calls: int
    """Number of calls of the transformer in the average."""

    def __str__(self) -> str:
        lines = [f"{self.transformer}, {self.calls} calls", "block" + "".join(f"{kind:>15}" for kind in self.errors)]
        for block, row in enumerate(zip(*self.errors.values(), strict=True)):
            lines.append(f"{block:5}" + "".join(f"{error:15.4f}" for error in row))
        return "\n".join(lines)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read scores from a file that `save` wrote.

        Raises:
            UserError: the file does not hold scores, or it is damaged.
        """
        content = read_record(cls, path, "scores")
        try:
            errors = {str(kind): tuple(map(float, row)) for kind, row in content["errors"].items()}
            return cls(transformer=str(content["transformer"]), errors=errors, calls=int(content["calls"]))
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} holds damaged scores ({error})") from error


def score(
    transformer: nn.Module,
    run: Callable[[], Any],
    *,
    kinds: Sequence[str] | None = None,
    config: LitConfig | None = None,
    students: Mapping[str, nn.Module] | None = None,
) -> Scores:
    """Measure how far each layer type is from softmax attention in each block, on the model's own sampling
    trajectories.

    In every call of a block's attention, each candidate layer receives the same input as softmax. The model itself
    continues with the softmax output. Untrained layers say little about trained ones, so pass `students`, transformers
    whose layers were trained block by block.

    Args:
        transformer: the stock transformer; other plug-ins may be attached.
        run: a function that samples with the transformer, if possible at every noise level with several prompts, such
            as `lambda: pipe(prompts)`.
        kinds: layer types to try; None for `usual_kinds`.
        config: options of the layer types; None for the defaults.
        students: layer type -> a converted transformer in which every block, or every block but the first, has this
            type.

    Raises:
        UserError: a layer type is unknown, the class cannot be converted, the transformer is converted already, or
            `run` does not call the transformer.
    """
    model, config = stock_transformer(transformer, "score"), config or LitConfig()
    kinds = usual_kinds(model) if kinds is None else kinds
    check_kinds(kinds)
    modules = modules_of_blocks(model)
    probe = _Probe(model)
    for kind in kinds:
        chosen = tuple(Converted(block, name, kind) for block, names in enumerate(modules) for name in names)
        probe.add(kind, readers_for(model, chosen), _candidates(model, kind, chosen, config, students or {}))
    with probe:
        run()
    if not probe.calls:
        raise UserError(
            "run() did not call the transformer, so there is nothing to score: pass a function that samples with this"
            " transformer"
        )
    blocks = {name: block for block, names in enumerate(modules) for name in names}
    errors = {kind: [0.0] * len(modules) for kind in kinds}
    for (name, kind), found in probe.errors.items():
        errors[kind][blocks[name]] = max(errors[kind][blocks[name]], sum(found) / len(found))
    return Scores(
        transformer=type(model).__name__,
        errors={kind: tuple(row) for kind, row in errors.items()},
        calls=probe.calls,
    )


def usual_kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the default candidate layer types of a model.

    Video models: `window_delta`. `lit` costs less and its untrained layers have similar scores, so a plan would prefer
    `lit`, but a video model with `lit` in many blocks fails without long training. Image models have no frames: `lit`.
    """
    return ("lit",) if layout_of(model).video is None else ("window_delta",)


def check_kinds(kinds: Sequence[str]) -> None:
    """Check a list of layer types.

    Raises:
        UserError: an unknown layer type, an empty list, or a single text instead of a list.
    """
    for kind in kinds:
        if kind not in LINEAR_TYPES:
            hint = did_you_mean(str(kind), LINEAR_TYPES)
            raise UserError(f"unknown layer type {shown(kind)}. Known: {', '.join(LINEAR_TYPES)}.{hint}")
    if not kinds or isinstance(kinds, str):
        raise UserError(f"kinds must be a list of layer types, got {shown(kinds)}")


def _candidates(
    model: nn.Module,
    kind: str,
    chosen: tuple[Converted, ...],
    config: LitConfig,
    students: Mapping[str, nn.Module],
) -> Mapping[str, LitLayer]:
    if kind not in students:
        return new_layers(model, config, chosen)
    trained = layers_of(students[kind])
    if wrong := {layer.kind for layer in trained.values()} - {kind}:
        raise UserError(
            f"students[{kind!r}] has layers of the types {', '.join(sorted(wrong))}: pass a transformer converted to"
            f" {kind} only"
        )
    # A block that stayed softmax in the student, such as block 0, is scored with an untrained layer.
    missing = tuple(each for each in chosen if each.module not in trained)
    return {**new_layers(model, config, missing), **trained}


class _Probe:
    """Records the errors of candidate layers while a model runs: a context manager that wraps its attention."""

    name = "lit_score"

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0
        self._text_first = tokens_of(model).token_order == "text-video"
        self.errors: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._layers: dict[str, dict[str, tuple[Any, LitLayer]]] = defaultdict(dict)
        self._grid: Any = None
        self._hook: Any = None

    def add(self, kind: str, readers: Mapping[str, Any], layers: Mapping[str, LitLayer]) -> None:
        for name, layer in layers.items():
            self._layers[name][kind] = readers[name], layer

    def __enter__(self) -> None:
        around = {name: functools.partial(self._around, name) for name in self._layers}
        processor_stack(self.model).push(self.name, around)
        self._hook = self.model.register_forward_pre_hook(self._before, with_kwargs=True)

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()
        processor_stack(self.model).pop(self.name)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self._grid = tokens_of(model).grid_rule(model.config, arguments)
        if self._grid is None:
            raise UserError(
                f"the arguments of this call of {type(model).__name__} do not determine the frames, rows and columns"
                " of its tokens"
            )
        self.calls += 1

    def _around(self, name: str, inner: Callable[..., Any], attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = inner(attention, *args, **kwargs)
        with torch.no_grad():
            soft = self._rows(out)
            spread = (soft - soft.mean(dim=1, keepdim=True)).abs().sum()
            for kind, (reader, layer) in self._layers[name].items():
                made = compute_layer(layer, reader, self._grid, inner, attention, *args, **kwargs)
                error = (self._rows(made) - soft).abs().sum() / spread.clamp(min=torch.finfo(spread.dtype).tiny)
                self.errors[name, kind].append(float(error))
        return out

    def _rows(self, out: Any) -> Tensor:
        """Return the outputs of the video tokens, (B, N, C), from the return value of an attention module.

        Some modules return the text tokens in the same tensor, before or after the video, others as a second tensor.
        """
        rows: Tensor = out[0] if isinstance(out, tuple) else out
        tokens = self._grid.tokens
        return (rows[:, -tokens:] if self._text_first else rows[:, :tokens]).double()
