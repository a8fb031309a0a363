"""Denoisers of all families except Wan, compared with their pipelines."""

import pytest
import torch

from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for
from postgen.sampling.schedule import schedule_of
from postgen.sampling.transition import transition
from tests.families.tiny_pipelines import PIPELINES, tiny_pipeline
from tests.sampling.toy import PointPipeline, ToyDenoiser

STEPS = 4


@pytest.fixture(scope="module", params=PIPELINES)
def built(request):
    """A pipeline and the size of its clips; tests must not change them."""
    return tiny_pipeline(request.param)


def noise_source():
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def deterministic(denoiser, condition, size, guidance):
    """Return latents and clips of deterministic sampling: Euler steps, or DDIM without noise."""
    batch = len(condition["prompt"])
    x = denoiser.initial_latents(batch, **size, generator=noise_source())
    schedule = schedule_of(denoiser, STEPS, x.shape[1:])
    for index in range(STEPS):
        now = torch.full((batch,), index)
        levels = schedule.levels(now, now + 1)
        prediction = denoiser.predict(x, schedule.received(now), condition, guidance)
        x = transition("ode", x, prediction, levels, 0.0, schedule.prediction_type).mean
    return x, denoiser.decode(x)


def call(pipe, size, guidance):
    """Return the arguments of the pipeline call that makes the same clips."""
    import inspect

    known = inspect.signature(type(pipe).__call__).parameters
    own = {"num_inference_steps": STEPS, "output_type": "pt", "generator": noise_source(), **size}
    own |= {"use_resolution_binning": False}
    if "true_cfg_scale" in known:
        own |= {"true_cfg_scale": guidance}
    else:
        own |= {"guidance_scale": guidance}
    return {name: value for name, value in own.items() if name in known}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_denoiser_equals_its_pipeline(built, guidance):
    pipe, size = built
    denoiser = denoiser_for(pipe)
    assert isinstance(denoiser, Denoiser)
    prompts, negative = ["a red ball", "a blue cube falls"], ["blurry", "dark"]
    words = {"negative_prompt": negative} if guidance > 1 else {}
    asked = prompts
    if type(pipe).__name__ == "DiTPipeline":  # prompts are classes, and the only negative class is none
        asked, words, negative = pipe.get_label_ids(prompts), {}, None
    made = pipe(asked, **words, **call(pipe, size, guidance))
    expected = made.frames if hasattr(made, "frames") else made.images[:, None]
    with torch.no_grad():
        condition = denoiser.encode_prompt(prompts, negative, guidance=guidance > 1)
        _, clips = deterministic(denoiser, condition, size, guidance)
    assert ("negative" in condition) == (guidance > 1)
    assert all(len(value) == 2 for value in condition.values())
    assert clips.shape == (2, size["num_frames"], 3, size["height"], size["width"])
    assert (clips - torch.as_tensor(expected)).abs().max() <= 2e-4


def test_denoiser_rows_are_independent(built):
    pipe, size = built
    denoiser = denoiser_for(pipe)
    x = denoiser.initial_latents(3, **size, generator=noise_source())
    levels = schedule_of(denoiser, 8, x.shape[1:]).sigmas[:3].float()
    with torch.no_grad():
        condition = denoiser.encode_prompt(["a", "b", "c"])
        together = denoiser.predict(x, levels, condition, 2.0)
        for row in range(3):
            one = slice(row, row + 1)
            alone = denoiser.predict(x[one], levels[one], {k: v[one] for k, v in condition.items()}, 2.0)
            torch.testing.assert_close(together[one], alone, rtol=1e-3, atol=1e-4)


def test_denoiser_lora_targets_exist(built):
    denoiser = denoiser_for(built[0])
    (model,) = denoiser.transformers.values()
    names = [layer for layer, _ in model.named_modules()]
    assert all(any(layer.endswith(f".{target}") for layer in names) for target in denoiser.lora_targets)


def test_denoiser_refuses_sizes(built):
    pipe, size = built
    denoiser = denoiser_for(pipe)
    with pytest.raises(UserError, match="height must be a multiple of"):
        denoiser.initial_latents(1, **{**size, "height": 17})
    with pytest.raises(UserError, match=r"num_frames must be 1|the number of frames must be"):
        denoiser.initial_latents(1, **{**size, "num_frames": 3})
    with pytest.raises(UserError, match="takes text only"):
        denoiser.encode_image(torch.zeros(1, 3, 16, 16), 5)


