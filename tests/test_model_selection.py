"""The comparison table, against scikit-learn's own functions and plain Python."""

import json
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    ShuffleSplit,
    StratifiedKFold,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import RadiusNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from skcifar.model_selection import compare

X, Y = load_iris(return_X_y=True)
T_975_4 = 2.7764451051977987  # 97.5% quantile of Student's t with 4 degrees of freedom


class Spy(DummyClassifier):
    """Notes the rows that it is fitted to and asked about; column 0 of X numbers them."""

    def __init__(self, log=None):
        super().__init__()
        self.log = log

    def __sklearn_clone__(self):
        return Spy(self.log)

    def fit(self, X, y):
        self.log.append(("fit", *np.asarray(X)[:, 0]))
        return super().fit(X, y)

    def score(self, X, y):
        self.log.append(("score", *np.asarray(X)[:, 0]))
        return super().score(X, y)


class Recorded(ClassifierMixin, BaseEstimator):
    """Keeps a history as the estimators here do; its epochs grow with `depth`."""

    def __init__(self, depth=1):
        self.depth = depth

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        self.n_iter_ = self.depth + 1
        self.history_ = [
            {"epoch": epoch, "train_loss": 1 / epoch, "train_accuracy": epoch / 10, "batches": [{}]}
            for epoch in range(1, self.n_iter_ + 1)
        ]
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])


class Failing(DummyClassifier):
    """Raises once it is fitted to more rows than `rows`."""

    def __init__(self, rows=0, error=ValueError):
        super().__init__()
        self.rows = rows
        self.error = error

    def fit(self, X, y):
        if len(X) > self.rows:
            raise self.error("out of\nluck")
        return super().fit(X, y)


def fold_scores(table):
    return table.filter(regex=r"^split\d+_score$").to_numpy()


# -- protocol ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cv", [3, ShuffleSplit(3)], ids=["integer", "unseeded"])
def test__splits__are_identical_for_all_models(cv):
    numbered = np.column_stack([np.arange(len(Y)), X])
    logs = [], [], []
    compare([(str(i), Spy(log)) for i, log in enumerate(logs)], numbered, Y, cv=cv)
    assert len(logs[0]) == 3 * 3  # each fold: fitted, scored on what it left out, on the rest
    assert logs[0] == logs[1] == logs[2]


def test__integer_cv__is_stratified_as_in_sklearn():
    numbered = np.column_stack([np.arange(len(Y)), X])
    log = []
    compare({"spy": Spy(log)}, numbered, Y, cv=4)
    expected = [("fit", *train) for train, _ in StratifiedKFold(4).split(X, Y)]
    assert [entry for entry in log if entry[0] == "fit"] == expected


@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
def test__scores__equal_cross_validate(scoring):
    estimator = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    table = compare({"a": GaussianNB(), "b": estimator}, X, Y, cv=4, scoring=scoring)
    expected = cross_validate(estimator, X, Y, cv=4, scoring=scoring, return_train_score=True)
    row = table.loc[1]
    np.testing.assert_array_equal(fold_scores(table)[1], expected["test_score"])
    assert row["cv_mean"] == expected["test_score"].mean()
    assert row["cv_std"] == expected["test_score"].std()
    assert row["train_score"] == expected["train_score"].mean()
    assert row["fit_seconds"] > 0 and row["predict_seconds"] > 0


def test__test_score__is_of_a_model_fitted_to_all_rows():
    log = []
    tree = DecisionTreeClassifier(max_depth=1, random_state=0)
    held_out = {"X_test": X[::3], "y_test": Y[::3]}
    table = compare({"tree": tree, "spy": Spy(log)}, X, Y, cv=3, scoring="f1_macro", **held_out)
    fitted = clone(tree).fit(X, Y)
    assert table.loc[0, "test_score"] == f1_score(Y[::3], fitted.predict(X[::3]), average="macro")
    assert log[-1] == ("fit", *X[:, 0])
    assert compare({"tree": tree}, X, Y, cv=3)["test_score"].isna().all()


