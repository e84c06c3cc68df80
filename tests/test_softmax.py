"""SoftmaxRegression is LogisticRegression, faster."""

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from skcifar import SoftmaxRegression


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0])
def test__lbfgs__reaches_the_optimum_of_logistic_regression(n_classes, alpha):
    X, y = make_classification(
        n_samples=300, n_features=12, n_informative=6, n_classes=n_classes, random_state=0
    )
    theirs = LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=10_000).fit(X, y)
    ours = SoftmaxRegression(alpha=alpha, solver="lbfgs", tol=1e-9).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)


def test__sample_and_class_weights__reach_the_optimum_of_logistic_regression():
    X, y = make_classification(
        n_samples=300,
        n_features=8,
        n_informative=5,
        n_classes=3,
        weights=[0.7, 0.2],
        random_state=0,
    )
    weight = np.random.default_rng(0).integers(0, 4, len(y)).astype(float)
    theirs = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-10, max_iter=10_000)
    theirs.fit(X, y, sample_weight=weight)
    ours = SoftmaxRegression(alpha=2.0, class_weight="balanced", tol=1e-9)
    ours.fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)


@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test__mini_batch_solvers__come_near_the_same_optimum(solver):
    X, y = load_digits(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    optimum = SoftmaxRegression(alpha=10.0, tol=1e-6).fit(X, y)
    ours = SoftmaxRegression(
        solver=solver, alpha=10.0, learning_rate_init=0.02, max_iter=60, random_state=0
    ).fit(X, y)
    assert ours.loss_ == pytest.approx(optimum.loss_, rel=0.02)


def test__coef__gives_the_outputs_from_pixels():
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.uint8)
    model = SoftmaxRegression(precision="float64").fit(X, y)
    assert model.coef_.shape == (10, 64)
    np.testing.assert_allclose(X @ model.coef_.T + model.intercept_, model.decision_function(X))


def test__alpha_auto__is_a_share_of_the_weight():
    X, y = load_digits(return_X_y=True)
    automatic = SoftmaxRegression().fit(X, y)
    explicit = SoftmaxRegression(alpha=2e-3 * len(y)).fit(X, y)
    np.testing.assert_array_equal(automatic.coef_, explicit.coef_)


def test__max_iter_auto__is_long_for_lbfgs_and_short_for_the_others():
    X, y = load_digits(return_X_y=True)
    assert SoftmaxRegression(solver="adam").fit(X, y).n_iter_ == 20
    assert 20 < SoftmaxRegression(tol=1e-6).fit(X, y).n_iter_ < 1000


def test__weight_decay__is_a_penalty_whatever_the_number_of_rows():
    X, y = load_digits(return_X_y=True)
    decayed = SoftmaxRegression(alpha=0.0, weight_decay=0.01, tol=1e-7).fit(X, y)
    penalised = SoftmaxRegression(alpha=0.01 * len(y), tol=1e-7).fit(X, y)
    np.testing.assert_allclose(decayed.coef_, penalised.coef_, atol=1e-6)


def test__lbfgs__has_no_partial_fit_and_refuses_early_stopping():
    assert not hasattr(SoftmaxRegression(), "partial_fit")
    assert hasattr(SoftmaxRegression(solver="adam"), "partial_fit")
    with pytest.raises(ValueError, match="early_stopping=True has no meaning for solver='lbfgs'"):
        SoftmaxRegression(early_stopping=True).fit([[0.0], [1.0]], [0, 1])


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test__squared_error__is_least_squares_on_targets(solver, n_classes):
    X, y = make_classification(
        n_samples=200, n_features=6, n_informative=4, n_classes=n_classes, random_state=0
    )
    model = SoftmaxRegression(
        solver=solver,
        loss="squared_error",
        alpha=0.0,
        tol=1e-9,
        batch_size="full",
        learning_rate_init=0.1,
        learning_rate="cosine",
        max_iter=500,
        random_state=0,
    ).fit(X, y)
    wanted = 2.0 * y[:, None] - 1 if n_classes == 2 else np.eye(n_classes)[y]
    design = np.column_stack([X, np.ones(len(X))])
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    outputs = model.decision_function(X).reshape(len(X), -1)
    np.testing.assert_allclose(outputs, design @ solution, atol=1e-4)
    assert not hasattr(model, "predict_proba")
    assert not hasattr(model, "predict_log_proba")
