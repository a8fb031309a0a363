"""Solving of the layers of a block with a Hessian, in the order in which they run, and the file of the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.files import replacing
from postgen.quant.fake import FakeQuantLinear, fake_layers
from postgen.quant.hessian import HessianSum
from postgen.quant.packing import pack, unpack
from postgen.quant.solvers import solve
from postgen.tensor_files import read_tensors

Solved = Mapping[str, Mapping[str, Tensor]]
"""Layer name inside the block -> its packed weight."""

_SETTINGS = "settings"
_BETWEEN = "|"


@torch.no_grad()
def solve_block(
    student: nn.Module, runs: Sequence[Callable[[], object]], solver: str, options: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Solve the layers of a block in the order in which they run. Each sees its inputs after those before it are
    quantised; layers that read the same tensor are solved together.

    Args:
        student: the block with `FakeQuantLinear` layers, in evaluation mode; their weights are fixed in place.
        runs: functions that run the student on one call each.
        solver: name of the solver.
        options: its options.

    Raises:
        UserError: see `postgen.quant.solvers.solve`.
    """
    found: dict[str, dict[str, Tensor]] = {}
    layers = {name: fake for name, fake in fake_layers(student) if fake.spec.weight is not None}
    for group in _groups(layers, runs[0]):
        sums = HessianSum(layers[group[0]].in_features)
        hook = layers[group[0]].register_forward_pre_hook(partial(_add, sums))
        try:
            for run in runs:
                run()
        finally:
            hook.remove()
        hessian = sums.finish()
        for name in group:
            fake = layers[name]
            format = fake.spec.weight
            assert format is not None
            weight, _ = fake.folded()
            packed = pack(solve(weight, format, solver, hessian, **_options(solver, fake, options)))
            fake.fix_(unpack(packed, format, tuple(weight.shape)))
            found[name] = {key: each.cpu() for key, each in packed.items()}
    return found


def write_solved(path: Path, solved: Solved, settings: Mapping[str, Any]) -> None:
    """Write the solved layers of a block, complete or not at all.

    Args:
        path: the file.
        solved: the packed weights.
        settings: JSON values that identify the run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}{_BETWEEN}{key}": each for name, parts in solved.items() for key, each in parts.items()}
    text = json.dumps(dict(settings), sort_keys=True).encode()
    tensors[_SETTINGS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with replacing(path) as part:
        save_file({name: each.contiguous() for name, each in tensors.items()}, part)


def read_solved(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Read the solved layers of a block.

    Raises:
        UserError: the file cannot be read, or is from a run with other settings.
    """
    tensors = read_tensors(path, f"cannot read the solved block {path}")
    before = json.loads(bytes(tensors.pop(_SETTINGS).tolist()))
    if before != json.loads(json.dumps(dict(settings))):
        raise UserError(f"{path} is from a run with other settings: use them again, or set another output_dir")
    found: dict[str, dict[str, Tensor]] = {}
    for name, each in tensors.items():
        layer, _, key = name.partition(_BETWEEN)
        found.setdefault(layer, {})[key] = each
    return found


def _groups(layers: Mapping[str, FakeQuantLinear], run: Callable[[], object]) -> list[list[str]]:
    """Return the layers in the order in which they run, those that read one tensor in a row as one group."""
    seen: list[tuple[str, Tensor]] = []

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((name, args[0]))  # a reference, so that the memory is not used again for another tensor

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(see, name)).remove)
        run()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, x in seen:
        if any(name in group for group in groups):
            continue
        fake = layers[name]
        # Transformations and rotations change what a layer multiplies.
        same = x is last and not fake.lets and fake.spec.rotate == layers[groups[-1][0]].spec.rotate
        if same:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    return groups


def _add(sums: HessianSum, fake: nn.Module, args: tuple[Any, ...]) -> None:
    """Add the inputs of a call, each row of the batch with the weight that gives all of them the same mean square."""
    assert isinstance(fake, FakeQuantLinear)
    x = fake.transformed(args[0])
    for row in x if x.dim() > 2 else x[None]:
        size = row.square().mean()
        if size > 0:
            sums.add(row, weight=float(1 / size))


def _options(solver: str, fake: FakeQuantLinear, options: Mapping[str, Any]) -> dict[str, Any]:
    # A rotation makes all inputs alike, so the order of groups has no use there.
    return {"order": "none", **options} if solver == "bpdq" and fake.spec.rotate else dict(options)
