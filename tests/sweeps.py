"""What the tests of the backend and of the searches have in common."""

import signal

import joblib
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_digits

from skcifar import MLPClassifier, SoftmaxRegression, TripletEmbedder

X, y = load_digits(return_X_y=True)
X, y = X[:300] / 16, y[:300]
SOFTMAX = SoftmaxRegression(
    solver="sgd", max_iter=3, batch_size=50, learning_rate_init=0.1, random_state=0
)
MLP = MLPClassifier((8,), max_iter=4, batch_size=50, random_state=0)
EMBEDDER = TripletEmbedder(4, max_iter=1, image_shape=(1, 1, 64), random_state=0)
RATES = {"learning_rate_init": [0.1, 0.01]}
GRID = {"learning_rate_init": [0.3, 0.1, 0.001], "alpha": [0.0, 0.01]}
# for halving, in three rounds
LONG = clone(MLP).set_params(max_iter=9)
MANY = {"learning_rate_init": [0.3, 0.1, 0.03, 0.01, 0.001], "alpha": [0.0, 0.01]}


def in_block(function, *args, backend="skcifar", **kwargs):
    with joblib.parallel_config(backend=backend):
        return function(*args, **kwargs)


def assert_same_results(found, expected):
    """Equal keys in equal order, but for what searches add; equal values, but for times."""
    assert list(found)[: len(expected)] == list(expected)
    added = ("seed_std_test_", "indistinguishable_from_best")
    assert all(name.startswith(added) for name in list(found)[len(expected) :])
    for name, values in expected.items():
        if str(name).endswith("_time"):
            assert (np.asarray(found[name]) >= 0).all()
        elif str(name).startswith("param"):
            assert list(found[name]) == list(values), name
        elif np.asarray(values).dtype.kind == "f":
            assert_allclose(found[name], values, rtol=0, atol=1e-9, err_msg=name)
        else:
            assert_array_equal(found[name], values, err_msg=name)


def interrupt_after(n_fits):
    """Progress that presses Ctrl-C in the first epoch after so many fits."""

    def progress(event):
        if event["done_fits"] >= n_fits and event["done_epochs"] > 4 * event["done_fits"]:
            signal.raise_signal(signal.SIGINT)

    return progress
