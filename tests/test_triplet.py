"""TripletEmbedder: losses, miners and samplers as trained, scores, and what estimators share."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.callback import ProgressBar
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback

from skcifar import SoftmaxRegression, TripletEmbedder
from skcifar._batches import Batches
from skcifar.metrics import map_at_r_score, map_at_r_scorer, recall_at_1_scorer

RNG = np.random.default_rng(0)
QUICK = {
    "triplet": TripletEmbedder(
        6,
        mining="semihard",
        margin=1.0,
        normalize_embedding=False,
        channels=(4, 8),
        solver="adam",
        max_iter=3,
        random_state=0,
    ),
    "supcon": TripletEmbedder(
        6,
        loss="supcon",
        sampler="balanced",
        samples_per_class=4,
        normalize_embedding=True,
        tta=True,
        horizontal_flip=True,
        cutout=2,
        dropout=0.2,
        channels=(4, 8),
        solver="adam",
        max_iter=3,
        random_state=0,
    ),
}
every_embedder = pytest.mark.parametrize("name", QUICK)


@pytest.fixture(scope="module")
def digits():
    """400 digits as uint8 rows (400, 64) and labels 0 to 9."""
    X, y = load_digits(return_X_y=True)
    return X[:400].astype(np.uint8), y[:400]


def quick(name="triplet", **parameters):
    return clone(QUICK[name]).set_params(**parameters)


def one_step(**parameters):
    """An embedder that takes a step too small to matter, on all rows at once."""
    return quick(
        batch_norm=False,
        weight_decay=0.0,
        batch_size="full",
        learning_rate_init=1e-12,
        max_iter=1,
        precision="float64",
    ).set_params(**parameters)


def assert_same(one, other, X, tolerance=0.0):
    np.testing.assert_allclose(one.transform(X), other.transform(X), rtol=0, atol=tolerance)


def recall_at_1(embedding, labels):
    nearest = NearestNeighbors(n_neighbors=1).fit(embedding).kneighbors(return_distance=False)
    return np.mean(labels[nearest[:, 0]] == labels)


# -- the loss --------------------------------------------------------------------------------------


def distance(one, other, p):
    return (np.abs(one - other) ** p).sum() ** (1 / p)


def loss_of_all(embedding, y, margin, p):
    losses = [
        distance(embedding[a], embedding[b], p) - distance(embedding[a], embedding[c], p) + margin
        for a in range(len(y))
        for b in np.flatnonzero(y == y[a])
        for c in np.flatnonzero(y != y[a])
        if a != b
    ]
    return np.mean([loss for loss in losses if loss > 0])


def loss_of_hardest(embedding, y, margin, p):
    losses = []
    for a in range(len(y)):
        distances = np.array([distance(embedding[a], other, p) for other in embedding])
        positives = (y == y[a]) & (np.arange(len(y)) != a)
        if positives.any() and (y != y[a]).any():
            violation = distances[positives].max() - distances[y != y[a]].min() + margin
            losses.append(max(0.0, violation))
    return np.mean(losses)


def loss_of_contrast(embedding, y, temperature):
    directions = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    losses = []
    for a in range(len(y)):
        others = np.flatnonzero(np.arange(len(y)) != a)
        logits = directions[others] @ directions[a] / temperature
        log_shares = logits - np.log(np.exp(logits).sum())
        if (y[others] == y[a]).any():
            losses.append(-log_shares[y[others] == y[a]].mean())
    return np.mean(losses)


@pytest.mark.parametrize("normalize_embedding", [False, True])
@pytest.mark.parametrize(
    ("parameters", "oracle"),
    [
        ({"mining": "all", "margin": 0.02, "p": 2.0}, loss_of_all),
        ({"mining": "all", "margin": 0.5, "p": 1.0}, loss_of_all),
        ({"mining": "hard", "margin": 0.3, "p": 2.0}, loss_of_hardest),
        ({"mining": "hard", "margin": 0.01, "p": 3.0}, loss_of_hardest),
        ({"loss": "supcon", "temperature": 0.2}, loss_of_contrast),
    ],
    ids=["all, p=2", "all, p=1", "hard, p=2", "hard, p=3", "supcon"],
)
def test__first_loss__is_that_of_a_slow_loop(digits, parameters, oracle, normalize_embedding):
    X, y = digits
    X, y = X[:30] / 16, np.append(y[:29], 77)  # one row is of a class of its own
    model = one_step(
        **parameters,
        normalize=False,
        image_shape=(8, 8),
        normalize_embedding=normalize_embedding,
    ).fit(X, y)
    of_loss = {k: v for k, v in parameters.items() if k in ("margin", "p", "temperature")}
    embedding = model.transform(X)
    assert embedding.dtype == np.float64
    assert model.loss_curve_ == pytest.approx([oracle(embedding, y, **of_loss)], rel=1e-5)


@pytest.mark.parametrize(
    ("parameters", "values"),
    [
        ({}, {"margin": [0.05, 2.0]}),
        ({}, {"p": [1.0, 2.0]}),
        ({}, {"mining": ["random", "semihard", "hard", "all"]}),
        ({"loss": "supcon"}, {"temperature": [0.01, 1.0]}),
        ({}, {"loss": ["triplet", "supcon"]}),
        ({}, {"sampler": ["shuffle", "balanced"]}),
        ({"sampler": "balanced", "batch_size": 16}, {"samples_per_class": [2, 4]}),
        ({}, {"normalize_embedding": [False, True]}),
    ],
    ids=str,
)
def test__every_parameter_of_the_loss__makes_another_model_in_a_search(digits, parameters, values):
    X, y = digits
    model = quick(learning_rate_init=1e-2, **parameters)
    search = GridSearchCV(model, values, scoring=map_at_r_scorer, cv=2, refit=False).fit(X, y)
    (tried,) = values.values()
    assert len(set(search.cv_results_["mean_test_score"])) == len(tried)


@pytest.mark.parametrize("loss", ["triplet", "supcon"])
@pytest.mark.parametrize("mining", ["random", "semihard", "hard", "all"])
def test__batches_without_any_pair__change_nothing(loss, mining):
    X = RNG.integers(0, 256, (60, 64), dtype=np.uint8)
    y = np.tile(np.arange(20), 3)  # in their order 3 batches of 20 classes
    model = quick(
        loss=loss, mining=mining, shuffle=False, batch_size=20, weight_decay=0.0, max_iter=2
    )
    model.fit(X, y)
    assert model.loss_curve_ == [0.0, 0.0]
    untrained = model._prepare(X, y, going_on=False)[0].module
    for trained, initial in zip(model.module_.parameters(), untrained.parameters(), strict=True):
        assert torch.equal(trained, initial)


def test__one_class__is_an_error_that_says_so(digits):
    X, y = digits
    for fit in (quick().fit, quick().partial_fit):
        with pytest.raises(ValueError, match="TripletEmbedder needs samples of at least 2 classes"):
            fit(X[y == 3], y[y == 3])
    with pytest.raises(ValueError, match="requires y to be passed"):
        quick().fit(X, None)


# -- batches ---------------------------------------------------------------------------------------


def test__balanced_batches__hold_a_few_classes_with_as_many_images_each(digits):
    X, y = digits
    job, _ = quick(sampler="balanced", batch_size=20, samples_per_class=5)._prepare(
        X, y, going_on=False
    )
    batches = Batches(job.train, job.recipe.batch_size, job.generators.order, job.sampler)
    for _ in range(2):
        drawn = list(batches)
        assert len(drawn) == len(batches) == 20
        for rows, targets, weight, weight_sum in drawn:
            assert targets.unique(return_counts=True)[1].tolist() == [5, 5, 5, 5]
            assert weight is None and weight_sum == len(rows) == 20
            assert len(rows.unique(dim=0)) == 20
            # rows with their own labels
            for row, target in zip(rows.numpy(), targets.numpy(), strict=True):
                assert target in y[(X == row).all(1)]
        assert len({tuple(targets.unique().tolist()) for _, targets, *_ in drawn}) > 1


def test__balanced_batches_of_rows_left_by_early_stopping__are_those_rows(digits):
    X, y = digits
    model = quick(sampler="balanced", batch_size=20, early_stopping=True, validation_fraction=0.4)
    job, _ = model._prepare(X, y, going_on=False)
    batches = Batches(job.train, job.recipe.batch_size, job.generators.order, job.sampler)
    trained = {bytes(row) for rows, *_ in batches for row in rows.numpy()}
    assert trained <= {bytes(row) for row in X[job.train.index]}


def test__fewer_classes_than_a_balanced_batch_wants__fill_it(digits):
    X, y = digits
    job, _ = quick(sampler="balanced", batch_size=32)._prepare(X[y < 2], y[y < 2], going_on=False)
    batches = Batches(job.train, job.recipe.batch_size, job.generators.order, job.sampler)
    for _, targets, *_ in batches:
        assert targets.bincount().tolist() == [16, 16]


def test__no_shuffling__takes_rows_as_they_lie_with_either_sampler(digits):
    X, y = digits
    models = [quick(sampler=sampler, shuffle=False) for sampler in ("shuffle", "balanced")]
    assert_same(*(model.fit(X, y) for model in models), X)


# -- the network and its output --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("lenet5", 12), ("vgg11", 32), ("vgg16", 32), ("resnet18", 8)]
)
def test__every_architecture__embeds(name, size):
    X = RNG.integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    model = TripletEmbedder(5, architecture=name, max_iter=1, random_state=0)
    embedding = model.fit_transform(X, np.arange(8) % 2)
    assert embedding.shape == (8, 5)
    assert np.isfinite(embedding).all()
    with pytest.raises(ValueError, match=f"at least {size} x {size} pixels"):
        model.fit(X[:, 1:], np.arange(8) % 2)


class TwoLayers(torch.nn.Sequential):
    def __init__(self, image_shape, n_outputs):
        height, width, channels = image_shape
        super().__init__(
            torch.nn.Flatten(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(height * width * channels, n_outputs),
        )


def test__factory__gets_n_components_and_survives_pickling(digits):
    X, y = digits
    model = quick(n_components=3, architecture=TwoLayers).fit(X, y)
    assert isinstance(model.module_.network, TwoLayers)
    assert model.n_parameters_ == 64 * 3 + 3
    assert_same(model, pickle.loads(pickle.dumps(model)), X)


@pytest.mark.parametrize("n_components", [1, np.int64(9)])
def test__n_components__is_the_width_and_names_the_features(digits, n_components):
    X, y = digits
    model = quick(n_components=n_components).fit(X, y)
    names = [f"tripletembedder{i}" for i in range(n_components)]
    assert model.transform(X).shape == (400, n_components)
    assert model.transform(X).dtype == np.float32
    assert list(model.get_feature_names_out()) == names
    frame = pd.DataFrame(X, index=np.arange(400) + 7)
    embedded = model.set_output(transform="pandas").transform(frame.to_numpy())
    assert list(embedded.columns) == names
    assert list(clone(model).fit_transform(frame, y).index) == list(frame.index)


def test__n_components_changed_after_fit__names_the_features_there_are(digits):
    X, y = digits
    model = quick(n_components=5, warm_start=True).fit(X, y)
    for train in (model.fit, model.partial_fit):
        train_on = train.__self__.set_params(n_components=3)
        train(X, y)
        assert train_on.transform(X).shape[1] == len(train_on.get_feature_names_out()) == 5


@pytest.mark.parametrize("set_output", [True, False])
def test__frames_as_output__do_not_disturb_early_stopping(digits, set_output):
    X, y = digits
    plain = quick(early_stopping=True).fit(X, y)
    for scoring in ("recall_at_1", recall_at_1_scorer):
        model = quick(early_stopping=True, scoring=scoring)
        if set_output:
            model.set_output(transform="pandas").fit(X, y)
        else:
            with sklearn.config_context(transform_output="pandas"):
                model.fit(X, y)
        np.testing.assert_allclose(model.validation_scores_, plain.validation_scores_)


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test__normalize_embedding__gives_unit_lengths(digits, tta, precision):
    X, y = digits
    model = quick(normalize_embedding=True, tta=tta, precision=precision).fit(X, y)
    np.testing.assert_allclose(np.linalg.norm(model.transform(X), axis=1), 1, atol=1e-5)
    free = quick(tta=tta, precision=precision).fit(X, y)
    assert np.ptp(np.linalg.norm(free.transform(X), axis=1)) > 0.01


@pytest.mark.parametrize("horizontal_flip", [False, True])
@pytest.mark.parametrize("normalize_embedding", [False, True])
def test__tta__is_the_mean_over_moved_and_mirrored_images(
    digits, horizontal_flip, normalize_embedding
):
    X, y = digits
    model = quick(
        horizontal_flip=horizontal_flip,
        normalize_embedding=normalize_embedding,
        precision="float32",
    ).fit(X, y)
    images = X.reshape(-1, 8, 8)

    def over_moves(images):
        padded = np.pad(images, [(0, 0), (1, 1), (1, 1)], mode="reflect")
        views = [(images, 0.5), (padded[:, :8, :8], 0.25), (padded[:, 2:, 2:], 0.25)]
        return sum(share * model.transform(view) for view, share in views)

    expected = over_moves(images)
    if horizontal_flip:
        expected = (expected + over_moves(images[:, :, ::-1])) / 2
    if normalize_embedding:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    averaged = model.set_params(tta=True).transform(images)
    np.testing.assert_allclose(averaged, expected, atol=1e-5)
    # what was trained decides on the length, not what the parameter says by now
    model.set_params(normalize_embedding=not normalize_embedding)
    np.testing.assert_array_equal(model.transform(images), averaged)


@every_embedder
def test__same_values_in_every_form__same_embedding(name, digits, tmp_path):
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
    }
    for form, values in forms.items():
        labels = y.astype(str) if form == "tensor" else y  # what the classes are called is nothing
        embedding = quick(name).fit(values, labels).transform(X)
        np.testing.assert_array_equal(embedding, expected.transform(X), err_msg=form)
    for dtype in (np.uint16, np.float32, np.float64):
        embedding = expected.transform(X.astype(dtype))
        np.testing.assert_array_equal(embedding, expected.transform(X))
        assert embedding.dtype == (np.float64 if dtype == np.float64 else np.float32)


def test__layouts__are_the_same_image():
    X = RNG.integers(0, 256, (40, 9, 8, 3), dtype=np.uint8)
    X[..., 1] //= 3
    y = np.arange(40) % 3
    planar = np.ascontiguousarray(X.transpose(0, 3, 1, 2))
    interleaved = quick().fit(X, y)
    other = quick(layout="CHW").fit(planar, y)
    flat = quick(layout="CHW", image_shape=(9, 8, 3)).fit(planar.reshape(40, -1), y)
    np.testing.assert_allclose(interleaved.mean_, X.reshape(-1, 3).mean(0))
    np.testing.assert_array_equal(other.transform(planar), interleaved.transform(X))
    assert_same(other, flat, planar.reshape(40, -1))
    with pytest.raises(ValueError, match=r"shape \(8, 9, 3\).*fitted on images of shape \(9, 8, 3"):
        interleaved.transform(X.transpose(0, 2, 1, 3))


# -- validation ------------------------------------------------------------------------------------


@every_embedder
def test__early_stopping__restores_the_epoch_of_the_best_recall_on_rows_held_out(name, digits):
    X, y = digits
    model = quick(
        name,
        early_stopping=True,
        validation_fraction=0.25,
        max_iter=30,
        n_iter_no_change=2,
        learning_rate_init=0.02,
        precision="float32",
    )
    job, _ = model._prepare(X, y, going_on=False)
    held_out = job.validation.index.numpy()
    assert sorted([*held_out, *job.train.index.tolist()]) == list(range(400))
    np.testing.assert_allclose(np.bincount(y[held_out]), np.bincount(y) / 4, atol=1)
    model.fit(X, y)
    scores = model.validation_scores_
    assert len(scores) == model.n_iter_ < 30
    assert np.argmax(scores) + 2 < len(scores)  # not the last epoch
    assert model.best_validation_score_ == max(scores)
    embedding = model.transform(X[held_out])
    assert recall_at_1(embedding, y[held_out]) == model.best_validation_score_


def test__scoring__loss_and_callables_are_monitored(digits):
    X, y = digits
    given = {"X_val": X[300:], "y_val": y[300:]}
    by_loss = quick(scoring="loss", early_stopping=True).fit(X[:300], y[:300], **given)
    losses = [row["valid_loss"] for row in by_loss.history_]
    assert by_loss.validation_scores_ == [-loss for loss in losses]
    by_scorer = quick(scoring=map_at_r_scorer, early_stopping=True).fit(X[:300], y[:300], **given)
    best = map_at_r_scorer(by_scorer, X[300:], y[300:])
    assert by_scorer.best_validation_score_ == pytest.approx(best)
    for scoring in ("accuracy", "f1_macro"):
        with pytest.raises(ValueError, match="'scoring' parameter of TripletEmbedder"):
            quick(scoring=scoring).fit(X, y)


@every_embedder
def test__validation_rows__may_be_of_other_classes_and_change_nothing(name, digits):
    X, y = digits
    seen = y < 6
    labels = np.array([f"class {i}" for i in range(10)])[y]
    plain = quick(name).fit(X[seen], labels[seen])
    recorded = quick(name).fit(X[seen], labels[seen], X_val=X[~seen], y_val=labels[~seen])
    assert_same(plain, recorded, X)
    assert plain.validation_scores_ is None
    expected = recall_at_1(recorded.transform(X[~seen]), y[~seen])
    assert recorded.validation_scores_[-1] == expected
    table = pd.DataFrame(recorded.history_)
    assert {"train_loss", "valid_loss", "valid_score", "learning_rate", "seconds"} <= set(table)
    assert not {"train_accuracy", "valid_accuracy"} & set(table)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"X_val": [[0] * 64]}, "X_val is provided, but y_val was not"),
        ({"X_val": [[0] * 63], "y_val": [1]}, "63 features"),
        ({"X_val": [[0] * 64], "y_val": [1]}, "n=1; give at least 2"),
    ],
)
def test__bad_validation_rows__error_says_which(digits, given, message):
    X, y = digits
    with pytest.raises(ValueError, match=message):
        quick().fit(X, y, **given)


def test__validation_rows_through_a_pipeline__are_transformed(digits):
    X, y = digits
    X = X.astype(float)
    with sklearn.config_context(enable_metadata_routing=True):
        embedder = quick(image_shape=(8, 8)).set_fit_request(X_val=True, y_val=True)
        pipeline = make_pipeline(StandardScaler(), embedder, transform_input=["X_val"])
        pipeline.fit(X[:300], y[:300], X_val=X[300:], y_val=y[300:])
    expected = recall_at_1(pipeline.transform(X[300:]), y[300:])
    assert pipeline[-1].validation_scores_[-1] == expected


# -- going on --------------------------------------------------------------------------------------


@every_embedder
@pytest.mark.parametrize("solver", ["sgd", "adam", "adamw"])
def test__pickle_between_partial_fits__changes_nothing(name, solver, digits):
    X, y = digits
    straight = quick(name, solver=solver).partial_fit(X, y)
    pickled = pickle.loads(pickle.dumps(straight))
    for _ in range(2):
        straight.partial_fit(X, y)
        pickled.partial_fit(X, y)
    assert_same(straight, pickled, X)
    assert straight.n_iter_ == pickled.n_iter_ == len(pickled.history_) == 3
    assert pickled.t_ == straight.t_ >= 1200


@every_embedder
def test__partial_fits__are_the_epochs_of_one_fit(name, digits):
    X, y = digits
    whole = quick(name, learning_rate="constant", max_iter=4, tol=0.0)
    with pytest.warns(ConvergenceWarning):
        whole.fit(X, y)
    parts = quick(name)
    for _ in range(4):
        parts.partial_fit(X, y)
    assert_same(whole, parts, X)


def test__partial_fit__takes_other_classes_than_before(digits):
    X, y = digits
    model = quick().partial_fit(X[y < 5], y[y < 5])
    before = model.transform(X)
    model.partial_fit(X[y >= 5], np.array(list("abcdefghij"))[y[y >= 5]])
    assert model.n_iter_ == 2
    assert np.abs(model.transform(X) - before).max() > 1e-3
    for parameters in ({"early_stopping": True}, {"learning_rate": "cosine"}):
        with pytest.raises(ValueError, match=next(iter(parameters))):
            quick(**parameters).partial_fit(X, y)


def test__warm_start__goes_on_and_a_plain_fit_starts_afresh(digits):
    X, y = digits
    model = quick(warm_start=True, learning_rate_init=1e-2).fit(X, y)
    first = model.loss_
    model.fit(X, y)
    assert model.loss_ < first
    assert model.n_iter_ == 6
    again = pickle.loads(pickle.dumps(model)).fit(X, y)
    assert_same(again, model.fit(X, y), X)
    fresh = quick()
    assert_same(fresh.fit(X, y), clone(fresh).fit(X, y), X)
    model.fit(X[y > 5], y[y > 5])  # as partial_fit, of other classes
    assert model.n_iter_ == 12


def test__failed_training__leaves_the_fitted_model_as_it_was(digits):
    X, y = digits
    model = quick(warm_start=True, precision="float32").fit(X, y)
    before, content = model.transform(X), pickle.dumps(model)
    model.set_params(learning_rate_init=1e30)
    with pytest.raises(ValueError, match="diverged"):
        model.fit(X, y)
    np.testing.assert_array_equal(model.transform(X), before)
    model.set_params(learning_rate_init="auto")
    assert pickle.dumps(model) == content


# -- the training loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "exponential", "step", "adaptive"])
def test__schedules__set_the_rate(digits, schedule):
    X, y = digits
    model = quick(
        learning_rate=schedule,
        learning_rate_decay=0.5,
        learning_rate_step=1,
        learning_rate_init=0.1,
    )
    if schedule in ("one_cycle", "cosine"):
        model.fit(X, y)
        assert 0 < model.history_[-1]["learning_rate"] < 0.02
        return
    with pytest.warns(ConvergenceWarning):
        model.fit(X, y)
    rates = [row["learning_rate"] for row in model.history_]
    assert rates == ([0.1, 0.1, 0.1] if schedule == "adaptive" else [0.1, 0.05, 0.025])


def test__clipping_and_decay__act_on_the_weights(digits):
    X, y = digits

    def moved(**parameters):
        model = quick(solver="sgd", momentum=0.0, weight_decay=0.0, **parameters)
        initial = model._prepare(X, y, going_on=False)[0].module.parameters()
        trained = model.fit(X, y).module_.parameters()
        return sum((a - b).square().sum().item() for a, b in zip(initial, trained, strict=True))

    assert moved(clip_grad_norm=1e-6) < 1e-9 < 1e-6 < moved()
    assert moved(clip_grad_value=1e-8) < 1e-9

    def size(**parameters):
        weights = quick(**parameters).fit(X, y).module_.parameters()
        return sum(w.square().sum().item() for w in weights if w.ndim > 1)

    assert size(weight_decay=10.0, solver="adamw") < size(weight_decay=0.0, solver="adamw")
    assert size(alpha=1e4) < size(alpha=0.0)
    penalised = one_step(alpha=3.0).fit(X, y)
    plain = one_step().fit(X, y)
    penalty = 3.0 / 2 / 400 * size_of_weights(plain)
    assert penalised.loss_ == pytest.approx(plain.loss_ + penalty)


def size_of_weights(model):
    weights = model.module_.parameters()
    return sum(w.square().sum().item() for w in weights if w.ndim > 1)


class CountEpochs:
    """A callback of scikit-learn's protocol that looks at the embedder of each epoch."""

    max_propagation_depth = None

    def __init__(self):
        self.embeddings = []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, X, y, fitted_estimator):
        if context.task_name == "epoch":
            self.embeddings.append(fitted_estimator.transform(X))
            return len(self.embeddings) == 3
        return False


