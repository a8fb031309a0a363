"""Agreement of the judge with a person on each draw of generated clips, with an edge network trained on other draws.

    python -m benchmarks.world_edge_cross FOLDER --generated FOLDER --generated-fresh FOLDER --generated-third FOLDER
        --generated-fourth FOLDER

FOLDER is the folder of `postgen.judges.world_edges`, with first.safetensors and looked.safetensors. The thresholds of
the judge were chosen with all four draws in view, so the result is slightly optimistic. The gate of
`benchmarks.world_eye` uses clips that were generated later. The command prints a table and writes
benchmarks/results/world_edges.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gates import write_result
from benchmarks.world_edge_windows import LEARNED, options
from benchmarks.world_eye import generated
from postgen.assets import embedded_model
from postgen.judges.world_edges import learn_looked, read_bags, read_net, write_net
from postgen.metrics.bootstrap import bootstrap
from postgen.world.check import edges


def judged_by(weights: Path, name: str, clips: Path) -> dict[str, Any]:
    """Return the agreement on the set `name` of `LEARNED` with the given weights, and its 95 % interval over clips."""
    shipped = edges.WEIGHTS
    try:
        edges.WEIGHTS = weights
        edges.network.cache_clear()
        row = generated(name, "cpu", clips, embedded_model())
    finally:
        edges.WEIGHTS = shipped
        edges.network.cache_clear()
    apart = len(row["apart"])
    found = bootstrap(torch.cat((torch.zeros(apart), torch.ones(row["judged"] - apart))))
    return {**row, "interval": [round(found.low, 4), round(found.high, 4)]}


def main() -> None:
    """Train on three draws and judge the fourth, for each draw in turn."""
    args = options(__doc__)
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for number, name in enumerate(LEARNED):
        bags = read_bags(args.folder / "looked.safetensors", but=number)
        net = learn_looked(read_net(args.folder / "first.safetensors"), bags)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "net.safetensors"
            write_net(net, weights)
            rows[name] = judged_by(weights, name, getattr(args, name))
        print(name, round(rows[name]["agree"], 4), rows[name]["interval"], *rows[name]["apart"], sep="\n  ")
    write_result("world_edges", {"sets": rows, "gates": []})


if __name__ == "__main__":
    main()
