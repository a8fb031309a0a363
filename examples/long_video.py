"""A long video by streaming, with depth: chunks come as they are made, in constant memory.

    python examples/long_video.py

The adapter of the embedded model gives it a depth channel and a memory. Writes `out/long.mp4` (the clip, and its depth
beside it) and the folder `out/long-state`, from which `pipe.stream(state=...)` goes on.
"""

from collections.abc import Iterator

import torch
from diffusers import WanPipeline

import postgen
from postgen.assets import embedded_adapter
from postgen.pipelines.worldweaver import WorldWeaverPipeline

FRAMES = 17
SIZE = 96
PROMPTS = [(0, "a red ball rolls left"), (9, "a blue cube falls")]  # from which frame on


def main() -> None:
    """Write each chunk when it is there; the video is never in memory as a whole."""
    base = WanPipeline.from_pretrained(postgen.embedded_model())
    pipe = WorldWeaverPipeline.from_pipe(base, adapter=embedded_adapter())
    stream = pipe.stream(
        PROMPTS,
        num_frames=FRAMES,
        height=SIZE,
        width=SIZE,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_depth=True,
    )

    def pictures() -> Iterator[torch.Tensor]:
        for chunk in stream:
            depth = chunk.depth[0][:, None].expand(-1, 3, -1, -1)  # bright is near
            print(f"from frame {chunk.start_frame}: {chunk.frames.shape[1]} frames")
            yield torch.cat([chunk.frames[0], depth], dim=3)
            chunk.state.save("out/long-state")

    postgen.write_video("out/long.mp4", pictures(), fps=8)


if __name__ == "__main__":
    main()