@every_embedder
def test__callback_of_scikit_learn__sees_a_fitted_embedder_and_may_stop(name, digits):
    X, y = digits
    callback = CountEpochs()
    model = quick(name, max_iter=20).set_callbacks(callback)
    model.fit(X, y)
    assert model.n_iter_ == len(callback.embeddings) == 3
    np.testing.assert_array_equal(callback.embeddings[-1], model.transform(X))
    assert not np.array_equal(callback.embeddings[0], callback.embeddings[1])


def test__progress_bar_of_scikit_learn__shows_the_embedder_inside_a_search(digits, capsys):
    pytest.importorskip("rich")
    X, y = digits
    search = GridSearchCV(
        make_pipeline(StandardScaler(), quick(max_iter=2, image_shape=(8, 8))),
        {"tripletembedder__margin": [0.1, 1.0]},
        scoring=recall_at_1_scorer,
        cv=2,
    )
    search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(X, y)
    assert "TripletEmbedder" in capsys.readouterr().out


class RecordLosses(Callback):
    def __init__(self):
        self.losses = []
        self.n_batches = 0

    def on_batch_end(self, net, training, **kwargs):
        self.n_batches += training

    def on_epoch_end(self, net, **kwargs):
        self.losses.append(net.history[-1]["train_loss"])
        if len(self.losses) == 2:
            raise KeyboardInterrupt  # skorch's way to end a training


