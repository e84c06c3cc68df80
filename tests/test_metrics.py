"""Retrieval metrics against loops, and their scorers inside scikit-learn's own searches."""

import pickle
import re

import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skcifar.metrics import (
    make_embedding_scorer,
    map_at_r_score,
    map_at_r_scorer,
    recall_at_1_scorer,
    recall_at_k_score,
)

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(6), [1, 2, 5, 9, 13, 30])[RNG.permutation(60)]
EMBEDDING = RNG.normal(size=(60, 3)) + LABELS[:, None] / 2  # overlapping classes, no ties
DISTANCES = {
    "euclidean": lambda a, b: float(np.linalg.norm(a - b)),
    "cosine": lambda a, b: 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
    "manhattan": lambda a, b: float(np.abs(a - b).sum()),
}


def ranking(X, query, distance):
    others = [other for other in range(len(X)) if other != query]
    return sorted(others, key=lambda other: distance(X[query], X[other]))


def slow_recall(X, y, k, distance):
    found = [any(y[o] == y[q] for o in ranking(X, q, distance)[:k]) for q in range(len(X))]
    return sum(found) / len(found)


def slow_map_at_r(X, y, distance):
    averages = []
    for query in range(len(X)):
        n_relevant = sum(label == y[query] for label in y) - 1
        if n_relevant == 0:
            continue
        n_hits, total = 0, 0.0
        for rank, other in enumerate(ranking(X, query, distance)[:n_relevant], start=1):
            if y[other] == y[query]:
                n_hits += 1
                total += n_hits / rank
        averages.append(total / n_relevant)
    return sum(averages) / len(averages)


# Values


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("k", [1, 2, 7, 59])
def test__recall_at_k__equals_a_loop(metric, k):
    score = recall_at_k_score(EMBEDDING, LABELS, k=k, metric=metric)
    assert type(score) is float
    assert score == pytest.approx(slow_recall(EMBEDDING, LABELS, k, DISTANCES[metric]), abs=1e-12)


@pytest.mark.parametrize("metric", DISTANCES)
def test__map_at_r__equals_a_loop(metric):
    score = map_at_r_score(EMBEDDING, LABELS, metric=metric)
    assert type(score) is float and 0.1 < score < 0.9
    assert score == pytest.approx(slow_map_at_r(EMBEDDING, LABELS, DISTANCES[metric]), abs=1e-12)


def test__callable_metric__is_used():
    chebyshev = {"metric": lambda a, b: float(np.abs(a - b).max())}
    for score in recall_at_k_score, map_at_r_score:
        assert score(EMBEDDING, LABELS, **chebyshev) == score(EMBEDDING, LABELS, metric="chebyshev")


def test__map_at_r__is_that_of_the_paper_by_hand():
    # On a line: a at 0, 1 and 4; b at 2 and 10; c alone at 5.
    X, y = np.array([[0.0], [1.1], [4.0], [2.0], [10.0], [5.5]]), list("aaabbc")
    # 0: a b -> 1/2; 1.1: b a -> (1/2)/2; 4: c b -> 0; 2: a -> 0; 10: c -> 0; c is left out.
    assert map_at_r_score(X, y) == pytest.approx((1 / 2 + 1 / 4) / 5)
    # 0 finds a; 1.1, 4, 2 and 10 find others; c cannot find any and counts.
    assert recall_at_k_score(X, y) == pytest.approx(1 / 6)


def test__separate_classes__score_one():
    X = LABELS[:, None] * 100 + EMBEDDING
    assert map_at_r_score(X, LABELS) == 1
    assert recall_at_k_score(X, LABELS) == pytest.approx(59 / 60)  # one label occurs once


def test__coinciding_samples__find_each_other_and_never_themselves():
    X, y = np.zeros((4, 2)), np.array([0, 0, 1, 2])
    assert recall_at_k_score(X, y, k=3) == 0.5
    assert recall_at_k_score([[0], [0], [5], [5]], [0, 1, 0, 1]) == 0
    assert map_at_r_score([[0], [0], [5], [5]], [0, 1, 0, 1]) == 0
    assert map_at_r_score([[0], [0], [5], [5]], [0, 0, 1, 1]) == 1


@pytest.mark.parametrize("score", [recall_at_k_score, map_at_r_score])
def test__labels__may_be_strings_or_lists(score):
    names = np.array(["ship", "cat", "dog", "a frog", "deer", "truck"])[LABELS]
    of_codes = score(EMBEDDING, LABELS)
    assert score(EMBEDDING, names) == of_codes
    assert score(EMBEDDING.tolist(), names.astype(object).tolist()) == of_codes


@pytest.mark.parametrize("score", [recall_at_k_score, map_at_r_score])
def test__float32_embedding__scores_as_float64(score):
    X = EMBEDDING.astype(np.float32)
    assert score(X, LABELS) == score(X.astype(np.float64), LABELS)


@pytest.mark.parametrize("score", [recall_at_k_score, map_at_r_score])
def test__arguments__are_not_written_to(score):
    X, y = EMBEDDING.copy(), LABELS.copy()
    score(X, y)
    np.testing.assert_array_equal(X, EMBEDDING)
    np.testing.assert_array_equal(y, LABELS)