def test__estimators__are_not_fitted():
    estimator = make_pipeline(StandardScaler(), GaussianNB())
    compare({"a": estimator}, X, Y, cv=2, X_test=X, y_test=Y)
    assert not hasattr(estimator[-1], "classes_")


def test__callable_scoring__is_used():
    table = compare({"a": GaussianNB()}, X, Y, cv=3, scoring=lambda e, X, y: float(len(X)))
    assert fold_scores(table).tolist() == [[50.0, 50.0, 50.0]]
    assert table.loc[0, "train_score"] == 100


def test__string_labels_and_image_arrays__are_taken():
    images, names = X.reshape(-1, 2, 2), np.array(["a", "b", "c"])[Y]
    table = compare({"recorded": Recorded()}, images, names, cv=5)
    assert table.loc[0, "cv_mean"] == pytest.approx(1 / 3)


def test__n_jobs__changes_nothing_but_seconds():
    models = {"tree": DecisionTreeClassifier(random_state=0), "fails": Failing()}
    alone = compare(models, X, Y)
    with parallel_config("threading"):
        together = compare(models, X, Y, n_jobs=2)
    seconds = ["fit_seconds", "predict_seconds"]
    pd.testing.assert_frame_equal(alone.drop(columns=seconds), together.drop(columns=seconds))


# -- difference to the best ----------------------------------------------------------------------


def test__difference__has_the_interval_of_nadeau_and_bengio():
    models = {
        "stump": DecisionTreeClassifier(max_depth=1, random_state=0),
        "tree": DecisionTreeClassifier(max_depth=2, random_state=0),
        "bayes": GaussianNB(),
    }
    splits = list(ShuffleSplit(5, test_size=0.3, random_state=0).split(X))
    table = compare(models, X, Y, cv=splits)
    scores = [cross_val_score(model, X, Y, cv=splits).tolist() for model in models.values()]
    best = max(scores, key=statistics.fmean)
    for row, mine in zip(table.to_dict("records"), scores, strict=True):
        d = [a - b for a, b in zip(mine, best, strict=True)]
        half_width = T_975_4 * math.sqrt((1 / 5 + 45 / 105) * statistics.variance(d))
        center = statistics.fmean(d)
        assert row["difference"] == pytest.approx(center, abs=1e-12)
        assert row["difference_low"] == pytest.approx(center - half_width, abs=1e-12)
        assert row["difference_high"] == pytest.approx(center + half_width, abs=1e-12)
    assert (table["difference"] < 0).sum() == 2
    assert table.loc[0, "difference_low"] < table.loc[0, "difference_high"]


def test__one_split__gives_a_difference_without_interval():
    models = {"bayes": GaussianNB(), "dummy": DummyClassifier()}
    table = compare(models, X, Y, cv=ShuffleSplit(1, random_state=0))
    assert table["difference"].notna().all() and table.loc[1, "difference"] < 0
    assert table[["difference_low", "difference_high"]].isna().all(axis=None)


# -- failures ------------------------------------------------------------------------------------


def test__failing_model__costs_its_own_row():
    models = {"a": GaussianNB(), "b": DummyClassifier()}
    table = compare({"a": models["a"], "bad": Failing(), "b": models["b"]}, X, Y)
    alone = compare(models, X, Y)
    assert table["model"].tolist() == ["a", "bad", "b"]
    numbers = ["cv_mean", "cv_std", "difference", "difference_low", "difference_high"]
    pd.testing.assert_frame_equal(table.loc[[0, 2], numbers].reset_index(drop=True), alone[numbers])
    assert table.loc[1, [*numbers, "epochs", "fit_seconds"]].isna().all()
    assert np.isnan(fold_scores(table)[1]).all()
    assert table["error"].isna().tolist() == [True, False, True]
    assert table.loc[1, "error"] == "ValueError: out of luck"
    assert list(table.attrs["tracebacks"]) == ["bad"]
    assert 'raise self.error("out of\\nluck")' in table.attrs["tracebacks"]["bad"]


