"""Without a GPU, Triton kernels run in its interpreter, and tests marked gpu are skipped."""

import os

import pytest
import torch

# The interpreter is chosen when Triton is imported, which the kernels' modules do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def nan_in_new_tensors():
    """What a kernel leaves unwritten shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Small models train faster on one thread; `pytestmark` asks for it in a whole file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
