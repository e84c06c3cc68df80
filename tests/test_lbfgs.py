"""L-BFGS for vectors, for modules and for softmax regression, against slow oracles."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.datasets import load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from skcifar import _lbfgs
from skcifar._lbfgs import minimize, minimize_module, minimize_softmax

LIMITS = {"max_iter": 10_000, "max_fun": 100_000}


def _rows(n_rows=120, n_features=9, n_classes=4, dtype=torch.float64, seed=0):
    """Features with unlike means and scales, and classes that depend on them."""
    rng = np.random.default_rng(seed)
    standard = rng.normal(size=(n_rows, n_features))
    logits = standard @ rng.normal(size=(n_features, n_classes)) + rng.normal(size=n_classes)
    targets = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    if dtype == torch.uint8:
        values = np.clip(standard * 40 + 120, 0, 255).astype(np.uint8)
    else:
        values = standard * rng.uniform(0.3, 3, n_features) + rng.normal(size=n_features)
    return torch.from_numpy(values).to(dtype), torch.from_numpy(targets)


def _fit(rows, targets, *, n_outputs=4, alpha=1.0, dtype=torch.float64, tol=1e-9, **options):
    options = {**LIMITS, **options}
    return minimize_softmax(
        rows, targets, n_outputs=n_outputs, alpha=alpha, dtype=dtype, tol=tol, **options
    )


def _objective(coefficients, intercept, features, targets, penalty, weight=None, smoothing=0.0):
    """The documented objective, sample by sample, in plain NumPy."""
    weight = np.ones(len(features)) if weight is None else np.asarray(weight)
    total = 0.0
    for row, target, share in zip(features, targets, weight, strict=True):
        logits = coefficients @ row + intercept
        if len(logits) == 1:
            logits = np.array([0.0, logits[0]])
        log_probability = logits - logits.max()
        log_probability = log_probability - np.log(np.exp(log_probability).sum())
        wanted = np.full(len(logits), smoothing / len(logits))
        wanted[int(target)] += 1 - smoothing
        total -= share * (wanted @ log_probability)
    return total / weight.sum() + 0.5 * penalty * np.sum(coefficients**2)


def _without_preconditioner(monkeypatch):
    monkeypatch.setattr(_lbfgs, "_GRAM_MAX_FEATURES", 0)


# minimize


def test__rosenbrock__minimum_found_and_curve_falls_to_the_loss():
    found = minimize(
        lambda t: (scipy.optimize.rosen(t), scipy.optimize.rosen_der(t)),
        np.array([-1.2, 1.0, 0.7]),
        tol=1e-8,
        **LIMITS,
    )
    assert found.converged
    np.testing.assert_allclose(found.theta, 1.0, atol=1e-6)
    assert len(found.loss_curve) == found.n_iter
    assert found.n_evaluations >= found.n_iter
    assert found.loss_curve[-1] == found.loss
    assert np.all(np.diff(found.loss_curve) <= 0)


@pytest.mark.parametrize("limit", [{"max_iter": 3}, {"max_fun": 3}])
def test__limit_reached__not_converged_and_message_says_which(limit):
    found = minimize(
        lambda t: (scipy.optimize.rosen(t), scipy.optimize.rosen_der(t)),
        np.array([-1.2, 1.0]),
        tol=1e-8,
        **{**LIMITS, **limit},
    )
    assert not found.converged
    assert ("ITERATIONS" if "max_iter" in limit else "EVALUATIONS") in found.message
    assert found.n_iter <= 4


def test__callback_returns_true__stops_unconverged_at_that_point():
    seen = []

    def callback(theta, loss):
        seen.append((theta, loss))
        return len(seen) == 2

    found = minimize(
        lambda t: (scipy.optimize.rosen(t), scipy.optimize.rosen_der(t)),
        np.array([-1.2, 1.0]),
        tol=1e-8,
        callback=callback,
        **LIMITS,
    )
    assert found.n_iter == 2 and not found.converged and "CALLBACK" in found.message
    np.testing.assert_array_equal(found.theta, seen[-1][0])
    assert seen[0][1] > seen[1][1] == found.loss


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test__not_finite__error_names_evaluation_and_remedy(where, bad):
    def objective(theta):
        far = theta[0] > 2
        loss = bad if far and where == "loss" else -theta[0]
        return loss, np.array([bad if far and where == "gradient" else -1.0])

    with pytest.raises(FloatingPointError, match=r"evaluation \d+.*penalise"):
        minimize(objective, np.zeros(1), tol=1e-8, **LIMITS)


# minimize_module


def _twin_networks(alpha):
    """A scikit-learn network after one iteration, and a torch module with the same weights."""
    X, y = load_iris(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    reference = MLPClassifier(
        (8,), activation="tanh", solver="lbfgs", alpha=alpha, max_iter=1, tol=1e-6,
        warm_start=True, random_state=0,
    )  # fmt: skip
    with pytest.warns(ConvergenceWarning):
        reference.fit(X, y)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        layers = zip(module.double()[::2], reference.coefs_, reference.intercepts_, strict=True)
        for layer, coef, intercept in layers:
            layer.weight.copy_(torch.from_numpy(coef.T))
            layer.bias.copy_(torch.from_numpy(intercept))
    return X, y, module, reference


def _closure(module, X, y, alpha):
    features, targets = torch.from_numpy(X), torch.from_numpy(y)

    def closure():
        loss = torch.nn.functional.cross_entropy(module(features), targets)
        for layer in module[::2]:
            loss = loss + 0.5 * alpha / len(X) * layer.weight.square().sum()
        loss.backward()
        return loss

    return closure


def test__module_from_equal_weights__final_loss_of_scikit_learn():
    X, y, module, reference = _twin_networks(alpha=1.0)
    found = minimize_module(module, _closure(module, X, y, 1.0), tol=1e-6, **LIMITS)
    reference.set_params(max_iter=10_000, max_fun=100_000).fit(X, y)
    assert found.converged
    assert found.loss == pytest.approx(reference.loss_, rel=1e-6)


def test__module__holds_the_point_found_and_no_gradients():
    X, y, module, _ = _twin_networks(alpha=1.0)
    found = minimize_module(module, _closure(module, X, y, 1.0), tol=1e-6, **LIMITS)
    held = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy()
    np.testing.assert_array_equal(held, found.theta)
    assert all(p.grad is None for p in module.parameters())
    assert _closure(module, X, y, 1.0)().item() == pytest.approx(found.loss, rel=1e-12)


def test__module_callback__sees_that_step_in_the_module_and_can_stop():
    X, y, module, _ = _twin_networks(alpha=1.0)
    closure = _closure(module, X, y, 1.0)
    recomputed, given = [], []

    def callback(loss):
        given.append(loss)
        recomputed.append(closure().item())
        return len(given) == 3

    found = minimize_module(module, closure, tol=1e-6, callback=callback, **LIMITS)
    np.testing.assert_allclose(recomputed, given, rtol=1e-12)
    assert found.n_iter == 3 and not found.converged


def test__frozen_and_unused_parameters__stay_as_they_were():
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})
    module["used"].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def closure():
        loss = (module["used"].weight - 5).square().sum()
        loss.backward()
        return loss

    minimize_module(module, closure, tol=1e-6, **LIMITS)
    after = module.state_dict()
    torch.testing.assert_close(after["used.weight"], torch.full((1, 2), 5.0))
    for name in ("used.bias", "unused.weight", "unused.bias"):
        assert torch.equal(after[name], before[name])


# minimize_softmax


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("preconditioned", [True, False])
def test__float64__coefficients_of_tight_logistic_regression(
    n_outputs, alpha, preconditioned, monkeypatch
):
    rows, targets = _rows(n_classes=max(2, n_outputs))
    if not preconditioned:
        _without_preconditioner(monkeypatch)
    found = _fit(rows, targets, n_outputs=n_outputs, alpha=alpha)
    reference = LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=10_000, solver="newton-cg")
    reference.fit(rows.numpy(), targets.numpy())
    assert found.preconditioned is preconditioned
    np.testing.assert_allclose(found.coefficients, reference.coef_, atol=2e-6)
    # The coefficients leave one direction of three intercepts free; both solvers start at 0.
    np.testing.assert_allclose(found.intercept, reference.intercept_, atol=2e-6)


def test__unscaled_wine__loss_of_tight_logistic_regression_in_few_iterations(monkeypatch):
    X, y = load_wine(return_X_y=True)
    reference = LogisticRegression(tol=1e-8, max_iter=10_000, solver="newton-cg").fit(X, y)
    best = _objective(reference.coef_, reference.intercept_, X, y, 1 / len(X))
    rows, targets = torch.from_numpy(X), torch.from_numpy(y)
    found = _fit(rows, targets, n_outputs=3, tol=1e-7)
    assert found.result.loss == pytest.approx(best, rel=1e-9)
    _without_preconditioner(monkeypatch)
    plain = _fit(rows, targets, n_outputs=3, tol=1e-7)
    assert 5 * found.result.n_evaluations < plain.result.n_evaluations


@pytest.mark.parametrize("n_outputs", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test__loss__is_the_documented_objective_at_a_stationary_point(n_outputs, smoothing, weighted):
    rows, targets = _rows(n_rows=60, n_features=3, n_classes=max(2, n_outputs))
    weight = np.random.default_rng(1).uniform(0, 3, len(rows)) if weighted else None
    shift, scale = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([2.0, 0.7, 1.3])
    found = _fit(
        rows,
        targets,
        n_outputs=n_outputs,
        alpha=2.0,
        weight_decay=0.03,
        shift=shift,
        scale=scale,
        label_smoothing=smoothing,
        sample_weight=None if weight is None else torch.from_numpy(weight),
    )
    features = ((rows - shift) / scale).numpy()
    penalty = 2.0 / (len(rows) if weight is None else weight.sum()) + 0.03

    def oracle(theta):
        coefficients, intercept = theta[: n_outputs * 3], theta[n_outputs * 3 :]
        return _objective(
            coefficients.reshape(n_outputs, 3),
            intercept,
            features,
            targets.numpy(),
            penalty,
            weight,
            smoothing,
        )

    assert found.result.loss == pytest.approx(oracle(found.result.theta), rel=1e-12)
    slope = scipy.optimize.approx_fprime(found.result.theta, oracle, 1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-5)


@pytest.mark.parametrize("n_outputs", [1, 4])
@pytest.mark.parametrize("preconditioned", [True, False])
def test__gradient__is_that_of_finite_differences(n_outputs, preconditioned):
    rows, targets = _rows(n_rows=50, n_features=4, n_classes=max(2, n_outputs))
    weight = torch.linspace(0.2, 2, len(rows), dtype=torch.float64)
    scale = torch.tensor([2.0, 0.7, 1.3, 0.1])
    data = _lbfgs._Rows(rows, targets, weight, None, scale, torch.float64)
    data.choose_centre()
    problem = _lbfgs._SoftmaxProblem(data, n_outputs, 0.1, label_smoothing=0.1)
    factor = problem.curvature_factor() if preconditioned else None
    theta = np.random.default_rng(0).normal(size=n_outputs * 5)
    error = scipy.optimize.check_grad(
        lambda t: problem.evaluate(t, factor)[0], lambda t: problem.evaluate(t, factor)[1], theta
    )
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32])
def test__whole_values_of_any_dtype__same_coefficients(dtype):
    rows, targets = _rows(dtype=torch.uint8)
    options = {"alpha": 3.0, "shift": torch.tensor(120.0), "scale": torch.tensor(40.0)}
    expected = _fit(rows.double(), targets, **options)
    found = _fit(rows.to(dtype), targets, **options)
    np.testing.assert_allclose(found.coefficients, expected.coefficients, atol=1e-12)


def test__shift_and_scale__equal_rows_normalised_beforehand():
    rows, targets = _rows(dtype=torch.uint8)
    shift, scale = rows.double().mean(0), rows.double().std(0)
    folded = _fit(rows, targets, shift=shift, scale=scale)
    formed = _fit((rows - shift) / scale, targets)
    np.testing.assert_allclose(folded.coefficients, formed.coefficients, atol=1e-9)
    np.testing.assert_allclose(folded.intercept, formed.intercept, atol=1e-9)


def test__float32__within_rounding_of_float64():
    rows, targets = _rows(n_rows=400, dtype=torch.uint8)
    options = {"shift": torch.tensor(120.0), "scale": torch.tensor(40.0), "tol": 1e-6}
    exact = _fit(rows, targets, **options)
    single = _fit(rows, targets, dtype=torch.float32, **options)
    np.testing.assert_allclose(single.coefficients, exact.coefficients, atol=2e-4)
    assert single.result.loss == pytest.approx(exact.result.loss, rel=1e-7)


def test__float32_features_far_from_zero__lose_no_digits():
    rows, targets = _rows(n_rows=400, n_features=3)
    far = rows / rows.std(0) + 4096
    far = far.float()
    exact = _fit(far, targets, tol=1e-6)
    single = _fit(far, targets, dtype=torch.float32, tol=1e-5)
    np.testing.assert_allclose(single.coefficients, exact.coefficients, atol=1e-3)


@pytest.mark.parametrize("tol", [1e-4, 1e-9])
def test__weights__equal_repetition(tol):
    rows, targets = _rows()
    counts = torch.from_numpy(np.random.default_rng(2).integers(0, 4, len(rows)))
    weighted = _fit(rows, targets, sample_weight=counts.double(), tol=tol)
    repeated = _fit(rows.repeat_interleave(counts, 0), targets.repeat_interleave(counts), tol=tol)
    np.testing.assert_allclose(weighted.coefficients, repeated.coefficients, atol=1e-7)
    np.testing.assert_allclose(weighted.intercept, repeated.intercept, atol=1e-7)


def test__index__equals_the_picked_rows():
    rows, targets = _rows()
    weight = torch.linspace(0.1, 3, len(rows), dtype=torch.float64)
    index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:70]
    by_index = _fit(rows, targets, sample_weight=weight, index=index)
    copied = _fit(rows[index], targets[index], sample_weight=weight[index])
    np.testing.assert_array_equal(by_index.coefficients, copied.coefficients)


@pytest.mark.parametrize("rows_in_sample, chunk_floats", [(10_000, 40), (60, 10_000), (60, 40)])
def test__small_chunks_and_samples__same_optimum(rows_in_sample, chunk_floats, monkeypatch):
    rows, targets = _rows()
    expected = _fit(rows, targets)
    monkeypatch.setattr(_lbfgs, "_GRAM_ROWS", rows_in_sample)
    monkeypatch.setattr(_lbfgs, "_CHUNK_FLOATS", {"cpu": chunk_floats})
    found = _fit(rows, targets, index=torch.arange(len(rows)))
    assert found.preconditioned
    np.testing.assert_allclose(found.coefficients, expected.coefficients, atol=1e-7)


def test__more_features_than_rows_and_constant_ones__converges_to_the_same_loss(monkeypatch):
    rows, targets = _rows(n_rows=30, n_features=50)
    rows[:, ::7] = 3.0
    found = _fit(rows, targets, alpha=0.5)
    _without_preconditioner(monkeypatch)
    plain = _fit(rows, targets, alpha=0.5)
    assert found.preconditioned and found.result.converged
    assert found.result.loss == pytest.approx(plain.result.loss, rel=1e-10)
    np.testing.assert_allclose(found.coefficients[:, ::7], 0, atol=1e-7)


def test__no_penalty_and_collinear_features__converges():
    rows, targets = _rows(n_rows=200, n_features=5)
    rows = torch.cat([rows, rows[:, :2], torch.zeros(200, 1)], dim=1)
    found = _fit(rows, targets, alpha=0.0, tol=1e-6)
    assert found.result.converged
    assert found.result.loss < np.log(4)


def test__stop__is_in_the_variables_of_the_user():
    rows, targets = _rows()
    shift, scale = rows.mean(0), rows.std(0)
    found = _fit(rows, targets, tol=1e-3, shift=shift, scale=scale)
    features = ((rows - shift) / scale).numpy()
    probability = features @ found.coefficients.T + found.intercept
    probability = np.exp(probability - probability.max(1, keepdims=True))
    residual = probability / probability.sum(1, keepdims=True) - np.eye(4)[targets]
    gradient = (residual.T @ features + found.coefficients) / len(rows)
    assert "NORM OF GRADIENT" in found.result.message
    assert np.abs(gradient).max() <= 1e-3 * (1 + 1e-9)
    assert np.abs(residual.mean(0)).max() <= 1e-3 * (1 + 1e-9)


def test__start_at_the_optimum__returns_it_after_one_evaluation():
    rows, targets = _rows()
    options = {"shift": rows.mean(0) + 1, "scale": rows.std(0)}
    first = _fit(rows, targets, tol=1e-7, **options)
    initial = first.coefficients, first.intercept
    again = _fit(rows, targets, tol=1e-6, initial=initial, **options)
    assert again.result.n_iter == 0 and again.result.n_evaluations == 1
    assert again.result.converged
    np.testing.assert_allclose(again.coefficients, first.coefficients, atol=1e-12)
    np.testing.assert_allclose(again.intercept, first.intercept, atol=1e-12)


def test__callback__sees_coefficients_of_each_step():
    rows, targets = _rows()
    seen = []

    def callback(coefficients, intercept, loss):
        seen.append((coefficients, intercept, loss))
        return len(seen) == 3

    found = _fit(rows, targets, shift=torch.tensor(0.5), callback=callback)
    assert found.result.n_iter == 3 and not found.result.converged
    for coefficients, intercept, loss in seen:
        features, penalty = rows.numpy() - 0.5, 1 / len(rows)
        expected = _objective(coefficients, intercept, features, targets.numpy(), penalty)
        assert loss == pytest.approx(expected, rel=1e-10)
    np.testing.assert_array_equal(found.coefficients, seen[-1][0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test__rows_not_finite__floating_point_error(bad):
    rows, targets = _rows()
    rows[3, 2] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        _fit(rows, targets)


def test__same_call_twice__bitwise_equal_and_global_generator_untouched(monkeypatch):
    monkeypatch.setattr(_lbfgs, "_GRAM_ROWS", 50)
    rows, targets = _rows()
    before = torch.get_rng_state()
    first, second = _fit(rows, targets), _fit(rows, targets)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first.coefficients, second.coefficients)


def test__too_large_for_the_gram_matrix__fits_without_it():
    rows, targets = _rows()
    huge = (rows * 1e25).float()  # squares overflow float32
    found = _fit(huge, targets, dtype=torch.float32, max_iter=1)
    assert not found.preconditioned
    assert np.isfinite(found.coefficients).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test__cuda__optimum_of_the_cpu():
    rows, targets = _rows()
    expected = _fit(rows, targets)
    found = _fit(rows.cuda(), targets.cuda())
    np.testing.assert_allclose(found.coefficients, expected.coefficients, atol=1e-7)
