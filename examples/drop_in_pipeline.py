"""Change the import line of a diffusers program to get a keyword argument for each plug-in of postgen.

    python examples/drop_in_pipeline.py

The rest of the program needs no change. Writes `out/drop_in.mp4`.
"""

import torch

import postgen
from postgen.pipelines import WanPipeline  # before: from diffusers import WanPipeline

PROMPT = "a red ball rolls left"
CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}


def main() -> None:
    """Generate one clip with Enhance-A-Video and fused operations, which are on for this call only."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model())  # or a model id of the Hub
    video = pipe(
        PROMPT,
        **CALL,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        enhance_a_video="auto",
        fused_ops=True,
    )
    info = postgen.write_video("out/drop_in.mp4", video.frames[0], fps=8)
    print(f"out/drop_in.mp4: {info.frames} frames of {info.width}x{info.height}")


if __name__ == "__main__":
    main()
