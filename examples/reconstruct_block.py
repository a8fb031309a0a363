"""Train a student that reproduces the outputs of one block of a transformer.

    python examples/reconstruct_block.py

In the student of this example a feed-forward layer has low rank. The inputs and outputs of the teacher are recorded
once, and the student is trained on these records alone. Writes the records to `out/records`, and the run with its
trained weights to `out/low-rank`.
"""

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

import postgen
from postgen.families import blocks_of, denoiser_for
from postgen.reconstruct import ReconstructConfig, RecordsConfig, block_task, collect, reconstruct

PROMPTS = ["a red ball rolls left", "a blue cube falls", "a green cone turns"]  # the last prompt is held out
STEPS, RANK = 20, 64


class LowRank(nn.Module):
    """A low-rank linear layer: two thin matrices, initialised from the largest singular values of the original."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.up, self.down = nn.Parameter(u[:, :RANK] * s[:RANK]), nn.Parameter(v[:RANK].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x @ down^T @ up^T + bias."""
        return x @ self.down.T @ self.up.T + self.bias


def change(block: nn.Module) -> nn.Module:
    """Turn a copy of the teacher's block into the student."""
    block.requires_grad_(False)
    block.ffn.net[0].proj = LowRank(block.ffn.net[0].proj)
    return block


def main() -> None:
    """Record block 3, train its student, and replace the block by the student."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model())
    block = blocks_of(pipe.transformer)[3]
    size = RecordsConfig(num_frames=5, height=64, width=64, num_inference_steps=4)
    records = collect(denoiser_for(pipe), [block], PROMPTS, size, where="out/records")
    task = block_task(block, change, is_new=lambda name: name.endswith((".up", ".down")), settings={"rank": RANK})
    train = ReconstructConfig(output_dir="out/low-rank", max_steps=STEPS, learning_rate_new=1e-3)
    report = reconstruct([task], records, train)  # prints errors on the held-out prompt before and after
    student = task.build()
    student.load_state_dict(report.weights(task.name))
    pipe.transformer.set_submodule(block.name, student)


if __name__ == "__main__":
    main()
