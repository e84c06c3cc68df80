"""Rows that are read where they are stored: equal to those in memory, and never all at once."""

import os
import threading
from collections import Counter

import dask.array
import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from skorch.callbacks import EpochScoring

from skcifar import (
    CNNClassifier,
    FineTunedClassifier,
    MLPClassifier,
    PretrainedFeatures,
    SoftmaxRegression,
    TripletEmbedder,
    _lbfgs,
    _stored_rows,
    _training,
)
from skcifar._batches import Batches, Samples
from skcifar._stored_rows import StoredRows, is_stored, on_device

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

ESTIMATORS = {
    "softmax": SoftmaxRegression(max_iter=5),
    "softmax-sgd": SoftmaxRegression(solver="sgd", max_iter=2, batch_size=64),
    "mlp": MLPClassifier((16,), max_iter=2, batch_size=64, precision="float64"),
    "mlp-full": MLPClassifier((16,), max_iter=2, batch_size="full", solver="sgd"),
    "mlp-lbfgs": MLPClassifier((16,), max_iter=2, solver="lbfgs"),
    "cnn": CNNClassifier((4, 8), max_iter=1, precision="float32"),
    "triplet": TripletEmbedder(4, channels=(4, 8), max_iter=1),
    "finetune": FineTunedClassifier(TripletEmbedder(4, channels=(4, 8), max_iter=1), max_iter=1),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
N_FEATURES = 64


class Sliced:
    """An array that gives slices of its rows and nothing else; counts the rows of each."""

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.most = Counter()  # by thread
        self.times = Counter()

    def __getitem__(self, key):
        assert isinstance(key, slice), key
        part = self._array[key]
        thread = threading.current_thread().name.split("_")[0]
        self.most[thread] = max(self.most[thread], len(part))
        self.times[thread] += 1
        return part.copy()


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X.astype(np.uint8), y


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 200 rows of digits, of blocks of 20."""
    monkeypatch.setattr(_stored_rows, "_WINDOW_BYTES", 200 * N_FEATURES)
    monkeypatch.setattr(_stored_rows, "_BLOCK_BYTES", 20 * N_FEATURES)
    monkeypatch.setattr(_training, "PIECE_ROWS", 200)
    monkeypatch.setitem(_lbfgs._CHUNK_FLOATS, "cpu", 200 * N_FEATURES)


@pytest.fixture
def every_memmap_stored(monkeypatch):
    monkeypatch.setattr(_stored_rows, "_LEAST_STORED_BYTES", 0)


def stored_file(array, path):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def fitted(name, X, y, **parameters):
    return clone(ESTIMATORS[name]).set_params(random_state=0, **parameters).fit(X, y)


def outputs(model, X):
    return model.transform(X) if hasattr(model, "transform") else model.decision_function(X)


# -- equal to rows in memory -----------------------------------------------------------------------


@every_estimator
@pytest.mark.usefixtures("every_memmap_stored")
def test__rows_of_one_window__give_the_model_of_rows_in_memory(name, digits, tmp_path):
    X, y = digits
    expected = fitted(name, X, y)
    forms = {
        "memmap": stored_file(X, tmp_path / "X.npy"),
        "memmap of images": stored_file(X.reshape(-1, 8, 8), tmp_path / "images.npy"),
        "slices": Sliced(X),
        "slices of images": Sliced(X.reshape(-1, 8, 8, 1)),
    }
    for form, values in forms.items():
        assert is_stored(values)
        model = fitted(name, values, y)
        np.testing.assert_array_equal(outputs(model, X), outputs(expected, X), err_msg=form)
        np.testing.assert_array_equal(outputs(model, values), outputs(expected, X), err_msg=form)


def test__whitening__sees_the_stored_images():
    X = np.random.default_rng(0).integers(0, 256, (80, 9 * 9 * 3), dtype=np.uint8)
    y = np.arange(80) % 2
    models = [
        CNNClassifier(architecture="airbench94", max_iter=1, random_state=0).fit(values, y)
        for values in (X, Sliced(X))
    ]
    np.testing.assert_array_equal(*(model.decision_function(X) for model in models))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint16", ">f4", "bool"])
def test__stored_rows_of_any_dtype__are_as_in_memory(dtype, digits):
    X, y = digits
    X = (X > 7 if dtype == "bool" else X).astype(dtype)
    expected = fitted("softmax-sgd", X, y)
    model = fitted("softmax-sgd", Sliced(X), y)
    np.testing.assert_array_equal(model.coef_, expected.coef_)
    assert model.dtype_ == expected.dtype_


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint16", ">i4", "float32"])
@pytest.mark.usefixtures("every_memmap_stored", "small_windows")
def test__part_of_a_file__is_read_as_slices_are(dtype, digits, tmp_path):
    X, y = digits[0].astype(dtype), digits[1]
    part = slice(301, 1500)
    stored = stored_file(X.reshape(-1, 8, 8), tmp_path / "X.npy")[part]
    model = fitted("mlp", stored, y[part], early_stopping=True)
    expected = fitted("mlp", Sliced(X.reshape(-1, 8, 8)[part]), y[part], early_stopping=True)
    np.testing.assert_array_equal(model.decision_function(X), expected.decision_function(X))


@pytest.mark.parametrize("name", ["softmax", "mlp-full", "mlp-lbfgs"])
@pytest.mark.usefixtures("small_windows")
def test__full_batches__are_equal_for_any_number_of_windows(name, digits):
    X, y = digits
    expected = fitted(name, X, y)
    np.testing.assert_array_equal(outputs(fitted(name, Sliced(X), y), X), outputs(expected, X))


@pytest.mark.usefixtures("small_windows")
def test__predictions__are_equal_for_any_number_of_windows(digits, tmp_path):
    X, y = digits
    model = fitted("mlp", X, y)
    np.testing.assert_array_equal(model.predict_proba(Sliced(X)), model.predict_proba(X))
    encoder = PretrainedFeatures("resnet18", weights=None, image_size=None, layer="layer1",
                                 random_state=0, memory=tmp_path)  # fmt: skip
    expected = encoder.fit(X[:300]).transform(X[:300])
    np.testing.assert_array_equal(encoder.transform(Sliced(X[:300])), expected)


def test__chunks_in_turn__are_as_in_memory(digits):
    X, y = digits
    models = [clone(ESTIMATORS["mlp"]).set_params(random_state=0) for _ in range(2)]
    for start in range(0, 900, 300):
        part = slice(start, start + 300)
        models[0].partial_fit(X[part], y[part], classes=np.arange(10))
        models[1].partial_fit(Sliced(X[part]), y[part], classes=np.arange(10))
    np.testing.assert_array_equal(*(model.decision_function(X) for model in models))


@pytest.mark.usefixtures("small_windows")
def test__weights_and_validation_rows__are_those_of_their_rows(digits):
    X, y = digits
    weight = np.where(np.arange(len(y)) % 3, 1.0, 0.0)  # the others carry wrong labels
    wrong = np.where(weight > 0, y, (y + 1) % 10)
    model = clone(ESTIMATORS["softmax-sgd"]).set_params(max_iter=20, random_state=0)
    model.fit(Sliced(X), wrong, sample_weight=weight, X_val=Sliced(X[:500]), y_val=y[:500])
    assert model.score(X[:500], y[:500]) > 0.9
    assert model.validation_scores_[-1] == pytest.approx(model.score(X[:500], y[:500]))


@pytest.mark.parametrize("scoring", ["accuracy", "balanced_accuracy"])
@pytest.mark.usefixtures("small_windows")
def test__early_stopping__holds_out_stored_rows(scoring, digits):
    X, y = digits
    model = fitted("mlp", Sliced(X), y, early_stopping=True, scoring=scoring, max_iter=15)
    assert model.best_validation_score_ > 0.85
    assert model.score(X, y) > 0.9


# -- never all at once -----------------------------------------------------------------------------


@every_estimator
@pytest.mark.usefixtures("small_windows")
def test__no_more_than_a_window__is_read_at_a_time(name, digits):
    X, y = np.tile(digits[0], (2, 1)), np.tile(digits[1], 2)
    source = Sliced(X)
    model = fitted(name, source, y)
    assert source.most.pop("skcifar-rows", 0) <= 20  # a block
    # statistics, pieces of full batches, a look at 1,000 images
    assert 0 < max(source.most.values()) <= 1024
    source.most.clear()
    assert len(outputs(model, source)) == len(y)
    assert max(source.most.values()) <= 1024  # of a forward pass


@pytest.mark.parametrize("name", ["softmax-sgd", "softmax", "mlp-full"])
@pytest.mark.usefixtures("small_windows")
def test__gaps_between_rows_that_are_used__are_no_reason_to_read_more(name, digits):
    X, y = np.tile(digits[0], (2, 1)), np.tile(digits[1], 2)
    source = Sliced(X)
    weight = (np.arange(len(y)) % 8 == 0).astype(float)
    fitted(name, source, y, normalize=False, shuffle=False).fit(source, y, sample_weight=weight)
    assert source.most.pop("skcifar-rows", 0) <= 20
    assert max(source.most.values(), default=0) <= 1024


@pytest.mark.usefixtures("small_windows")
def test__batches_larger_than_a_window__are_read_in_pieces(digits):
    X, y = np.tile(digits[0], (2, 1)), np.tile(digits[1], 2)
    source = Sliced(X)
    fitted("mlp", source, y, batch_size=1500, normalize=False)
    assert max(source.most.values()) <= 1000  # a look at as many images
    expected = fitted("mlp", X, y, batch_size=1500, normalize=False, shuffle=False)
    model = fitted("mlp", source, y, batch_size=1500, normalize=False, shuffle=False)
    np.testing.assert_array_equal(model.decision_function(X), expected.decision_function(X))


@pytest.mark.usefixtures("small_windows")
def test__next_window__is_read_while_one_is_trained_on():
    second_is_read = threading.Event()

    class Telling(Sliced):
        def __getitem__(self, key):
            if key.start >= 200:
                second_is_read.set()
            return super().__getitem__(key)

    rows = StoredRows(Telling(np.zeros((400, N_FEATURES), np.uint8)))
    batches = iter(Batches(Samples(rows, torch.zeros(400, dtype=torch.int64)), 100))
    next(batches)
    assert second_is_read.wait(timeout=30)  # and nobody asks for its batches
    batches.close()


def test__windows__are_read_by_a_thread_that_ends_with_the_fit(digits, small_windows):
    X, y = digits
    source = Sliced(X)
    fitted("mlp", source, y, normalize=False)
    assert source.times["skcifar-rows"] > 2 * 9
    assert not [t for t in threading.enumerate() if t.name.startswith("skcifar-rows")]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system reads no files ahead")
@pytest.mark.usefixtures("every_memmap_stored", "small_windows")
def test__mapped_file__is_read_ahead_by_the_blocks_of_each_window(digits, tmp_path, monkeypatch):
    X, y = digits
    asked = []
    stored = stored_file(X, tmp_path / "X.npy")[100:]
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, start, length, advice: asked.append((start, length))
    )
    fitted("mlp", stored, y[100:], max_iter=1)
    header = (tmp_path / "X.npy").stat().st_size - X.nbytes
    in_rows = [(start - header) / N_FEATURES for start, _ in asked]
    assert all(row == int(row) and 100 <= row for row in in_rows)
    assert sum(length for _, length in asked) <= 1.2 * stored.nbytes
    rows = {int(row) + i for row, (_, length) in zip(in_rows, asked, strict=True)
            for i in range(length // N_FEATURES)}  # fmt: skip
    assert rows >= set(range(100, len(X)))
    assert max(length for _, length in asked) <= 200 * N_FEATURES


# -- the order of a pass ---------------------------------------------------------------------------


def batches_of(rows, batch_size=32, **others):
    n = len(rows)
    targets = torch.arange(n)
    samples = Samples(rows, targets, targets.double(), **others)
    return Batches(samples, batch_size, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.usefixtures("small_windows")
def test__pass__has_every_row_once_with_its_target_and_weight(has_index):
    X = np.arange(1000)[:, None] * np.ones(N_FEATURES, int)
    index = torch.arange(0, 1000, 3) if has_index else None
    rows = StoredRows(X.astype(np.uint16))
    passes = []
    for _ in range(2):
        seen = []
        batches = batches_of(rows, index=index)
        batches.order.manual_seed(len(passes))
        for batch, targets, weight, weight_sum in batches:
            assert torch.equal(batch[:, 0].long(), targets)
            assert torch.equal(batch[:, -1].long(), targets)
            assert torch.equal(weight.long(), targets)
            assert torch.equal(batches.picked, targets)
            assert weight_sum == targets.sum()
            seen += targets.tolist()
        assert sorted(seen) == list(range(0, 1000, 3 if has_index else 1))
        passes.append(seen)
    assert passes[0] != passes[1]


@pytest.mark.usefixtures("small_windows")
def test__windows__are_made_of_blocks_that_meet_anew_in_each_pass():
    rows = StoredRows(np.zeros((1000, N_FEATURES), np.uint8))
    generator = torch.Generator().manual_seed(0)
    windows = [200] * 5
    passes = [rows.shuffled(windows, generator) for _ in range(2)]
    for order in passes:
        assert order.sort().values.tolist() == list(range(1000))
        for window in order.split(200):
            assert len(set((window // 20).tolist())) <= 11  # blocks, of 50
            assert window.tolist() != window.sort().values.tolist()
    first = [set((p[:200] // 20).tolist()) for p in passes]
    assert first[0] != first[1]


@pytest.mark.usefixtures("small_windows")
def test__fit__is_the_same_for_the_same_seed_and_learns_from_all_windows(digits):
    order = np.argsort(digits[1], kind="stable")  # a window of the file has one class
    X, y = digits[0][order], digits[1][order]
    models = [fitted("mlp", Sliced(X), y, max_iter=40) for _ in range(2)]
    np.testing.assert_array_equal(*(model.decision_function(X) for model in models))
    assert models[0].score(X, y) > 0.95


# -- what is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0]],
        np.ones((2, 2)),
        torch.ones(2, 2),
        scipy.sparse.eye(2, format="csr"),
        pd.DataFrame(np.ones((2, 2))),
        Sliced(np.array([["a", "b"]], dtype=object)),
        Sliced(np.ones(3)),
        None,
        dask.array.ones((2, 2)),
    ],
    ids=lambda values: type(values).__name__,
)
def test__what_is_in_memory_or_no_rows_of_numbers__is_not_stored(values):
    assert not is_stored(values)


def test__memmap__is_stored_from_a_size_on_unless_joblib_made_it(monkeypatch, tmp_path):
    X = np.ones((100, 4))
    assert not is_stored(stored_file(X, tmp_path / "X.npy"))
    monkeypatch.setattr(_stored_rows, "_LEAST_STORED_BYTES", 3200)
    stored = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert is_stored(stored)
    assert type(stored.copy()) is np.memmap
    assert not is_stored(stored.copy())
    assert not is_stored(np.load(tmp_path / "X.npy", mmap_mode="r")[1:])
    with joblib.parallel_config(backend="loky", n_jobs=2, max_nbytes=100):
        kinds = joblib.Parallel()(joblib.delayed(_kind_and_whether_stored)(X) for _ in range(2))
    assert kinds == [("memmap", False)] * 2


def _kind_and_whether_stored(X):
    _stored_rows._LEAST_STORED_BYTES = 0
    return type(X).__name__, is_stored(X)


@pytest.mark.usefixtures("every_memmap_stored")
def test__scikit_learn_s_searches__take_stored_rows(digits, tmp_path):
    X, y = digits
    stored = stored_file(X, tmp_path / "X.npy")
    model = clone(ESTIMATORS["softmax-sgd"]).set_params(random_state=0)
    expected = cross_val_score(model, X, y, cv=3)
    np.testing.assert_array_equal(cross_val_score(model, stored, y, cv=3), expected)
    grid = {"learning_rate_init": [0.01, 0.1]}
    for backend in ("skcifar", "threading"):
        with joblib.parallel_config(backend=backend):
            search = GridSearchCV(model, grid, cv=3).fit(stored, y)
        assert search.best_score_ > 0.85


@pytest.mark.usefixtures("every_memmap_stored", "small_windows")
def test__stored_validation_rows__are_taken_where_fits_are_trained_together(digits, tmp_path):
    X, y = digits
    model = clone(ESTIMATORS["softmax-sgd"]).set_params(random_state=0)
    validation = {"X_val": stored_file(X[:300], tmp_path / "X.npy"), "y_val": y[:300]}
    grid = {"learning_rate_init": [0.01, 0.1]}
    with joblib.parallel_config(backend="skcifar"):
        search = GridSearchCV(model, grid, cv=3).fit(X, y, **validation)
    expected = GridSearchCV(model, grid, cv=3).fit(X, y, X_val=X[:300], y_val=y[:300])
    np.testing.assert_allclose(
        search.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"], atol=0.002
    )


@pytest.mark.usefixtures("small_windows")
def test__scorers_and_callbacks__take_stored_rows_as_arrays(digits):
    X, y = digits
    seen = []

    def scorer(estimator, rows, labels):
        seen.append(np.asarray(rows).shape)
        return estimator.score(rows[labels < 5], labels[labels < 5])

    callback = EpochScoring("accuracy", use_caching=False, lower_is_better=False)
    fitted("mlp", Sliced(X), y, early_stopping=True, scoring=scorer, skorch_callbacks=[callback])
    assert seen == [(180, N_FEATURES)] * 2


def test__rows_beyond_a_device_s_memory__stay_on_the_host(monkeypatch):
    rows = torch.zeros(100, 10, dtype=torch.uint8)
    monkeypatch.setattr(_stored_rows, "free_memory", lambda device: 1999)
    rows[:] = torch.arange(100, dtype=torch.uint8)[:, None]
    kept = on_device(rows, torch.device("cuda"))
    assert isinstance(kept, StoredRows)
    assert torch.equal(kept[:], rows)
    # in the order of rows on the device, however many windows there are
    orders = [
        [targets for _, targets, *_ in batches_of(values, batch_size=10)] for values in (kept, rows)
    ]
    monkeypatch.setattr(_stored_rows, "_WINDOW_BYTES", 100)
    for batch, targets, *_ in batches_of(kept, batch_size=10):
        assert torch.equal(batch[:, 3].long(), targets)
        assert torch.equal(orders[0].pop(0), targets)
        assert torch.equal(orders[1].pop(0), targets)
    assert on_device(rows, torch.device("cpu")) is rows
    moved = on_device(rows, torch.device("meta"))
    assert moved.device.type == "meta"


def test__windows__go_to_the_device_of_the_training():
    rows = StoredRows(np.ones((10, 3), np.float32))
    (window, rank), (second, none) = rows.windows(
        [torch.tensor([5, 1]), slice(0, 3)], torch.device("meta")
    )
    assert window.device.type == rank.device.type == "meta"
    assert (window.shape, second.shape, none) == ((2, 3), (3, 3), None)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
def test__nan_among_stored_rows__error_names_them(digits):
    X, y = digits
    X = X.astype(np.float32)
    X[777, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity, first in row 777; .*Replace"):
        fitted("softmax-sgd", Sliced(X), y)
    # what is not trained on is not looked at, in whatever order rows come
    weight = (np.arange(len(y)) != 777).astype(float)
    for seed in range(3):
        clone(ESTIMATORS["softmax-sgd"]).set_params(random_state=seed).fit(
            Sliced(X), y, sample_weight=weight
        )
    model = fitted("softmax-sgd", X[:700], y[:700])
    with pytest.raises(ValueError, match="NaN or infinity, first in row 777"):
        model.predict(Sliced(X))


@pytest.mark.usefixtures("small_windows")
def test__file_that_fails__error_is_the_file_s_and_leaves_the_model_as_it_was(digits):
    X, y = digits
    model = fitted("mlp", X, y)
    before = model.decision_function(X)

    class Failing(Sliced):
        def __getitem__(self, key):
            if threading.current_thread().name.startswith("skcifar-rows"):
                raise OSError("the disk is gone")
            return super().__getitem__(key)

    with pytest.raises(OSError, match="the disk is gone"):
        model.fit(Failing(X), y)
    np.testing.assert_array_equal(model.decision_function(X), before)
    assert not [t for t in threading.enumerate() if t.name.startswith("skcifar-rows")]


def test__stored_rows_of_another_width__error_is_scikit_learn_s(digits):
    X, y = digits
    model = fitted("mlp", X, y)
    with pytest.raises(ValueError, match="X has 32 features, but MLPClassifier is expecting 64"):
        model.predict(Sliced(X[:, :32]))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(Sliced(X), y[:-1])


# -- features into a file --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test__features__are_written_where_they_are_to_go(dtype, digits, tmp_path, monkeypatch):
    X, y = digits
    model = fitted("triplet", X, y)
    monkeypatch.setattr("skcifar._encoder._ROWS_WRITTEN_AT_ONCE", 100)
    out = np.lib.format.open_memmap(tmp_path / "Z.npy", "w+", dtype, (len(X), 4))
    assert model.transform(Sliced(X), out=out) is out
    out.flush()
    # a row's last digits may depend on how many come with it
    np.testing.assert_allclose(
        np.load(tmp_path / "Z.npy"), model.transform(X), atol=2e-3 if dtype == "float16" else 1e-6
    )


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "out",
    [np.empty((3, 4)), np.empty((10, 4), int), [[0.0] * 4] * 10, read_only(np.empty((10, 4)))],
    ids=["rows", "int", "list", "read-only"],
)
def test__place_that_cannot_hold_the_features__error_says_what_can(out, digits):
    X, y = digits
    model = fitted("triplet", X, y)
    message = r"out is a?.*; expected a writable array of floats of shape \(10, 4"
    with pytest.raises(ValueError, match=message):
        model.transform(X[:10], out=out)
