"""Merge full weights: folders of models, single networks, weight files, checkpoints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from postgen.errors import UserError
from postgen.families.exports import NOTE
from postgen.tensor_files import FLOATS, TensorBlocks, TensorRow, writing_blocks, written_order

from .card import merged_card
from .checks import check_configs, check_no_lora, check_rows
from .layout import Layout, layout_of
from .methods import DTYPES, MergeConfig, source_factors
from .posthoc_ema import Profile, gamma_of, solve
from .power_average import GAMMA, STEP
from .report import MergeReport, Progress, change_of, emulated, mean_cosine, measured_sources, settings_of
from .sources import Source, WeightSet
from .stream import Measured, Rule, merged_blocks


@dataclass(kw_only=True)
class WholeMerge:
    """A checked merge of full weights, ready to be written."""

    sources: Sequence[Source]
    base: Source | None
    config: MergeConfig
    layout: Layout
    readers: Mapping[str, list[TensorBlocks]]
    """Network -> readers of the base, if there is one, and of the sources."""
    rows: Mapping[str, dict[str, TensorRow]]
    """Network -> tensors of the output, in the order of the first source's files; with those that are filled in."""
    fill: Mapping[str, TensorBlocks]
    """Network -> reader of the tensors that the sources lack."""
    rule: Rule

    @property
    def size(self) -> int:
        """Number of bytes of all tensors of the output."""
        return sum(row.size for rows in self.rows.values() for row in rows.values())

    def write(self, folder: Path, output: str, progress: Progress | None = None) -> MergeReport:
        """Write the merged files into an existing folder, and return the report.

        Raises:
            UserError: a source holds NaN, or the sources differ in what has no mean.
            OSError: a file cannot be written.
        """
        began, done, total = time.monotonic(), 0, self.size
        labels = [each.label for each in self._all]
        measured = Measured(labels=labels, has_base=self.base is not None)
        tensors = 0
        for network, files in self.layout.shards.items():
            for number, place in enumerate(files):
                own = {name: row for name, row in self.rows[network].items() if row.file == number}
                own = {name: own[name] for name in written_order(own)}
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                with writing_blocks(folder / place, own, self._metadata(network, number)) as write:
                    for name in own:
                        for block in self._blocks(network, name, measured):
                            write(block)
                            done += block.numel() * block.itemsize
                            if progress is not None:
                                progress(100 * done // max(total, 1), 100)
                tensors += len(own)
        return self._report(measured, output, tensors, time.monotonic() - began)

    @property
    def _all(self) -> list[Source]:
        return [*([self.base] if self.base else []), *self.sources]

    def _blocks(self, network: str, name: str, measured: Measured) -> Iterator[Tensor]:
        if name in self.readers[network][-1].rows:
            shown = network if len(self.readers) > 1 else ""
            return merged_blocks(name, self.readers[network], self.rule, measured, shown)
        filler = self.fill[network]
        count = filler.rows[name].count
        return (filler.read(name, start, min(start + 2**20, count)) for start in range(0, count, 2**20))

    def _metadata(self, network: str, number: int) -> dict[str, str]:
        found = self.readers[network][self.layout.like - len(self.sources)].metadata
        return found[number] if number < len(found) and found[number] else {"format": "pt"}

    def _report(self, measured: Measured, output: str, tensors: int, seconds: float) -> MergeReport:
        factors: list[float | None] = [None] * len(self._all) if self.rule.slerp is not None else [*self.rule.factors]
        rows = measured_sources(measured, [each.step for each in self._all], factors)
        relative, largest = change_of(measured)
        sources = rows[1:] if self.base else rows
        return MergeReport(
            output=output,
            kind=self.sources[0].kind,
            settings=settings_of(self.config),
            sources=sources,
            base=rows[0] if self.base else None,
            mean_cosine=mean_cosine(sources),
            curve=emulated(self.rule.factors) if self.base is None and self.rule.slerp is None else None,
            tensors=tensors,
            values=measured.values,
            relative_change=relative,
            largest_changes=largest,
            seconds=round(seconds, 3),
        )


def prepare(sources: Sequence[Source], base: Source | None, config: MergeConfig, stack: ExitStack) -> WholeMerge:
    """Open and check the sources of a merge of full weights. Only the headers of weight files are read.

    Args:
        sources: the sources.
        base: the base, if the method uses one.
        config: the settings.
        stack: closes the opened files.

    Raises:
        UserError: a file cannot be read, the sources or the base do not fit together, or the settings do not fit them.
    """
    check_base(config, base)
    networks = sources[0].sets.keys()
    for source in sources[1:]:
        if source.sets.keys() != networks:
            raise UserError(
                f"{sources[0].label} has the networks {_names(networks)}, {source.label} has {_names(source.sets)}:"
                " give the folder of one network of each (MODEL/transformer), or the whole model as the base"
            )
    everything = {
        name: [*([_set_of(base, name, sources)] if base else []), *(source.sets[name] for source in sources)]
        for name in networks
    }
    check_configs(_configs(sources, base))
    readers = {name: [_opened(each, stack) for each in found] for name, found in everything.items()}
    layout = layout_of(sources, config.dtype is not None)
    labels = [source.label for source in sources]
    for found in readers.values():
        every = [reader.rows for reader in found]
        check_rows(every[-len(sources) :], labels, any_dtype=config.dtype is not None)
        check_no_lora(every[-1], labels[-1])
        if base is not None:
            check_rows(every[:2], [f"the base {base.label}", labels[0]], any_dtype=True)
    fill = {name: reader for name in networks if (reader := _filler(name, layout, readers[name][-1], stack))}
    rule = _rule(sources, base, config, [found[-1] for found in readers.values()], readers)
    rows = {name: _rows(readers[name][layout.like - len(sources)], fill.get(name), rule.dtype) for name in networks}
    return WholeMerge(
        sources=sources,
        base=base,
        config=config,
        layout=layout,
        readers=readers,
        rows=rows,
        fill=fill,
        rule=rule,
    )


def check_base(config: MergeConfig, base: object) -> None:
    """Check that a base is given if and only if the method uses one.

    Raises:
        UserError: a base is missing or superfluous.
    """
    if base is None and config.needs_base:
        what = f"eta {config.eta:g}" if config.eta not in (None, 1) else f"method {config.method}"
        raise UserError(f"{what} needs the model that the sources began from: give it with --base")
    if base is not None and not config.takes_base:
        raise UserError(f"method {config.method} uses a base only with eta: give --eta, or leave --base out")


def copy_others(layout: Layout, folder: Path, report: MergeReport) -> None:
    """Copy the other files of a merged folder; the model card, if there is one, begins with the merge.

    Raises:
        OSError: a file cannot be read or written.
    """
    for place, file in layout.copies.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / place)
    for place, text in layout.texts.items():
        (folder / place).write_text(text, encoding="utf-8")
    if (card := folder / "README.md").is_file():
        # Cards in other encodings keep their bytes.
        old = card.read_text(encoding="utf-8", errors="surrogateescape")
        card.write_text(merged_card(old, report), encoding="utf-8", errors="surrogateescape")