def test__something_that_is_no_estimator__costs_its_own_row():
    table = compare({"class": GaussianNB, "ok": GaussianNB()}, X, Y)
    assert "TypeError" in table.loc[0, "error"] and table.loc[1, "cv_mean"] > 0.9


def test__failure_on_all_rows__keeps_what_was_measured_before():
    table = compare({"bad": Failing(rows=120)}, X, Y, cv=5, X_test=X, y_test=Y)
    assert table.loc[0, "cv_mean"] == pytest.approx(1 / 3)
    assert np.isnan(table.loc[0, "test_score"])
    assert table.loc[0, "error"] == "ValueError: out of luck"


def test__all_models_failing__is_a_table_of_errors():
    table = compare({"a": Failing(), "b": Failing(error=MemoryError)}, X, Y, cv=3)
    assert table["error"].tolist() == ["ValueError: out of luck", "MemoryError: out of luck"]
    assert table["difference"].isna().all()


def test__keyboard_interrupt__ends_the_comparison():
    with pytest.raises(KeyboardInterrupt):
        compare({"a": Failing(error=KeyboardInterrupt), "b": GaussianNB()}, X, Y)


# -- wrong arguments -----------------------------------------------------------------------------


def test__duplicate_names__raise():
    with pytest.raises(ValueError, match=r"unique, got \['a'\] more than once"):
        compare([("a", GaussianNB()), ("b", GaussianNB()), ("a", DummyClassifier())], X, Y)


@pytest.mark.parametrize(
    ("estimators", "error"),
    [
        (GaussianNB(), TypeError),
        ([GaussianNB()], TypeError),
        ([(1, GaussianNB())], TypeError),
        ("ab", TypeError),
        ([], ValueError),
        ({}, ValueError),
    ],
)
def test__malformed_estimators__raise_with_what_is_expected(estimators, error):
    with pytest.raises(error, match="dict of name to estimator or \\(name, estimator\\) pairs"):
        compare(estimators, X, Y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"X_test": X}, "X_test was given without y_test"),
        ({"y_test": Y}, "y_test was given without X_test"),
        ({"X_test": X, "y_test": Y[1:]}, "inconsistent numbers of samples"),
        ({"scoring": "accurracy"}, "accurracy"),
        ({"scoring": ["accuracy", "f1"]}, "scoring must be one metric"),
        ({"cv": 1}, "n_splits=1"),
    ],
)
def test__wrong_arguments__raise_before_any_fit(arguments, message):
    log = []
    with pytest.raises(ValueError, match=message):
        compare({"spy": Spy(log)}, X, Y, **arguments)
    assert not log


# -- description, epochs, histories --------------------------------------------------------------


def test__pairs_and_dict__give_one_table():
    models = {"bayes": GaussianNB(), "tree": DecisionTreeClassifier(random_state=0)}
    seconds = ["fit_seconds", "predict_seconds"]
    first, second, third = (
        compare(m, X, Y).drop(columns=seconds)
        for m in (models, models.items(), list(models.items()))
    )
    pd.testing.assert_frame_equal(first, second)
    pd.testing.assert_frame_equal(first, third)


def test__parameters__are_those_that_differ_from_defaults_on_one_line():
    models = {
        "default": LogisticRegression(),
        "pipeline": make_pipeline(StandardScaler(with_std=False), LogisticRegression(C=2.0)),
        "search": GridSearchCV(
            DecisionTreeClassifier(random_state=0),
            {"max_depth": [1, 2], "min_samples_leaf": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]},
        ),
    }
    default, pipeline, search = compare(models, X, Y, cv=2)["parameters"]
    assert default == "LogisticRegression()"
    assert pipeline == "StandardScaler(with_std=False) | LogisticRegression(C=2.0)"
    assert search.startswith("GridSearchCV(estimator=Dec") and "\n" not in search


