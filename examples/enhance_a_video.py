"""Enhance-A-Video on a stock diffusers pipeline: clips of one seed without and with it, side by side.

    python examples/enhance_a_video.py

Writes `out/enhance.mp4` (without on the left, with on the right) and its contact sheet `out/enhance.png`.
"""

import torch
from diffusers import WanPipeline

import postgen

PROMPT = "a blue cube falls"
WEIGHT = 2.0  # without a weight, the config takes the recommended one of the model
CALL = {"height": 96, "width": 96, "num_frames": 17, "num_inference_steps": 6, "guidance_scale": 3.0}


def main() -> None:
    """Generate a clip before and after `apply_enhance_a_video`, then remove the plug-in."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model())

    def make() -> torch.Tensor:
        return pipe(PROMPT, **CALL, generator=torch.Generator().manual_seed(0), output_type="pt").frames[0]

    before = make()
    handle = postgen.apply_enhance_a_video(pipe, postgen.EnhanceAVideoConfig(weight=WEIGHT))
    after = make()
    assert not torch.equal(after, before)
    print(postgen.summary(pipe))  # the layers that the plug-in changes, and the gains of the last call
    handle.remove()
    assert torch.equal(make(), before)  # the stock pipeline again, bit by bit

    pair = list(postgen.side_by_side(before, after))
    postgen.write_video("out/enhance.mp4", pair, fps=8)
    postgen.contact_sheet(pair, "out/enhance.png", title=f"weight 0 and {WEIGHT:g}")


if __name__ == "__main__":
    main()
