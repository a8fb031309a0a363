"""Cut out windows of cubes from clips that people judged, as training data for `postgen.judges.world_edges`.

    python -m benchmarks.world_edge_windows FOLDER --generated FOLDER --generated-fresh FOLDER --generated-third FOLDER
        --generated-fourth FOLDER

In a clip that a person calls right, every cube counts as a true cube. For wrong clips,
benchmarks/data/world_edges.json lists by clip the colours of the cubes that are no cubes according to the person's
verdict. Other cubes of wrong clips, and unclear clips, are not used. The clips are those of `benchmarks.world_check`,
and the windows are cut out as in the judge. The command writes FOLDER/looked.safetensors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.world_eye import DATA, eye_verdicts
from benchmarks.world_eye_clips import kept_clips
from postgen.judges.edge_clips import as_bytes, cut
from postgen.judges.world_edges import LEAST
from postgen.world.parse import read
from postgen.world.spec import COLOURS

NO_CUBES = DATA / "world_edges.json"
#: The draws that are training data. The index here is the number of the draw in the file of windows.
LEARNED = ("generated", "generated_fresh", "generated_third", "generated_fourth")
#: Smallest area of the body in a window, relative to its largest area in the clip.
_PART = 0.25


def bodies(name: str, folder: Path) -> Iterator[tuple[Tensor, bool]]:
    """Yield for each cube of the set `name` its windows, int16 (n,2,CELLS,CELLS), and True if it is no true cube."""
    clips, wrong = kept_clips(folder), json.loads(NO_CUBES.read_text(encoding="utf-8"))[name]
    for clip, row in eye_verdicts(name)["clips"].items():
        reading = read(row["prompt"])
        if reading is None or (row["verdict"] != "right" and clip not in wrong):
            continue
        window, _, colour, area = cut(clips[clip].float() / 255)
        for body in reading.scene.bodies:
            none = body.colour in wrong.get(clip, ())
            own = colour == list(COLOURS).index(body.colour)
            if body.shape == "cube" and (none or row["verdict"] == "right") and own.sum() >= LEAST:
                yield as_bytes(window[own & (area >= _PART * area[own].max())]), none


def options(says: str | None) -> argparse.Namespace:
    """Read a command line with the folder of the network and the folders of all sets of `LEARNED`."""
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of postgen.judges.world_edges")
    for name in LEARNED:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=Path, required=True, help="folder of the clips of this set"
        )
    return parser.parse_args()


def main() -> None:
    """Cut out and write the windows of all sets."""
    args = options(__doc__)
    torch.set_num_threads(1)
    by_set = [list(bodies(name, getattr(args, name))) for name in LEARNED]
    found, sets = [body for part in by_set for body in part], [k for k, part in enumerate(by_set) for _ in part]
    args.folder.mkdir(parents=True, exist_ok=True)
    numbers = torch.arange(len(found)).repeat_interleave(torch.tensor([len(window) for window, _ in found]))
    wrong = torch.tensor([none for _, none in found])
    tensors = {"window": torch.cat([window for window, _ in found]), "bag": numbers, "wrong": wrong}
    tensors["set"] = torch.tensor(sets)
    save_file(tensors, args.folder / "looked.safetensors")
    print(f"{len(found)} cubes, {int(wrong.sum())} of them no true cubes; {len(numbers)} windows")


if __name__ == "__main__":
    main()