def test__epochs__are_the_mean_of_n_iter():
    mlp = MLPClassifier((3,), max_iter=500, tol=1e-3, random_state=0)
    models = {"mlp": make_pipeline(StandardScaler(), mlp), "dummy": DummyClassifier()}
    fitted = cross_validate(models["mlp"], X, Y, cv=3, return_estimator=True)["estimator"]
    counts = [pipeline[-1].n_iter_ for pipeline in fitted]
    table = compare(models, X, Y, cv=3)
    assert len(set(counts)) > 1
    assert table.loc[0, "epochs"] == pytest.approx(statistics.fmean(counts))
    assert np.isnan(table.loc[1, "epochs"])


def test__array_of_n_iter__counts_its_largest():
    model = SVC(kernel="linear")  # one count for each pair of classes
    fitted = cross_validate(model, X, Y, return_estimator=True)["estimator"]
    counts = [max(estimator.n_iter_.tolist()) for estimator in fitted]
    assert compare({"a": model}, X, Y).loc[0, "epochs"] == pytest.approx(statistics.fmean(counts))


def test__histories__have_a_row_for_each_model_fold_and_epoch():
    models = {
        "alone": Recorded(),
        "dummy": DummyClassifier(),
        "search": make_pipeline(StandardScaler(), GridSearchCV(Recorded(), {"depth": [2]}, cv=2)),
    }
    histories = pd.DataFrame(compare(models, X, Y, cv=2).attrs["histories"])
    assert histories.columns.tolist() == ["model", "fold", "epoch", "train_loss", "train_accuracy"]
    counts = histories.groupby(["model", "fold"]).size().to_dict()
    assert counts == {("alone", 0): 2, ("alone", 1): 2, ("search", 0): 3, ("search", 1): 3}
    assert histories["epoch"].tolist() == [1, 2, 1, 2, 1, 2, 3, 1, 2, 3]
    assert (histories["train_loss"] * histories["epoch"]).eq(1).all()


class RecordedScaler(StandardScaler):
    """A transformer that is trained in epochs."""

    def fit(self, X, y=None):
        self.n_iter_ = 5
        self.history_ = [{"train_loss": 0.5}] * 5
        return super().fit(X, y)


def test__pipeline__tells_of_its_last_step_with_a_history():
    models = {
        "transformer": make_pipeline(RecordedScaler(), GaussianNB()),
        "both": make_pipeline(RecordedScaler(), Recorded()),
    }
    table = compare(models, X, Y, cv=2)
    assert table["epochs"].tolist() == [5, 2]
    histories = pd.DataFrame(table.attrs["histories"])
    assert histories.groupby("model").size().to_dict() == {"transformer": 10, "both": 4}


def test__model_without_history__gives_its_loss_curve():
    mlp = MLPClassifier((3,), max_iter=4, learning_rate_init=0.1, tol=10, n_iter_no_change=2)
    mlp.set_params(random_state=0)
    curves = [e.loss_curve_ for e in cross_validate(mlp, X, Y, return_estimator=True)["estimator"]]
    histories = pd.DataFrame(compare({"mlp": mlp}, X, Y).attrs["histories"])
    assert histories["train_loss"].tolist() == [loss for curve in curves for loss in curve]


def test__table__survives_csv_json_and_concatenation(tmp_path):
    models = {"recorded": Recorded(), "bad": Failing(), "bayes": GaussianNB()}
    table = compare(models, X, Y, cv=3)
    table.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    pd.testing.assert_frame_equal(read, table, check_exact=False)
    assert json.loads(json.dumps(table.attrs)) == table.attrs
    assert len(pd.concat([table, table])) == 6


