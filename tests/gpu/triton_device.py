"""Where the tests of Triton kernels run: on the GPU, or, float32 only, in Triton's interpreter on the CPU."""

import contextlib
import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

needs_kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not IS_INTERPRETED and not torch.cuda.is_available(),
        reason="no GPU; TRITON_INTERPRET=1 runs them on the CPU",
    ),
]
needs_gpu = pytest.mark.skipif(
    IS_INTERPRETED or not torch.cuda.is_available(), reason="the interpreter cannot do it"
)


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def side_by_side():
    """Memory as it is while launches follow one another: it takes a kernel to poison it, which nothing may overtake."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def generator(seed: int) -> torch.Generator:
    """Random numbers made on the CPU, the same on every device."""
    return torch.Generator().manual_seed(seed)
