"""Linear layers in FP8: one call, no calibration, and off again bit by bit.

    python examples/fp8_linears.py

NVIDIA GPUs from Ada on compute in eight bits. On a CPU the rounding is emulated: the clip is what a GPU gives, the
speed is not. Writes `out/fp8.mp4` (exact on the left, FP8 on the right).
"""

import torch
from diffusers import WanPipeline

import postgen

PROMPT = "a red ball rolls left"
CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Make the same clip in full precision and in FP8."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model()).to(DEVICE)

    def make() -> torch.Tensor:
        return pipe(PROMPT, **CALL, generator=torch.Generator().manual_seed(0), output_type="pt").frames[0].cpu()

    exact = make()
    # Layers of fewer features are left alone on a GPU, where FP8 would be no faster. This model has small layers.
    handle = postgen.apply_fp8_linears(pipe, postgen.FP8LinearConfig(min_features=0, exact_first=1))
    print(postgen.summary(pipe))
    eight_bits = make()
    handle.remove()
    assert torch.equal(make(), exact)

    error = (eight_bits - exact).square().mean()
    print(f"PSNR of FP8 to exact: {-10 * error.log10():.1f} dB")
    postgen.write_video("out/fp8.mp4", postgen.side_by_side(exact, eight_bits), fps=8)


if __name__ == "__main__":
    main()
