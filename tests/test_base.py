"""What every classifier does alike: input, labels, validation, going on, pickles, randomness."""

import copy
import io
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, log_loss, make_scorer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    GradientNormClipping,
    LRScheduler,
)

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression
from skcifar._device import _per_feature

# One quick instance of each class, and of each way to train.
QUICK = {
    "softmax-lbfgs": SoftmaxRegression(random_state=0),
    "softmax-sgd": SoftmaxRegression(
        solver="sgd", learning_rate_init=0.01, max_iter=5, random_state=0
    ),
    "mlp": MLPClassifier((16,), max_iter=5, random_state=0),
    "mlp-dropout": MLPClassifier((16,), dropout=0.3, max_iter=5, random_state=0),
    "cnn": CNNClassifier((8, 16), max_iter=3, random_state=0),
    "cnn-augmented": CNNClassifier(
        (8, 16), max_iter=3, horizontal_flip=True, cutout=2, dropout=0.2, random_state=0
    ),
}
STOCHASTIC = [name for name in QUICK if name != "softmax-lbfgs"]
every_classifier = pytest.mark.parametrize("name", QUICK)
every_stochastic_classifier = pytest.mark.parametrize("name", STOCHASTIC)


@pytest.fixture(scope="module")
def digits():
    """600 digits as uint8 rows (600, 64) and labels 0 to 9."""
    X, y = load_digits(return_X_y=True)
    return X[:600].astype(np.uint8), y[:600]


def quick(name, **parameters):
    return clone(QUICK[name]).set_params(**parameters)


def assert_same(one, other, X, tolerance=0.0):
    np.testing.assert_allclose(
        one.decision_function(X), other.decision_function(X), rtol=0, atol=tolerance
    )


# -- input -----------------------------------------------------------------------------------------


@every_classifier
def test__same_values_in_every_form__same_model(name, digits, tmp_path):
    X, y = digits
    expected = quick(name).fit(X, y)
    np.save(tmp_path / "X.npy", X)
    forms = {
        "list": X.tolist(),
        "DataFrame": pd.DataFrame(X),
        "read-only memmap": np.load(tmp_path / "X.npy", mmap_mode="r"),
        "tensor": torch.from_numpy(X),
        "int64": X.astype(np.int64),
        "Fortran order": np.asfortranarray(X),
        "images": X.reshape(-1, 8, 8),
        "images with a channel": X.reshape(-1, 8, 8, 1),
        "reversed twice": X[::-1].copy()[::-1],
    }
    for form, values in forms.items():
        outputs = quick(name).fit(values, y).decision_function(X)
        np.testing.assert_array_equal(outputs, expected.decision_function(X), err_msg=form)


@every_classifier
def test__prediction__is_equal_for_every_dtype_of_the_same_values(name, digits):
    X, y = digits
    model = quick(name).fit(X, y)
    expected = model.decision_function(X)
    for dtype in (np.int64, np.uint16, np.float32, np.float64):
        np.testing.assert_array_equal(model.decision_function(X.astype(dtype)), expected)


@every_classifier
def test__statistics__are_in_input_units(name, digits):
    X, y = digits
    model = quick(name).fit(X.reshape(-1, 8, 8), y)
    np.testing.assert_allclose(model.mean_, [X.mean()])
    np.testing.assert_allclose(model.scale_, [X.astype(float).std()])
    assert model.image_shape_ == (8, 8, 1)
    assert model.n_features_in_ == 64


def test__normalize_auto__is_on_for_whole_pixels_and_off_for_floats(digits):
    X, y = digits
    assert MLPClassifier(max_iter=1).fit(X, y).mean_ is not None
    assert MLPClassifier(max_iter=1).fit(X.astype(float), y).mean_ is None
    assert MLPClassifier(max_iter=1).fit(X.astype(np.int64) - 1, y).mean_ is None
    assert MLPClassifier(max_iter=1).fit(X.astype(np.int64) * 100, y).mean_ is None
    assert MLPClassifier(max_iter=1, normalize=True).fit(X.astype(float), y).mean_ is not None
    assert MLPClassifier(max_iter=1, normalize=False).fit(X, y).mean_ is None


@pytest.mark.parametrize("name", ["mlp", "softmax-lbfgs", "cnn"])
def test__layouts__are_the_same_image(name):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (80, 9, 8, 3), dtype=np.uint8)
    X[..., 1] //= 3
    y = rng.integers(0, 3, 80)
    planar = np.ascontiguousarray(X.transpose(0, 3, 1, 2))
    interleaved = quick(name, layout="HWC").fit(X, y)
    other = quick(name, layout="CHW").fit(planar, y)
    flat = quick(name, layout="CHW", image_shape=(9, 8, 3)).fit(planar.reshape(80, -1), y)
    np.testing.assert_allclose(interleaved.mean_, X.reshape(-1, 3).mean(0))
    np.testing.assert_allclose(other.mean_, interleaved.mean_)
    assert other.image_shape_ == flat.image_shape_ == (9, 8, 3)
    assert_same(other, flat, planar.reshape(80, -1))
    if name == "cnn":  # the same network on the same images
        np.testing.assert_array_equal(
            other.decision_function(planar), interleaved.decision_function(X)
        )


