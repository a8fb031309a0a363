"""The attention router: one function, the fastest exact kernel that is installed and works here.

    python examples/attention_router.py

On a GPU it times the kernels once for each shape. On a CPU torch's own attention runs. Writes `out/routed.png`, a clip
whose self-attention went through the router.
"""

import torch
from diffusers import WanPipeline

import postgen
from postgen.kernels.attention.ops import attention, backend_names

CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Call the router on tensors, then in a pipeline."""
    print("known kernels:", ", ".join(backend_names()))  # `postgen info` says which of them work here
    query, key, value = torch.randn(3, 2, 100, 4, 32, device=DEVICE)  # (B, N, H, D) each
    lengths = torch.tensor([100, 60])  # the second sample has 60 keys
    out, lse = attention(query, key, value, key_lengths=lengths, return_lse=True)
    print("output", tuple(out.shape), "log-sum-exp", tuple(lse.shape))

    pipe = WanPipeline.from_pretrained(postgen.embedded_model()).to(DEVICE)
    with postgen.routed_attention(pipe):  # afterwards the pipeline is as it was
        generator = torch.Generator().manual_seed(0)
        clip = pipe("a red ball rolls left", **CALL, generator=generator, output_type="pt").frames[0]
    postgen.contact_sheet(clip, "out/routed.png")


if __name__ == "__main__":
    main()
