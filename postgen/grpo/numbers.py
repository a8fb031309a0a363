"""Types for the integer numberings of rollouts, prompts and samples, so that the type checker tells them apart.

Five numberings occur together in this package:

    RolloutNumber   a rollout of the run, from 0
    PromptNumber    a prompt within its rollout, from 0, over all processes
    SampleNumber    a sample within its rollout, from 0, prompt by prompt, over all processes
    row (int)       a row of a tensor or list of this process: of the drawn samples, or of the `Buffer`
    step (int)      an index into the noise levels of the schedule, from 0 (noise)

A `SampleNumber` is the same whatever number of processes share a rollout; a row is not. Docstrings of functions that
take rows or steps say so, because these two are plain integers. At run time all five are plain integers.
"""

from typing import NewType

RolloutNumber = NewType("RolloutNumber", int)
"""Number of a rollout in the run."""

PromptNumber = NewType("PromptNumber", int)
"""Number of a prompt in its rollout, over all processes."""

SampleNumber = NewType("SampleNumber", int)
"""Number of a sample in its rollout, counted prompt by prompt over all processes."""
