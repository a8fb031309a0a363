"""The attention router: one function that runs the fastest exact attention kernel on this machine.

    python examples/attention_router.py

On a GPU the router times the kernels once for each shape. On a CPU it runs torch's attention. Writes `out/routed.png`,
frames of a clip whose self-attention used the router.
"""

import torch
from diffusers import WanPipeline

import postgen
from postgen.kernels.attention.ops import attention, backend_names

CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Call the router with tensors, then use it in a pipeline."""
    print("known kernels:", ", ".join(backend_names()))  # `postgen info` shows which of them run on this machine
    query, key, value = torch.randn(3, 2, 100, 4, 32, device=DEVICE)  # (B, N, H, D) each
    lengths = torch.tensor([100, 60])  # the second sample has 60 keys
    out, lse = attention(query, key, value, key_lengths=lengths, return_lse=True)
    print("output", tuple(out.shape), "log-sum-exp", tuple(lse.shape))

    pipe = WanPipeline.from_pretrained(postgen.embedded_model()).to(DEVICE)
    with postgen.routed_attention(pipe):  # after the block the pipeline is unchanged
        generator = torch.Generator().manual_seed(0)
        clip = pipe("a red ball rolls left", **CALL, generator=generator, output_type="pt").frames[0]
    postgen.contact_sheet(clip, "out/routed.png")


if __name__ == "__main__":
    main()
