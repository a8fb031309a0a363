"""On two GPUs: two processes train, save and export the weights of one process, for every kind of sharding."""

import pytest
import torch

from benchmarks.faults_two_gpus import TOLERANCE, TRAINERS, Bench, compared, jobs_of, resumes
from benchmarks.two_gpus_compare import moved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Train all runs, in one pair of processes for each kind of launch."""
    made = Bench(tmp_path_factory.mktemp("two"), "cuda")
    made.build()
    for jobs in jobs_of("cuda"):
        made.run(jobs)
    return made


@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_process_learns(bench, trainer):
    assert moved(bench.run_of(f"{trainer}-one"), bench.folder / "model") > 10 * TOLERANCE


@pytest.mark.parametrize(
    "job", [job for jobs in jobs_of("cuda") for job in jobs if job.launch], ids=lambda job: job.name
)
def test_two_processes_learn_what_one_does(bench, job):
    row = compared(bench, job)
    assert not row["log"], row
    assert row["max_abs"] <= TOLERANCE, row


def test_a_run_goes_on_in_another_number_of_processes(bench):
    for jobs in resumes(bench):
        bench.run(jobs)
        for job in jobs:
            row = compared(bench, job)
            assert not row["log"], row
            assert not row["refused"]
            assert row["max_abs"] <= TOLERANCE, job.name
