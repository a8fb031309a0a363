"""Block-wise training and solving of quantised weights, from the first block to the last.

Each block gets the inputs that the quantised blocks before it produce (`postgen.quant.chain`), and is trained to give
the output of the exact block for the exact inputs. A run that was killed resumes: finished blocks are read, and the
block that was being trained goes on from its last checkpoint, on the CPU to the same weights.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Block
from postgen.quant.chain import Chain, ChainedCall, ChainedRecords
from postgen.quant.fake import fake_layers
from postgen.quant.fdda import Penalty, StatPenalty
from postgen.quant.packing import pack, unpack
from postgen.quant.rotation import rotated_back
from postgen.quant.rounding import Quantized
from postgen.quant.solved import read_solved, solve_block, write_solved
from postgen.quant.spec import LayerSpec
from postgen.quant.stages import COMPUTED
from postgen.quant.student import Ranges, StudentPlan, make_student, observed
from postgen.quant.transforms.let import FoldPoint
from postgen.quant.visits import Bin
from postgen.reconstruct import (
    Call,
    ReconstructConfig,
    ReconstructTask,
    Records,
    Report,
    Share,
    read_report,
    reconstruct,
)
from postgen.reconstruct.loss import distance
from postgen.training.logging import Progress

Bins = Mapping[bool, Sequence[Sequence[Bin]]]
"""Held out or not -> for each call in `Records.calls` the bin of each row, see `Calibration.bins_of`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """What the engine found for one layer. All tensors are on the CPU and belong to the folded block."""

    packed: Mapping[str, Tensor] | None
    """The packed weight, see `postgen.quant.packing`; None if the weight stays exact."""
    weight: Tensor | None
    """The weight (N, K) where it stays exact, not rotated; None otherwise."""
    bias: Tensor | None
    branch: tuple[Tensor, Tensor] | None = None
    """Low-rank branch (N, r), (r, K)."""
    clips: Tensor | None = None
    """Clips of the input's range for each bin of noise levels."""

    def quantized(self, spec: LayerSpec, shape: tuple[int, ...]) -> Quantized | None:
        """Return the quantised weight of the layer; None if it stays exact."""
        return None if self.packed is None or spec.weight is None else unpack(self.packed, spec.weight, shape)


@dataclass(frozen=True, kw_only=True)
class BlocksResult:
    """What the engine found for a model."""

    layers: Mapping[str, LayerResult]
    """By full name."""
    folds: Sequence[tuple[FoldPoint, Tensor, Tensor | None]]
    """Transformations to fold into the model: tensor, scale, shift."""
    report: Report | None
    """Errors of the blocks before and after training, if there was any."""


