"""Attention transfer: each new layer learns to give what softmax attention gave, block by block (the first stage of
arXiv:2509.24899 and arXiv:2609.20744).

A layer is shown what its block's attention is shown in the trained model, on that model's own trajectories, so errors
of blocks before it do not reach it. What is compared is the result of attention before its output layer, the video's
rows only, with a loss relative to what is left without the mean over tokens (`postgen.reconstruct.loss`).
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.families import Denoiser, Grid, denoiser_for, tokens_of
from postgen.families.attention import AttentionReader
from postgen.families.installed import installed
from postgen.files import check_place, replacing
from postgen.lit.config import LiTConfig
from postgen.lit.conversion import CHILD, NAME, Converted
from postgen.lit.convert import (
    PROJECTIONS,
    Fresh,
    convert,
    modules_of_blocks,
    new_layers,
    readers_for,
    revert,
)
from postgen.lit.layers import LitLayer
from postgen.lit.pattern import types_of_blocks
from postgen.lit.saving import save
from postgen.lit.student import give
from postgen.lit.tokens import Tokens
from postgen.locks import NAME as NAME_OF_LOCK
from postgen.prompt_rows import prompt_row
from postgen.reconstruct import (
    Call,
    ReconstructConfig,
    ReconstructTask,
    RecordsConfig,
    Report,
    Share,
    collect,
    read_report,
    reconstruct,
)
from postgen.sampling.conditions import Embeddings
from postgen.training import Reason
from postgen.training.run_folder import RunLock

OUTPUT = "to_out.0"
"""The output layer of an attention module; what comes into it is what attention gave."""
INHERITED = (*PROJECTIONS, "norm_q", "norm_k")
"""Parts of a module that a layer reads, so that training them changes what it gives."""
FOLDER = "transformer"
"""Where the converted transformer is written, in the folder of the run."""


def transfer(
    pipe: Any,
    config: LiTConfig,
    prompts: Iterable[str | Mapping[str, Any]],
    *,
    records: RecordsConfig,
    train: ReconstructConfig,
    where: Path | str = "cpu",
    blocks_at_a_time: int | None = None,
    inherited: bool = False,
    share: Share | None = None,
) -> Report:
    """Train the layers of a conversion block by block, then convert the pipeline's transformer with them, in place.

    The converted transformer is also written to `output_dir/transformer`. Where blocks are missing yet (a signal came,
    or other processes have them) the transformer stays the stock one: call again with `resume=True`. Killed at any
    moment and called again so, a run on the CPU ends with the weights of one that was not.

    Args:
        pipe: with the trained transformer, which must not be converted.
        config: which blocks become what.
        prompts: texts, or rows as `postgen.reconstruct.collect` takes them; the last ones are held out.
        records: which calls are recorded.
        train: how layers are trained. `learning_rate_new` is that of the layers, None is .001; `learning_rate` that of
            inherited weights.
        where: records are kept in memory ("cpu") or in a folder.
        blocks_at_a_time: blocks that are recorded and trained before the next ones, so that fewer records are kept at
            once; one process removes those of a folder when the blocks are done. Every time the trajectories are drawn
            anew. None: all.
        inherited: whether the base's queries, keys, values and their norms are trained too; else they stay.
        share: blocks of this process; None is what its launcher says.

    Returns:
        Errors of each block before and after, on held-out records.

    Raises:
        UserError: as `convert`, `collect` and `reconstruct`; no block is converted; a window that covers the whole
            clip, so that there is nothing to learn.

    Example:
        size = {"num_frames": 81, "height": 480, "width": 832}
        train = ReconstructConfig(output_dir="lit-transfer", max_steps=300)
        transfer(pipe, LiTConfig(), prompts, records=RecordsConfig(**size), train=train, where="records")
    """
    share = share or Share.launched()
    denoiser = denoiser_for(pipe)
    given: dict[str, Any] = {"where": where, "blocks_at_a_time": blocks_at_a_time, "inherited": inherited}
    report = train_layers(denoiser, config, prompts, records=records, train=train, share=share, **given)
    if not report.unfinished:
        model = the_network(denoiser)
        put_in(model, config, report)
        if share.rank == 0:
            with replacing(report.folder / FOLDER) as folder:
                save(model, folder)
    return report


def train_layers(
    denoiser: Denoiser,
    config: LiTConfig,
    prompts: Iterable[str | Mapping[str, Any]],
    *,
    records: RecordsConfig,
    train: ReconstructConfig,
    where: Path | str,
    blocks_at_a_time: int | None,
    inherited: bool,
    share: Share,
) -> Report:
    """Do the training of `transfer`; the transformer is left as it is."""
    if isinstance(prompts, str | Mapping) or not (rows := list(prompts)):
        raise UserError(f"prompts are {shown(prompts)}, they must be a list of texts or rows")
    if train.learning_rate_new is None:
        train = replace(train, learning_rate_new=1e-3)
    tasks = attention_tasks(denoiser, config, grid_of(denoiser, rows[0], records.size), inherited=inherited)
    names = [task.name for task in tasks]
    size = blocks_at_a_time or len(tasks)
    removes = size < len(tasks) and str(where) != "cpu" and share.processes == 1
    with _held(Path(where)) if removes else nullcontext():
        for first in range(0, len(tasks), size):
            part = tasks[first : first + size]
            if size < len(tasks) and train.resume and _are_done(train, part):
                continue
            place = where if str(where) == "cpu" or size == len(tasks) else Path(where) / f"blocks-{first:03}"
            taken = collect(denoiser, _modules(part), rows, records, where=place, share=share)
            report = reconstruct(part, taken, train, share=share)
            if report.reason is Reason.INTERRUPTED:
                return replace(report, unfinished=tuple(name for name in names if name not in report.blocks))
            if removes:
                shutil.rmtree(place)
    return read_report(train.output_dir, names)


@contextmanager
def _held(where: Path) -> Iterator[None]:
    """Keep a second run from records that are removed when their blocks are done."""
    check_place(where)
    where.mkdir(parents=True, exist_ok=True)
    with RunLock(where, setting="where"):
        try:
            yield
        finally:
            (where / NAME_OF_LOCK).unlink(missing_ok=True)  # nothing is to be left there


def attention_tasks(
    denoiser: Denoiser, config: LiTConfig, grid: Grid, *, inherited: bool = False
) -> list[ReconstructTask]:
    """Return a task for each self-attention that a conversion changes.

    Args:
        denoiser: of the stock transformer.
        config: the conversion.
        grid: of the video's tokens.
        inherited: whether the base's queries, keys, values and their norms are trained too.

    Raises:
        UserError: as `convert`; nothing is converted; a window covers the whole clip.
    """
    model = the_network(denoiser)
    modules = modules_of_blocks(model)
    types = types_of_blocks(config.layers, len(modules), first_block=config.first_block)
    linear = [block for block, kind in enumerate(types) if kind != "softmax"]
    chosen = tuple(Converted(block, name, types[block]) for block in linear for name in modules[block])
    if not chosen:
        raise UserError("every block stays softmax: there is nothing to transfer, name blocks in layers")
    readers = readers_for(model, chosen)
    tasks = []
    for each in chosen:
        (layer,) = new_layers(model, config, (each,)).values()
        if layer.covers(grid):
            raise UserError(
                f"{each.kind} in {each.module} is softmax on {grid.frames} frames of tokens, so it has nothing to"
                " learn: take a smaller window, fewer anchors, or longer clips"
            )
        tasks.append(_task(model, each, readers[each.module], config, grid, inherited=inherited))
    return tasks


class Student(nn.Module):
    """One layer with the attention module whose projections it reads; computes what comes before the output layer."""

    def __init__(self, attention: nn.Module, layer: LitLayer, reader: AttentionReader, grid: Grid) -> None:
        super().__init__()
        self.attention, self.layer = attention, layer
        self._reader, self._grid = reader, grid

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the video's rows (B, N, C) for the arguments of the attention module.

        Raises:
            UserError: a call that the layer cannot compute.
        """
        call = self._reader.bind(self.attention, *args, **kwargs)
        reading = self._reader.read(call)
        if reading is None:
            raise UserError(f"{self.layer.kind} cannot compute a call of this attention: leave its block softmax")
        reading, hidden = reading.with_video(self._grid.tokens), call.hidden_states
        hidden = hidden if hidden.shape[1] == self._grid.tokens else hidden[:, reading.video]
        out: Tensor = self.layer(Tokens(reading, self._grid, hidden))
        return out.flatten(2)


