"""Curate a data set: measure its files, apply the funnel, write the rows that are kept and a report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from postgen.errors import UserError, is_number
from postgen.files import replacing
from postgen.sft.faults import Fault, check_faults
from postgen.sft.items import Item

from .captions import CaptionEmbed, ngram_embeddings
from .clips import clip_name, needs_file, write_clip
from .config import CurationConfig
from .funnel import Candidate, Funnel, Step, decide
from .hashes import embedder
from .measured import Measured, measure
from .places import Places
from .report import write_report
from .store import MeasureStore

Report = Callable[[str, int, int], None]
"""Called with the work ("Measuring", "Cutting", "Drawing"), the finished and the total number of files."""

ADVICE = "or leave out --strict; at least one must be usable"
"""Advice about files that cannot be used."""
_OWN = (
    "video",
    "image",
    "file_name",
    "prompt",
    "weight",
    "given_weight",
    "source",
    "first_frame",
    "num_frames",
    "measures",
)


def curate(
    items: Sequence[Item],
    output: str | Path,
    config: CurationConfig | None = None,
    *,
    faults: Sequence[Fault] = (),
    apart_from: Sequence[str] = (),
    caption_embed: CaptionEmbed = ngram_embeddings,
    device: str = "cpu",
    workers: int = 1,
    strict: bool = False,
    report: Report = lambda *_: None,
) -> Funnel:
    """Curate a data set, and write the JSONL file that `train_dataset` of `method: sft` accepts.

    A call that was stopped, also by kill -9, is continued by the same call: measured files and written clips are kept.
    A call with other thresholds uses the measurements again.

    Args:
        items: the items of `postgen.sft.items.read_items`.
        output: the JSONL file to write, with `video` or `image`, `prompt`, `weight`, the columns of the source and
            the measurements. Beside it are written: NAME.measures.jsonl; NAME-clips, the shots and cropped pictures;
            NAME-report, the counts (`funnel.json`) and pictures.
        config: the settings; None: the defaults.
        faults: rows and files that `read_items` left out; they are counted.
        apart_from: prompts that no caption may repeat, such as those of RL and of tests.
        caption_embed: embedder of captions for their weights and overlaps.
        device: device of a CLIP model and of the search for duplicates.
        workers: number of files that are measured at once.
        strict: whether a file that cannot be read is an error; otherwise it is counted.
        report: receives the progress.

    Raises:
        UserError: OpenCV is missing and `flow` is on; no file can be read (with `strict`: not every file); no clip is
            left; or a file cannot be written.
    """
    config = config or CurationConfig()
    if config.measured()["flow"] and find_spec("cv2") is None:
        raise UserError("flow needs OpenCV: pip install 'postgen[rewards]', or set flow to null")
    if not items:
        raise UserError("there is nothing to curate: the data set has no items")
    places = Places(Path(output))
    found = _candidates(items, config, places, device, workers, report)
    unread = [one for one in found if one.shot is None]
    if strict or len(unread) == len(found):
        wrong = [Fault(one.item.key, one.measured.error or "") for one in unread]
        check_faults(wrong, len(items), "the source", ADVICE)
    funnel = decide(found, config, apart_from=apart_from, embed=caption_embed, device=device)
    if faults:
        total = len(items) + len(faults)
        funnel.steps.insert(0, Step(name="usable", before=total, after=len(items), threshold="file and caption"))
    paths = _written(funnel, places, report)
    write_report(places.report, funnel, config, faults, lambda done, total: report("Drawing", done, total))
    if not funnel.kept:
        most = max(funnel.steps, key=lambda step: step.removed)
        raise UserError(
            f"no clip is left: {most.name} removed {most.removed} of {most.before}; change the thresholds"
            f" ({places.report} shows the removed clips)"
        )
    _write_rows(places.output, funnel, paths)
    return funnel


def _candidates(
    items: Sequence[Item], config: CurationConfig, places: Places, device: str, workers: int, report: Report
) -> list[Candidate]:
    store = MeasureStore(places.store, config)
    keys, done = _keys(items, store)
    for number, (path, measured) in enumerate(_measured(items, keys, store, config, device, workers), 1):
        done[path] = measured
        report("Measuring", number, len(keys))
    found = []
    for source, item in enumerate(items):
        measured = done[item.path]
        for number, shot in enumerate(measured.shots or (None,)):
            key = keys.get(item.path, "")
            found.append(Candidate(item=item, source=source, key=key, number=number, measured=measured, shot=shot))
    return found


def _keys(items: Sequence[Item], store: MeasureStore) -> tuple[dict[Path, str], dict[Path, Measured]]:
    """Return the key of each file, and the result for files that are missing."""
    keys: dict[Path, str] = {}
    lost: dict[Path, Measured] = {}
    for item in items:
        if item.path not in keys and item.path not in lost:
            try:
                keys[item.path] = store.key(item.path)
            except OSError as error:
                lost[item.path] = Measured(error=f"cannot read {item.path}: {error.strerror or error}")
    return keys, lost


def _measured(
    items: Sequence[Item],
    keys: dict[Path, str],
    store: MeasureStore,
    config: CurationConfig,
    device: str,
    workers: int,
) -> Iterator[tuple[Path, Measured]]:
    """Yield (path, measurements) of each file as they are ready, and store them."""
    kinds = {item.path: item.kind for item in items if item.path in keys}
    known = {path: found for path in kinds if (found := store.get(keys[path])) is not None}
    yield from known.items()
    todo = [path for path in kinds if path not in known]
    embed = embedder(config.embedding, config.embedding_model, device) if todo else None
    pool = ThreadPoolExecutor(workers)
    running: dict[Future[Measured], Path] = {}
    waiting = iter(todo)
    try:
        while True:
            # Only a few files wait, so that an interrupt does not have to cancel thousands.
            while len(running) < 2 * workers and (path := next(waiting, None)) is not None:
                running[pool.submit(measure, path, kinds[path], config, embed)] = path
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                path, measured = running.pop(future), future.result()
                if measured.error is None:
                    store.add(keys[path], measured)
                yield path, measured
    finally:
        # After an error or Ctrl-C, files that are being measured are not waited for.
        pool.shutdown(wait=False, cancel_futures=True)


def _written(funnel: Funnel, places: Places, report: Report) -> dict[int, Path]:
    """Write the clips that are parts of their files; return the path of each kept candidate by its place."""
    kept = [(place, one) for place, one in enumerate(funnel.candidates) if one.removed is None]
    paths = {place: one.item.path for place, one in kept}
    parts = [(place, one) for place, one in kept if needs_file(one)]
    for number, (place, one) in enumerate(parts, 1):
        paths[place] = places.clips / clip_name(one)
        write_clip(one, paths[place])
        report("Cutting", number, len(parts))
    return paths


def _write_rows(output: Path, funnel: Funnel, paths: dict[int, Path]) -> None:
    try:
        # A file with several captions has several items, and one name.
        names = {one.item.path: _origin(one) for one in reversed(funnel.candidates)}
        with replacing(output) as part, open(part, "w", encoding="utf-8") as file:
            for place, path in paths.items():
                one = funnel.candidates[place]
                near = os.path.relpath(path.absolute(), output.absolute().parent)
                row = _row(one, near) | {"source": names[one.item.path]}
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _origin(one: Candidate) -> str:
    """Return the name of the file of a clip; in a curated data set, of the video from which it was cut."""
    row = one.item.row
    return str(row["source"]) if {"source", "measures"} <= row.keys() else one.item.key


def _row(one: Candidate, path: str) -> dict[str, Any]:
    assert one.shot is not None
    given = _given(one.item.row)
    further = {name: value for name, value in one.item.row.items() if name not in _OWN}
    return {
        one.item.kind: path,
        "prompt": one.item.caption,
        "weight": round(one.weight * given, 6),
        **({} if given == 1 else {"given_weight": given}),
        **further,
        "first_frame": one.shot.first + (one.item.row.get("first_frame", 0) if "measures" in one.item.row else 0),
        "num_frames": one.shot.count,
        "measures": {name: _short(value) for name, value in one.shot.values.items()},
    }


def _given(row: dict[str, Any]) -> float:
    """Return the weight that the user gave a row; the weight of an earlier curation does not count."""
    given = row.get("given_weight", 1 if "measures" in row else row.get("weight", 1))
    return float(given) if is_number(given) else 1.0


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
