"""The funnel: which clips pass which filter, decided from measurements alone, so that thresholds can change freely."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.sft.items import Item

from .captions import CaptionEmbed, density_weights, ngram_embeddings, overlaps
from .config import BANDS, Band, CurationConfig
from .hashes import read_back, signs
from .measured import Measured, Shot
from .nearest import Duplicates


@dataclass(kw_only=True, slots=True)
class Candidate:
    """One shot of a video, or one image, on its way through the funnel."""

    item: Item
    source: int
    """Number of the item in the data set."""
    key: str = ""
    """Key of the file in the store of measurements."""
    number: int = 0
    """Number of the shot in its file."""
    measured: Measured
    shot: Shot | None
    """None: the file cannot be read."""
    removed: str | None = None
    """Name of the filter that removed it; None: it is kept."""
    value: float | None = None
    """The value that the filter refused, or the distance to the clip or prompt that it repeats."""
    why: str = ""
    """The reason in words."""
    other: int | None = None
    """Number of the candidate that it duplicates."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of the funnel."""

    name: str
    before: int
    after: int
    threshold: str = ""
    """The threshold in words."""
    alone: int | None = None
    """How many of all readable clips this filter alone would remove; None where the order matters."""

    @property
    def removed(self) -> int:
        """Number of removed clips; below 0 if videos were divided into more shots."""
        return self.before - self.after


@dataclass(kw_only=True, slots=True)
class Funnel:
    """The result of the curation: all candidates, and the counts at each step."""

    candidates: list[Candidate]
    steps: list[Step]

    @property
    def kept(self) -> list[Candidate]:
        """The clips that passed all filters, in the order of the source."""
        return [one for one in self.candidates if one.removed is None]


def decide(
    found: Sequence[Candidate],
    config: CurationConfig,
    *,
    apart_from: Sequence[str] = (),
    embed: CaptionEmbed = ngram_embeddings,
    device: str = "cpu",
) -> Funnel:
    """Apply all thresholds to measured clips.

    Each clip is removed by the first filter that refuses it. Of duplicates the clip with the most pixels is kept, then
    the longest, then the first of the source.

    Args:
        found: the candidates; their results are set. Those of one file follow each other.
        config: the thresholds.
        apart_from: prompts that no caption may repeat.
        embed: embedder of captions and prompts.
        device: device of the search for duplicates and of the density.
    """
    funnel = Funnel(candidates=list(found), steps=[])
    files = len({one.source for one in found})
    readable = [one for one in found if one.shot is not None]
    for one in found:
        if one.shot is None:
            one.removed, one.why = "readable", one.measured.error or "it cannot be read"
    files_read = files - (len(found) - len(readable))
    funnel.steps.append(Step(name="readable", before=files, after=files_read))
    if config.cuts == "split":
        funnel.steps.append(Step(name="shots", before=files_read, after=len(readable), threshold="one clip per shot"))
    if config.cuts == "drop":
        _apply(funnel, "cuts", "no cut", _cuts, readable)
    if config.bars == "drop":
        _apply(funnel, "bars", "no black bars", _bars, readable)
    for name in BANDS:
        band = getattr(config, name)
        if band != (None, None):
            _apply(funnel, name, worded(band), _outside(name, band), readable)
    if config.hash_distance is not None:
        _remove_duplicates(funnel, "duplicate_hash", config.hash_distance, device)
    if config.embedding_distance is not None and config.embedding != "none":
        _remove_duplicates(funnel, "duplicate_embedding", config.embedding_distance, device)
    if apart_from:
        _remove_overlaps(funnel, config, apart_from, embed)
    _weigh(funnel.kept, config, embed, device)
    return funnel


def worded(band: Band) -> str:
    """Return a band in words.

    >>> worded((0.5, None)), worded((None, 2.0)), worded((1.0, 3.0))
    ('>= 0.5', '<= 2', '1 to 3')
    """
    low, high = band
    if low is None:
        return f"<= {high:g}"
    return f">= {low:g}" if high is None else f"{low:g} to {high:g}"


Refuse = Callable[[Candidate], tuple[float, str] | None]
"""Candidate -> value and reason of a refusal; None: it passes."""


def _apply(funnel: Funnel, name: str, threshold: str, refuse: Refuse, readable: Iterable[Candidate]) -> None:
    before = len(funnel.kept)
    alone = 0
    for one in readable:
        if (refused := refuse(one)) is not None:
            alone += 1
            if one.removed is None:
                one.removed = name
                one.value, one.why = refused
    funnel.steps.append(Step(name=name, before=before, after=len(funnel.kept), threshold=threshold, alone=alone))