def test_denoiser_tells_the_shape_of_its_latents(built):
    pipe, size = built
    denoiser = denoiser_for(pipe)
    x = denoiser.initial_latents(2, **size)
    assert denoiser.latent_shape(**size) == x.shape[1:]
    pictures = size["num_frames"] == 1
    assert denoiser.frame_axis == (None if pictures else 1 if type(pipe).__name__.startswith("CogVideoX") else 2)
    if not pictures:
        more = {**size, "num_frames": size["num_frames"] + 8}
        longer = denoiser.initial_latents(2, **more)
        grown = [axis for axis in range(x.dim()) if longer.shape[axis] != x.shape[axis]]
        assert grown == [denoiser.frame_axis]
    with pytest.raises(UserError, match="height must be a multiple of"):
        denoiser.latent_shape(**{**size, "height": 17})


@torch.no_grad()
def test_denoiser_encodes_what_it_decodes(built):
    pipe, size = built
    denoiser = denoiser_for(pipe)
    assert denoiser.encodes_video
    clips = torch.rand(2, size["num_frames"], 3, size["height"], size["width"], generator=noise_source())
    latents = denoiser.encode_video(clips)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, *denoiser.latent_shape(**size))
    pictures = denoiser.frame_axis is None
    raw = pipe.vae.encode((clips[:, 0] if pictures else clips.transpose(1, 2)) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(denoiser.denormalise(latents), raw, rtol=1e-5, atol=1e-5)
    decoded = pipe.vae.decode(raw).sample
    direct = (decoded[:, None] if pictures else decoded.transpose(1, 2)) / 2 + 0.5
    # The decoder enlarges the rounding of normalise and denormalise, by an amount that depends on the CPU.
    torch.testing.assert_close(denoiser.decode(latents), direct.clamp(0, 1), rtol=0, atol=1e-4)
    drawn = [denoiser.encode_video(clips, sample=True, generator=noise_source()) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], latents)
    with pytest.raises(UserError, match=r"num_frames must be 1|the number of frames must be"):
        denoiser.encode_video(clips[:, :1].expand(-1, 3, -1, -1, -1))
    with pytest.raises(UserError, match=r"\(B, F, 3, H, W\), got"):
        denoiser.encode_video(clips.transpose(1, 2))


@torch.no_grad()
def test_posterior_gives_what_encode_video_samples(built):
    pipe, size = built
    denoiser = denoiser_for(pipe)
    clips = torch.rand(2, size["num_frames"], 3, size["height"], size["width"], generator=noise_source())
    mean, std = denoiser.posterior(clips)
    assert torch.equal(denoiser.from_raw(mean), denoiser.encode_video(clips))
    noise = torch.randn(mean.shape, generator=noise_source())
    drawn = denoiser.encode_video(clips, sample=True, generator=noise_source())
    assert torch.equal(denoiser.from_raw(mean + std * noise), drawn)


@torch.no_grad()
def test_autoencoder_without_a_distribution():
    from diffusers import AutoencoderTiny

    pipe, _ = tiny_pipeline("Stable Diffusion")
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    pipe.vae = AutoencoderTiny(
        **widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4, upsample_fn="nearest"
    ).eval()
    denoiser, clips = denoiser_for(pipe), torch.rand(2, 1, 3, 16, 16, generator=noise_source())
    mean, std = denoiser.posterior(clips)
    assert std is None
    latents = denoiser.from_raw(mean)
    assert torch.equal(latents, denoiser.encode_video(clips))
    assert torch.equal(latents, denoiser.encode_video(clips, sample=True))


def test_denoiser_has_alpha_bars_unless_it_is_a_flow(built):
    denoiser = denoiser_for(built[0])
    sigma = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.75, 0.1]])
    if denoiser.prediction_type == "flow":
        with pytest.raises(UserError, match="is a flow model and has no alpha-bar"):
            denoiser.alpha_bar(sigma)
        return
    bars = denoiser.alpha_bar(sigma)
    assert bars.dtype == torch.float64
    assert bars.shape == sigma.shape
    assert torch.equal(bars[1], denoiser.alpha_bar(sigma[1]))
    assert bars[0, 0] > bars[0, 1] > bars[0, 2]


def test_denoiser_length_of_prompts_can_be_set_before_they_are_encoded(built):
    pipe, _ = built
    denoiser = denoiser_for(pipe)
    if denoiser.max_sequence_length in (1, 77):  # a class, or the fixed length of CLIP
        with pytest.raises(UserError, match=r"have (1 token|77 tokens), not 16: leave max_sequence_length out"):
            denoiser.max_sequence_length = 16
        return
    before = denoiser.encode_prompt(["a"], guidance=False)["prompt"].shape[1]
    denoiser.max_sequence_length -= 7
    assert denoiser.encode_prompt(["a"], guidance=False)["prompt"].shape[1] == before - 7


