"""Copies of a network that share its weights, or have none, for a student beside its teacher."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def twin(network: nn.Module, *, shared: bool) -> nn.Module:
    """Copy a network; if `shared`, the copy has the same parameter objects.

    Buffers are always copied. They are small, and checkpoints contain the buffers of both networks.
    """
    return copy.deepcopy(network, {id(each): each for each in network.parameters()} if shared else {})


def empty_copy(network: nn.Module, device: str = "meta") -> nn.Module:
    """Copy a network without the values of its parameters; on the device "meta" they take no memory."""
    memo: dict[int, Any] = {
        id(each): nn.Parameter(torch.empty_like(each, device=device), requires_grad=False)
        for each in network.parameters()
    }
    return copy.deepcopy(network, memo)


@torch.no_grad()
def share_equal_(network: nn.Module, other: nn.Module) -> None:
    """Replace the parameters of a network by those of another one that have the same name, dtype and values."""
    theirs = dict(other.named_parameters())
    for name, value in list(network.named_parameters()):
        same = theirs.get(name)
        if same is None or same is value or (same.shape, same.dtype) != (value.shape, value.dtype):
            continue
        if torch.equal(same.to(value.device), value):
            set_in(network, name, same)


def set_in(network: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """Replace a parameter, buffer or module of a network by its dotted name."""
    owner, _, key = name.rpartition(".")
    setattr(network.get_submodule(owner), key, value)


def bytes_of(student: nn.Module, teacher: nn.Module) -> tuple[int, int]:
    """Return the bytes of weights that student and teacher share, and the bytes of weights of the student alone."""
    theirs = {id(tensor) for tensor in teacher.parameters()}
    sizes: dict[bool, int] = {True: 0, False: 0}
    for tensor in chain(student.parameters(), student.buffers()):
        sizes[id(tensor) in theirs] += tensor.nbytes
    return sizes[True], sizes[False]