def _outside(name: str, band: Band) -> Refuse:
    low, high = band

    def refuse(one: Candidate) -> tuple[float, str] | None:
        value = one.shot.values[name] if one.shot else None
        if value is None or ((low is None or value >= low) and (high is None or value <= high)):
            return None
        return value, f"{name} is {value:.4g}, allowed {worded(band)}"

    return refuse


def _cuts(one: Candidate) -> tuple[float, str] | None:
    cuts = one.measured.cuts
    return (float(len(cuts)), f"{len(cuts)} cuts, the first at frame {cuts[0]}") if cuts else None


def _bars(one: Candidate) -> tuple[float, str] | None:
    bars = one.shot.bars if one.shot else 0.0
    return (bars, f"black bars cover {bars:.1%}") if bars else None


def _remove_duplicates(funnel: Funnel, name: str, distance: float, device: str) -> None:
    """Remove duplicates by the hash or by the embedding. Images and videos are not compared with each other."""
    before = len(funnel.kept)
    hashed = name == "duplicate_hash"
    # The product of two hashes is 1 - 2 * the share of different bits; of two embeddings 1 - the distance.
    least = 1 - 2 * distance if hashed else 1 - distance
    for kind in ("image", "video"):
        order = [place for place, one in enumerate(funnel.candidates) if one.removed is None and one.item.kind == kind]
        order.sort(key=lambda place: _rank(funnel.candidates[place]))
        order = _each_once(funnel.candidates, order)
        search = Duplicates(least, device)
        for start in range(0, len(order), 4096):
            places = order[start : start + 4096]
            vectors = torch.stack([_vector(funnel.candidates[place], hashed) for place in places])
            for place, vector, same in zip(places, vectors, search.add(vectors), strict=True):
                if same is None:
                    continue
                one, other = funnel.candidates[place], funnel.candidates[order[same]]
                near = float(vector @ _vector(other, hashed))
                one.removed, one.other = name, order[same]
                one.value = max(0.0, (1 - near) / 2 if hashed else 1 - near)
                one.why = f"at the distance {one.value:.3f} from {other.item.key}, shot {other.number}"
    _follow(funnel.candidates, name)
    funnel.steps.append(Step(name=name, before=before, after=len(funnel.kept), threshold=f"distance > {distance:g}"))


def _part(one: Candidate) -> tuple[str, int]:
    return str(one.item.path), one.number


def _each_once(candidates: Sequence[Candidate], order: Sequence[int]) -> list[int]:
    """Return the places without further captions of the same file, which are no duplicates."""
    return list({_part(candidates[place]): place for place in reversed(order)}.values())[::-1]


def _follow(candidates: Sequence[Candidate], name: str) -> None:
    """Remove a file's further captions with it."""
    gone = {_part(one): one for one in candidates if one.removed == name}
    for one in candidates:
        if one.removed is None and (first := gone.get(_part(one))) is not None:
            one.removed, one.value, one.why, one.other = name, first.value, first.why, first.other


def _rank(one: Candidate) -> tuple[float, float]:
    assert one.shot is not None
    values = one.shot.values
    return -(values["height"] or 0) * (values["width"] or 0), -one.shot.count


def _vector(one: Candidate, hashed: bool) -> Tensor:
    assert one.shot is not None
    if hashed:
        return signs(one.shot.hash)
    assert one.shot.embedding is not None
    return read_back(one.shot.embedding)


def _remove_overlaps(funnel: Funnel, config: CurationConfig, prompts: Sequence[str], embed: CaptionEmbed) -> None:
    kept = funnel.kept
    captions = list(dict.fromkeys(one.item.caption for one in kept))
    near = overlaps(captions, prompts, distance=config.caption_distance, embed=embed)
    found = {captions[one.caption]: one for one in near}
    for one in kept:
        if (same := found.get(one.item.caption)) is not None:
            one.removed, one.value = "overlap", same.distance
            one.why = f"its caption is at the distance {same.distance:.3f} from the prompt {prompts[same.prompt]!r}"
    others = "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
    threshold = f"distance > {config.caption_distance:g} from {others}"
    funnel.steps.append(Step(name="overlap", before=len(kept), after=len(funnel.kept), threshold=threshold))


def _weigh(kept: Sequence[Candidate], config: CurationConfig, embed: CaptionEmbed, device: str) -> None:
    if config.density_power == 0 or not kept:
        return
    weights = density_weights(
        embed([one.item.caption for one in kept]),
        power=config.density_power,
        width=config.density_width,
        cap=config.density_cap,
        device=device,
    )
    for one, weight in zip(kept, weights.tolist(), strict=True):
        one.weight = weight
