"""Linear layers in FP8: one call without calibration, which can be undone bit by bit.

    python examples/fp8_linears.py

NVIDIA GPUs since Ada compute in eight bits. A CPU simulates the rounding: the clip looks as on a GPU, but the model is
not faster. Writes `out/fp8.mp4` (exact on the left, FP8 on the right).
"""

import torch
from diffusers import WanPipeline

import postgen

PROMPT = "a red ball rolls left"
CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Generate the same clip in full precision and in FP8."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model()).to(DEVICE)

    def make() -> torch.Tensor:
        return pipe(PROMPT, **CALL, generator=torch.Generator().manual_seed(0), output_type="pt").frames[0].cpu()

    exact = make()
    # By default small layers stay exact on a GPU, because FP8 does not make them faster. All layers of this model are
    # small, so the example sets min_features=0.
    handle = postgen.apply_fp8_linears(pipe, postgen.FP8LinearConfig(min_features=0, first_exact_blocks=1))
    print(postgen.summary(pipe))
    eight_bits = make()
    handle.remove()
    assert torch.equal(make(), exact)

    error = (eight_bits - exact).square().mean()
    print(f"PSNR between FP8 and exact: {-10 * error.log10():.1f} dB")
    postgen.write_video("out/fp8.mp4", postgen.side_by_side(exact, eight_bits), fps=8)


if __name__ == "__main__":
    main()
