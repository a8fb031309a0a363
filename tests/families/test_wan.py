"""The denoiser of Wan, compared with the pipeline."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for

SIZE = {"height": 16, "width": 32, "num_frames": 5}


def load(folder: Path, **changes: Any) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, **changes)


def noise_source() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def euler(denoiser: Denoiser, condition: dict[str, torch.Tensor], steps: int, guidance: float) -> torch.Tensor:
    batch = condition["prompt"].shape[0]
    x = denoiser.initial_latents(batch, **SIZE, generator=noise_source())
    sigmas = denoiser.sigmas(steps)
    for now, after in itertools.pairwise(sigmas):
        x = x + (after - now) * denoiser.predict(x, now.expand(batch), condition, guidance)
    return x


def two_experts(folder: Path) -> Any:
    from diffusers import WanTransformer3DModel

    pipe = load(folder)
    torch.manual_seed(9)
    second = WanTransformer3DModel.from_config(pipe.transformer.config).eval()
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.8)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("experts", [1, 2])
def test_euler_loop_equals_pipeline(tiny_wan: Path, guidance: float, experts: int) -> None:
    pipe = load(tiny_wan) if experts == 1 else two_experts(tiny_wan)
    prompts = ["a red ball", "a blue cube falls"]
    call = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "pt", **SIZE}
    expected = pipe(prompts, negative_prompt=["blurry", "dark"], generator=noise_source(), **call).frames
    denoiser = denoiser_for(pipe)
    assert isinstance(denoiser, Denoiser)
    with torch.no_grad():
        condition = denoiser.encode_prompt(prompts, ["blurry", "dark"], guidance=guidance > 1)
        latents = euler(denoiser, condition, 4, guidance)
        clips = denoiser.decode(latents)
    assert ("negative" in condition) == (guidance > 1)
    assert clips.shape == (2, 5, 3, 16, 32)
    assert (clips - expected).abs().max() <= 1e-5
    latent_call = {**call, "output_type": "latent"}
    same = pipe(prompts, negative_prompt=["blurry", "dark"], generator=noise_source(), **latent_call).frames
    assert (latents - same).abs().max() <= 1e-5


def test_image_to_video_equals_pipeline(tiny_wan_image: Path) -> None:
    pipe = load(tiny_wan_image)
    denoiser = denoiser_for(pipe)
    image = torch.rand(1, 3, 16, 32, generator=noise_source())
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", **SIZE}
    expected = pipe(image, "a red ball", generator=noise_source(), **call).frames
    with torch.no_grad():
        condition = denoiser.encode_prompt(["a red ball"]) | denoiser.encode_image(image, SIZE["num_frames"])
    assert condition["image_latents"].shape == (1, 8, 2, 2, 4)
    assert (euler(denoiser, condition, 3, 3.0) - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="image_latents"):
        denoiser.predict(torch.zeros(1, 4, 2, 2, 4), torch.ones(1), denoiser.encode_prompt(["x"]))


def test_rows_on_both_sides_of_the_boundary(tiny_wan: Path) -> None:
    denoiser = denoiser_for(two_experts(tiny_wan))
    x = torch.randn(4, 4, 2, 2, 4, generator=noise_source())
    sigma = torch.tensor([0.95, 0.3, 0.8, 0.7])
    condition = denoiser.encode_prompt(["a", "b", "c", "d"], guidance=False)
    together = denoiser.predict(x, sigma, condition)
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in condition.items()}
        expected = denoiser.predict(x[row : row + 1], sigma[row : row + 1], alone)
        assert (together[row] - expected[0]).abs().max() <= 1e-5
    together.sum().backward()
    for module in denoiser.transformers.values():
        assert module.proj_out.weight.grad.abs().sum() > 0


def test_predict_calls_the_wrapped_network(tiny_wan: Path) -> None:
    denoiser = denoiser_for(load(tiny_wan))
    calls = []

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs: Any) -> Any:
            calls.append(kwargs["timestep"])
            return self.inner(**kwargs)

    denoiser.transformers["transformer"] = Wrapped(denoiser.transformers["transformer"])
    denoiser.predict(torch.zeros(2, 4, 1, 2, 2), torch.tensor([0.5, 0.25]), denoiser.encode_prompt(["a", "b"]), 2.0)
    assert len(calls) == 2
    assert calls[0].tolist() == [500.0, 250.0]


def test_per_token_timesteps(tiny_wan: Path) -> None:
    pipe = load(tiny_wan)
    x = torch.randn(1, 4, 2, 2, 4, generator=noise_source())
    plain = denoiser_for(pipe)
    condition = plain.encode_prompt(["a"], guidance=False)
    expected = plain.predict(x, torch.tensor([0.5]), condition)
    pipe.register_to_config(expand_timesteps=True)
    assert (denoiser_for(pipe).predict(x, torch.tensor([0.5]), condition) - expected).abs().max() <= 1e-5


def test_encode_and_decode(tiny_wan: Path) -> None:
    pipe = load(tiny_wan)
    denoiser = denoiser_for(pipe)
    clips = torch.rand(2, 9, 3, 16, 32, generator=noise_source())
    with torch.no_grad():
        latents = denoiser.encode_video(clips)
        assert latents.shape == (2, 4, 3, 2, 4)
        raw = pipe.vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist
        mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
        torch.testing.assert_close(latents * std + mean, raw.mode())
        back = denoiser.decode(latents)
        assert back.shape == clips.shape
        direct = pipe.vae.decode(raw.mode()).sample.transpose(1, 2) / 2 + 0.5
        torch.testing.assert_close(back, direct)
        drawn = [denoiser.encode_video(clips, sample=True, generator=noise_source()) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_guidance_is_combined_in_float32(tiny_wan: Path, dtype: torch.dtype) -> None:
    denoiser = denoiser_for(load(tiny_wan, dtype=dtype))
    x = torch.randn(2, 4, 2, 2, 4, generator=noise_source())
    sigma = torch.tensor([0.9, 0.4])
    condition = denoiser.encode_prompt(["a", "b"], ["c", "d"])
    assert condition["prompt"].dtype == dtype
    with_text, without = (denoiser.predict(x, sigma, {"prompt": condition[text]}) for text in ("prompt", "negative"))
    found = denoiser.predict(x, sigma, condition, 5.0)
    assert torch.equal(found, without + 5.0 * (with_text - without))
    if dtype == torch.bfloat16:  # the pipeline combines in bfloat16, which rounds twice more
        assert not torch.equal(found, found.bfloat16().float())


def test_sigmas_leave_the_scheduler_alone(tiny_wan: Path) -> None:
    pipe = load(tiny_wan)
    pipe.scheduler.set_timesteps(7)
    before = pipe.scheduler.sigmas.clone()
    sigmas = denoiser_for(pipe).sigmas(3)
    assert sigmas.shape == (4,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert torch.equal(pipe.scheduler.sigmas, before)


def test_lora_targets_exist(tiny_wan: Path) -> None:
    denoiser = denoiser_for(load(tiny_wan))
    names = [name for name, _ in denoiser.transformers["transformer"].named_modules()]
    for target in denoiser.lora_targets:
        assert sum(name.endswith("." + target) for name in names) == 4  # 2 blocks, self- and cross-attention


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 20}, r"height must be a multiple of 16, got 20: use 16 or 32"),
        ({"width": 8}, r"width must be a multiple of 16, got 8: use 16$"),
        ({"num_frames": 6}, r"frames must be 4n\+1, got 6: use 5 or 9"),
        ({"num_frames": 0}, r"frames must be 4n\+1, got 0: use 1$"),
    ],
)
def test_sizes_that_do_not_fit(tiny_wan: Path, size: dict[str, int], message: str) -> None:
    denoiser = denoiser_for(load(tiny_wan))
    with pytest.raises(UserError, match=message):
        denoiser.initial_latents(1, **{**SIZE, **size})


def test_wrong_calls(tiny_wan: Path) -> None:
    denoiser = denoiser_for(load(tiny_wan))
    x = torch.zeros(2, 4, 1, 2, 2)
    condition = denoiser.encode_prompt(["a", "b"], guidance=False)
    with pytest.raises(ValueError, match="negative"):
        denoiser.predict(x, torch.ones(2), condition, 5.0)
    with pytest.raises(ValueError, match=r"sigma must have the shape \(2,\)"):
        denoiser.predict(x, torch.tensor(1.0), condition)
    with pytest.raises(UserError, match="takes text only"):
        denoiser.encode_image(torch.zeros(1, 3, 16, 16), 5)
    with pytest.raises(UserError, match=r"\(B, F, 3, H, W\)"):
        denoiser.encode_video(torch.zeros(1, 3, 5, 16, 16))


def test_scheduler_must_be_flow_matching(tiny_wan: Path) -> None:
    from diffusers import DDIMScheduler, UniPCMultistepScheduler

    pipe = load(tiny_wan)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler is not a flow-matching"):
        denoiser_for(pipe)
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert denoiser_for(pipe).sigmas(4)[-1] == 0
