"""Trains the network of `postgen.world.check.edges`, which separates cubes from bodies with round sides.

    python -m postgen.judges.world_edges FOLDER --shares 0 1 2 3 4 5 6 8 12 13 14 15 16 17 18 20 21 22 23 50 51 52
    python -m benchmarks.world_edge_windows FOLDER --generated ... # windows of clips labelled by persons
    python -m postgen.judges.world_edges FOLDER --first           # trains on the prisms (first.safetensors)
    python -m postgen.judges.world_edges FOLDER --output postgen/assets/world-edges/model.safetensors

These commands make the weights of the package, on one thread of a CPU: 2 minutes a share, 10 for the rest. The first
stage trains on bodies between a cube and a cylinder of known roundness. They pass through the autoencoder of the
embedded model, most with noise on their latents, because bodies in generated clips are softer and lumpier than
rendered ones. The second stage trains on cubes of generated clips that persons labelled. A person labels a whole clip,
not a frame: a wrong cube looks round in some frames, a right one in none. The value of a body is therefore the mean
over its roundest frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.files import replacing
from postgen.judges.edge_clips import make_share
from postgen.tensor_files import read_tensors
from postgen.world.check.edges import EdgeNet

#: Steps, batch size and learning rate of the first stage.
_STEPS, _BATCH, _RATE = 5000, 192, 2e-3
#: Second stage: steps, bodies per batch (half of them wrong), frames per body, how many of these count, learning rate.
_LOOKED_STEPS, _BODIES, _SHOTS, _WORST, _LOOKED_RATE = 150, 32, 10, 3, 5e-4
#: Fewest windows of a body that is used for training.
LEAST = 4
#: Label smoothing for the persons' labels, and dropout of the features.
_DOUBT, _DROPPED = 0.05, 0.2
_DECAY = 0.02

Bag = tuple[Tensor, bool]
"""Windows (n,2,CELLS,CELLS) of one requested cube, and whether a person labelled it as wrong (not a cube)."""


def learn_prisms(window: Tensor, label: Tensor, steps: int = _STEPS) -> EdgeNet:
    """Train on windows (N,2,CELLS,CELLS) int16 as stored by `edge_clips.as_bytes`, with their roundness (N,)."""
    torch.manual_seed(0)
    net = EdgeNet()
    optimizer, plan = _optimizer(net, _RATE, steps)
    for _ in range(steps):
        rows = torch.randint(len(label), (_BATCH,))
        loss = functional.binary_cross_entropy_with_logits(net(varied(window[rows].float() / 255)), label[rows])
        _update(loss, optimizer, plan)
    return net.eval()


def learn_looked(net: EdgeNet, bags: Sequence[Bag], steps: int = _LOOKED_STEPS) -> EdgeNet:
    """Continue training on bodies of generated clips that a person labelled.

    Raises:
        UserError: there are no right bodies, or no wrong ones.
    """
    torch.manual_seed(0)
    kinds = [[window for window, wrong in bags if wrong is said and len(window) >= LEAST] for said in (True, False)]
    if not all(kinds):
        raise UserError(
            f"world_edges needs right and wrong bodies, got {len(kinds[1])} right and {len(kinds[0])} wrong:"
            " label more clips."
        )
    optimizer, plan = _optimizer(net.train(), _LOOKED_RATE, steps)
    said = torch.tensor([1 - _DOUBT, _DOUBT]).repeat_interleave(_BODIES // 2)
    for _ in range(steps):
        chosen = [kind[int(k)] for kind in kinds for k in torch.randint(len(kind), (_BODIES // 2,))]
        shots = [window[torch.randperm(len(window))[:_SHOTS]].float() / 255 for window in chosen]
        logits = net(varied(torch.cat(shots)), _DROPPED).split([len(shot) for shot in shots])
        value = torch.stack([one.topk(min(_WORST, len(one))).values.mean() for one in logits])
        _update(functional.binary_cross_entropy_with_logits(value, said), optimizer, plan)
    return net.eval()


def _optimizer(net: EdgeNet, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=_DECAY)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _update(loss: Tensor, optimizer: torch.optim.Optimizer, plan: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    plan.step()


def varied(window: Tensor) -> Tensor:
    """Augment windows: mirror, shift, scale and soften them a little."""
    count = len(window)
    grow, flip = 1 + 0.08 * (torch.rand(count) * 2 - 1), torch.randint(0, 2, (count,)) * 2.0 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = grow * flip, grow
    theta[:, :, 2] = 0.05 * (torch.rand(count, 2) * 2 - 1)
    moved = functional.grid_sample(
        window, functional.affine_grid(theta, list(window.shape), False), align_corners=False
    )
    soft = functional.avg_pool2d(functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    part = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
    return moved + part * (soft - moved)


def read_bags(path: Path, but: int | None = None) -> list[Bag]:
    """Read the bodies from a file of `benchmarks.world_edge_windows`.

    The file has `window` (N,...), `bag` (N,), and `wrong` and `set` (bags,).

    Args:
        path: the file.
        but: index of a set of clips whose bodies are left out.

    Raises:
        UserError: the file is missing or damaged.
    """
    held = read_tensors(path)
    bodies = enumerate(zip(held["wrong"].tolist(), held["set"].tolist(), strict=True))
    return [(held["window"][held["bag"] == k], wrong) for k, (wrong, part) in bodies if part != but]


def read_net(path: Path) -> EdgeNet:
    """Load a network that the first stage wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    net = EdgeNet()
    net.load_state_dict({name: value.float() for name, value in read_tensors(path).items()})
    return net


def write_net(net: EdgeNet, path: Path) -> None:
    """Write the weights in float16."""
    _write({name: value.half() for name, value in net.state_dict().items()}, path)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file(tensors, part)


def main() -> None:
    """Make shares of prisms, train on them, or train on labelled clips, as the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the shares and windows")
    parser.add_argument("--shares", type=int, nargs="+", metavar="NUMBER", help="make these shares of prisms")
    parser.add_argument("--first", action="store_true", help="train on all shares but the last")
    parser.add_argument("--output", type=Path, help="train on looked.safetensors too, and write the weights here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    first = args.folder / "first.safetensors"
    if args.shares:
        from diffusers import DiffusionPipeline

        vae = DiffusionPipeline.from_pretrained(embedded_model()).vae.float()
        for share in args.shares:
            _write(make_share(share, vae), args.folder / f"share-{share:03d}.safetensors")
    if args.first:
        shares = [read_tensors(path) for path in sorted(args.folder.glob("share-*.safetensors"))[:-1]]
        window, label = (torch.cat([share[name] for share in shares]) for name in ("window", "round"))
        write_net(learn_prisms(window, label), first)
    if args.output:
        bags = read_bags(args.folder / "looked.safetensors")
        write_net(learn_looked(read_net(first), bags), args.output)
        print(f"{sum(wrong for _, wrong in bags)} of {len(bags)} bodies are wrong; the weights are in {args.output}")


if __name__ == "__main__":
    main()