# -- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verbose", "expected"),
    [
        (0, []),
        (1, ["[1/2] bayes: 0.9", "[2/2] bad: failed with ValueError: out of luck ("]),
        (
            2,
            [
                "[1/2] bayes: fold 1 of 2",
                "[1/2] bayes: fold 2 of 2",
                "[1/2] bayes: fit on all training rows",
                "[1/2] bayes: 0.9",
                "[2/2] bad: fold 1 of 2",
                "[2/2] bad: failed with ValueError: out of luck (",
            ],
        ),
    ],
)
def test__verbose__tells_on_stderr(verbose, expected, capsys):
    models = {"bayes": GaussianNB(), "bad": Failing()}
    compare(models, X, Y, cv=2, X_test=X, y_test=Y, verbose=verbose)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


# -- predictions -----------------------------------------------------------------------------------


def test__predictions__of_left_out_rows_equal_cross_val_predict():
    names = np.array(["setosa", "versicolor", "virginica"])[Y]
    splits = list(StratifiedKFold(3, shuffle=True, random_state=0).split(X, names))
    table = compare({"bayes": GaussianNB()}, X, names, cv=splits)
    predictions = pd.DataFrame(table.attrs["predictions"]["bayes"])
    assert list(predictions) == ["part", "row", "actual", "predicted", "confidence"]
    assert set(predictions["part"]) == {"left out"}
    assert predictions["row"].tolist() == [row for _, test in splits for row in test]
    in_order = predictions.sort_values("row")
    expected = cross_val_predict(GaussianNB(), X, names, cv=splits)
    assert in_order["actual"].tolist() == names.tolist()
    assert in_order["predicted"].tolist() == expected.tolist()
    probabilities = cross_val_predict(GaussianNB(), X, names, cv=splits, method="predict_proba")
    np.testing.assert_allclose(in_order["confidence"], probabilities.max(axis=1))


def test__predictions__are_of_the_test_rows_where_there_are_any():
    table = compare({"bayes": GaussianNB()}, X[::2], Y[::2], cv=3, X_test=X[1::2], y_test=Y[1::2])
    fitted = GaussianNB().fit(X[::2], Y[::2])
    assert table.attrs["predictions"] == {
        "bayes": {
            "part": "test",
            "row": list(range(75)),
            "actual": Y[1::2].tolist(),
            "predicted": fitted.predict(X[1::2]).tolist(),
            "confidence": fitted.predict_proba(X[1::2]).max(axis=1).tolist(),
        }
    }


def test__confidence__is_of_the_predicted_class_which_need_not_be_the_likeliest():
    binary = (Y == 2).astype(int)
    model = FixedThresholdClassifier(GaussianNB(), threshold=0.01)
    predictions = pd.DataFrame(compare({"early": model}, X, binary).attrs["predictions"]["early"])
    unlikely = predictions[predictions["confidence"] < 0.5]
    assert len(unlikely) and set(unlikely["predicted"]) == {1}
    assert unlikely["confidence"].min() >= 0.01


def test__model_without_probabilities__predicts_without_confidence():
    predictions = compare({"svm": SVC()}, X, Y, cv=3).attrs["predictions"]["svm"]
    assert set(predictions["confidence"]) == {None} and len(predictions["confidence"]) == 150
    right = np.equal(predictions["predicted"], predictions["actual"])
    assert right.mean() > 0.9


class Odd(GaussianNB):
    """Good scores; what is asked for beside them may fail."""

    def __init__(self, what=None):
        super().__init__()
        self.what = what

    def predict_proba(self, X):
        if self.what == "probabilities that raise":
            raise NotImplementedError("none of this\nloss")
        if self.what == "one column too many":
            return np.ones((len(X), 4))
        return super().predict_proba(X)

    def score(self, X, y):
        return np.mean(super().predict(X) == y)

    def predict(self, X):
        if self.what == "labels that raise":
            raise RuntimeError("no\nlabels")
        return super().predict(X)