class BlockwiseRun:
    """One stage of a recipe on one model.

    Args:
        blocks: the blocks of the exact model, in running order. They are not changed.
        plan: what the students have in common.
        records: records of all blocks, see `postgen.reconstruct.collect`.
        config: settings of the training; `output_dir` is the folder of this stage.
        bins: bins of the rows of all calls, where the plan has bins or there is a penalty.
        penalty: second term of the loss, on statistics of activations.
        former: the former stage of the recipe, which is finished.
        settings: JSON values that identify the run.
        options: options of the stage's solver.

    Raises:
        UserError: the launcher has started several processes. Blocks depend on each other.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        plan: StudentPlan,
        records: Records,
        config: ReconstructConfig,
        *,
        bins: Bins | None = None,
        penalty: StatPenalty | None = None,
        former: BlockwiseRun | None = None,
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if (processes := Share.launched().processes) > 1:
            raise UserError(
                f"blocks are quantised one after the other, but {processes} processes were started: start one process"
            )
        self.plan, self.records, self.config = plan, records, config
        self.bins, self.penalty, self.former, self.options = bins, penalty, former, dict(options or {})
        self.settings = {"stage": _plain(asdict(plan.stage)), **(settings or {})}
        self.device = Share().device(config.device)
        self.chain = Chain(blocks, records, self._for_chain, self.device, half=config.bf16)
        self._all, self._results = list(blocks), dict[str, tuple[dict[str, LayerResult], list[Any]]]()
        self._report: Report | None = None
        self._found = Penalty()
        self._teacher = nn.Module()  # the exact block, where its outputs for the chain's inputs are a target

    def run(self) -> BlocksResult:
        """Train or solve all blocks, and return the quantised layers.

        A signal (Ctrl-C, SIGTERM) ends the training with a checkpoint, and is then raised.

        Raises:
            UserError, FloatingPointError: see `reconstruct`.
        """
        if self.plan.stage.trains:
            self._report = reconstruct(
                [self._task(number) for number in self._numbers()],
                ChainedRecords(self.chain),
                self.config,
                share=Share(),
            )
            if self._report.signal:
                signal.raise_signal(self._report.signal)  # `reconstruct` caught it; the next run resumes
            if self._report.unfinished:
                raise UserError(f"{self.config.folder} was interrupted: run it again with resume")
        else:
            numbers = list(self._numbers())
            bar = Progress(step=0, max_steps=len(numbers), shown=not self.config.disable_tqdm, name="solve blocks")
            for number in numbers:
                self._solve(number)
                bar.step()
            bar.close()
        layers: dict[str, LayerResult] = {}
        folds: list[Any] = []
        for number in self._numbers():
            found = self._result(number)
            layers, folds = layers | found[0], folds + found[1]
        return BlocksResult(layers=layers, folds=folds, report=self._report)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of the finished student of a block.

        Raises:
            UserError: it is not finished.
        """
        assert self._report is not None, "only stages with training have students"
        return self._report.weights(name)

    def _numbers(self) -> Iterator[int]:
        """Yield the numbers of the blocks that have quantised layers."""
        for number, block in enumerate(self._all):
            if self.plan.of(block.name):
                yield number

    # Training.

    def _task(self, number: int) -> ReconstructTask:
        block = self._all[number]

        def build() -> nn.Module:
            self.chain.reach(number)
            if self.plan.stage.aug:
                self._teacher = copy.deepcopy(block.module).float().to(self.device).requires_grad_(False)
            return self._student(number, ranges=True)

        def run(student: nn.Module, calls: Sequence[Call]) -> tuple[Tensor, ...]:
            if self.penalty is None:
                return self._run(block, student, calls[0])
            with self.penalty.watching(block.name, student, self._bins_of(calls[0])) as self._found:
                return self._run(block, student, calls[0])

        def second(student: nn.Module, calls: Sequence[Call], outputs: Sequence[Tensor]) -> Tensor:
            term = torch.zeros((), device=self.device) if self.penalty is None else self._found.total
            if self.plan.stage.aug:
                with torch.no_grad():
                    exact = self._run(block, self._teacher, calls[0])
                term = term + self.plan.stage.aug * distance(self.config.loss, outputs, exact)
            return term

        return ReconstructTask(
            name=block.name,
            build=build,
            run=run,
            target=lambda calls: _streams(block, calls[0].output()),
            penalty=second if self.plan.stage.aug or self.penalty is not None else None,
            is_new=lambda name: name.rpartition(".")[2] in COMPUTED or ".branch." in f".{name}",
            settings={**self.settings, "layers": {name: str(spec) for name, spec in self.plan.of(block.name).items()}},
        )

    def _run(self, block: Block, student: nn.Module, call: Call) -> tuple[Tensor, ...]:
        args, kwargs = call.inputs()
        if self.plan.bins is not None:
            levels = [bin.level for bin in self._bins_of(call)]
            self.plan.bins.current = torch.tensor(levels, device=self.device)
        return _streams(block, student(*args, **kwargs))

    def _bins_of(self, call: Call) -> Sequence[Bin]:
        recorded = call.recorded
        assert isinstance(recorded, ChainedCall)
        assert self.bins is not None, "a penalty and clips need the bins of the calls"
        held_out, place = recorded.key
        return self.bins[held_out][place]

    def _student(self, number: int, *, ranges: bool) -> nn.Module:
        block = self._all[number]
        before = self.former.weights(block.name) if self.former is not None else None
        student = make_student(
            block.name,
            block.module,
            self.plan,
            before=before,
            ranges=partial(self._ranges, number) if ranges else None,
        )
        return student.to(self.device)

    def _ranges(self, number: int, names: Collection[str]) -> Ranges:
        """Return the ranges of the inputs of layers of the exact block on the inputs of the chain."""
        block = self._all[number]

        def run(module: nn.Module) -> None:
            for recorded in self.chain.calls(number, held_out=False):
                self.chain.run(block, module, recorded)

        found = observed(copy.deepcopy(block.module).float().to(self.device), names, run)
        place = next(block.module.parameters()).device
        for each in found.values():
            each.low, each.high = each.low.to(place), each.high.to(place)
        return found

    # Solving.

    def _solve(self, number: int) -> None:
        block = self._all[number]
        path = self.config.folder / "solved" / f"{block.name}.safetensors"
        if path.is_file():
            if not self.config.resume:
                raise UserError(
                    f"{self.config.folder} holds an earlier run of {block.name}: continue it with resume=True, or"
                    " choose another output_dir"
                )
            read_solved(path, self._identity())
            return
        self.chain.reach(number)
        student = self._student(number, ranges=True).eval()
        calls = self.chain.calls(number, held_out=False)
        run = [partial(self.chain.run, block, student, call) for call in calls]
        write_solved(path, solve_block(student, run, self.plan.stage.solver, self.options), self._identity())

    def _identity(self) -> dict[str, Any]:
        return {**self.settings, "options": self.options, "records": self.records.identity}

    # Finished blocks.

    def _finished(self, number: int) -> nn.Module:
        """Return the finished student of a block, whose weights are fixed."""
        name, student = self._all[number].name, self._student(number, ranges=False)
        if self.plan.stage.trains:
            student.load_state_dict(self._trained(name))
            fixed: Mapping[str, Mapping[str, Tensor]] = {}
        else:
            path = self.config.folder / "solved" / f"{name}.safetensors"
            fixed = read_solved(path, self._identity())
        for inside, fake in fake_layers(student):
            format, shape = fake.spec.weight, tuple(fake.weight.shape)
            packed = {key: value.to(self.device) for key, value in fixed.get(inside, {}).items()}
            fake.fix_(unpack(packed, format, shape) if packed and format is not None else None)
        return student.eval()

    def _trained(self, name: str) -> dict[str, Tensor]:
        return read_report(self.config.folder, [name]).weights(name)

    def _for_chain(self, number: int) -> nn.Module:
        block = self._all[number]
        if not self.plan.of(block.name):
            return copy.deepcopy(block.module).float().to(self.device).eval()
        student = self._finished(number)
        self._results[block.name] = self._harvest(block.name, student)
        return student

    def _result(self, number: int) -> tuple[dict[str, LayerResult], list[Any]]:
        name = self._all[number].name
        if name not in self._results:
            self._results[name] = self._harvest(name, self._finished(number))
        return self._results[name]

    @torch.no_grad()
    def _harvest(self, block: str, student: nn.Module) -> tuple[dict[str, LayerResult], list[Any]]:
        """Return the results of the layers of a finished student, and the transformations of its tensors."""
        layers: dict[str, LayerResult] = {}
        lets: dict[int, Any] = {}
        for name, fake in fake_layers(student):
            quantized, (weight, bias), branch = fake.quantized(), fake.folded(), fake.folded_branch()
            if branch is not None:
                bias = branch[1]
            layers[f"{block}.{name}"] = LayerResult(
                packed=None if quantized is None else {key: each.cpu() for key, each in pack(quantized).items()},
                weight=rotated_back(weight, fake.spec.rotate).cpu() if quantized is None else None,
                bias=None if bias is None else bias.cpu(),
                branch=None if branch is None else (branch[0][0].cpu(), branch[0][1].cpu()),
                clips=fake.act_clip.detach().cpu() if hasattr(fake, "act_clip") else None,
            )
            for let in fake.lets_of():
                scale, shift = let.values
                lets[id(let)] = (let.point, scale.cpu(), None if shift is None else shift.cpu())
        return layers, [_in_model(block, *each) for each in lets.values()]


def _in_model(
    block: str, point: FoldPoint, scale: Tensor, shift: Tensor | None
) -> tuple[FoldPoint, Tensor, Tensor | None]:
    return replace(point, block=block), scale, shift


def _streams(block: Block, output: Any) -> tuple[Tensor, ...]:
    return tuple(stream for stream in block.outputs(output) if stream is not None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return sorted(value) if isinstance(value, frozenset | set) else value
