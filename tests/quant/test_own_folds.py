"""Rows of folds for a user's own class of blocks."""

import pytest
import torch
from torch import nn

from postgen.errors import UserError
from postgen.families.folds import Fold, Norm, Projection, Reader, has_folds, register_folds
from postgen.quant.transforms.let import fold_all_, let_points
from tests.quant.test_let import drawn, error


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        half, gate = self.up(self.norm(x)).chunk(2, -1)
        return self.down(half * gate.sigmoid())


@torch.no_grad()
def test_rows_of_a_users_own_block():
    torch.manual_seed(0)
    block, x = OwnBlock(), torch.randn(3, 8)
    with pytest.raises(UserError, match="no folds are known for blocks of the class OwnBlock"):
        let_points(block)
    rows = (
        Fold(name="up.input", kind="norm", writers=(Norm(name="norm"),), readers=(Reader(linear="up"),)),
        Fold(
            name="hidden",
            kind="gated",
            writers=(Projection(linear="up", part=(0, 2)),),
            readers=(Reader(linear="down"),),
            shift=False,
        ),
        Fold(name="absent", kind="norm", writers=(Norm(name="other"),), readers=(Reader(linear="up"),)),
    )
    register_folds("OwnBlock", rows)
    assert has_folds(block)
    expected = block(x)
    points = let_points(block)
    assert [(point.name, point.shiftable) for point in points] == [("up.input", True), ("hidden", False)]
    fold_all_(block, [(point, *drawn(point)) for point in points])
    assert error(block(x), expected) < 1e-6