def test__skorch_callbacks__see_epochs_and_may_stop(digits):
    X, y = digits
    callback = RecordLosses()
    model = quick(max_iter=9, batch_size=100, skorch_callbacks=[callback]).fit(X, y)
    (trained,) = model.skorch_callbacks_
    assert trained.losses == model.loss_curve_ and model.n_iter_ == 2
    assert trained.n_batches == 8
    assert callback.losses == []


def test__verbose__prints_a_line_an_epoch(digits, capsys):
    X, y = digits
    quick(verbose=True, max_iter=2).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["Epoch 1", "Epoch 2"]


# -- pickles, randomness ---------------------------------------------------------------------------


@every_embedder
@pytest.mark.parametrize("way", ["pickle", "joblib", "joblib mmap", "deepcopy"])
def test__copies__embed_the_same(name, way, digits, tmp_path):
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
    assert list(other.get_feature_names_out()) == list(model.get_feature_names_out())
    assert repr(clone(other)) == repr(clone(model))


@pytest.mark.parametrize(
    ("name", "mining"), [("triplet", "random"), ("triplet", "semihard"), ("supcon", "random")]
)
def test__result__is_the_same_in_any_thread_and_order(name, mining, digits):
    X, y = digits

    def embedding(seed):
        return quick(name, mining=mining, random_state=seed).fit(X, y).transform(X)

    seeds = [0, 1, 2, 0, 1, 2]
    alone = [embedding(seed) for seed in seeds[:3]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(embedding, seeds))
    for seed, embedded in zip(seeds, together, strict=True):
        np.testing.assert_allclose(embedded, alone[seed], rtol=0, atol=1e-12)
    assert not np.allclose(alone[0], alone[1])


