"""What every test shares: one thread, no network, the tier's marker, a visible skip where something is absent."""

import os

# Before anything imports torch or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

import tests.checker  # noqa: F401 (jaxtyping looks its checker up by name, and imports no more than `tests`)

REPO = Path(__file__).resolve().parents[1]
REAL = REPO.parent / "shared" / "real"
TIERS = ("unit", "contract", "model", "reference", "docs", "browser", "real")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the tier whose folder it lies in; skip `real` tests where their models are not."""
    for item in items:
        tier = item.path.relative_to(REPO / "tests").parts[0]
        if tier in TIERS:
            item.add_marker(tier)
        if item.get_closest_marker("real") and not REAL.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs ../shared/real, which is not here"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, and none is here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's random numbers are its own: they do not depend on which tests ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests of wrong arguments: they meet the library's own errors, as a user's do, not the tests' type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real models and text, for tests marked `real`."""
    return REAL
