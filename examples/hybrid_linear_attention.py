"""Hybrid linear attention: convert two blocks of a trained transformer, save them as an adapter and load it.

    python examples/hybrid_linear_attention.py

The new layers are untrained; `postgen.lit.transfer` or `postgen train lit-tiny-wan` train them (docs/lit_training.md).
Writes `out/two-blocks.safetensors` and `out/linear.mp4` (stock on the left, converted on the right).
"""

from pathlib import Path

import torch
from diffusers import WanPipeline

import postgen
from postgen.lit import LitConfig, WindowOptions, apply_adapter, convert, revert, save_adapter

CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}
ADAPTER = Path("out/two-blocks.safetensors")


def main() -> None:
    """Convert blocks 3 and 4, save the new weights in a small file, and load the file into the stock model."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model())

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a blue cube falls", **CALL, generator=generator, output_type="pt").frames[0]

    stock = make()
    print(convert(pipe.transformer, LitConfig(layers="3-4:window_delta", window=WindowOptions(radius=1))))
    print(f"{ADAPTER}: {save_adapter(pipe.transformer, ADAPTER) / 1e6:.2f} MB")
    revert(pipe.transformer)
    assert torch.equal(make(), stock)  # the stock model again, bit by bit

    apply_adapter(pipe, ADAPTER)  # on the command line: postgen generate --lit FILE
    print(postgen.summary(pipe))
    postgen.write_video("out/linear.mp4", postgen.side_by_side(stock, make()), fps=8)


if __name__ == "__main__":
    main()
