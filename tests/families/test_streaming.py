"""Decoding in pieces, compared with decoding the whole video at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.families.streaming import StreamingDecoder, stream_decode
from tests.families.tiny_pipelines import tiny_pipeline


def wan(**changes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    config = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True], "base_dim": 4, **changes}
    return AutoencoderKLWan(num_res_blocks=1, z_dim=4, **config).eval()


def wan_residual() -> Any:
    """Return a tiny autoencoder like that of Wan 2.2 5B: residual shortcuts, patches of pixels."""
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    return wan(is_residual=True, dim_mult=[1, 1, 1], temperal_downsample=[True, True], base_dim=8, **patches)


def cogvideox() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()  # fmt: skip


def hunyuan_video() -> Any:
    return tiny_pipeline("HunyuanVideo")[0].vae


def ltx(**changes: Any) -> Any:
    from diffusers import AutoencoderKLLTXVideo

    torch.manual_seed(0)
    return AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), **changes,
    ).eval()  # fmt: skip


EXACT = {"Wan": wan, "Wan residual": wan_residual, "CogVideoX": cogvideox}
WINDOWS = {"HunyuanVideo": hunyuan_video, "LTX": ltx, "LTX with a timestep": lambda: ltx(timestep_conditioning=True)}


def noise(frames: int, batch: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, frames, 2, 3, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def at_once(vae: Any, latents: Tensor) -> Tensor:
    told = [torch.zeros(len(latents))] if vae.config.get("timestep_conditioning") else []
    video = vae.decode(latents, *told, return_dict=False)[0]
    return (video.float() * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)


def in_pieces(decoder: StreamingDecoder, latents: Tensor, piece: int) -> Tensor:
    return torch.cat([*(decoder.push(part) for part in latents.split(piece, 2)), decoder.finish()], 1)


@pytest.mark.parametrize("frames", [1, 6, 7])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, frames: int) -> None:
    """In float64, so that the float32 clips agree to the last bits: kernels sum pieces in another order."""
    vae, latents = EXACT[name]().double(), noise(frames).double()
    whole = at_once(vae, latents)
    for piece in (1, 2, 3):
        decoder = StreamingDecoder(vae, num_latents=frames)
        assert decoder.exact
        torch.testing.assert_close(in_pieces(decoder, latents, piece), whole, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", EXACT)
def test_exact_in_float32(name: str) -> None:
    vae, latents = EXACT[name](), noise(7)
    whole = at_once(vae, latents)
    assert torch.equal(in_pieces(StreamingDecoder(vae, num_latents=7), latents, 7), whole)
    for piece in (1, 3):
        decoder = StreamingDecoder(vae, num_latents=7)
        # The order of sums in convolutions depends on the length of a piece; test_exact compares in float64.
        torch.testing.assert_close(in_pieces(decoder, latents, piece), whole, atol=1e-4, rtol=0)


def test_pieces_that_differ_in_length_and_another_decode_between() -> None:
    vae, latents = wan(), noise(6)
    vae, latents = vae.double(), latents.double()
    whole, made = at_once(vae, latents), []
    one, other = StreamingDecoder(vae), StreamingDecoder(vae)
    for part in latents.split([1, 3, 2], 2):
        made.append(one.push(part))
        at_once(vae, part)
        other.push(-part)
    torch.testing.assert_close(torch.cat(made, 1), whole, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", [*EXACT, *WINDOWS])
def test_resume_from_a_file(name: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    make = {**EXACT, **WINDOWS}[name]
    vae, latents, options = make().double(), noise(7).double(), {"num_latents": 7, "windows": True}
    if name in WINDOWS:
        short_windows(vae)
    expected = in_pieces(StreamingDecoder(vae, **options), latents, 1)
    for cut in (1, 4) if name in EXACT else (4,):
        first = StreamingDecoder(vae, **options)
        begun = [first.push(part) for part in latents[:, :, :cut].split(1, 2)]
        save_file(first.state_dict(), tmp_path / "state.safetensors")
        second = StreamingDecoder(vae, **options)
        second.load_state_dict(load_file(tmp_path / "state.safetensors"))
        rest = [second.push(part) for part in latents[:, :, cut:].split(1, 2)]
        resumed = torch.cat([*begun, *rest, second.finish()], 1)
        torch.testing.assert_close(resumed, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", [*EXACT, *WINDOWS])
def test_memory_is_constant(name: str) -> None:
    vae = {**EXACT, **WINDOWS}[name]()
    if name in WINDOWS:
        short_windows(vae)
    decoder = StreamingDecoder(vae, num_latents=100, windows=True)
    sizes = []
    for latents in noise(24, batch=1).split(1, 2):
        decoder.push(latents)
        sizes.append(decoder.state_bytes)
    assert 0 < max(sizes[12:]) == max(sizes[6:12])


def short_windows(vae: Any) -> None:
    """Set windows of 3 latent frames with a stride of 2, so that they overlap by 1 latent frame."""
    time = vae.temporal_compression_ratio
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 3 * time, 2 * time


@pytest.mark.parametrize("frames", [3, 8])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_the_framewise_decoding_of_diffusers(name: str, frames: int) -> None:
    vae, latents = WINDOWS[name](), noise(frames)
    short_windows(vae)
    vae.use_framewise_decoding = True
    framewise = at_once(vae, latents)
    for piece in (1, 3, frames):
        decoder = StreamingDecoder(vae)
        assert decoder.exact
        assert torch.equal(in_pieces(decoder, latents, piece), framewise)
    assert vae.use_framewise_decoding


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_not_exact(name: str) -> None:
    """Only a video of one window is exact."""
    vae = WINDOWS[name]()
    short_windows(vae)
    vae.use_framewise_decoding = False
    short, long = noise(3), noise(8)
    assert torch.equal(in_pieces(StreamingDecoder(vae, windows=True), short, 1), at_once(vae, short))
    decoder = StreamingDecoder(vae, windows=True)
    assert not decoder.exact
    difference = in_pieces(decoder, long, 1) - at_once(vae, long)
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["CogVideoX", "HunyuanVideo", "LTX", "SkyReels-V2"])
def test_normalised_latents_become_clips(name: str) -> None:
    """Pieces of the transformer's latents decode to the clip of the denoiser's `decode`."""
    pipe, size = tiny_pipeline(name)
    denoiser = denoiser_for(pipe)
    latents = denoiser.initial_latents(1, **{**size, "num_frames": 17})
    if name == "LTX":
        pipe.vae.tile_sample_min_num_frames = 64  # one window
    axis = 1 if name == "CogVideoX" else 2
    with torch.no_grad():
        whole = denoiser.decode(latents)
    for source in (denoiser, pipe):
        options = {"num_latents": latents.shape[axis], "windows": True}
        clip = torch.cat(list(stream_decode(source, pieces(latents, axis), **options)), 1)
        assert clip.dtype == torch.float32
        torch.testing.assert_close(clip, whole, atol=1e-6, rtol=0)


def pieces(latents: Tensor, axis: int) -> Iterator[Tensor]:
    yield from latents.split(2, axis)


def test_refusals() -> None:
    from diffusers import AutoencoderKL

    with pytest.raises(UserError, match=r"AutoencoderKL cannot be decoded in pieces: use .*Wan \(exact\), .*LTX"):
        StreamingDecoder(AutoencoderKL())
    with pytest.raises(UserError, match=r"LTXVideo is not causal.*windows=True"):
        StreamingDecoder(ltx())
    with pytest.raises(UserError, match="give num_latents"):
        StreamingDecoder(cogvideox())
    tiled = wan()
    tiled.enable_tiling()
    with pytest.raises(UserError, match="disable_tiling"):
        StreamingDecoder(tiled)


def test_wrong_use() -> None:
    decoder = StreamingDecoder(wan())
    with pytest.raises(UserError, match="nothing to finish"):
        decoder.finish()
    decoder.push(noise(1))
    with pytest.raises(UserError, match=r"B, h, w of the first piece, got \(1, 4, 1, 2, 3\)"):
        decoder.push(noise(1, batch=1))
    with pytest.raises(UserError, match="t >= 1"):
        decoder.push(noise(1)[:, :, :0])
    decoder.finish()
    with pytest.raises(UserError, match="is finished"):
        decoder.push(noise(1))
    with pytest.raises(UserError, match="not a state of a StreamingDecoder"):
        decoder.load_state_dict({})
    with pytest.raises(UserError, match="takes latents of 4 channels, got 3"):
        StreamingDecoder(wan()).push(noise(1, channels=3))
    with pytest.raises(UserError, match="num_latents is 0"):
        StreamingDecoder(wan(), num_latents=0)
    for other in (cogvideox(), wan(base_dim=8)):
        with pytest.raises(UserError, match="of another autoencoder than this AutoencoderKLWan"):
            decoder.load_state_dict(StreamingDecoder(other, num_latents=3).state_dict())
    short = hunyuan_video()
    short.tile_sample_stride_num_frames = 3
    with pytest.raises(UserError, match="set a stride of at least 4 frames"):
        StreamingDecoder(short)


def test_primed_with_all_latents_is_exact() -> None:
    vae, latents = wan(), noise(6)
    decoder = StreamingDecoder(vae)
    decoder.push(latents[:, :, :4])
    few = {name: value for name, value in decoder.state_dict().items() if name in ("autoencoder", "size", "counts")}
    primed, less = StreamingDecoder(vae), StreamingDecoder(vae)
    primed.prime(few, [latents[:, :, :4]])
    less.prime(few, [latents[:, :, 2:4]])
    rest = decoder.push(latents[:, :, 4:])
    assert torch.equal(primed.push(latents[:, :, 4:]), rest)
    approximate = less.push(latents[:, :, 4:])
    assert approximate.shape == rest.shape
    assert not torch.equal(approximate, rest)
    assert torch.equal(primed.state_dict()["counts"], less.state_dict()["counts"])
    with pytest.raises(UserError, match="has decoded 6 latent frames cannot be primed: prime a new decoder"):
        less.prime(few, [latents])
    other = StreamingDecoder(cogvideox(), num_latents=3)
    with pytest.raises(UserError, match="autoencoders other than Wan's need load_state_dict with a whole state"):
        other.prime(other.state_dict(), [noise(3)])


@pytest.mark.parametrize(("make", "reach"), [(wan, 30), (wan_residual, 28)])
def test_primed_with_as_many_latents_as_it_looks_back_is_exact(make: Any, reach: int) -> None:
    """The result is bitwise equal with `reach` latent frames, and differs with one piece less."""
    vae, latents = make(), noise(reach + 6, batch=1)
    decoder, pieces = StreamingDecoder(vae), latents.split(2, 2)
    assert decoder.reach == reach
    for piece in pieces[:-1]:
        decoder.push(piece)
    kept = decoder.state_dict()
    few, rest = {name: kept[name] for name in ("autoencoder", "size", "counts")}, decoder.push(pieces[-1])
    for count in (reach // 2, reach // 2 - 1):
        primed = StreamingDecoder(vae)
        primed.prime(few, pieces[-1 - count : -1])
        same = all(torch.equal(value, kept[name]) for name, value in primed.state_dict().items())
        assert same == (2 * count == reach)
        assert torch.equal(primed.push(pieces[-1]), rest) or not same
    assert StreamingDecoder(cogvideox(), num_latents=3).reach is None


@pytest.mark.parametrize("name", EXACT)
def test_another_number_of_latents_is_refused(name: str) -> None:
    vae = EXACT[name]()
    few = StreamingDecoder(vae, num_latents=3)
    made = [few.push(noise(2))]
    with pytest.raises(UserError, match="2 of num_latents=3"):
        few.finish()
    with pytest.raises(UserError, match="more than num_latents=3"):
        few.push(noise(2))
    made += [few.push(noise(1)), few.finish()]
    assert sum(each.shape[1] for each in made) == 9


@contextmanager
def out_of_memory(vae: Any) -> Iterator[None]:
    """Make the second call of the decoder fail."""
    calls = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    hook = vae.decoder.register_forward_hook(fail)
    try:
        with pytest.raises(MemoryError):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("name", WINDOWS)
def test_a_finish_that_failed_can_be_repeated(name: str) -> None:
    vae, latents = WINDOWS[name](), noise(9)
    vae.tile_sample_stride_num_frames = vae.temporal_compression_ratio  # four windows remain for `finish`
    one, other = (StreamingDecoder(vae, windows=True) for _ in range(2))
    one.push(latents)
    other.push(latents)
    with out_of_memory(vae):
        one.finish()
    assert torch.equal(one.finish(), other.finish())


@pytest.mark.parametrize("name", [*EXACT, *WINDOWS])
def test_a_push_that_failed_can_be_repeated(name: str) -> None:
    vae, latents = {**EXACT, **WINDOWS}[name](), noise(7)
    if name in WINDOWS:
        short_windows(vae)
    options: dict[str, Any] = {"num_latents": 7, "windows": True}
    expected = in_pieces(StreamingDecoder(vae, **options), latents, 1)
    decoder = StreamingDecoder(vae, **options)
    begun = [decoder.push(part) for part in latents[:, :, :2].split(1, 2)]

    with out_of_memory(vae):
        decoder.push(latents[:, :, 2:])
    rest = [decoder.push(part) for part in latents[:, :, 2:].split(1, 2)]
    torch.testing.assert_close(torch.cat([*begun, *rest, decoder.finish()], 1), expected, atol=1e-5, rtol=0)


def test_nothing_is_kept_for_gradients() -> None:
    vae = wan()
    latents = noise(2).requires_grad_()
    decoder = StreamingDecoder(vae)
    assert not decoder.push(latents).requires_grad
    assert not any(tensor.requires_grad for tensor in decoder.state_dict().values())
