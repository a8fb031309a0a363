"""Attention transfer: train each new layer to reproduce the output of softmax attention, block by block (the first
stage of arXiv:2509.24899 and arXiv:2609.20744).

Each layer receives the inputs that its attention module has in the trained stock model, on sampling trajectories of
the stock model. Errors of earlier converted blocks therefore do not reach it. The loss compares the attention outputs
of the video tokens before the output projection, relative to the teacher's output minus its mean over the tokens
(`postgen.reconstruct.loss`).
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
from postgen.lit.config import LitConfig
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
"""Name of the output projection in an attention module; its input is the output of attention."""
INHERITED = (*PROJECTIONS, "norm_q", "norm_k")
"""Parts of an attention module that `inherited=True` trains together with the new layer."""
FOLDER = "transformer"
"""Sub-folder of the run folder for the converted transformer."""


def transfer(
    pipe: Any,
    config: LitConfig,
    prompts: Iterable[str | Mapping[str, Any]],
    *,
    records: RecordsConfig,
    train: ReconstructConfig,
    where: Path | str = "cpu",
    blocks_at_a_time: int | None = None,
    inherited: bool = False,
    share: Share | None = None,
) -> Report:
    """Train the new layers of a conversion block by block, then convert the pipeline's transformer with them, in
    place.

    `transfer` also writes the converted transformer to `output_dir/transformer`. If some blocks are not finished,
    because a signal stopped the run or other processes train them, the transformer stays the stock one: call
    `transfer` again with `resume=True`. On the CPU, a run that was killed and resumed ends with the same weights as an
    uninterrupted run.

    Args:
        pipe: the pipeline with the trained stock transformer.
        config: the conversion.
        prompts: texts, or rows as for `postgen.reconstruct.collect`. The last ones are held out for evaluation.
        records: the calls of the stock transformer to record.
        train: settings of the training. `learning_rate_new` applies to the new layers (None: .001), `learning_rate` to
            inherited weights.
        where: "cpu" to keep the records in memory, or a folder.
        blocks_at_a_time: number of blocks to record and train before the next blocks, to keep fewer records at once;
            the trajectories are then sampled again for each group. If only one process runs, the records of a group in
            a folder are removed when its blocks are finished. None: all blocks at once.
        inherited: whether to also train the base model's projections of queries, keys and values and their norms.
        share: the blocks of this process; None for the division of the launcher (torchrun, accelerate).

    Returns:
        The errors of each block on held-out records, before and after training.

    Raises:
        UserError: see `convert`, `collect` and `reconstruct`; or no block is converted, or a window covers the whole
            clip, so that the layer has nothing to learn.

    Example:
        size = {"num_frames": 81, "height": 480, "width": 832}
        train = ReconstructConfig(output_dir="lit-transfer", max_steps=300)
        transfer(pipe, LitConfig(), prompts, records=RecordsConfig(**size), train=train, where="records")
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
    config: LitConfig,
    prompts: Iterable[str | Mapping[str, Any]],
    *,
    records: RecordsConfig,
    train: ReconstructConfig,
    where: Path | str,
    blocks_at_a_time: int | None,
    inherited: bool,
    share: Share,
) -> Report:
    """Train the layers of `transfer` without changing the transformer; see `transfer` for the arguments."""
    if isinstance(prompts, str | Mapping) or not (rows := list(prompts)):
        raise UserError(f"prompts must be a list of texts or rows with at least one entry, got {shown(prompts)}")
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
    """Lock the folder of the records, because a second run must not use records that this run will remove."""
    check_place(where)
    where.mkdir(parents=True, exist_ok=True)
    with RunLock(where, setting="where"):
        try:
            yield
        finally:
            (where / NAME_OF_LOCK).unlink(missing_ok=True)  # the folder is empty again after the run


def attention_tasks(
    denoiser: Denoiser, config: LitConfig, grid: Grid, *, inherited: bool = False
) -> list[ReconstructTask]:
    """Return one reconstruction task for each self-attention module that the conversion changes.

    Args:
        denoiser: the denoiser of the stock transformer.
        config: the conversion.
        grid: the grid of the video tokens.
        inherited: whether to also train the base model's projections of queries, keys and values and their norms.

    Raises:
        UserError: see `convert`; or no block is converted, or a window covers the whole clip.
    """
    model = the_network(denoiser)
    modules = modules_of_blocks(model)
    types = types_of_blocks(config.layers, len(modules), first_block=config.first_block)
    linear = [block for block, kind in enumerate(types) if kind != "softmax"]
    chosen = tuple(Converted(block, name, types[block]) for block in linear for name in modules[block])
    if not chosen:
        raise UserError("the config leaves every block softmax, so there is nothing to train: name blocks in layers")
    readers = readers_for(model, chosen)
    tasks = []
    for each in chosen:
        (layer,) = new_layers(model, config, (each,)).values()
        if layer.covers(grid):
            raise UserError(
                f"the {each.kind} layer of {each.module} equals softmax on {grid.frames} latent frames, so it has"
                " nothing to learn: use a smaller window, fewer anchors, or longer clips"
            )
        tasks.append(_task(model, each, readers[each.module], config, grid, inherited=inherited))
    return tasks


