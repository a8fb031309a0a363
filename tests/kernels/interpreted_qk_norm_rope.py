"""The Triton kernel of norm and rotation, in Triton's interpreter. `test_interpreted.py` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgen.kernels.qk_norm_rope import naive, triton
from tests.kernels.launches import relative_error
from tests.kernels.norm_rope_cases import KINDS, Case, make
from tests.kernels.poison import poisoned_memory


def launch(case: Case, *, heads_first: bool = False) -> list[Any]:
    tensors = dict(case.tensors)
    affine = tuple(tensors.pop(name) for name in ("q_weight", "k_weight", "q_bias", "k_bias"))
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    with poisoned_memory():
        out = [
            None if x is None else torch.empty(x.transpose(1, 2).shape if heads_first else x.shape, dtype=x.dtype)
            for x in (q, k, v)
        ]
    places = tuple(x.transpose(1, 2) if heads_first and x is not None else x for x in out)
    triton.qk_norm_rope(**tensors, affine=affine, out=places, scales=(None, None), **case.options)
    return list(places)


# In half precision only loads and stores differ, so one shape is enough for float16.
@pytest.mark.parametrize(
    ("shape", "dtype", "bound"),
    [
        ((2, 4, 3, 8), torch.float32, 1e-6),
        ((2, 4, 3, 8), torch.float16, 4e-4),
        ((1, 4, 12, 80), torch.float32, 1e-6),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, bound: float) -> None:
    case = make(kind, shape, dtype=dtype)
    for heads_first in (False, True):
        found = launch(case, heads_first=heads_first)
        for x, name in zip(found, "qk", strict=False):
            assert relative_error(x, naive.norm_rope(**case.in_float64().of(name))) < bound
        if case.tensors["v"] is not None:
            assert torch.equal(found[2], case.tensors["v"])


@pytest.mark.parametrize("kind", ["Wan", "half, shifted"])
def test_int8_with_a_scale_for_every_row(kind: str) -> None:
    case = make(kind, (2, 3, 3, 24))
    case.tensors["q"] = case.tensors["q"].clone()
    case.tensors["q"][0, 1] = 0
    tensors = {name: x for name, x in case.tensors.items() if name not in ("v",)}
    affine = tuple(tensors.pop(name) for name in ("q_weight", "k_weight", "q_bias", "k_bias"))
    shape = case.tensors["q"].shape
    out = [torch.full(shape, 99, dtype=torch.int8) for _ in range(2)]
    scales = tuple(torch.full(shape[:3], torch.nan) for _ in range(2))
    triton.qk_norm_rope(v=None, **tensors, affine=affine, out=(*out, None), scales=scales, **case.options)
    for x, scale, name in zip(out, scales, "qk", strict=True):
        expected, expected_scale = naive.norm_rope_int8(**case.of(name))
        assert torch.allclose(scale, expected_scale, rtol=1e-5, atol=0)
        # A number close to a half may be rounded up or down.
        assert (x.int() - expected.int()).abs().max() <= 1
        assert (x != expected).float().mean() < 0.01
        exact = naive.norm_rope(**case.in_float64().of(name))
        assert ((x * scale.unsqueeze(-1) - exact).abs() <= scale.unsqueeze(-1) * 0.501).all()
    assert not scales[0][0, 1].any()
    assert not out[0][0, 1].any()


def test_nothing_beside_the_inputs_is_read() -> None:
    case = make("Wan", (1, 3, 2, 12))
    expected = launch(case)
    room = torch.full((1, 5, 9, 40), torch.nan)
    for number, name in enumerate("qk"):
        view = room[:, 1:4, number * 3 + 1 : number * 3 + 3, 5:17]
        view.copy_(case.tensors[name])
        case.tensors[name] = view
    for x, y in zip(launch(case)[:2], expected[:2], strict=True):
        assert torch.equal(x, y)
