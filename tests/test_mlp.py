"""MLPClassifier means what scikit-learn's means."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification
from sklearn.neural_network import MLPClassifier as SklearnMLP

from skcifar import MLPClassifier

SIZES = (12, 7)


@pytest.fixture
def blobs():
    def make(n_classes):
        return make_classification(
            n_samples=200, n_features=10, n_informative=6, n_classes=n_classes, random_state=0
        )

    return make


def both(monkeypatch, X, y, **parameters):
    """scikit-learn's estimator and ours, unfitted, that start from the same weights."""
    theirs = SklearnMLP(SIZES, random_state=1, shuffle=False, **parameters)
    untrained = SklearnMLP(
        SIZES,
        random_state=1,
        activation=theirs.activation,
        solver="sgd",
        momentum=0.0,
        learning_rate_init=1e-300,
        max_iter=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        untrained.fit(X, y)

    def start_alike(self, module):
        layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
        with torch.no_grad():
            for layer, coef, intercept in zip(
                layers, untrained.coefs_, untrained.intercepts_, strict=True
            ):
                layer.double()
                layer.weight.copy_(torch.from_numpy(coef.T))
                layer.bias.copy_(torch.from_numpy(intercept))

    monkeypatch.setattr(MLPClassifier, "_initialize", start_alike)
    parameters.setdefault("learning_rate", "constant")
    ours = MLPClassifier(SIZES, shuffle=False, normalize=False, **parameters)
    return theirs, ours


def test__signature__has_every_parameter_of_scikit_learns():
    theirs = inspect.signature(SklearnMLP).parameters
    assert set(theirs) <= set(inspect.signature(MLPClassifier).parameters)


@pytest.mark.filterwarnings("ignore:.*converged:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize(
    "optimisation",
    [
        {"momentum": 0.0, "alpha": 0.0},
        {"momentum": 0.9, "nesterovs_momentum": True, "alpha": 0.1},
        {"momentum": 0.5, "nesterovs_momentum": False, "alpha": 1.0},
    ],
)
def test__sgd__follows_scikit_learns_loss_curve(
    monkeypatch, blobs, n_classes, activation, optimisation
):
    X, y = blobs(n_classes)
    theirs, ours = both(
        monkeypatch,
        X,
        y,
        solver="sgd",
        activation=activation,
        batch_size=50,
        learning_rate_init=0.05,
        max_iter=20,
        tol=0.0,
        **optimisation,
    )
    theirs.fit(X, y)
    ours.fit(X, y)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)
    for ours_coef, their_coef in zip(ours.coefs_, theirs.coefs_, strict=True):
        np.testing.assert_allclose(ours_coef, their_coef, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*converged:sklearn.exceptions.ConvergenceWarning")
def test__sample_weight__follows_scikit_learns_loss_curve_over_full_batches(monkeypatch, blobs):
    X, y = blobs(3)
    weight = np.random.default_rng(0).uniform(0.1, 3, len(y))
    theirs, ours = both(
        monkeypatch,
        X,
        y,
        solver="sgd",
        batch_size=len(y),
        learning_rate_init=0.1,
        max_iter=15,
        tol=0.0,
        alpha=0.0,
    )
    theirs.fit(X, y, sample_weight=weight / weight.mean())
    ours.fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*converged:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("schedule", ["invscaling", "adaptive"])
def test__schedules_of_scikit_learns__follow_its_loss_curve(monkeypatch, blobs, schedule):
    X, y = blobs(3)
    theirs, ours = both(
        monkeypatch,
        X,
        y,
        solver="sgd",
        batch_size=50,
        learning_rate=schedule,
        momentum=0.0,
        learning_rate_init=0.5,
        power_t=0.3,
        max_iter=60,
        tol=1e-2,
        n_iter_no_change=2,
    )
    theirs.fit(X, y)
    ours.fit(X, y)
    assert ours.n_iter_ == theirs.n_iter_
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)


def test__open_length__ends_in_scikit_learns_epoch(monkeypatch, blobs):
    X, y = blobs(2)
    theirs, ours = both(
        monkeypatch,
        X,
        y,
        solver="sgd",
        batch_size=50,
        learning_rate_init=0.1,
        max_iter=2000,
        tol=1e-2,
        n_iter_no_change=3,
    )
    assert ours.fit(X, y).n_iter_ == theirs.fit(X, y).n_iter_ < 2000


@pytest.mark.filterwarnings("ignore:.*converged:sklearn.exceptions.ConvergenceWarning")
def test__adam__stays_near_scikit_learns_loss_curve(monkeypatch, blobs):
    X, y = blobs(3)
    theirs, ours = both(
        monkeypatch,
        X,
        y,
        solver="adam",
        batch_size=50,
        learning_rate_init=1e-2,
        max_iter=30,
        tol=0.0,
    )
    np.testing.assert_allclose(ours.fit(X, y).loss_curve_, theirs.fit(X, y).loss_curve_, rtol=1e-2)


@pytest.mark.parametrize("n_classes", [2, 3])
def test__lbfgs__reaches_scikit_learns_loss(monkeypatch, blobs, n_classes):
    X, y = blobs(n_classes)
    theirs, ours = both(
        monkeypatch, X, y, solver="lbfgs", activation="tanh", alpha=20.0, max_iter=5000, tol=1e-5
    )
    assert ours.fit(X, y).loss_ == pytest.approx(theirs.fit(X, y).loss_, rel=1e-6)


def test__coefs__give_the_outputs_from_rows_in_their_own_units():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (60, 12), dtype=np.uint8)
    y = rng.integers(0, 3, 60)
    model = MLPClassifier((5,), max_iter=2, random_state=0, precision="float64").fit(X, y)
    hidden = np.maximum(X @ model.coefs_[0] + model.intercepts_[0], 0)
    outputs = hidden @ model.coefs_[1] + model.intercepts_[1]
    np.testing.assert_allclose(outputs, model.decision_function(X), rtol=1e-9, atol=1e-9)
    assert (model.n_layers_, model.out_activation_, model.n_outputs_) == (3, "softmax", 3)


def test__dropout__draws_masks_of_the_stated_share_and_only_in_training():
    from skcifar._networks import Dropout

    layer = Dropout(0.25)
    layer.generator = torch.Generator().manual_seed(0)
    ones = torch.ones(1000, 100)
    dropped = layer(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((dropped == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert layer.eval()(ones) is ones


@pytest.mark.parametrize("sizes", [(0,), (3, -1), (2.5,)])
def test__hidden_layer_sizes_not_positive__error_names_them(sizes):
    with pytest.raises(ValueError, match="hidden_layer_sizes"):
        MLPClassifier(sizes).fit([[0.0], [1.0]], [0, 1])