def put_in(transformer: nn.Module, config: LiTConfig, report: Report) -> None:
    """Convert a stock transformer and give its layers the weights of a finished `transfer`.

    Args:
        transformer: whose attention was the teacher.
        config: as it was transferred.
        report: of the transfer, nothing unfinished.

    Raises:
        UserError: as `convert`, or weights of other layers; the transformer is the stock one then.
    """
    convert(transformer, config)
    try:
        give(transformer, trained_tensors(report))
    except BaseException:
        revert(transformer)
        raise


def trained_tensors(report: Report) -> dict[str, Tensor]:
    """Return what a finished `transfer` has trained, by the names of a converted transformer."""
    places = {"layer": f".{CHILD}", "attention": ""}
    found = {}
    for name in report.blocks:
        for key, value in report.weights(name).items():
            part, _, rest = key.partition(".")
            found[f"{name}{places[part]}.{rest}"] = value
    return found


def grid_of(denoiser: Denoiser, row: str | Mapping[str, Any], size: dict[str, int]) -> Grid:
    """Return the grid of the video's tokens in calls of a denoiser, from a call that ends before the first block.

    Args:
        denoiser: of the stock transformer.
        row: a prompt, or a row with one.
        size: `num_frames`, `height` and `width`.

    Raises:
        UserError: a size that the model cannot make, or calls that do not tell the grid.
    """
    model = the_network(denoiser)
    parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
    found: list[Grid | None] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        found.append(tokens_of(model).grid_rule(model.config, arguments))
        raise _Seen

    row = prompt_row({"prompt": row} if isinstance(row, str) else row, "the first of the prompts")
    frames, rows, columns = (size[name] for name in ("num_frames", "height", "width"))
    x = denoiser.initial_latents(1, num_frames=frames, height=rows, width=columns)
    embeddings = Embeddings(
        denoiser, size=size, guidance=False, negative_prompt="", keep_all=False, device=x.device
    )  # fmt: skip
    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            denoiser.predict(x, torch.ones(1, device=x.device), embeddings.of(row))
    except _Seen:
        pass
    finally:
        hook.remove()
    if not found or found[0] is None:
        raise UserError(f"calls of {type(model).__name__} do not tell frames, rows and columns of their tokens")
    return found[0]