def _configs(sources: Sequence[Source], base: Source | None) -> list[list[Path]]:
    folders = [source.path for source in sources if source.kind == "folder"]
    groups = [[folder / name for folder in folders] for name in ("model_index.json", NOTE, "config.json")]
    for network in dict.fromkeys(name.split("/")[0] for source in sources for name in source.sets):
        group = [folder / network / "config.json" for folder in folders] if network else groups.pop()
        if base is not None and base.kind == "folder":
            inner = network if network in {name.split("/")[0] for name in base.sets} else ""
            group = [base.path / inner / "config.json", *group]
        groups.append(group)
    return groups


def _set_of(base: Source, network: str, sources: Sequence[Source]) -> WeightSet:
    """Return the tensors of the base for a network of the sources."""
    if network in base.sets:
        return base.sets[network]
    if len(sources[0].sets) == 1 and (len(base.sets) == 1 or sources[0].path.name in base.sets):
        return base.sets.get(sources[0].path.name, next(iter(base.sets.values())))
    raise UserError(
        f"the base {base.label} has the networks {_names(base.sets)}, the sources have {_names(sources[0].sets)}: give"
        " the folder of the same network"
    )


def _names(networks: Collection[str]) -> str:
    return ", ".join(name or "(one without a name)" for name in networks)