def test__training__does_not_copy_or_write_a_tensor(digits):
    X, y = digits
    rows = torch.from_numpy(X.copy())
    model = quick("mlp")
    job, _ = model._prepare(rows, y, None, going_on=False)
    assert job.train.rows.data_ptr() == rows.data_ptr()
    model.fit(rows, y)
    np.testing.assert_array_equal(rows.numpy(), X)


@every_classifier
@pytest.mark.parametrize("labels", ["strings", "booleans", "numbers far apart", "objects"])
def test__labels__come_back_as_they_were(name, digits, labels):
    X, y = digits
    y = {
        "strings": np.array(["even", "odd"])[y % 2],
        "booleans": y % 2 == 0,
        "numbers far apart": np.array([-7, 1000, 3])[y % 3],
        "objects": np.array(["a", "b", "c"], dtype=object)[y % 3],
    }[labels]
    model = quick(name).fit(X, y)
    predicted = model.predict(X)
    assert predicted.dtype == y.dtype
    assert set(predicted) <= set(y)
    np.testing.assert_array_equal(model.classes_, np.unique(y))
    assert model.score(X, y) == accuracy_score(y, predicted)
    assert model.predict_proba(X).shape == (len(X), len(model.classes_))


@every_classifier
def test__probabilities__agree_with_each_other_and_with_predict(name, digits):
    X, y = digits
    for labels in (y, y % 2):
        model = quick(name).fit(X, labels)
        probabilities = model.predict_proba(X)
        assert probabilities.dtype == np.float64
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
        np.testing.assert_allclose(np.log(probabilities), model.predict_log_proba(X), rtol=1e-9)
        np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], model.predict(X))


def test__images_of_another_shape__are_refused_with_both_shapes(digits):
    X, y = digits
    model = quick("cnn").fit(X.reshape(-1, 8, 8), y)
    model.predict(X)  # the same pixels, flat
    with pytest.raises(
        ValueError, match=r"shape \(4, 16, 1\).*fitted on images of shape \(8, 8, 1\)"
    ):
        model.predict(X.reshape(-1, 4, 16))
    with pytest.raises(ValueError, match="32 features, but CNNClassifier is expecting 64"):
        model.predict(X[:, :32])
    with pytest.raises(ValueError, match="X has 5 dimensions"):
        model.fit(X.reshape(-1, 2, 2, 4, 4), y)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, 9), "does not fit X, whose rows have 64 features"),
        ((8.5, 8), "whole numbers"),
        ((-8, -8), "whole numbers"),
        ((2, 4, 8), "X holds images of shape"),
    ],
)
def test__image_shape_that_does_not_fit__error_says_what_would(digits, shape, message):
    X, y = digits
    X = X.reshape(-1, 8, 8) if "holds" in message else X
    with pytest.raises(ValueError, match=message):
        quick("mlp", image_shape=shape).fit(X, y)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax-lbfgs", "softmax-sgd", "mlp"])
def test__weights__are_repetitions(name, digits):
    X, y = digits
    X = X.astype(np.float64) / 16
    weight = np.random.default_rng(0).integers(0, 4, len(y))
    model = quick(name, batch_size="full", normalize=True)
    if name != "softmax-lbfgs":
        model.set_params(shuffle=False)
    weighted = clone(model).fit(X, y, sample_weight=weight)
    repeated = clone(model).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    assert_same(weighted, repeated, X, 1e-7)


def test__class_of_weight_zero__stays_among_the_classes(digits):
    X, y = digits
    model = quick("mlp").fit(X, y, sample_weight=(y != 3).astype(float))
    assert 3 in model.classes_
    with pytest.raises(
        ValueError, match=r"at least 2 classes with non-zero weight.*leave 1: \[3\]"
    ):
        quick("mlp").fit(X, y, sample_weight=(y == 3).astype(float))


def test__class_weight__is_that_sample_weight(digits):
    X, y = digits
    y = (y > 7).astype(int)
    balanced = quick("mlp", class_weight="balanced", shuffle=False).fit(X, y)
    counts = np.bincount(y)
    by_hand = quick("mlp", shuffle=False).fit(X, y, sample_weight=(len(y) / 2 / counts)[y])
    assert_same(balanced, by_hand, X, 1e-5)
    as_dict = quick("mlp", class_weight={0: 1.0, 1: 5.0}, shuffle=False).fit(X, y)
    assert as_dict.predict(X).sum() > quick("mlp", shuffle=False).fit(X, y).predict(X).sum()


