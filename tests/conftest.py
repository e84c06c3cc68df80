"""Real images for the tests that want them, and a watch over what a test may leave behind."""

from pathlib import Path

import pytest
import sklearn
import torch
from sklearn.datasets import get_data_home


@pytest.fixture(scope="session")
def cifar10():
    """The 50,000 training images of CIFAR-10: X (50000, 3072) uint8, y (50000,)."""
    return _laid_out("fetch_cifar10", "cifar-10-batches-bin")


@pytest.fixture(scope="session")
def mnist():
    """The 60,000 training images of MNIST: X (60000, 784) uint8, y (60000,)."""
    return _laid_out("fetch_mnist", "MNIST/raw")


@pytest.fixture(autouse=True)
def _process_wide_settings_stay():
    before = _process_wide_settings()
    yield
    assert _process_wide_settings() == before


def _laid_out(fetcher, folder):
    # Only a missing folder skips: a damaged file is an error, here as everywhere.
    home = Path(get_data_home())
    if not (home / folder).is_dir():
        pytest.skip(f"no {folder} below {home}; SCIKIT_LEARN_DATA names another data home")
    from skcifar import datasets

    X, y = getattr(datasets, fetcher)(return_X_y=True, download_if_missing=False)
    # Shared by all tests of the session, so none may write to it.
    X.flags.writeable = y.flags.writeable = False
    return X, y


def _process_wide_settings():
    return {
        "scikit-learn": sklearn.get_config(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }
