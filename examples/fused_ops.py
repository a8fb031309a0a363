"""Fused operations in the blocks of a stock pipeline: norms, rotation and modulation, each as one GPU kernel.

    python examples/fused_ops.py

On a GPU a sampling step gets faster. On a CPU plain torch computes the same formulas, so the example also runs there.
Writes `out/fused.mp4`.
"""

import time

import torch
from diffusers import WanPipeline

import postgen

PROMPT = "a green cylinder stands still"
CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Generate the same clip with stock and with fused blocks, and compare times and results."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model()).to(DEVICE)

    def make(label: str) -> torch.Tensor:
        begin = time.perf_counter()
        clip = pipe(PROMPT, **CALL, generator=torch.Generator().manual_seed(0), output_type="pt").frames[0].cpu()
        print(f"{label}: {time.perf_counter() - begin:.2f} s on {DEVICE}")
        return clip

    make("stock, first call")  # the first call is slower, because it loads libraries
    stock = make("stock")
    handle = postgen.apply_fused_ops(pipe, postgen.FusedOpsConfig())  # default: norm_rope, adaln and attention are on
    print(postgen.summary(pipe))
    fused = make("fused")
    handle.remove()
    print(f"largest difference of pixel values in [0, 1]: {(fused - stock).abs().max():.2e}")
    postgen.write_video("out/fused.mp4", fused, fps=8)


if __name__ == "__main__":
    main()