def the_network(denoiser: Denoiser) -> Any:
    """Return the one network of a denoiser.

    Raises:
        UserError: there are several, which take turns, or it is converted already.
    """
    if len(denoiser.transformers) != 1:
        names = " and ".join(denoiser.transformers)
        raise UserError(f"this pipeline has {names}, which take turns: distillation takes pipelines with one network")
    (model,) = denoiser.transformers.values()
    if NAME in installed(model).plug_ins:
        raise UserError(f"this {type(model).__name__} is converted: revert it, softmax is the teacher")
    return model


class _Seen(Exception):
    """The arguments of a call were seen."""


def _task(
    model: nn.Module,
    each: Converted,
    reader: AttentionReader,
    config: LiTConfig,
    grid: Grid,
    *,
    inherited: bool,
) -> ReconstructTask:
    output, order = f"{each.module}.{OUTPUT}", tokens_of(model).token_order
    # Where the block itself projects (single blocks of FLUX and HunyuanVideo), the module returns what it computed.
    reads = (each.module, output) if output in dict(model.named_modules()) else (each.module,)

    def build() -> Student:
        attention: Any = copy.deepcopy(model.get_submodule(each.module)).requires_grad_(False)
        if config.inherit == "output":
            for name in PROJECTIONS:
                setattr(attention, name, Fresh(getattr(attention, name)))
        if inherited:
            for name, part in attention.named_children():
                part.requires_grad_(name in INHERITED)
        (layer,) = new_layers(model, config, (each,)).values()
        return Student(attention, layer, reader, grid)

    def run(student: nn.Module, calls: Sequence[Call]) -> tuple[Tensor, ...]:
        args, kwargs = calls[0].inputs()
        return (student(*args, **kwargs),)

    def target(calls: Sequence[Call]) -> tuple[Tensor, ...]:
        found = calls[1].inputs()[0][0] if len(calls) > 1 else calls[0].output()
        rows: Tensor = found[0] if isinstance(found, tuple) else found
        return (rows[:, -grid.tokens :] if order == "text-video" else rows[:, : grid.tokens],)

    return ReconstructTask(
        name=each.module,
        reads=reads,
        build=build,
        run=run,
        target=target,
        is_new=lambda name: name.startswith("layer.") or ".fresh." in name,
        settings={"layer": each.kind, "config": config.as_json(), "inherited": inherited},
    )


def _are_done(train: ReconstructConfig, tasks: Sequence[ReconstructTask]) -> bool:
    """Whether blocks were finished before; their records may be gone."""
    return not read_report(train.output_dir, [task.name for task in tasks]).unfinished


def _modules(tasks: Iterable[ReconstructTask]) -> list[str]:
    return [name for task in tasks for name in task.modules]
