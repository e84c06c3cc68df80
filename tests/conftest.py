"""Real images for the tests that want them, and a watch over what a test may leave behind."""

import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import sklearn
import torch
from sklearn.datasets import get_data_home
from sklearn.dummy import DummyClassifier
from sklearn.utils import Bunch


@pytest.fixture(scope="session")
def cifar10():
    """The 50,000 training images of CIFAR-10: X (50000, 3072) uint8, y (50000,)."""
    return _laid_out("fetch_cifar10", "cifar-10-batches-bin")


@pytest.fixture(scope="session")
def mnist():
    """The 60,000 training images of MNIST: X (60000, 784) uint8, y (60000,)."""
    return _laid_out("fetch_mnist", "MNIST/raw")


# -- the backend and the searches ------------------------------------------------------------------


@pytest.fixture
def met(monkeypatch):
    """How many fits wait together, each time that they are about to be trained."""
    from skcifar import _backend, _stack

    assert _backend._works_with_joblib()
    numbers = []
    groups_of = _stack.groups_of

    def recorded(jobs):
        numbers.append(len(jobs))
        return groups_of(jobs)

    monkeypatch.setattr(_stack, "groups_of", recorded)
    return numbers


@pytest.fixture
def trained(monkeypatch):
    """What is trained within searches, a task each; counts what a resumed search repeats."""
    from skcifar._study import SearchStudy

    tasks = []
    original = SearchStudy.trained

    def record(self, task, job, result):
        tasks.append((len(self.rounds) - 1, task.position))
        original(self, task, job, result)

    monkeypatch.setattr(SearchStudy, "trained", record)
    return tasks


# -- the command line ------------------------------------------------------------------------------


class Failing(DummyClassifier):
    """Raises what it is given."""

    def __init__(self, error=ValueError):
        super().__init__()
        self.error = error

    def fit(self, X, y):
        raise self.error("no luck " * 30)


class Recorded(DummyClassifier):
    """Keeps the history of two epochs."""

    def fit(self, X, y):
        self.history_ = [
            {"epoch": i, "train_loss": 1 / i, "train_accuracy": 0.1 * i, "valid_loss": 2 / i}
            for i in (1, 2)
        ]
        self.n_iter_ = 2
        return super().fit(X, y)


@pytest.fixture
def models():
    """The command line's models and three more, to add to: name -> function of the device."""
    from skcifar._command_line import MODELS

    others = {
        "recorded": lambda device: Recorded(),
        "bad": lambda device: Failing(),
        "stopped": lambda device: Failing(KeyboardInterrupt),
    }
    with patch.dict(MODELS, others):
        yield MODELS


@pytest.fixture
def small_mnist(monkeypatch):
    """Instead of MNIST, 100 training and 30 test images of 2 x 2 pixels, of three classes.

    Gives the list of what was asked for: (data_home, subset).
    """
    from skcifar._command_line import FETCHERS

    asked = []

    def fetch(*, data_home, subset, classes=None, return_X_y=False, verbose):
        asked.append((data_home, subset))
        rng = np.random.default_rng(0)
        y = np.repeat([0, 1, 2], [17, 33, 50] if subset == "train" else [10, 10, 10])
        X = rng.integers(0, 256, (len(y), 4)).astype(np.uint8)
        kept = np.isin(y, range(3) if classes is None else classes)
        if return_X_y:
            return X[kept], y[kept]
        images = X[kept].reshape(-1, 2, 2)
        names = np.array(["zero", "one", "two"])
        return Bunch(data=X[kept], images=images, target=y[kept], target_names=names)

    monkeypatch.setitem(FETCHERS, "mnist", fetch)
    return asked


@pytest.fixture
def image_folder(tmp_path):
    """A folder "pets" of 18 training and 9 test images, classes "7", "cat" and "dog" alternating.

    Image i of a part is red of value 10 i; sizes differ.
    """
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pets"
    for part, n_images in ("train", 18), ("test", 9):
        for i in range(n_images):
            place = folder / part / ["7", "cat", "dog"][i % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + i, 30), (10 * i, 0, 0)).save(place / f"{i:02}.png")
    return folder


@pytest.fixture
def error_line(capsys):
    """What a wrong call says on stderr, once it is sure that it says one line and no more."""
    from skcifar.__main__ import main

    def run(*arguments):
        try:
            status = main([*arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        told, line = err.splitlines()[:-1], err.splitlines()[-1]
        assert status == 2
        assert out == ""
        assert line.startswith("skcifar: error: ")
        assert not [t for t in told if not t.startswith("skcifar: reading")]
        return line

    return run


# -- of every test ---------------------------------------------------------------------------------


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
        "tasks": [t.name for t in threading.enumerate() if t.name.startswith("skcifar")],
    }