@every_embedder
def test__global_generators__are_untouched(name, digits):
    X, y = digits
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    quick(name, early_stopping=True).fit(X, y).transform(X)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == expected  # noqa: NPY002


def test__drawn_triplets__do_not_shift_order_or_weights(digits):
    X, y = digits
    jobs = [quick(mining=mining)._prepare(X, y, going_on=False)[0] for mining in ("random", "all")]
    for job in jobs:
        job.criterion.train()(torch.randn(400, 2), job.train.targets)
    orders = [torch.randperm(9, generator=job.generators.order).tolist() for job in jobs]
    assert orders[0] == orders[1]
    first, second = (list(job.module.parameters()) for job in jobs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


# -- what it is for --------------------------------------------------------------------------------


def test__training__separates_digits_better_than_raw_pixels():
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.uint8)
    train, test = train_test_split(np.arange(len(y)), test_size=0.5, random_state=0, stratify=y)
    raw = KNeighborsClassifier(5).fit(X[train], y[train]).score(X[test], y[test])
    embedder = TripletEmbedder(16, channels=(32, 64), max_iter=30, random_state=0)
    model = make_pipeline(embedder, KNeighborsClassifier(5)).fit(X[train], y[train])
    assert model.score(X[test], y[test]) > raw
    assert map_at_r_scorer(embedder, X[test], y[test]) > map_at_r_score(X[test], y[test]) + 0.2