def _opened(found: WeightSet, stack: ExitStack) -> TensorBlocks:
    reader = TensorBlocks(found.files, found.prefix)
    stack.callback(reader.close)
    return reader


def _filler(name: str, layout: Layout, like: TensorBlocks, stack: ExitStack) -> TensorBlocks | None:
    """Return a reader of the network that the run trained, if the checkpoint lacks some of its tensors.

    If the network has not all tensors of the checkpoint, it is another one: then nothing of it is used.
    """
    folder = layout.fill.get(name)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        return None
    reader = _opened(WeightSet(files=tuple(files)), stack)
    same = all(key in reader.rows and reader.rows[key].shape == row.shape for key, row in like.rows.items())
    if not same:
        del layout.fill[name]
        for place in (f"{name}/config.json", NOTE):
            layout.copies.pop(place, None)
            layout.texts.pop(place, None)
        return None
    return reader if reader.rows.keys() > like.rows.keys() else None


def _rows(first: TensorBlocks, fill: TensorBlocks | None, dtype: str | None) -> dict[str, TensorRow]:
    """Return the tensors of the output by name."""
    rows = {}
    for name, row in first.rows.items():
        if dtype is not None and row.is_float:
            row = replace(row, dtype=dtype, size=row.count * (4 if dtype == "F32" else 2))
        rows[name] = row
    if fill is not None:
        rows |= {name: replace(row, file=0) for name, row in fill.rows.items() if name not in rows}
    return rows


def _rule(
    sources: Sequence[Source],
    base: Source | None,
    config: MergeConfig,
    firsts: Sequence[TensorBlocks],
    readers: Mapping[str, list[TensorBlocks]],
) -> Rule:
    dtype = DTYPES.get(config.dtype or "")
    assert dtype is None or dtype in FLOATS
    if config.method == "slerp":
        if len(sources) != 2:
            raise UserError(f"method slerp needs two sources, got {len(sources)}")
        return Rule(factors=[], slerp=0.5 if config.t is None else config.t, dtype=dtype)
    if config.method == "posthoc_ema":
        eta = 1.0 if config.eta is None else config.eta
        factors = [eta * weight for weight in _posthoc(sources, config, next(iter(readers.values())))]
    else:
        factors = source_factors(config, len(sources), [source.step for source in sources])
    if base is not None:
        rest = 1 - sum(factors)
        factors = [rest if abs(rest) > 1e-12 else 0.0, *factors]
    return Rule(factors=factors, dtype=dtype)


def _posthoc(sources: Sequence[Source], config: MergeConfig, readers: Sequence[TensorBlocks]) -> list[float]:
    """Return the weights of stored averages, whose files tell their profiles."""
    profiles = []
    for source, reader in zip(sources, readers[-len(sources) :], strict=True):
        said = reader.metadata[0] if reader.metadata else {}
        try:
            profiles.append(Profile(float(said[GAMMA]), float(said[STEP])))
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{source.label} is no stored average with a power-function profile (its metadata has no {GAMMA} and"
                f" {STEP}): use method power for plain checkpoints"
            ) from error
    last = max(profile.step for profile in profiles)
    return solve(profiles, Profile(gamma_of(config.sigma_rel or 0.1), last))
