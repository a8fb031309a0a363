from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """More threads than one only wait for each other in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