def test_denoiser_refuses_another_number_of_negative_prompts(built):
    with pytest.raises(UserError, match="2 prompts with 1 negative prompts"):
        denoiser_for(built[0]).encode_prompt(["a", "b"], ["c"])


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon"])
def test_denoiser_of_the_toy_has_all_that_is_used(prediction_type):
    toy = ToyDenoiser(PointPipeline(prediction_type))
    assert isinstance(toy, Denoiser)
    x = toy.initial_latents(2, num_frames=1, height=2, width=2, generator=None)
    assert toy.latent_shape(1, 2, 2) == x.shape[1:]
    for refused in (toy.encode_video, lambda clips: toy.encode_image(clips[:, 0], 1)):
        with pytest.raises(UserError):
            refused(torch.zeros(1, 1, 3, 2, 2))


def test_denoiser_of_a_pipeline_without_its_network_is_refused():
    pipe, _ = tiny_pipeline("LTX")
    pipe.transformer = None
    with pytest.raises(UserError, match="this LTXPipeline has no transformer: load it with its network"):
        denoiser_for(pipe)


@pytest.fixture(scope="module")
def padded():
    """CogVideoX 1.5, whose patches hold two latent frames, and the size of its clips."""
    from diffusers import CogVideoXTransformer3DModel

    pipe, size = tiny_pipeline("CogVideoX")
    config = {**pipe.transformer.config, "patch_size_t": 2, "patch_bias": False, "_use_default_values": []}
    torch.manual_seed(0)
    pipe.transformer = CogVideoXTransformer3DModel.from_config(config).eval()
    return pipe, size


@torch.no_grad()
def test_denoiser_of_cogvideox_15_pads_as_its_pipeline_does(padded):
    pipe, size = padded
    denoiser = denoiser_for(pipe)
    assert size["num_frames"] == 9
    assert denoiser.latent_shape(**size)[0] == 4  # three latent frames and one of padding
    made = pipe(["a red ball", "a cube"], **call(pipe, size, 1.0)).frames
    condition = denoiser.encode_prompt(["a red ball", "a cube"], guidance=False)
    _, clips = deterministic(denoiser, condition, size, 1.0)
    assert clips.shape[1] == 9
    assert (clips - torch.as_tensor(made)).abs().max() <= 2e-4


@torch.no_grad()
def test_denoiser_of_cogvideox_15_encodes_what_it_decodes(padded):
    pipe, size = padded
    denoiser = denoiser_for(pipe)
    clips = torch.rand(1, 9, 3, size["height"], size["width"], generator=noise_source())
    latents = denoiser.encode_video(clips)
    assert latents.shape[1:] == denoiser.latent_shape(**size)
    assert torch.equal(latents[:, 0], latents[:, 1])
    raw = pipe.vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode()
    direct = pipe.vae.decode(raw).sample.transpose(1, 2) / 2 + 0.5
    # The decoder enlarges the rounding of normalise and denormalise, by an amount that depends on the CPU.
    torch.testing.assert_close(denoiser.decode(latents), direct.clamp(0, 1), rtol=0, atol=1e-4)


def test_denoiser_of_cogvideox_makes_as_many_frames_as_were_asked_for(padded):
    """5 frames would have two latent frames, which the autoencoder decodes into 8 frames."""
    for pipe in (padded[0], tiny_pipeline("CogVideoX")[0]):
        with pytest.raises(UserError, match=r"the number of frames must be 8n\+1, got 5: use 1 or 9"):
            denoiser_for(pipe).initial_latents(1, **{**padded[1], "num_frames": 5})


def test_denoiser_schedules_need_the_right_scheduler():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flux = tiny_pipeline("FLUX")[0]
    with pytest.raises(UserError, match="depend on the size"):
        denoiser_for(flux).sigmas(4)
    flux.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler is not a flow-matching scheduler"):
        denoiser_for(flux)
    stable = tiny_pipeline("Stable Diffusion")[0]
    stable.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="has no alpha-bars"):
        denoiser_for(stable)


def test_a_schedule_has_no_more_steps_than_there_are_timesteps():
    stable = tiny_pipeline("Stable Diffusion")[0]
    known = stable.scheduler.config.num_train_timesteps
    assert len(denoiser_for(stable).sigmas(known)) == known + 1
    with pytest.raises(UserError, match=f"num_inference_steps must be at least 1 and at most {known:,}, got"):
        denoiser_for(stable).sigmas(known + 1)
    stable.scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(UserError, match="is 'noise', it must be one of epsilon, sample, v_prediction"):
        denoiser_for(stable)