@pytest.mark.parametrize("scorer", [recall_at_1_scorer, map_at_r_scorer])
def test__scorers__choose_the_embedder_that_is_trained(digits, scorer):
    X, y = digits
    rates = [1e-9, 1e-2]
    alone = GridSearchCV(
        quick(max_iter=5), {"learning_rate_init": rates}, scoring=scorer, cv=2
    ).fit(X, y)
    assert alone.best_params_ == {"learning_rate_init": 1e-2}
    assert alone.score(X, y) == scorer(alone.best_estimator_, X, y)
    behind = make_pipeline(StandardScaler(), quick(max_iter=5, image_shape=(8, 8)))
    name = "tripletembedder__learning_rate_init"
    search = GridSearchCV(behind, {name: rates}, scoring=scorer, cv=2).fit(X.astype(float), y)
    assert search.best_params_ == {name: 1e-2}


def test__pipeline_on_real_images__in_cross_validation_and_search(cifar10):
    X, y = cifar10
    X, y = X[:300], y[:300]
    embedder = TripletEmbedder(8, channels=(8, 16), max_iter=3, random_state=0)
    pipeline = make_pipeline(embedder, SoftmaxRegression(alpha=1.0))
    scores = cross_val_score(pipeline, X, y, cv=2)
    assert scores.shape == (2,) and scores.mean() > 0.15
    grid = {"tripletembedder__margin": [0.1, 1.0], "softmaxregression__alpha": [1.0, 10.0]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X, y)
    assert search.best_estimator_[0].image_shape_ == (32, 32, 3)
    assert search.best_score_ > 0.15