def test__chunks_and_jobs__change_nothing():
    X, y = load_digits(return_X_y=True)
    X = X[:600] + np.random.default_rng(0).normal(size=(600, 64)) / 1000  # no ties
    y = y[:600]
    in_one, recall = map_at_r_score(X, y), recall_at_k_score(X, y)
    with config_context(working_memory=0.05):  # 0.05 MiB: 10 rows of distances
        assert map_at_r_score(X, y) == pytest.approx(in_one, abs=1e-12)
        assert map_at_r_score(X, y, n_jobs=2) == pytest.approx(in_one, abs=1e-12)
        assert recall_at_k_score(X, y, n_jobs=2) == recall


# Errors


@pytest.mark.parametrize("score", [recall_at_k_score, map_at_r_score])
@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([[0.0]], [0], r"1 sample.* minimum of 2 is required"),
        ([[0.0], [1.0]], [0, 0, 0], r"inconsistent numbers of samples: \[2, 3\]"),
        ([[0.0], [1.0]], [0, 1], r"2 samples of 2 labels, expected one that occurs twice"),
        ([[0.0], [np.nan]], [0, 0], "NaN"),
        ([0.0, 1.0], [0, 0], "Expected 2D array, got 1D array"),
        ([[0.0], [1.0]], None, "'y' parameter .* must be an array-like"),
    ],
)
def test__wrong_data__raise(score, X, y, message):
    with pytest.raises(ValueError, match=message):
        score(X, y)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, r"'k' parameter of recall_at_k_score must be an int in the range \[1, inf\). Got 0"),
        (1.5, "'k' parameter of recall_at_k_score must be an int"),
        (60, r"k=60 neighbours were asked for, expected at most n_samples - 1 = 59: lower k"),
    ],
)
def test__wrong_k__error_names_value_and_range(k, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k_score(EMBEDDING, LABELS, k=k)


@pytest.mark.parametrize("score", [recall_at_k_score, map_at_r_score])
@pytest.mark.parametrize("metric", ["nonesuch", 3])
def test__unknown_metric__error_names_it(score, metric):
    with pytest.raises(ValueError, match=rf"(?i)metric.*{metric}"):
        score(EMBEDDING, LABELS, metric=metric)


# Scorers


def test__grid_search__picks_by_the_scorer():
    X, y = load_digits(return_X_y=True)
    X, y = X[:500], y[:500]
    search = GridSearchCV(
        PCA(random_state=0), {"n_components": [2, 8]}, cv=3, scoring=recall_at_1_scorer
    ).fit(X, y)
    assert search.best_params_ == {"n_components": 8}
    assert search.score(X, y) == recall_at_k_score(search.transform(X), y) > 0.9
    assert recall_at_1_scorer(search, X, y) == search.score(X, y)


def test__cross_validation__scores_the_transformed_rows_left_out():
    X, y = load_iris(return_X_y=True)
    halves = [(np.arange(0, 150, 2), np.arange(1, 150, 2))]
    pipeline = make_pipeline(StandardScaler(), PCA(n_components=2))
    by_name = {"recall": recall_at_1_scorer, "map": map_at_r_scorer}
    scores = cross_validate(pipeline, X, y, cv=halves, scoring=by_name, error_score="raise")
    embedding = clone(pipeline).fit(X[::2], y[::2]).transform(X[1::2])
    assert scores["test_recall"] == [recall_at_k_score(embedding, y[1::2])]
    assert scores["test_map"] == [map_at_r_score(embedding, y[1::2])]


def test__any_metric_of_embeddings__makes_a_scorer():
    X, y = load_iris(return_X_y=True)
    scaler = StandardScaler().fit(X)
    scorer = make_embedding_scorer(silhouette_score, metric="cosine")
    expected = silhouette_score(scaler.transform(X), y, metric="cosine")
    assert scorer(scaler, X, y) == expected
    assert scorer(scaler.set_output(transform="pandas"), X, y) == expected


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), clone])
def test__copy__scores_as_the_original(copied):
    original = GridSearchCV(
        PCA(), {"n_components": [1]}, scoring=make_embedding_scorer(recall_at_k_score, k=3)
    )
    copy = copied(original).scoring
    fitted = PCA(n_components=1).fit(EMBEDDING)
    assert repr(copy) == repr(original.scoring)
    assert copy(fitted, EMBEDDING, LABELS) == recall_at_k_score(
        fitted.transform(EMBEDDING), LABELS, k=3
    )


def test__repr__is_the_call_that_makes_the_scorer():
    assert repr(recall_at_1_scorer) == "make_embedding_scorer(recall_at_k_score, k=1)"
    assert repr(map_at_r_scorer) == "make_embedding_scorer(map_at_r_score)"
    scorer = make_embedding_scorer(recall_at_k_score, k=2, metric="cosine")
    assert repr(scorer) == "make_embedding_scorer(recall_at_k_score, k=2, metric='cosine')"
    assert repr(eval(repr(scorer))) == repr(scorer)


@pytest.mark.parametrize(
    "classifier", [GaussianNB(), make_pipeline(StandardScaler(), GaussianNB())]
)
def test__estimator_without_transform__error_says_what_is_expected(classifier):
    X, y = load_iris(return_X_y=True)
    expected = re.escape(repr(classifier)) + ", which has no transform: expected a fitted transf"
    with pytest.raises(TypeError, match=expected):
        recall_at_1_scorer(classifier.fit(X, y), X, y)
    with pytest.raises(TypeError, match="which has no transform"):
        cross_val_score(classifier, X, y, scoring=map_at_r_scorer, error_score="raise")


def test__score_func_that_is_no_function__error_names_it():
    with pytest.raises(TypeError, match="score_func='recall' was given, expected a function"):
        make_embedding_scorer("recall")
