"""Solvers: each lowers the error that it is made to lower, for every number format."""

import functools

import pytest
import torch

from postgen.errors import UserError
from postgen.quant import FORMATS, Hessian, HessianSum, format_of, quantize_tensor, solve
from postgen.quant.packing import pack, unpack
from postgen.quant.rounding import qsnr
from postgen.quant.solvers.compensation import sweep
from tests.quant.solved import example, inputs

WEIGHT, HESSIAN = example()
ALL = ["int2:g64:asym", "int2:g64", "int3:g128", "int4", "int4:tensor", "int4:asym", "int8:g32", "fp8", "fp8:block"]
ALL += ["mxint8", "mxfp4", "mxfp6", "mxfp4:floor", "nvfp4", "nvint4", "bp2", "bp3:g128"]


@functools.cache
def solved(text, solver, **options):
    """Return what a solver finds for the example with its Hessian; tests do not change it."""
    return solve(WEIGHT, format_of(text), solver, HESSIAN, **options)


def output_error(text, solver, **options):
    found = solved(text, solver, **options)
    assert found.format == format_of(text)
    assert found.shape == tuple(WEIGHT.shape)
    return HESSIAN.error(WEIGHT, found.numbers())


@pytest.mark.parametrize("text", ALL)
def test_the_order_of_the_solvers(text):
    nearest = qsnr(WEIGHT, solve(WEIGHT, format_of(text), "rtn").numbers())
    assert torch.equal(solve(WEIGHT, format_of(text), "rtn").values, quantize_tensor(WEIGHT, format_of(text)).values)
    fitted = qsnr(WEIGHT, solve(WEIGHT, format_of(text), "ls").numbers())
    assert fitted >= nearest
    if not format_of(text).planes:
        searched = qsnr(WEIGHT, solve(WEIGHT, format_of(text), "rtn", clip="search").numbers())
        assert nearest <= searched <= fitted + 1e-6
    assert output_error(text, "gptq") < 0.7 * output_error(text, "rtn")


@pytest.mark.parametrize("text", ALL)
def test_codes_are_of_the_grid_and_scales_as_rounding_makes_them(text):
    format = format_of(text)
    plain = quantize_tensor(WEIGHT, format)
    for solver in ("ls", "gptq"):
        found = solved(text, solver)
        assert found.values.shape == plain.values.shape
        assert torch.equal(format.grid.decode(format.grid.encode(found.values)), found.values)
        assert found.scales.scale.shape == plain.scales.scale.shape
        assert (found.scales.zero is None) == (plain.scales.zero is None)
        if format.scale == "e8m0":
            assert torch.equal(found.scales.scale.frexp().mantissa, torch.full_like(found.scales.scale, 0.5))
        if format.scale == "e4m3":
            assert torch.equal(found.scales.scale.to(torch.float8_e4m3fn).float(), found.scales.scale)
        kept = unpack(pack(found), format, found.shape)
        assert torch.equal(kept.numbers(), found.numbers())


@pytest.mark.parametrize("text", ["int3:g64", "int3", "nvint4", "int2:g64:asym"])
def test_the_order_of_channels_changes_the_error_but_not_the_places(text):
    plain = output_error(text, "gptq")
    for order in ("groups", "channels"):
        assert output_error(text, "gptq", order=order) < 1.02 * plain
    assert output_error(text, "gptq", order="channels", clip="search") < plain


def test_gptq_with_uncorrelated_channels_rounds_to_nearest():
    hessian = Hessian.of(torch.diag(torch.linspace(1, 5, 256)))
    for text in ("int4:g64", "nvfp4", "int3", "fp8:block", "int3:asym"):
        for order in ("none", "groups", "channels"):
            found = solve(WEIGHT, format_of(text), "gptq", hessian, order=order)
            assert torch.equal(found.values, quantize_tensor(WEIGHT, format_of(text)).values), (text, order)


def test_errors_of_a_sweep_give_back_the_weight():
    numbers, errors = sweep(WEIGHT, HESSIAN.upper, lambda place, columns: columns[:, place].round())
    torch.testing.assert_close(errors @ HESSIAN.upper, WEIGHT - numbers, atol=1e-4, rtol=1e-4)
    # The squared errors are the squared error of the output.
    noise = (WEIGHT - numbers).double()
    expected = float(((noise @ HESSIAN.matrix.double()) * noise).sum())
    assert float(errors.double().square().sum()) == pytest.approx(expected, rel=1e-3)


def test_least_squares_finds_the_grid_of_weights_on_a_grid():
    codes = torch.arange(64).remainder(4).float().repeat(3, 1)
    weight = (codes - 1) * torch.tensor([[0.1], [2.0], [30.0]])
    weight[:, 0] *= 1.2  # an extreme that stretches the range
    found = solve(weight, format_of("int2:asym"), "ls")
    assert qsnr(weight[:, 1:], found.numbers()[:, 1:]) > 30
    assert qsnr(weight, quantize_tensor(weight, format_of("int2:asym")).numbers()) < 28


