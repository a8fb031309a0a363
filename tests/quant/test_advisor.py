"""The advisor: published crossovers, formulas against measured noise, and the formats that it advises."""

import math

import pytest
import torch
from torch import nn

from postgen.errors import UserError
from postgen.quant import format_of
from postgen.quant.advisor import (
    PAIRS,
    advise,
    crest_factor,
    crossover,
    expected_qsnr,
    fits_of,
    gap_by_crest,
    measured_crossover,
)

GAUSSIAN = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
OUTLIERS = GAUSSIAN * torch.where(torch.arange(512) % 32 == 0, 12.0, 1.0)
ALL = [name for pair in PAIRS for name in pair]


@pytest.mark.parametrize(
    ("integers", "floating", "crest"),
    [("mxint8", "mxfp8", 7.546), ("mxint6", "mxfp6", 1.959), ("mxint4", "mxfp4", 2.042), ("nvint4", "nvfp4", 2.390)],
)
def test_published_crossovers(integers, floating, crest):
    pair = format_of(integers), format_of(floating)
    assert crossover(*pair) == pytest.approx(crest, abs=1e-3)
    assert expected_qsnr(pair[0], crest - 0.1) > expected_qsnr(pair[1], crest - 0.1)
    assert expected_qsnr(pair[0], crest + 0.1) < expected_qsnr(pair[1], crest + 0.1)


def test_floating_point_has_a_ceiling():
    for name, mantissa in (("mxfp8", 3), ("mxfp4", 1)):
        assert expected_qsnr(format_of(name), 1e-3 if mantissa == 1 else 3.0) <= 13.80 + 6.02 * mantissa + 0.1
    assert crossover(format_of("int8"), format_of("fp8"), 5120) == pytest.approx(11.18, abs=0.01)


def test_formulas_agree_with_rounding():
    for x in (GAUSSIAN, OUTLIERS):
        for fit in fits_of(x, ALL, (0, 16)):
            # The formula counts 8 steps of a 4-bit integer, not 7. A group whose maximum is an outlier is not normally
            # distributed, as the formula assumes.
            tolerance = 1.1 if x is GAUSSIAN or fit.rotate else 2.1
            assert fit.expected == pytest.approx(fit.measured, abs=tolerance), (fit.format, fit.rotate)


def test_measured_noise_of_a_channel_of_outliers():
    found = {(fit.format, fit.rotate): fit.measured for fit in fits_of(OUTLIERS, ALL, (0, 16, 32))}
    expected = {("nvint4", 0): 17.15, ("nvint4", 16): 24.19, ("nvfp4", 0): 20.62, ("nvfp4", 16): 19.44}
    expected |= {("mxint8", 0): 35.31, ("mxint8", 32): 44.85, ("mxfp4", 0): 14.28, ("mxfp4", 32): 19.45}
    for case, noise in expected.items():
        assert found[case] == pytest.approx(noise, abs=0.1), case


def test_crossovers_of_a_tensor():
    x = torch.randn(2048, 512, generator=torch.Generator().manual_seed(2))
    pairs = {("mxint6", "mxfp6"): 1.95, ("nvint4", "nvfp4"): 2.27}
    for (integers, floating), crest in pairs.items():
        found = measured_crossover(x, format_of(integers), format_of(floating))
        assert found == pytest.approx(crest, abs=0.06)
        assert found < crossover(format_of(integers), format_of(floating)) + 0.02
    assert measured_crossover(x, format_of("mxint8"), format_of("mxfp8")) == math.inf
    assert measured_crossover(x, format_of("mxint4"), format_of("mxfp4")) == 0
    crests, gaps = gap_by_crest(x, format_of("nvint4"), format_of("nvfp4"), 8)
    assert torch.equal(crests, crests.sort().values)
    assert gaps[0] > 3 > 0 > gaps[-1]
    with pytest.raises(UserError, match="different sizes"):
        measured_crossover(x, format_of("mxint4"), format_of("nvfp4"))
    with pytest.raises(UserError, match="too few"):
        measured_crossover(x[:1, :64], format_of("mxint4"), format_of("mxfp4"))


def test_crest_factors():
    x = torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 2], [0, 0, 0, 0]])
    assert crest_factor(x, format_of("int8")).tolist() == [1, 2]
    assert crest_factor(x, format_of("int8:g2")).tolist() == pytest.approx([1, 1, math.sqrt(2)])
    assert crest_factor(x, format_of("int8:tensor")).tolist() == pytest.approx([2 / math.sqrt(8 / 12)])
    assert crest_factor(torch.ones(128, 256), format_of("fp8:block")).tolist() == [1, 1]


def test_advice_for_a_layer():
    layer = nn.Linear(512, 64)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    plain, hard = advise({"a": layer, "b": layer}, {"b": {"early": OUTLIERS, "late": GAUSSIAN}})
    assert plain.best(("nvint4", "nvfp4"))[:2] == ("nvint4", 0)
    assert not plain.inputs
    text, rotate, noise = hard.best(("nvint4", "nvfp4"))
    assert (text, rotate) == ("nvint4", 16)
    # The noise of weight and input together is above that of each.
    at = next(place for place, fit in enumerate(hard.weight) if (fit.format, fit.rotate) == (text, rotate))
    assert noise < min(hard.weight[at].measured, hard.inputs["late"][at].measured)
    assert hard.best(("mxint6", "mxfp6"))[:2] != ("mxint6", 0)
    assert "nvint4           16" in str(hard)
    assert str(hard).startswith("b: median")


def test_formats_that_do_not_fit_are_left_out_and_refused_if_none_is_left():
    layer = nn.Linear(24, 8)
    assert {fit.format for fit in advise({"a": layer})[0].weight} == {"int8", "fp8"}
    with pytest.raises(UserError, match="none of the formats mxint8 divides 24"):
        advise({"a": layer}, formats=("mxint8",))
    with pytest.raises(UserError, match="of mxint4 none was tried for a, only int8, fp8"):
        advise({"a": layer})[0].best(("mxint4",))
    with pytest.raises(UserError, match="zero point"):
        advise({"a": layer}, formats=("int4:asym",))
    with pytest.raises(UserError, match="the inputs of a in bin 0 have 25 channels"):
        advise({"a": layer}, {"a": {0: torch.ones(2, 25)}})
    with pytest.raises(UserError, match="rows"):
        expected_qsnr(format_of("int8"), 3.0)


def test_zeros_have_no_noise():
    layer = nn.Linear(32, 8)
    nn.init.zeros_(layer.weight)
    assert advise({"a": layer})[0].best()[2] == math.inf