# -- validation and early stopping -----------------------------------------------------------------


@every_stochastic_classifier
def test__early_stopping__restores_the_best_epoch_and_stops(name, digits):
    X, y = digits
    model = quick(
        name,
        early_stopping=True,
        max_iter=40,
        n_iter_no_change=2,
        scoring="loss",
        learning_rate_init=0.05 if "softmax" in name else 0.01,
    )
    model.fit(X[:400], y[:400], X_val=X[400:], y_val=y[400:])
    assert model.n_iter_ == len(model.validation_scores_)
    assert model.best_validation_score_ == max(model.validation_scores_)
    loss = log_loss(y[400:], model.predict_proba(X[400:]), labels=model.classes_)
    assert -loss == pytest.approx(model.best_validation_score_, rel=1e-2 if "cnn" in name else 1e-5)


def test__early_stopping__holds_out_a_stratified_share_not_trained_on(digits):
    X, y = digits
    model = quick("mlp", early_stopping=True, validation_fraction=0.25)
    job, _ = model._prepare(X, y, None, going_on=False)
    trained, held_out = job.train.index.tolist(), job.validation.index.tolist()
    assert sorted(trained + held_out) == list(range(len(X)))
    assert len(held_out) == len(X) // 4
    np.testing.assert_allclose(np.bincount(y[held_out]), np.bincount(y) / 4, atol=1)


def test__validation_rows_without_early_stopping__are_only_recorded(digits):
    X, y = digits
    plain = quick("mlp").fit(X[:400], y[:400])
    recorded = quick("mlp").fit(X[:400], y[:400], X_val=X[400:], y_val=y[400:])
    assert_same(plain, recorded, X)
    last = recorded.history_[-1]
    assert last["valid_accuracy"] == pytest.approx(recorded.score(X[400:], y[400:]))
    expected = log_loss(y[400:], recorded.predict_proba(X[400:]), labels=recorded.classes_)
    assert last["valid_loss"] == pytest.approx(expected, rel=1e-5)
    assert plain.validation_scores_ is None


def test__scorer__is_called_on_the_estimator_of_that_epoch(digits):
    X, y = digits
    scored = quick("mlp", scoring="neg_log_loss").fit(X, y, X_val=X[400:], y_val=y[400:])
    by_loss = quick("mlp", scoring="loss").fit(X, y, X_val=X[400:], y_val=y[400:])
    np.testing.assert_allclose(scored.validation_scores_, by_loss.validation_scores_, rtol=1e-5)
    weight = np.arange(200) % 3
    custom = quick("mlp", scoring=make_scorer(accuracy_score), early_stopping=True)
    custom.fit(X, y, X_val=X[400:], y_val=y[400:], sample_weight_val=weight)
    assert custom.score(X[400:], y[400:], weight) == pytest.approx(custom.best_validation_score_)


@every_classifier
def test__validation_rows_of_weight_zero__do_not_count(name, digits):
    X, y = digits
    weight = (np.arange(200) < 100).astype(float)
    model = quick(name).fit(
        X, y, X_val=X[400:], y_val=y[400:], sample_weight_val=torch.from_numpy(weight)
    )
    half = quick(name).fit(X, y, X_val=X[400:500], y_val=y[400:500])
    for key in ("valid_loss", "valid_accuracy", "valid_score"):
        assert model.history_[-1][key] == pytest.approx(half.history_[-1][key], rel=1e-2)


def test__scorer_on_held_out_rows_of_a_frame__does_not_warn_of_names(digits):
    X, y = digits
    frame = pd.DataFrame(X, columns=[f"pixel{i}" for i in range(64)])
    model = quick("mlp", early_stopping=True, scoring="f1_macro").fit(
        frame, y, sample_weight=np.ones(len(y))
    )
    assert 0 < model.best_validation_score_ <= 1
    assert list(model.feature_names_in_) == list(frame.columns)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"X_val": [[0] * 64]}, "X_val is provided, but y_val was not"),
        ({"y_val": [0]}, "y_val is provided, but X_val was not"),
        ({"X_val": [[0] * 64], "y_val": [77]}, r"y_val contains labels \[77\]"),
        ({"X_val": [[0] * 63], "y_val": [1]}, "63 features"),
    ],
)
def test__bad_validation_rows__error_says_which(digits, given, message):
    X, y = digits
    with pytest.raises(ValueError, match=message):
        quick("mlp").fit(X, y, **given)


def test__too_few_rows_to_hold_out__error_names_the_remedy(digits):
    X, y = digits
    with pytest.raises(ValueError, match="Pass X_val and y_val, or more samples"):
        quick("mlp", early_stopping=True).fit(X[:20], y[:20])


def test__validation_rows_through_a_pipeline__are_transformed(digits):
    X, y = digits
    X = X.astype(float)
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = quick("mlp").set_fit_request(X_val=True, y_val=True)
        pipeline = make_pipeline(StandardScaler(), classifier, transform_input=["X_val"])
        pipeline.fit(X[:400], y[:400], X_val=X[400:], y_val=y[400:])
    recorded = pipeline[-1].history_[-1]["valid_accuracy"]
    assert recorded == pytest.approx(pipeline.score(X[400:], y[400:]))


# -- going on --------------------------------------------------------------------------------------


@every_stochastic_classifier
@pytest.mark.parametrize("solver", ["sgd", "adam", "adamw"])
def test__pickle_between_partial_fits__changes_nothing(name, solver, digits):
    X, y = digits
    straight = quick(name, solver=solver).partial_fit(X, y, classes=np.arange(10))
    pickled = pickle.loads(pickle.dumps(straight))
    for _ in range(2):
        straight.partial_fit(X, y)
        pickled.partial_fit(X, y)
    assert_same(straight, pickled, X)
    assert straight.n_iter_ == pickled.n_iter_ == len(pickled.history_) == 3
    assert [row["epoch"] for row in pickled.history_] == [1, 2, 3]


def test__partial_fits__are_the_epochs_of_one_fit(digits):
    X, y = digits
    whole = quick("mlp", learning_rate="constant", max_iter=4, tol=0.0)
    with pytest.warns(ConvergenceWarning):
        whole.fit(X, y)
    parts = quick("mlp")
    for _ in range(4):
        parts.partial_fit(X, y, classes=np.arange(10))
    assert_same(whole, parts, X)


def test__partial_fit__accepts_batches_that_lack_classes_and_refuses_new_ones(digits):
    X, y = digits
    model = quick("mlp").partial_fit(X[y < 5], y[y < 5], classes=np.arange(9))
    model.partial_fit(X[y == 6], y[y == 6])
    with pytest.raises(ValueError, match=r"labels \[9\] that are not among the classes"):
        model.partial_fit(X, y)
    with pytest.raises(ValueError, match="not the same as on the last call to partial_fit"):
        model.partial_fit(X, y, classes=np.arange(10))
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        quick("mlp").partial_fit(X, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"early_stopping": True}, "early_stopping"),
        ({"learning_rate": "cosine"}, "constant rate"),
        ({"class_weight": "balanced"}, "balanced"),
    ],
)
def test__partial_fit__refuses_what_needs_the_whole(digits, parameters, message):
    X, y = digits
    with pytest.raises(ValueError, match=message):
        quick("mlp", **parameters).partial_fit(X, y, classes=np.arange(10))


def test__warm_start__goes_on_and_a_plain_fit_starts_afresh(digits):
    X, y = digits
    model = quick("mlp", warm_start=True).fit(X, y)
    first = model.loss_
    model.fit(X, y)
    assert model.loss_ < first
    assert model.n_iter_ == 10
    again = pickle.loads(pickle.dumps(model)).fit(X, y)
    assert_same(again, model.fit(X, y), X)
    fresh = quick("mlp")
    assert_same(fresh.fit(X, y), clone(fresh).fit(X, y), X)
    with pytest.raises(
        ValueError, match="warm_start can only be used where y has the same classes"
    ):
        model.fit(X[y < 5], y[y < 5])


def test__warm_start_with_another_solver__starts_its_optimizer_afresh(digits):
    X, y = digits
    model = SoftmaxRegression(warm_start=True, random_state=0).fit(X, y)
    loss = model.loss_
    for solver in ("sgd", "adam", "adamw"):
        model.set_params(solver=solver, max_iter=2, learning_rate_init=1e-5).fit(X, y)
        assert model.loss_ == pytest.approx(loss, rel=0.05)


def test__warm_start_with_early_stopping__holds_the_same_rows_out(digits):
    X, y = digits
    model = quick("mlp", early_stopping=True, warm_start=True).fit(X, y)
    held_out = [
        model._prepare(X, y, None, going_on=True)[0].validation.index.tolist() for _ in range(2)
    ]
    first = quick("mlp", early_stopping=True)._prepare(X, y, None, going_on=False)[0]
    assert held_out[0] == held_out[1] == first.validation.index.tolist()


def test__partial_fit_after_a_planned_fit__trains_at_the_constant_rate(digits):
    X, y = digits
    model = quick("mlp", warm_start=True).fit(X, y)
    model.partial_fit(X, y)
    assert model.history_[-1]["learning_rate"] == model.learning_rate_init
    model.set_params(learning_rate="exponential", max_iter=2, tol=0.0)
    with pytest.warns(ConvergenceWarning):
        model.fit(X, y)
    rates = [row["learning_rate"] for row in model.history_[-2:]]
    assert rates == pytest.approx([2e-3, 2e-3 * 0.95])
    model.set_params(learning_rate=halve_every_epoch)
    with pytest.warns(ConvergenceWarning):
        model.fit(X, y).fit(X, y)
    rates = [row["learning_rate"] for row in model.history_[-4:]]
    assert rates == pytest.approx([2e-3, 1e-3, 5e-4, 2.5e-4])


def halve_every_epoch(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test__partial_fit__takes_class_weights_for_classes_that_a_batch_lacks(digits):
    X, y = digits
    model = quick("mlp", class_weight={0: 2.0, 9: 3.0})
    model.partial_fit(X[y < 5], y[y < 5], classes=np.arange(10))
    model.partial_fit(X[y > 7], y[y > 7], sample_weight=(y[y > 7] == 9).astype(float))
    assert model.n_iter_ == 2


def test__rows_seen__are_counted_over_partial_fits(digits):
    X, y = digits
    model = quick("mlp").partial_fit(X[:100], y[:100], classes=np.arange(10))
    assert model.partial_fit(X[:30], y[:30]).t_ == 130


def test__warm_start_of_lbfgs__begins_where_it_ended(digits):
    X, y = digits
    model = SoftmaxRegression(warm_start=True).fit(X, y)
    n_iter = model.n_iter_
    model.fit(X, y)
    assert model.n_iter_ - n_iter <= 2 < n_iter


# -- divergence, interruption ----------------------------------------------------------------------


def test__diverging_training__error_names_epoch_rate_and_remedies(digits):
    X, y = digits
    bad = quick("softmax-sgd", learning_rate_init=1e30, loss="squared_error", normalize=False)
    with pytest.raises(
        ValueError, match=r"in epoch \d at learning rate .*lower learning_rate_init"
    ):
        bad.fit(X, y)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::sklearn.exceptions.FitFailedWarning")
def test__diverging_candidate__costs_only_itself_in_a_search(digits):
    X, y = digits
    model = quick("softmax-sgd", loss="squared_error")
    search = GridSearchCV(model, {"learning_rate_init": [1e-3, 1e30]}, cv=2, error_score=np.nan)
    search.fit(X, y)
    assert np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False, True]
    assert search.best_params_ == {"learning_rate_init": 1e-3}


def test__failed_training__leaves_the_fitted_model_as_it_was(digits):
    X, y = digits
    model = quick("mlp", warm_start=True).fit(X, y)
    before = model.decision_function(X)
    with pytest.raises(ValueError, match="diverged"):
        model.set_params(learning_rate_init=1e30, loss="squared_error").fit(X, y)
    np.testing.assert_array_equal(model.decision_function(X), before)


def test__not_converged__warns_with_open_length_only(digits):
    X, y = digits
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        quick("mlp", learning_rate="constant", max_iter=3).fit(X, y)
    quick("mlp", learning_rate="cosine", max_iter=3).fit(X, y)


class InterruptAfter(Callback):
    """Sends the process a real Ctrl-C."""

    def on_epoch_end(self, net, **kwargs):
        signal.raise_signal(signal.SIGINT)


def test__ctrl_c__leaves_fit_as_an_exception(digits):
    X, y = digits
    model = quick("mlp", skorch_callbacks=[InterruptAfter()])
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert not hasattr(model, "module_")


def test__quiet_stop_of_a_callback__ends_the_training(digits):
    X, y = digits
    stop = EarlyStopping(monitor="train_loss", patience=1, threshold=1e9, sink=lambda text: None)
    model = quick("mlp", max_iter=50, skorch_callbacks=[stop]).fit(X, y)
    assert model.n_iter_ == len(model.loss_curve_) == 2
    assert model.skorch_callbacks_[0] is not stop
    assert model.skorch_callbacks_[0].misses_ > stop.misses_ == 0


def test__quiet_stop_before_the_first_epoch_is_over__is_an_error(digits):
    X, y = digits

    class StopAtOnce(Callback):
        def on_batch_end(self, net, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(ValueError, match="before its first epoch was over"):
        quick("mlp", skorch_callbacks=[StopAtOnce()]).fit(X, y)


# -- callbacks -------------------------------------------------------------------------------------


def test__skorch_callbacks__work(digits, tmp_path):
    X, y = digits
    callbacks = [
        EpochScoring("accuracy", lower_is_better=False, name="accuracy"),
        LRScheduler("StepLR", step_size=1, gamma=0.5),
        GradientNormClipping(0.1),
        Checkpoint(monitor="valid_loss_best", dirname=str(tmp_path)),
        EpochScoring("neg_log_loss", name="ignored", use_caching=False),
    ]
    model = quick(
        "mlp",
        learning_rate="constant",
        learning_rate_init=1e-3,
        skorch_callbacks=callbacks,
        tol=0.0,
    )
    with pytest.warns(ConvergenceWarning):
        model.fit(X[:400], y[:400], X_val=X[400:], y_val=y[400:])
    history = pd.DataFrame(model.history_)
    np.testing.assert_allclose(history["accuracy"], history["valid_accuracy"])
    np.testing.assert_allclose(history["learning_rate"], 1e-3 * 0.5 ** np.arange(5))
    assert (tmp_path / "params.pt").exists()
    assert "batches" not in history


def test__history__is_a_table_of_epochs(digits):
    X, y = digits
    model = quick("mlp").fit(X, y, X_val=X[:50], y_val=y[:50])
    table = pd.DataFrame(model.history_)
    assert list(table["epoch"]) == [1, 2, 3, 4, 5]
    assert {
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_accuracy",
        "valid_score",
        "learning_rate",
        "seconds",
    } <= set(table)
    assert table["train_loss"].tolist() == model.loss_curve_
    assert model.n_parameters_ == 64 * 16 + 16 + 16 * 10 + 10


def test__progress_bar_of_scikit_learn__shows_epochs_inside_folds(digits, capsys):
    pytest.importorskip("rich")
    X, y = digits
    pipeline = make_pipeline(StandardScaler(), quick("mlp", max_iter=3))
    search = GridSearchCV(pipeline, {"mlpclassifier__alpha": [0.1, 1.0]}, cv=2)
    search.set_callbacks(ProgressBar(max_propagation_depth=None))
    search.fit(X.astype(float), y)
    shown = capsys.readouterr().out
    assert "MLPClassifier" in shown


class CountEpochs:
    """A callback of scikit-learn's protocol that looks at the estimator of each epoch."""

    max_propagation_depth = None

    def __init__(self):
        self.scores = []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, X, y, fitted_estimator):
        if context.task_name == "epoch":
            self.scores.append(fitted_estimator.score(X, y))
            return len(self.scores) == 3
        return False


@every_classifier
def test__callback_of_scikit_learn__sees_a_fitted_estimator_and_may_stop(name, digits):
    X, y = digits
    callback = CountEpochs()
    model = quick(name, max_iter=20).set_callbacks(callback)
    model.fit(X, y)
    assert model.n_iter_ == len(callback.scores) == 3
    assert callback.scores[-1] == model.score(X, y)


def test__verbose__prints_a_line_an_epoch(digits, capsys):
    X, y = digits
    quick("mlp", verbose=True, max_iter=2).fit(X, y)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "Epoch 1",
        "Epoch 2",
    ]


# -- prediction ------------------------------------------------------------------------------------


@every_classifier
@pytest.mark.parametrize("n", [1, 3, 4, 5, 9, 31, 33])
def test__few_rows__have_the_outputs_of_many(name, n, digits):
    X, y = digits
    model = quick(name, precision="float64").fit(X, y)
    np.testing.assert_allclose(
        model.decision_function(X[-n:]), model.decision_function(X)[-n:], rtol=0, atol=1e-12
    )


@every_classifier
@pytest.mark.parametrize("n", [33, 39, 50, 63, 64])
def test__last_rows_of_several_passes__have_their_own_outputs(name, n, digits, monkeypatch):
    X, y = digits
    model = quick(name, precision="float64").fit(X, y)
    expected = model.decision_function(X[:n])
    monkeypatch.setattr("skcifar._base._PREDICTION_ROWS", 32)
    np.testing.assert_allclose(model.decision_function(X[:n]), expected, rtol=0, atol=1e-12)


def test__images__are_predicted_in_passes_that_stay_in_the_cache(digits, monkeypatch):
    X, y = digits
    model = quick("cnn").fit(X, y)
    expected = model.decision_function(X)
    monkeypatch.setattr("skcifar._convolutional._PIXELS_OF_A_PASS", 40 * 64)
    sizes = []
    model.module_.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    np.testing.assert_allclose(model.decision_function(X[:99]), expected[:99], rtol=0, atol=1e-5)
    assert sizes == [32, 32, 32, 4]


REFUSED = {
    "NaN": lambda X: np.where(X == 0, np.nan, X),
    "infinity": lambda X: np.where(X == 0, -np.inf, X).astype(np.float32),
    "too few features": lambda X: X[:, 1:],
    "no rows": lambda X: X[:0],
    "one dimension": lambda X: X[0],
    "five dimensions": lambda X: X.reshape(-1, 2, 2, 4, 4),
    "words": lambda X: np.full(X.shape, "seven"),
    "complex": lambda X: X.astype(complex),
    "objects": lambda X: np.full(X.shape, None),
}


@pytest.mark.parametrize("fault", REFUSED)
def test__rows_that_scikit_learn_refuses__are_refused_in_its_words(fault, digits, monkeypatch):
    X, y = digits
    model = quick("mlp").fit(X, y)
    with pytest.raises((ValueError, TypeError)) as refused:
        model.predict(REFUSED[fault](X))
    monkeypatch.setattr(MLPClassifier, "_is_as_expected", lambda self, X: False)
    with pytest.raises(refused.type) as expected:
        model.predict(REFUSED[fault](X))
    assert str(refused.value) == str(expected.value)


def test__rows_without_the_names_of_the_fit__warn(digits):
    X, y = digits
    model = quick("mlp").fit(pd.DataFrame(X).add_prefix("pixel"), y)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(X)


def test__finite_rows_whose_sum_is_not__are_predicted(digits):
    X, y = digits
    model = quick("mlp", normalize=False).fit(X, y)
    huge = np.full((2, 64), 3e38, dtype=np.float32)
    assert not torch.isfinite(torch.from_numpy(huge).sum())
    assert model.predict(huge).shape == (2,)


@every_classifier
def test__prediction__leaves_no_trace(name, digits):
    X, y = digits
    model = quick(name).fit(X, y)
    before, content = dict(vars(model)), pickle.dumps(model)
    model.predict(X[:1])
    model.predict_proba(X.astype(np.float32))
    assert vars(model) == before
    assert pickle.dumps(model) == content


def test__refit_on_other_pixels__predicts_with_their_statistics(digits):
    X, y = digits
    model = quick("mlp").fit(X, y)
    model.predict(X[:1])
    model.fit(255 - 4 * X, y)
    fresh = quick("mlp").fit(255 - 4 * X, y)
    assert_same(model, fresh, 255 - 4 * X[:1])


def test__layout_set_after_the_fit__holds_in_prediction():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    X[..., 1] //= 3
    model = quick("cnn").fit(X, rng.integers(0, 3, 40))
    expected = model.predict_proba(X)
    model.set_params(layout="CHW")
    planar = np.ascontiguousarray(X.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(model.predict_proba(planar), expected)


@every_classifier
def test__threads_that_predict_at_once__get_what_one_gets(name, digits):
    X, y = digits
    models = [quick(name, random_state=seed).fit(X // (seed + 1), y) for seed in range(2)]
    expected = [model.decision_function(X) for model in models]
    with ThreadPoolExecutor(4) as pool:
        outputs = pool.map(lambda i: models[i % 2].decision_function(X[i : i + 1])[0], range(100))
        for i, output in enumerate(outputs):
            np.testing.assert_allclose(output, expected[i % 2][i], rtol=0, atol=1e-5)


def test__prediction_in_inference_mode__leaves_training_as_it_was(digits):
    X, y = digits
    model = quick("mlp").partial_fit(X, y, classes=np.arange(10))
    other = copy.deepcopy(model).partial_fit(X, y)
    _per_feature.cache_clear()
    with torch.inference_mode():
        model.predict(X)
    assert_same(model.partial_fit(X, y), other, X)


# -- pickles, randomness ---------------------------------------------------------------------------


@every_classifier
@pytest.mark.parametrize("way", ["pickle", "joblib", "joblib mmap", "deepcopy"])
def test__copies__predict_the_same(name, way, digits, tmp_path):
    X, y = digits
    model = quick(name).fit(X, y)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        joblib.dump(model, tmp_path / "model.joblib")
        mode = "r" if "mmap" in way else None
        other = joblib.load(tmp_path / "model.joblib", mmap_mode=mode)
    assert_same(model, other, X)
    assert repr(clone(other)) == repr(clone(model))


def test__pickle__holds_numpy_only_and_neither_data_nor_optimizer(digits):
    X, y = digits
    model = SoftmaxRegression(solver="adam", max_iter=2, random_state=0).fit(X[:, :17], y)
    content = pickle.dumps(model)
    assert model.n_parameters_ == 180
    assert len(content) < 6000

    class NoTensors(pickle.Unpickler):
        def find_class(self, module, name):
            assert "_rebuild" not in name or module.startswith("numpy"), (module, name)
            return super().find_class(module, name)

    NoTensors(io.BytesIO(content)).load()


def test__pickle_after_set_params__still_holds_the_fitted_network(digits):
    X, y = digits
    model = quick("mlp").fit(X, y)
    expected = model.decision_function(X)
    model.set_params(hidden_layer_sizes=(3, 3))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).decision_function(X), expected)


@every_classifier
def test__result__is_the_same_in_any_thread_and_order(name, digits):
    X, y = digits
    seeds = [0, 1, 2, 0, 1, 2]
    alone = [quick(name, random_state=seed).fit(X, y).decision_function(X) for seed in seeds[:3]]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda s: quick(name, random_state=s).fit(X, y).decision_function(X), seeds)
        )
    for seed, outputs in zip(seeds, together, strict=True):
        np.testing.assert_allclose(outputs, alone[seed], rtol=0, atol=1e-12)
    if name != "softmax-lbfgs":
        assert not np.allclose(alone[0], alone[1])


def test__result__is_the_same_in_another_process(digits):
    X, y = digits
    model = quick("cnn-augmented")
    outputs = joblib.Parallel(n_jobs=2)(
        joblib.delayed(lambda: clone(model).fit(X, y).decision_function(X))() for _ in range(2)
    )
    np.testing.assert_allclose(outputs[0], model.fit(X, y).decision_function(X), atol=1e-6)
    np.testing.assert_array_equal(outputs[0], outputs[1])


@every_classifier
def test__global_generators__are_untouched(name, digits):
    X, y = digits
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    quick(name).fit(X, y).predict(X)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == expected  # noqa: NPY002


def test__dropout__does_not_shift_order_or_weights(digits):
    X, y = digits
    jobs = [quick("mlp", dropout=p)._prepare(X, y, None, going_on=False)[0] for p in (0.0, 0.5)]
    first, second = (list(job.module.parameters()) for job in jobs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    orders = [torch.randperm(9, generator=job.generators.order).tolist() for job in jobs]
    assert orders[0] == orders[1]


def test__no_thread_is_left(digits):
    X, y = digits
    before = threading.active_count()
    quick("mlp").fit(X, y)
    assert threading.active_count() == before


def test__parameters_across__are_checked_when_fit_opens(digits):
    X, y = digits
    with pytest.raises(ValueError, match="early_stopping=True has no meaning"):
        quick("softmax-lbfgs", early_stopping=True).fit(X, y)
    with pytest.raises(ValueError, match="another loss at every evaluation"):
        quick("mlp-dropout", solver="lbfgs").fit(X, y)
    with pytest.raises(ValueError, match="is not a torch device"):
        quick("mlp", device="gpu").fit(X, y)


@every_stochastic_classifier
@pytest.mark.parametrize("n_classes", [2, 10])
def test__squared_error__trains_by_default_parameters(name, n_classes, digits):
    X, y = digits
    model = quick(name, loss="squared_error", learning_rate_init=1e-2).fit(X, y % n_classes)
    assert model.loss_curve_[-1] < model.loss_curve_[0]
    assert model.predict(X).shape == y.shape
    assert not hasattr(model, "predict_proba")


def test__label_smoothing__is_not_in_the_validation_loss(digits):
    X, y = digits
    model = quick("mlp", label_smoothing=0.3).fit(X, y, X_val=X, y_val=y)
    expected = log_loss(y, model.predict_proba(X))
    assert model.history_[-1]["valid_loss"] == pytest.approx(expected, rel=1e-5)
    assert model.history_[-1]["train_loss"] > expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test__cuda_asked_for_without_any__error_names_the_remedy(digits):
    X, y = digits
    with pytest.raises(ValueError, match="finds no CUDA device; give device='auto'"):
        quick("mlp", device="cuda").fit(X, y)
    model = quick("mlp").partial_fit(X, y, classes=np.arange(10))
    model.device_ = "cuda:1"  # as if it had been trained there
    model = pickle.loads(pickle.dumps(model))
    assert model.device_ == "cpu"
    assert model.partial_fit(X, y).n_iter_ == 2


@every_classifier
def test__failed_refit__leaves_what_is_known_of_the_input(name, digits):
    X, y = digits
    frame = pd.DataFrame(X).add_prefix("pixel")
    model = quick(name).fit(frame, y)
    expected = model.predict(frame)
    with pytest.raises(ValueError, match="only one class"):
        model.fit(X[:, :32], np.zeros(len(X)))
    assert model.n_features_in_ == 64
    np.testing.assert_array_equal(model.predict(frame), expected)


@pytest.mark.parametrize("name", STOCHASTIC)
def test__scoring_monitor__scores_every_epoch(name, digits):
    X, y = digits
    for weight in (None, np.ones(len(X))):
        monitor = ScoringMonitor(scoring="accuracy")
        model = quick(name).set_callbacks(monitor).fit(X, y, weight)
        scores = monitor.get_logs().data_as_pandas["accuracy"]
        assert scores.iloc[-1] == model.score(X, y)
        assert len(scores) >= model.n_iter_
