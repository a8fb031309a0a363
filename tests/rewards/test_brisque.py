"""BRISQUE against the scores of the reference code, and on real pictures with their degraded twins."""

import subprocess
from io import BytesIO

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from postgen.errors import UserError
from postgen.rewards import get_reward
from postgen.rewards.brisque import Brisque, Regression, constants, features, fit, fitted_shape
from postgen.rewards.pictures import eight_bit, luma
from postgen.video import read_video
from tests.offline_assets import installed

# Computed once with the package brisque 0.2.0 (SciPy, libsvm) on the same 8-bit pictures.
REFERENCE = {"waves": 79.6753, "clip-carphone": 13.0364, "clip-bunny": 41.1799, "clip-bikes": 55.9464}


def waves():
    y, x = torch.meshgrid(torch.arange(160.0), torch.arange(192.0), indexing="ij")
    shades = [(torch.sin(x * x / 900 + k) + torch.cos(y * x / 500) + torch.sin(y / 5)) / 6 + 0.5 for k in range(3)]
    return torch.stack(shades)


def picture(name):
    return read_video(installed(name), start=10, count=1)[0]


def scored_picture(name):
    """The picture that the reference code was given: stored pixels, converted by ffmpeg's fast way."""
    arguments = ["-vf", "select=eq(n\\,10)", "-frames:v", "1", "-f", "image2pipe", "-c:v", "ppm", "-"]
    program = imageio_ffmpeg.get_ffmpeg_exe()
    done = subprocess.run([program, "-v", "error", "-i", installed(name), *arguments], capture_output=True, check=True)
    frame = np.array(Image.open(BytesIO(done.stdout)))
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255


def blurred(frame):
    small = interpolate(frame[None], scale_factor=0.25, mode="area")
    return interpolate(small, frame.shape[-2:], mode="bicubic").clamp(0, 1)[0]


def noisy(frame):
    generator = torch.Generator().manual_seed(0)
    return (frame + 0.1 * torch.randn(frame.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("name", REFERENCE)
def test_scores_of_the_reference_code(name):
    frame = waves() if name == "waves" else scored_picture(name)
    score = float(Regression()(features(luma(eight_bit(frame)[None])))[0])
    assert score == pytest.approx(REFERENCE[name], abs=0.05)
    assert Brisque(frames=1)([""], [eight_bit(frame)[None]]) == pytest.approx([1 - score / 100], abs=1e-4)  # float32


def test_the_table():
    table = constants()
    assert (table["gamma"], table["rho"]) == (0.05, -155.845)
    assert (len(table["vectors"]), len(table["coefficients"])) == (770, 770)
    assert {len(vector) for vector in table["vectors"]} == {len(table["least"])} == {len(table["greatest"])} == {36}
    assert table["vectors"][0][:3] == [-0.597198, -0.143425, -0.250373]
    assert table["least"][0] == 0.336999


def test_the_table_is_the_packages():
    lines = installed("brisque-svm").read_text().partition("SV\n")[2].splitlines()
    rows = [line.split() for line in lines if line.strip()]
    assert [float(row[0]) for row in rows] == constants()["coefficients"]
    assert [[float(x.partition(":")[2]) for x in row[1:]] for row in rows] == constants()["vectors"]


@pytest.mark.parametrize("name", ["clip-carphone", "clip-bunny", "clip-bikes"])
def test_clean_pictures_before_degraded_ones(name):
    frame = picture(name)
    clean, *worse = Brisque(frames=1)([""] * 3, [frame[None], blurred(frame)[None], noisy(frame)[None]])
    assert all(clean > value + 0.05 for value in worse)


def test_a_compressed_twin_is_worse():
    good, bad = (picture(name)[None] for name in ("clip-carphone", "clip-carphone-distorted"))
    scores = Brisque(frames=1)(["", ""], [good, bad])
    assert scores[0] > scores[1] + 0.1


def test_fitted_shapes():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 400, 400, generator=generator)
    laplace = torch.empty(1, 400, 400).exponential_(generator=generator) * normal.sign()
    # A generalised Gaussian of shape 6 is a gamma variable to the power of 1 / 6 with a sign.
    gamma = torch.distributions.Gamma(torch.tensor(1 / 6), torch.tensor(1.0))
    torch.manual_seed(0)
    flat = gamma.sample((1, 400, 400)) ** (1 / 6) * normal.sign()
    for sample, shape in ((normal, 2.0), (laplace, 1.0), (flat, 6.0)):
        alpha, mean, left, right = fit(sample)
        assert float(alpha) == pytest.approx(shape, rel=0.03)
        assert abs(float(mean)) < 0.02
        assert float(left) == pytest.approx(float(right), rel=0.03)
    lopsided = torch.where(normal < 0, normal, 2 * normal)
    _, mean, left, right = fit(lopsided)
    assert float(right / left) == pytest.approx(4, rel=0.05)
    assert float(mean) > 0.3


def test_the_gradient_of_the_fit():
    ratio = torch.tensor([0.4, 0.55, 0.62], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: fitted_shape(r), ratio, eps=1e-5, atol=1e-4)


def test_the_gradient_makes_pictures_better():
    frame = noisy(waves())[None, None].requires_grad_()
    reward = Brisque(frames=1)
    reward.load()
    before = reward.frame_scores(frame, [""])
    before.sum().backward()
    step = 0.02 * frame.grad / frame.grad.abs().max()
    assert float(reward.frame_scores((frame + step).detach(), [""])) > float(before.detach())


def test_a_batch_scores_like_single_clips():
    clips = [noisy(waves()).roll(k, -1)[None] for k in range(8)]
    reward = get_reward("brisque", frames=1)
    assert reward([""] * 8, clips) == pytest.approx([reward([""], [c])[0] for c in clips], abs=1e-4)


def test_small_clips_are_not_scored():
    clips = [torch.rand(2, 3, 100, 200), torch.rand(2, 3, 128, 130)]
    small, large = Brisque()(["", ""], clips)
    assert small is None
    assert large is not None
    assert Brisque(least=64)([""], clips[:1])[0] is not None
    with pytest.raises(UserError, match="at least 16 px"):
        Brisque(least=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.backends.cudnn.flags(allow_tf32=False)
def test_the_gpu_gives_the_same():
    clips = [noisy(waves()).roll(k, -1)[None] for k in range(3)]
    here, there = (Brisque(device=device)([""] * 3, clips) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, abs=1e-3)