class Student(nn.Module):
    """A new layer together with the attention module whose projections it uses, without the output projection."""

    def __init__(self, attention: nn.Module, layer: LitLayer, reader: AttentionReader, grid: Grid) -> None:
        super().__init__()
        self.attention, self.layer = attention, layer
        self._reader, self._grid = reader, grid

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the attention outputs of the video tokens, (B, N, C), for the arguments of the attention module.

        Raises:
            UserError: the layer cannot compute this call.
        """
        call = self._reader.bind(self.attention, *args, **kwargs)
        reading = self._reader.read(call)
        if reading is None:
            raise UserError(
                f"a {self.layer.kind} layer cannot compute a call of this attention module, because the arguments are"
                " not known: leave the block softmax"
            )
        reading, hidden = reading.with_video(self._grid.tokens), call.hidden_states
        hidden = hidden if hidden.shape[1] == self._grid.tokens else hidden[:, reading.video]
        out: Tensor = self.layer(Tokens(reading, self._grid, hidden))
        return out.flatten(2)


def put_in(transformer: nn.Module, config: LitConfig, report: Report) -> None:
    """Convert a stock transformer and load the weights of a finished `transfer` into its layers, in place.

    Args:
        transformer: the stock transformer, the teacher of the transfer.
        config: the conversion of the transfer.
        report: the report of the transfer, without unfinished blocks.

    Raises:
        UserError: see `convert`; or the weights belong to other layers. The transformer is unchanged in these cases.
    """
    convert(transformer, config)
    try:
        give(transformer, trained_tensors(report))
    except BaseException:
        revert(transformer)
        raise


def trained_tensors(report: Report) -> dict[str, Tensor]:
    """Return the tensors that a finished `transfer` trained, by their names in the converted transformer."""
    places = {"layer": f".{CHILD}", "attention": ""}
    found = {}
    for name in report.blocks:
        for key, value in report.weights(name).items():
            part, _, rest = key.partition(".")
            found[f"{name}{places[part]}.{rest}"] = value
    return found


def grid_of(denoiser: Denoiser, row: str | Mapping[str, Any], size: dict[str, int]) -> Grid:
    """Return the grid of the video tokens in calls of a denoiser. The probing call stops before the first block.

    Args:
        denoiser: the denoiser of the stock transformer.
        row: a prompt, or a row with a prompt.
        size: `num_frames`, `height` and `width` (in pixels).

    Raises:
        UserError: the model cannot generate this size, or the arguments of a call do not determine the grid.
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
        raise UserError(
            f"the arguments of calls of {type(model).__name__} do not determine the frames, rows and columns of its"
            " tokens"
        )
    return found[0]


def the_network(denoiser: Denoiser) -> Any:
    """Return the only transformer of a denoiser.

    Raises:
        UserError: the denoiser has several transformers, or the transformer is converted already.
    """
    if len(denoiser.transformers) != 1:
        names = " and ".join(denoiser.transformers)
        raise UserError(f"this pipeline has {names}, but attention transfer needs a pipeline with one transformer")
    (model,) = denoiser.transformers.values()
    if NAME in installed(model).plug_ins:
        raise UserError(
            f"this {type(model).__name__} is converted, but the teacher must be the stock model: revert the conversion"
            " first (postgen.lit.revert)"
        )
    return model


class _Seen(Exception):
    """Ends the probing call of `grid_of` once its arguments are known."""


def _task(
    model: nn.Module,
    each: Converted,
    reader: AttentionReader,
    config: LitConfig,
    grid: Grid,
    *,
    inherited: bool,
) -> ReconstructTask:
    output, order = f"{each.module}.{OUTPUT}", tokens_of(model).token_order
    # In single blocks of FLUX and HunyuanVideo the block itself projects, so the module has no output projection and
    # its return value is the attention output.
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
    """Whether an earlier run finished these blocks. Their records may be removed already."""
    return not read_report(train.output_dir, [task.name for task in tasks]).unfinished


def _modules(tasks: Iterable[ReconstructTask]) -> list[str]:
    return [name for task in tasks for name in task.modules]