def test_the_factor_is_that_of_the_inverse():
    inverse = torch.linalg.inv(HESSIAN.matrix.double())
    torch.testing.assert_close((HESSIAN.upper.T @ HESSIAN.upper).double(), inverse, atol=1e-3, rtol=1e-3)
    assert torch.equal(HESSIAN.upper, HESSIAN.upper.triu())
    order = torch.arange(255, -1, -1)
    swapped = HESSIAN.reordered(order)
    torch.testing.assert_close(
        (swapped.upper.T @ swapped.upper).double(), inverse[order][:, order], atol=1e-3, rtol=1e-3
    )


def test_sums_stream_and_bins_count_alike():
    x, y = inputs(64, 300, seed=1), 50 * inputs(64, 2000, seed=2)
    whole, parts, alone = HessianSum(64), HessianSum(64), [HessianSum(64), HessianSum(64)]
    for sums, pieces in ((whole, ([x], [y])), (parts, (x.split(7), y[None].split(1, 1)))):
        for bin, each in enumerate(pieces):
            for piece in each:
                sums.add(piece, bin=bin)
    for sums, each in zip(alone, (x, y), strict=True):
        sums.add(each)
    assert whole.tokens == parts.tokens == 2300
    expected = (alone[0].finish(0.0).matrix + alone[1].finish(0.0).matrix) / 2
    torch.testing.assert_close(whole.finish(0.0).matrix, expected)
    torch.testing.assert_close(parts.finish(0.0).matrix, expected)
    assert whole.finish(0.1).matrix.diagonal().mean() == pytest.approx(1.1)


def test_a_weight_counts_as_so_many_inputs():
    x, y = inputs(32, 50, seed=1), inputs(32, 50, seed=2)
    weighted, repeated = HessianSum(32), HessianSum(32)
    weighted.add(x, 3.0)
    weighted.add(y)
    for each in (x, x, x, y):
        repeated.add(each)
    torch.testing.assert_close(weighted.finish().matrix, repeated.finish().matrix)


def test_autocast_changes_nothing():
    plain, sums = HessianSum(256), HessianSum(256)
    plain.add(inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums.add(inputs())
        found = solve(WEIGHT, format_of("int3:g64"), "gptq", sums.finish())
    assert torch.equal(found.values, solve(WEIGHT, format_of("int3:g64"), "gptq", plain.finish()).values)


def test_channels_without_inputs_are_damped_and_keep_their_nearest_numbers():
    x = inputs(64)
    x[:, 5] = 0
    sums = HessianSum(64)
    sums.add(x)
    hessian = sums.finish(0.0)
    assert 0 < hessian.damping < 1e-5
    found = solve(WEIGHT[:, :64], format_of("int4"), "gptq", hessian)
    assert torch.equal(found.values[..., 5], quantize_tensor(WEIGHT[:, :64], format_of("int4")).values[..., 5])


def test_wrong_sums_are_refused():
    sums = HessianSum(8)
    with pytest.raises(UserError, match="not all 0"):
        sums.finish()
    with pytest.raises(UserError, match=r"7 channels.*has 8"):
        sums.add(torch.ones(3, 7))
    sums.add(torch.full((3, 8), torch.nan), bin="late")
    with pytest.raises(UserError, match="bin 'late'"):
        sums.finish()
    with pytest.raises(UserError, match="damping"):
        sums.finish(-1)
    with pytest.raises(UserError, match="positive semidefinite"):
        Hessian.of(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [(("int4", "gptk", HESSIAN), {}, "Did you mean 'gptq'"), (("int4", "gptq", None), {}, "needs calibration"),
     (("int4", "rtn", None), {"clop": "search"}, "Did you mean 'clip'"), (("int4", "ls", None), {"steps": 0}, "steps"),
     (("int4", "rtn", None), {"clip": "mse"}, "clip is 'mse'. Allowed: minmax, search"),
     (("bp2", "gptq", HESSIAN), {"clip": "search"}, "no range"), (("bp2", "ls", None), {"clip": "search"}, "no range"),
     (("int4:g96", "ls", None), {}, "groups 96"),
     (("int4", "gptq", Hessian.of(torch.eye(8))), {}, "8 channels"), (("int4", 4, None), {}, "4 is unknown")],
)  # fmt: skip
def test_wrong_choices_are_refused(arguments, options, said):
    text, solver, hessian = arguments
    with pytest.raises(UserError, match=said):
        solve(WEIGHT, format_of(text), solver, hessian, **options)


def test_wrong_weights_are_refused():
    with pytest.raises(UserError, match="not finite"):
        solve(torch.full((2, 32), torch.inf), FORMATS["int4"], "rtn")
    with pytest.raises(UserError, match="matrix"):
        solve(torch.ones(2, 2, 32), FORMATS["int4"], "rtn")
