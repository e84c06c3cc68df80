"""Our classifiers inside scikit-learn's meta-estimators, which clone, index, weight and nest."""

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    TunedThresholdClassifierCV,
    cross_val_score,
    cross_validate,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression

BASES = {
    "softmax": SoftmaxRegression(),
    "mlp": MLPClassifier((32,), max_iter=10, learning_rate_init=0.01, random_state=0),
    "cnn": CNNClassifier((16, 32), max_iter=8, random_state=0),
}
WRAPPERS = {
    "calibrated": lambda base: CalibratedClassifierCV(base, cv=2),
    "voting": lambda base: VotingClassifier(
        [("ours", base), ("theirs", LogisticRegression(max_iter=500))], voting="soft"
    ),
    "stacking": lambda base: StackingClassifier([("ours", base)], cv=2),
    "bagging": lambda base: BaggingClassifier(base, 3, max_samples=0.7, random_state=0),
    "one against the rest": OneVsRestClassifier,
    "nested search": lambda base: GridSearchCV(base, {"alpha": [0.1, 1.0]}, cv=2),
    "pipeline": lambda base: make_pipeline(FunctionTransformer(), base),
}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:700].astype(np.uint8), y[:700]


@pytest.mark.filterwarnings("ignore:.*lbfgs failed to converge")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test__wrapped__learns(wrapper, base, digits):
    X, y = digits
    model = WRAPPERS[wrapper](BASES[base]).fit(X[:500], y[:500])
    assert model.score(X[500:], y[500:]) > 0.7
    probabilities = model.predict_proba(X[500:])
    np.testing.assert_allclose(probabilities.sum(1), 1)


@pytest.mark.parametrize("base", BASES)
def test__tuned_threshold__learns(base, digits):
    X, y = digits
    model = TunedThresholdClassifierCV(BASES[base], scoring="f1", cv=2, random_state=0)
    assert model.fit(X[:500], y[:500] == 3).score(X[500:], y[500:] == 3) > 0.9


def test__search_over_a_pipeline_in_cross_validation__nests(digits):
    X, y = digits
    pipeline = make_pipeline(StandardScaler(), BASES["mlp"])
    grid = {"mlpclassifier__learning_rate_init": [1e-5, 1e-2]}
    search = GridSearchCV(pipeline, grid, cv=2)
    assert cross_val_score(search, X, y, cv=2).mean() > 0.7
    search.fit(X, y)
    assert search.best_params_["mlpclassifier__learning_rate_init"] == 1e-2


def test__folds__are_equal_in_processes_and_alone(digits):
    X, y = digits
    alone = cross_validate(BASES["mlp"], X, y, cv=2, scoring="neg_log_loss")
    apart = cross_validate(BASES["mlp"], X, y, cv=2, scoring="neg_log_loss", n_jobs=2)
    np.testing.assert_allclose(alone["test_score"], apart["test_score"], rtol=1e-4)