@pytest.mark.parametrize("what", ["probabilities that raise", "one column too many"])
@pytest.mark.parametrize("test", [{}, {"X_test": X, "y_test": Y}])
def test__probabilities_that_fail__cost_the_confidence_only(what, test):
    table = compare({"odd": Odd(what), "bayes": GaussianNB()}, X, Y, cv=3, **test)
    assert table["error"].isna().all()
    assert table["cv_mean"].nunique() == 1 and table["test_score"].nunique() == len(test) // 2
    odd, bayes = (table.attrs["predictions"][name] for name in ("odd", "bayes"))
    assert set(odd["confidence"]) == {None}
    assert odd["predicted"] == bayes["predicted"]


@pytest.mark.parametrize("test", [{}, {"X_test": X, "y_test": Y}])
def test__predict_that_fails__costs_the_predictions_only_and_is_told(test, capsys):
    table = compare({"odd": Odd("labels that raise")}, X, Y, cv=3, verbose=1, **test)
    expected = cross_val_score(GaussianNB(), X, Y, cv=3)
    np.testing.assert_array_equal(table.loc[0, "split0_score":], expected)
    assert table["error"].isna().all() and table["test_score"].notna().all() == bool(test)
    assert table.attrs["predictions"] == table.attrs["tracebacks"] == {}
    assert ", without predictions: RuntimeError: no labels (" in capsys.readouterr().err


class Unsorted(ClassifierMixin, BaseEstimator):
    """The classes, and columns of probabilities, from the last to the first."""

    def fit(self, X, y):
        self.model_ = GaussianNB().fit(X, y)
        self.classes_ = self.model_.classes_[::-1]
        return self

    def predict(self, X):
        return self.model_.predict(X)

    def predict_proba(self, X):
        return self.model_.predict_proba(X)[:, ::-1]


def test__classes_that_are_not_sorted__have_their_own_probabilities():
    attrs = compare({"odd": Unsorted(), "bayes": GaussianNB()}, X, Y, cv=3).attrs
    assert attrs["predictions"]["odd"] == attrs["predictions"]["bayes"]


@pytest.mark.filterwarnings("ignore:Outlier label")
@pytest.mark.parametrize("outlier", [99, -1])
def test__label_that_is_no_class__has_no_confidence(outlier):
    model = RadiusNeighborsClassifier(radius=0.3, outlier_label=outlier)
    table = compare({"radius": model}, X, Y, cv=3)
    assert table["error"].isna().all()
    predictions = pd.DataFrame(table.attrs["predictions"]["radius"]).sort_values("row")
    expected = cross_val_predict(model, X, Y, cv=3, method="predict_proba").max(axis=1)
    is_outlier = predictions["predicted"] == outlier
    assert 0 < is_outlier.sum() < 150
    assert predictions["confidence"].isna().tolist() == is_outlier.tolist()
    np.testing.assert_allclose(predictions["confidence"][~is_outlier], expected[~is_outlier])


def test__failed_model__has_no_predictions():
    models = {"bad": Failing(), "late": Failing(rows=120), "dummy": DummyClassifier()}
    attrs = compare(models, X, Y, X_test=X, y_test=Y).attrs
    assert list(attrs["predictions"]) == ["dummy"]
    assert list(attrs["tracebacks"]) == ["bad", "late"]


def test__predictions__want_no_further_fit():
    log = []
    compare({"spy": Spy(log)}, X, Y, cv=2, X_test=X, y_test=Y)
    assert [what for what, *_ in log].count("fit") == 3


def test__splits_by_mask_and_data_frames__are_predicted():
    mask = np.arange(150) % 3 == 0
    frame = pd.DataFrame(X, index=np.arange(150) + 7)
    labels = pd.Series(Y, index=frame.index)
    table = compare({"bayes": GaussianNB()}, frame, labels, cv=[(~mask, mask)])
    assert table["error"].isna().all()
    predictions = table.attrs["predictions"]["bayes"]
    assert predictions["row"] == np.flatnonzero(mask).tolist()
    fitted = GaussianNB().fit(X[~mask], Y[~mask])
    assert predictions["predicted"] == fitted.predict(X[mask]).tolist()
    assert predictions["actual"] == Y[mask].tolist()
