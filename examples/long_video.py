"""A long video with depth: the pipeline yields one chunk after the other, in constant memory.

    python examples/long_video.py

The adapter adds a depth output and a memory to the embedded model. Writes `out/long.mp4` (the clip on the left, its
depth on the right) and the folder `out/long-state`, with which `pipe.stream(state=...)` can continue the video.
"""

from collections.abc import Iterator

import torch
from diffusers import WanPipeline

import postgen
from postgen.assets import embedded_adapter
from postgen.pipelines.worldweaver import WorldWeaverPipeline

FRAMES = 17
SIZE = 96
PROMPTS = [(0, "a red ball rolls left"), (9, "a blue cube falls")]  # (first frame, prompt)


def main() -> None:
    """Write each chunk when it is finished; the whole video is never in memory."""
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
            depth = chunk.depth[0][:, None].expand(-1, 3, -1, -1)  # near surfaces are bright
            print(f"{chunk.frames.shape[1]} frames from frame {chunk.start_frame}")
            yield torch.cat([chunk.frames[0], depth], dim=3)
            chunk.state.save("out/long-state")

    postgen.write_video("out/long.mp4", pictures(), fps=8)


if __name__ == "__main__":
    main()
