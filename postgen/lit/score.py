"""How much a block's attention changes by each layer type: what a plan is made from."""

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
from postgen.lit.config import LiTConfig
from postgen.lit.conversion import Converted, compute_layer
from postgen.lit.convert import layers_of, modules_of_blocks, new_layers, readers_for, stock_transformer
from postgen.lit.layers import LitLayer
from postgen.lit.options import LINEAR_TYPES
from postgen.lit.record import Record, read_record


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores(Record):
    """Errors of layer types, block by block; `print` it."""

    transformer: str
    """Class name."""
    errors: Mapping[str, tuple[float, ...]]
    """Layer type -> of each block, |y - y'| over |y - mean of y over the tokens|, both summed, averaged over calls; y
    is what softmax attention returns, y' what the layer does."""
    calls: int
    """Calls of the transformer that were averaged."""

    def __str__(self) -> str:
        lines = [f"{self.transformer}, {self.calls} calls", "block" + "".join(f"{kind:>15}" for kind in self.errors)]
        for block, row in enumerate(zip(*self.errors.values(), strict=True)):
            lines.append(f"{block:5}" + "".join(f"{error:15.4f}" for error in row))
        return "\n".join(lines)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            UserError: it is something else.
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
    config: LiTConfig | None = None,
    students: Mapping[str, nn.Module] | None = None,
) -> Scores:
    """Measure how far each block's attention is from softmax with each layer type, on the model's own trajectories.

    In every call of a block's attention each candidate gets the same input as softmax; the model goes on with softmax.
    New layers tell little: give transformers whose layers were trained block by block.

    Args:
        transformer: the stock one, or one with other plug-ins on.
        run: calls it, at best at every noise level with several prompts: `lambda: pipe(prompts)`.
        kinds: layer types to try; None is `usual_kinds`.
        config: their options.
        students: layer type -> a converted transformer in which every block but the first (or with it) has that type.

    Raises:
        UserError: an unknown type, a class that cannot be converted, it is converted already, or `run` calls it never.
    """
    model, config = stock_transformer(transformer, "score"), config or LiTConfig()
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
        raise UserError("the run did not call the transformer: give a function that samples with it")
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
    """Return the layer types that blocks are chosen from where none are named.

    window_delta for video: `lit` costs less and its new layers score alike, so that plans would prefer it, but a video
    model with it fails without long training. A picture has no frames: lit.
    """
    return ("lit",) if layout_of(model).video is None else ("window_delta",)


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse what is no layer type.

    Raises:
        UserError: one is none, or there are none.
    """
    for kind in kinds:
        if kind not in LINEAR_TYPES:
            hint = did_you_mean(str(kind), LINEAR_TYPES)
            raise UserError(f"there is no layer type {shown(kind)}. Known: {', '.join(LINEAR_TYPES)}.{hint}")
    if not kinds or isinstance(kinds, str):
        raise UserError(f"kinds must be a list of layer types, got {shown(kinds)}")


def _candidates(
    model: nn.Module,
    kind: str,
    chosen: tuple[Converted, ...],
    config: LiTConfig,
    students: Mapping[str, nn.Module],
) -> Mapping[str, LitLayer]:
    if kind not in students:
        return new_layers(model, config, chosen)
    trained = layers_of(students[kind])
    if wrong := {layer.kind for layer in trained.values()} - {kind}:
        raise UserError(f"the transformer given for {kind} has layers {', '.join(sorted(wrong))}")
    # Blocks that stayed softmax in the student (the first one) are scored by a new layer.
    missing = tuple(each for each in chosen if each.module not in trained)
    return {**new_layers(model, config, missing), **trained}


class _Probe:
    """Wrapped around the attention of a model while it runs."""

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
                f"this call of {type(model).__name__} does not tell frames, rows and columns of its tokens"
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
        """The video's rows of what an attention returns, (B, N, C); it may return the text's too, behind or among."""
        rows: Tensor = out[0] if isinstance(out, tuple) else out
        tokens = self._grid.tokens
        return (rows[:, -tokens:] if self._text_first else rows[:, :tokens]).double()
