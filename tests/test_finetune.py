"""FineTunedClassifier: the encoder before, in and after the training; what classifiers share."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.callback import ProgressBar
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.callbacks import Callback

from skcifar import FineTunedClassifier, PretrainedFeatures, TripletEmbedder

RNG = np.random.default_rng(0)
EMBEDDER = TripletEmbedder(
    6,
    mining="all",
    margin=0.2,
    normalize_embedding=False,
    channels=(4, 8),
    solver="adam",
    max_iter=2,
    learning_rate_init=1e-2,
)


class SmallBackbone(torch.nn.Sequential):
    """A feature extractor with BatchNorm whose stem takes any number of channels."""

    def __init__(self, image_shape):
        super().__init__(
            torch.nn.Conv2d(image_shape[2], 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(2),
        )


def small_features(**parameters):
    return PretrainedFeatures(SmallBackbone, weights=None, image_size=None, **parameters)


PLAIN = {"solver": "adam", "label_smoothing": 0.0, "max_iter": 3, "learning_rate_init": 1e-2}
QUICK = {
    "embedder": FineTunedClassifier(EMBEDDER, random_state=0, **PLAIN),
    "features": FineTunedClassifier(small_features(), random_state=0, **PLAIN),
    "head": FineTunedClassifier(
        EMBEDDER,
        (8,),
        trainable="head",
        dropout=0.2,
        horizontal_flip=True,
        cutout=2,
        tta=True,
        random_state=0,
        **PLAIN,
    ),
}
every_classifier = pytest.mark.parametrize("name", QUICK)


@pytest.fixture(scope="module")
def digits():
    """400 digits as uint8 rows (400, 64) and labels 0 to 9."""
    X, y = load_digits(return_X_y=True)
    return X[:400].astype(np.uint8), y[:400]


@pytest.fixture(scope="module")
def embedder(digits):
    """An encoder that is fitted already."""
    return clone(EMBEDDER).set_params(random_state=0).fit(*digits)


def quick(name="embedder", **parameters):
    return clone(QUICK[name]).set_params(**parameters)


def assert_same(one, other, X, tolerance=0.0):
    np.testing.assert_allclose(
        one.decision_function(X), other.decision_function(X), rtol=0, atol=tolerance
    )


def weights_of(model):
    """Copies of all weights and running statistics, by name."""
    return {name: value.clone() for name, value in model.module_.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# -- the encoder before and in training ------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedder", "features"])
def test__plain_encoder__stays_as_it_is(name, digits):
    X, y = digits
    model = quick(name)
    before = repr(model.encoder)
    model.fit(X, y)
    assert repr(model.encoder) == before
    assert not hasattr(model.encoder, "module_")
    assert model.encoder.random_state is None
    with pytest.raises(NotFittedError):
        model.encoder.transform(X)
    assert type(model.encoder_) is type(model.encoder)


@pytest.mark.parametrize("trainable", ["all", "head", ["head"]])
def test__frozen_encoder__stays_as_it_is(digits, embedder, trainable):
    X, y = digits
    flags = {name: (p.requires_grad, p.grad) for name, p in embedder.module_.named_parameters()}
    before, content, features = weights_of(embedder), pickle.dumps(embedder), embedder.transform(X)
    frozen = FrozenEstimator(embedder)
    model = quick(encoder=frozen, trainable=trainable, precision="float64", warm_start=True)
    model.fit(X, y).fit(X, y).partial_fit(X, y)
    assert model.encoder is frozen and frozen.estimator is embedder
    assert_same_weights(weights_of(embedder), before)
    assert pickle.dumps(embedder) == content
    assert not any(part.training for part in embedder.module_.modules())
    for name, parameter in embedder.module_.named_parameters():
        assert (parameter.requires_grad, parameter.grad) == flags[name]
    np.testing.assert_array_equal(embedder.transform(X), features)


def test__head_only__leaves_weights_and_statistics_of_the_encoder(digits, embedder):
    X, y = digits
    model = quick(encoder=FrozenEstimator(embedder), trainable="head", weight_decay=0.1)
    model.fit(X, y)
    assert_same_weights(weights_of(model.encoder_), weights_of(embedder))
    np.testing.assert_array_equal(model.encoder_.transform(X), embedder.transform(X))
    all_of_it = quick(encoder=FrozenEstimator(embedder)).fit(X, y)
    changed = weights_of(all_of_it.encoder_)
    for name, value in weights_of(embedder).items():
        assert not torch.equal(value, changed[name]), name


@pytest.mark.parametrize("prefixes", [["features.4", "features.6"], ("head",), []])
def test__listed_parts__are_all_that_changes(digits, embedder, prefixes):
    X, y = digits
    model = quick(encoder=FrozenEstimator(embedder), trainable=prefixes).fit(X, y)
    trained = weights_of(model.encoder_)
    for name, value in weights_of(embedder).items():
        listed = any(name.startswith(f"network.{prefix}.") for prefix in prefixes)
        assert torch.equal(value, trained[name]) != listed, name


def test__unknown_part__error_names_those_there_are(digits):
    X, y = digits
    with pytest.raises(ValueError, match=r"'layer4'.*its parts are features, head"):
        quick(trainable=["layer4"]).fit(X, y)
    with pytest.raises(ValueError, match="'trainable' parameter of FineTunedClassifier"):
        quick(trainable="features").fit(X, y)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test__head_on_features_computed_once__is_that_trained_through_the_encoder(
    digits, embedder, monkeypatch, early_stopping, weighted
):
    X, y = digits
    weight = (np.arange(400) % 3).astype(float) if weighted else None
    frozen = FrozenEstimator(embedder)
    # the head's own arithmetic is that of its batch, so the encoder's must not round differently
    parameters = {"trainable": "head", "early_stopping": early_stopping, "precision": "float64"}
    once = quick(encoder=frozen, **parameters)
    job, _ = once._prepare(X, y, weight, going_on=False)
    assert job.train.rows.shape == (len(job.train), embedder.n_components)
    once.fit(X, y, weight)
    monkeypatch.setattr("skcifar.finetune._MOST_FEATURE_BYTES", 0)
    always = quick(encoder=frozen, **parameters)
    job, _ = always._prepare(X, y, weight, going_on=False)
    assert job.train.rows.shape == (400, 64)
    always.fit(X, y, weight)
    np.testing.assert_allclose(
        once.decision_function(X), always.decision_function(X), rtol=0, atol=1e-10
    )
    assert once.n_parameters_ == always.n_parameters_
    np.testing.assert_allclose(once.loss_curve_, always.loss_curve_, rtol=1e-10)
    np.testing.assert_allclose(once.validation_scores_ or [], always.validation_scores_ or [])


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test__rows_that_are_not_trained_on__are_unknown_to_the_encoder(
    digits, early_stopping, weighted
):
    X, y = digits
    model = quick(trainable="head", early_stopping=early_stopping, encoder__random_state=3)
    weight = (np.arange(400) % 3).astype(float) if weighted else None
    job, _ = clone(model).set_params(trainable="all")._prepare(X, y, weight, going_on=False)
    index = np.arange(400) if job.train.index is None else job.train.index.numpy()
    expected_rows = (266 if weighted else 400) * (0.9 if early_stopping else 1)
    assert len(index) == pytest.approx(expected_rows, abs=2)
    by_hand = clone(model.encoder).fit(X[index], y[index])
    model.fit(X, y, sample_weight=weight)
    assert_same_weights(weights_of(model.encoder_), weights_of(by_hand))
    assert (model.mean_, model.scale_) == (by_hand.mean_, by_hand.scale_)
    assert model.mean_ == pytest.approx(X[index].mean())


def test__encoder_without_seed__is_given_one(digits):
    X, y = digits
    first, second = (weights_of(quick(trainable="head").fit(X, y)) for _ in range(2))
    assert_same_weights(first, second)
    other = quick(trainable="head", random_state=1).fit(X, y)
    assert other.encoder_.random_state != quick().fit(X, y).encoder_.random_state
    assert quick(encoder__random_state=5).fit(X, y).encoder_.random_state == 5


def test__frozen_encoder_and_images_of_another_shape__error_says_both(digits, embedder):
    X, y = digits
    model = quick(encoder=FrozenEstimator(embedder))
    with pytest.raises(
        ValueError, match=r"shape \(4, 16, 1\), but the frozen encoder was.*\(8, 8, 1\)"
    ):
        model.fit(X.reshape(-1, 4, 16), y)
    with pytest.raises(ValueError, match=r"32 features, but the frozen encoder was.*64 features"):
        model.fit(X[:, :32], y)
    with pytest.raises(NotFittedError, match="TripletEmbedder instance is not fitted"):
        quick(encoder=FrozenEstimator(EMBEDDER)).fit(X, y)


@pytest.mark.parametrize(
    "encoder",
    [
        PCA(),
        make_pipeline(EMBEDDER),
        FrozenEstimator(PCA()),
        TripletEmbedder,
    ],
    ids=lambda encoder: str(encoder)[:20],
)
def test__encoder_that_is_not_ours__is_an_error_in_fit_only(digits, encoder):
    X, y = digits
    model = FineTunedClassifier(encoder)
    assert model.get_params(deep=False)["encoder"] is encoder
    assert "FineTunedClassifier(" in repr(model) and "FineTunedClassifier" in model._repr_html_()
    if not isinstance(encoder, type):
        assert repr(clone(model)) == repr(model)
    for fit in (model.fit, lambda X, y: model.partial_fit(X, y, classes=np.arange(10))):
        with pytest.raises(TypeError, match="cannot be trained further; expected a TripletEmbe"):
            fit(X, y)
    with pytest.raises(ValueError, match="implementing 'fit' and 'transform'"):
        FineTunedClassifier(LogisticRegression()).fit(X, y)


def test__bad_parameter_of_the_encoder__error_names_it(digits):
    X, y = digits
    for fit in (quick, lambda **bad: FineTunedClassifier(clone(EMBEDDER).set_params(**bad))):
        bad = {"encoder__p": 0.5} if fit is quick else {"temperature": -1.0}
        with pytest.raises(ValueError, match="parameter of TripletEmbedder must be"):
            fit(**bad).fit(X, y)


# -- the training ----------------------------------------------------------------------------------


def whole_batches(embedder, **parameters):
    """Plain gradient descent on all rows, in float64."""
    return FineTunedClassifier(
        FrozenEstimator(embedder),
        solver="sgd",
        momentum=0.0,
        label_smoothing=0.0,
        batch_size="full",
        learning_rate="constant",
        precision="float64",
        random_state=0,
    ).set_params(**parameters)


@pytest.fixture(scope="module")
def smooth_embedder(digits):
    """Without BatchNorm, in float64, and reading float images as they are."""
    X, y = digits
    model = clone(EMBEDDER).set_params(
        batch_norm=False, random_state=0, precision="float64", image_shape=(8, 8), normalize=True
    )
    return model.fit(X / 16, y)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("hidden_layer_sizes", [(), (5,)])
def test__training__is_a_plain_loop_over_the_cross_entropy(
    digits, smooth_embedder, hidden_layer_sizes
):
    X, y = digits
    X = X / 16
    model = whole_batches(
        smooth_embedder,
        hidden_layer_sizes=hidden_layer_sizes,
        activation="tanh",
        learning_rate_init=0.1,
        encoder_learning_rate=0.02,
        weight_decay=0.01,
        max_iter=3,
    )
    module = model._prepare(X, y, going_on=False)[0].module
    images = (X - X.mean()) / X.std()
    images = torch.from_numpy(images.reshape(-1, 1, 8, 8))
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(
            module.head(module.encoder.network(images)), torch.from_numpy(y)
        )
        named = list(module.named_parameters())
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in named])
        penalty = sum(p.square().sum().item() for _, p in named if p.ndim > 1)
        losses.append(loss.item() + 0.01 / 2 * penalty)
        with torch.no_grad():
            for (name, parameter), gradient in zip(named, gradients, strict=True):
                rate = 0.02 if name.startswith("encoder.") else 0.1
                decay = 0.01 * parameter if parameter.ndim > 1 else 0.0
                parameter -= rate * (gradient + decay)
    model.fit(X, y)
    assert model.loss_curve_ == pytest.approx(losses, rel=1e-10)
    for name, parameter in module.named_parameters():
        trained = dict(model.module_.named_parameters())[name]
        torch.testing.assert_close(trained, parameter, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test__encoder_learning_rate__scales_the_encoders_step_alone(digits, smooth_embedder, factor):
    X, y = digits
    X = X / 16

    def step(rate):
        model = whole_batches(
            smooth_embedder, learning_rate_init=0.01, encoder_learning_rate=rate, max_iter=1
        )
        initial = model._prepare(X, y, going_on=False)[0].module.state_dict()
        return {k: v - initial[k] for k, v in weights_of(model.fit(X, y)).items()}

    full, scaled, auto = step(0.01), step(0.01 * factor), step("auto")
    for name in full:
        of_encoder = name.startswith("encoder.")
        assert full[name].abs().max() > 1e-6, name
        for other, expected in ((scaled, factor), (auto, 0.1)):
            expected = full[name] * (expected if of_encoder else 1.0)
            torch.testing.assert_close(other[name], expected, rtol=1e-9, atol=1e-15)


class RecordRates(Callback):
    def __init__(self):
        self.rates = []

    def on_epoch_begin(self, net, **kwargs):
        self.rates.append({g["rate_factor"]: g["lr"] for g in net.optimizer_.param_groups})


def halve_every_epoch(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "exponential", halve_every_epoch])
def test__schedules__act_on_head_and_encoder(digits, embedder, schedule):
    X, y = digits
    model = quick(
        encoder=FrozenEstimator(embedder),
        learning_rate=schedule,
        learning_rate_decay=0.5,
        encoder_learning_rate=1e-3,
        warm_start=True,
        max_iter=2,
        skorch_callbacks=[RecordRates()],
    )
    rates = []
    for _ in range(2):
        rates += model.fit(X, y).skorch_callbacks_[0].rates
    for rate in rates:
        assert rate[0.1] == pytest.approx(0.1 * rate[1.0])
    head = [rate[1.0] for rate in rates]
    if schedule == "exponential" or callable(schedule):
        assert head == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    else:
        assert head[0] == head[2] == 0.01 and head[1] != 0.01


def test__clipping__limits_the_gradient_of_both_together(digits, smooth_embedder):
    X, y = digits
    X = X / 16

    def moved(**parameters):
        model = whole_batches(
            smooth_embedder,
            learning_rate="one_cycle",
            learning_rate_init=1.0,
            encoder_learning_rate=1.0,
            weight_decay=0.0,
            max_iter=1,
            **parameters,
        )
        initial = model._prepare(X, y, going_on=False)[0].module.state_dict()
        trained = weights_of(model.fit(X, y))
        steps = torch.cat([(trained[name] - initial[name]).flatten() for name in initial])
        return steps / model.history_[-1]["learning_rate"]

    free = moved()
    norm = free.norm()
    torch.testing.assert_close(moved(clip_grad_norm=1e-3), free * (1e-3 / norm), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved(clip_grad_value=1e-3), free.clamp(-1e-3, 1e-3))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__weights__are_repetitions_behind_a_frozen_encoder(digits, smooth_embedder):
    X, y = digits
    X = X / 16
    weight = np.random.default_rng(0).integers(0, 4, len(y))
    model = whole_batches(smooth_embedder, learning_rate_init=0.1, max_iter=3)
    weighted = clone(model).fit(X, y, sample_weight=weight)
    repeated = clone(model).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    assert_same(weighted, repeated, X, 1e-9)
    balanced = clone(model).set_params(class_weight="balanced").fit(X, y > 6)
    counts = np.bincount(y > 6)
    by_hand = clone(model).fit(X, y > 6, sample_weight=(400 / 2 / counts)[(y > 6).astype(int)])
    assert_same(balanced, by_hand, X, 1e-9)
    assert np.abs(balanced.decision_function(X) - model.fit(X, y > 6).decision_function(X)).max()


def test__class_of_weight_zero__stays_among_the_classes(digits):
    X, y = digits
    model = quick().fit(X, y, sample_weight=(y != 3).astype(float))
    assert 3 in model.classes_ and model.decision_function(X).shape == (400, 10)
    with pytest.raises(ValueError, match=r"at least 2 classes with non-zero weight.*: \[3\]"):
        quick().fit(X, y, sample_weight=(y == 3).astype(float))


@pytest.mark.parametrize(
    ("backbone", "image_size", "prefix"),
    [("alexnet", 64, "features.10"), ("resnet18", 32, "layer4")],
)
def test__imagenet_networks__train_a_step(backbone, image_size, prefix):
    X = RNG.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    y = np.arange(6) % 3
    features = PretrainedFeatures(backbone, weights=None, image_size=image_size, random_state=0)
    fitted = features.fit(X)
    model = FineTunedClassifier(
        FrozenEstimator(fitted), trainable=[prefix], max_iter=1, random_state=0
    )
    model.fit(X, y)
    trained = weights_of(model.encoder_)
    for name, value in weights_of(fitted).items():
        if name.endswith((".weight", ".bias")):
            assert torch.equal(value, trained[name]) != name.startswith(f"network.{prefix}"), name
    assert model.predict(X).shape == (6,)
    np.testing.assert_array_equal(model.mean_, np.array([0.485, 0.456, 0.406]) * 255)


# -- the encoder after training --------------------------------------------------------------------


@every_classifier
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test__trained_encoder__gives_what_the_head_reads(name, precision, digits):
    X, y = digits
    model = quick(name, tta=False, precision=precision).fit(X, y)
    assert model.encoder_.dtype_ == model.dtype_ == precision
    assert model.encoder_.device_ == model.device_ == "cpu"
    features = torch.from_numpy(model.encoder_.transform(X.astype(float)))
    assert features.shape == (400, model.encoder_._n_features_out)
    with torch.no_grad():
        outputs = model.module_.head(features.to(model.module_.head.head.weight.dtype))
    tolerance = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.1}[precision]
    np.testing.assert_allclose(outputs, model.decision_function(X), atol=tolerance)


@pytest.mark.parametrize("name", ["embedder", "features"])
def test__trained_encoder__shares_the_network_however_it_came_about(name, digits):
    X, y = digits
    model = quick(name, warm_start=True)
    states = {"fit": model.fit(X, y)}
    states["pickle"] = pickle.loads(pickle.dumps(model))
    states["deepcopy"] = copy.deepcopy(model)
    states["copy"] = copy.copy(model)
    states["refit clone"] = clone(model).fit(X, y)
    expected = model.encoder_.transform(X)
    for state, other in states.items():
        assert other.encoder_.module_ is other.module_.encoder, state
        np.testing.assert_array_equal(other.encoder_.transform(X), expected, err_msg=state)
        assert_same(other, model, X)
    assert states["deepcopy"].encoder_.module_ is not model.encoder_.module_
    model.fit(X, y)
    assert model.encoder_.module_ is model.module_.encoder
    assert np.abs(model.encoder_.transform(X) - expected).max() > 1e-4
    np.testing.assert_array_equal(states["deepcopy"].encoder_.transform(X), expected)
    model.partial_fit(X, y)
    assert model.encoder_.module_ is model.module_.encoder


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("trainable", ["all", "head"])
def test__trained_encoder__can_be_trained_further_and_fine_tuned_again(digits, trainable, pickled):
    X, y = digits
    model = quick(trainable=trainable).fit(X, y)
    if pickled:
        model = pickle.loads(pickle.dumps(model))
    outputs = model.decision_function(X)
    features = model.encoder_.transform(X)
    again = quick(encoder=FrozenEstimator(model.encoder_), random_state=5).fit(X, y)
    assert np.abs(again.encoder_.transform(X) - features).max() > 1e-4
    np.testing.assert_array_equal(model.decision_function(X), outputs)
    model.encoder_.partial_fit(X, y)
    assert np.abs(model.encoder_.transform(X) - features).max() > 1e-4
    np.testing.assert_array_equal(model.decision_function(X), outputs)


def test__pickle__holds_the_encoders_weights_once(digits):
    X, y = digits
    model = quick(encoder__channels=(16, 64), encoder__n_components=32).fit(X, y)
    assert model.n_parameters_ > 10_000
    size = 4 * model.n_parameters_
    assert size < len(pickle.dumps(model)) < 1.5 * size


def test__feature_store__never_mixes_trained_and_untrained_features(digits, tmp_path):
    X, y = digits
    features = small_features(memory=str(tmp_path), random_state=0).fit(X)
    before = features.transform(X)
    seen = []
    model = quick(encoder=FrozenEstimator(features))
    model.set_callbacks(LookAtEpochs(lambda fitted: seen.append(fitted.encoder_.transform(X))))
    model.fit(X, y)
    trained = model.encoder_.transform(X)
    uncached = copy.deepcopy(model.encoder_).set_params(memory=None).transform(X)
    np.testing.assert_allclose(trained, uncached, atol=1e-6)
    np.testing.assert_array_equal(model.encoder_.transform(X), trained)
    np.testing.assert_array_equal(features.transform(X), before)
    different = [before, *seen[:-1], trained]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert np.abs(one - other).max() > 1e-4


# -- searches --------------------------------------------------------------------------------------


def test__search__tries_parameters_of_the_encoder_and_its_own_at_once(digits):
    X, y = digits
    grid = {
        "encoder__margin": [0.1, 1.0],
        "trainable": ["all", "head"],
        "hidden_layer_sizes": [(), (4,)],
    }
    search = GridSearchCV(quick(), grid, cv=2, scoring="neg_log_loss").fit(X, y)
    assert len(set(search.cv_results_["mean_test_score"])) == 8
    assert search.best_estimator_.encoder_.margin == search.best_params_["encoder__margin"]
    frozen = quick(encoder=FrozenEstimator(clone(EMBEDDER).fit(X, y)))
    with pytest.raises(ValueError, match="You cannot set parameters of the inner estimator"):
        frozen.set_params(encoder__margin=0.1)
    kinds = {"encoder": [EMBEDDER, small_features()]}
    assert len(GridSearchCV(quick(), kinds, cv=2).fit(X, y).cv_results_["params"]) == 2


def test__cross_validation_and_search__run_on_real_images(cifar10):
    X, y = cifar10
    X, y = X[:300], y[:300]
    model = FineTunedClassifier(
        TripletEmbedder(16, channels=(8, 16), max_iter=4, batch_size=50),
        batch_size=25,
        max_iter=8,
        learning_rate_init=2e-2,
        encoder_learning_rate=1e-2,
        horizontal_flip=True,
        random_state=0,
    )
    scores = cross_val_score(model, X, y, cv=2)
    assert scores.shape == (2,) and scores.mean() > 0.15
    pipeline = make_pipeline(FunctionTransformer(), model)
    name = "finetunedclassifier__learning_rate_init"
    search = GridSearchCV(pipeline, {name: [1e-9, 2e-2]}, cv=2, error_score="raise").fit(X, y)
    assert search.best_estimator_[-1].image_shape_ == (32, 32, 3)
    assert search.best_params_ == {name: 2e-2}


def test__digits__are_told_apart():
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.uint8)
    embedder = TripletEmbedder(16, channels=(16, 32), max_iter=4)
    model = FineTunedClassifier(embedder, max_iter=12, learning_rate_init=2e-2, random_state=0)
    model.fit(X[:1200], y[:1200])
    assert model.score(X[1200:], y[1200:]) > 0.93


# -- what every classifier does --------------------------------------------------------------------


@every_classifier
def test__same_values_in_every_form__same_model(name, digits, tmp_path):
    X, y = digits
    expected = quick(name).fit(X, y)
    np.save(tmp_path / "X.npy", X)
    forms = {
        "list": X.tolist(),
        "DataFrame": pd.DataFrame(X, columns=[f"pixel{i}" for i in range(64)]),
        "read-only memmap": np.load(tmp_path / "X.npy", mmap_mode="r"),
        "tensor": torch.from_numpy(X),
        "int64": X.astype(np.int64),
        "images": X.reshape(-1, 8, 8),
        "images with a channel": X.reshape(-1, 8, 8, 1),
    }
    for form, values in forms.items():
        model = quick(name).fit(values, y)
        outputs = model.decision_function(values)
        np.testing.assert_array_equal(outputs, expected.decision_function(X), err_msg=form)
        assert model.n_features_in_ == 64 and model.image_shape_ == (8, 8, 1)
    for dtype in (np.uint16, np.float32, np.float64):
        outputs = expected.decision_function(X.astype(dtype))
        np.testing.assert_array_equal(outputs, expected.decision_function(X))


@pytest.mark.parametrize("name", ["embedder", "features"])
def test__layouts__are_those_of_the_encoder(name):
    X = RNG.integers(0, 256, (40, 9, 8, 3), dtype=np.uint8)
    y = np.arange(40) % 3
    planar = np.ascontiguousarray(X.transpose(0, 3, 1, 2))
    model = quick(name).fit(X, y)
    other = quick(name, encoder__layout="CHW").fit(planar, y)
    flat = quick(name, encoder__layout="CHW", encoder__image_shape=(9, 8, 3))
    flat.fit(planar.reshape(40, -1), y)
    assert model.image_shape_ == other.image_shape_ == flat.image_shape_ == (9, 8, 3)
    np.testing.assert_array_equal(other.decision_function(planar), model.decision_function(X))
    assert_same(other, flat, planar.reshape(40, -1))
    with pytest.raises(ValueError, match=r"shape \(8, 9, 3\).*fitted on images of shape \(9, 8, 3"):
        model.predict(X.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("n_classes", [2, 10])
def test__labels_and_probabilities__agree(digits, n_classes):
    X, y = digits
    labels = np.array([f"class {i}" for i in range(10)])[y % n_classes]
    model = quick(max_iter=20).fit(X, labels)
    probabilities = model.predict_proba(X)
    assert model.n_outputs_ == (1 if n_classes == 2 else 10)
    assert list(model.classes_) == sorted(set(labels))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], model.predict(X))
    assert model.score(X, labels) == accuracy_score(labels, model.predict(X)) > 1.5 / n_classes
    squared = quick(max_iter=20, loss="squared_error").fit(X, labels)
    assert not hasattr(squared, "predict_proba") and squared.score(X, labels) > 1.2 / n_classes


@every_classifier
def test__early_stopping__restores_the_best_epoch_and_stops(name, digits):
    X, y = digits
    model = quick(
        name,
        early_stopping=True,
        max_iter=40,
        n_iter_no_change=2,
        scoring="loss",
        learning_rate_init=0.1,
        encoder_learning_rate=0.05,
        precision="float32",
        tta=False,
    )
    model.fit(X[:300], y[:300], X_val=X[300:], y_val=y[300:])
    assert model.n_iter_ == len(model.validation_scores_) < 40
    assert model.best_validation_score_ == max(model.validation_scores_)
    assert model.best_validation_score_ > model.validation_scores_[-1]
    loss = log_loss(y[300:], model.predict_proba(X[300:]), labels=model.classes_)
    assert -loss == pytest.approx(model.best_validation_score_, rel=1e-4)


def test__validation_rows__are_recorded_weighted_and_change_nothing(digits):
    X, y = digits
    plain = quick().fit(X[:300], y[:300])
    weight = (np.arange(100) < 50).astype(float)
    recorded = quick(scoring="neg_log_loss").fit(
        X[:300], y[:300], X_val=X[300:], y_val=y[300:], sample_weight_val=weight
    )
    assert_same(plain, recorded, X)
    last = recorded.history_[-1]
    assert last["valid_accuracy"] == pytest.approx(recorded.score(X[300:350], y[300:350]))
    loss = log_loss(y[300:350], recorded.predict_proba(X[300:350]), labels=np.arange(10))
    assert last["valid_score"] == pytest.approx(-loss)
    with pytest.raises(ValueError, match=r"y_val contains labels \[77\]"):
        quick().fit(X, y, X_val=X[:1], y_val=[77])


@every_classifier
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
    np.testing.assert_array_equal(straight.encoder_.transform(X), pickled.encoder_.transform(X))


@every_classifier
def test__partial_fits__are_the_epochs_of_one_fit(name, digits):
    X, y = digits
    whole = quick(name, learning_rate="constant", max_iter=3, tol=0.0)
    with pytest.warns(ConvergenceWarning):
        whole.fit(X, y)
    parts = quick(name)
    for _ in range(3):
        parts.partial_fit(X, y, classes=np.arange(10))
    assert_same(whole, parts, X)


def test__partial_fit__refuses_what_needs_the_whole(digits):
    X, y = digits
    model = quick().partial_fit(X[y < 5], y[y < 5], classes=np.arange(9))
    model.partial_fit(X[y == 6], y[y == 6])
    with pytest.raises(ValueError, match=r"labels \[9\] that are not among the classes"):
        model.partial_fit(X, y)
    for parameters in ({"early_stopping": True}, {"learning_rate": "cosine"}):
        with pytest.raises(ValueError, match=next(iter(parameters))):
            quick(**parameters).partial_fit(X, y, classes=np.arange(10))


@every_classifier
def test__warm_start__goes_on_and_a_plain_fit_starts_afresh(name, digits):
    X, y = digits
    model = quick(name, warm_start=True).fit(X, y)
    first, encoder_epochs = model.loss_, getattr(model.encoder_, "n_iter_", None)
    model.fit(X, y)
    assert model.loss_ < first
    assert model.n_iter_ == 6
    assert getattr(model.encoder_, "n_iter_", None) == encoder_epochs  # not fitted again
    again = pickle.loads(pickle.dumps(model)).fit(X, y)
    assert_same(again, model.fit(X, y), X)
    fresh = quick(name)
    assert_same(fresh.fit(X, y), clone(fresh).fit(X, y), X)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("goes_on_with", ["fit", "partial_fit"])
def test__trainable_changed_after_fit__thaws_and_freezes(digits, embedder, pickled, goes_on_with):
    X, y = digits
    model = quick(encoder=FrozenEstimator(embedder), trainable="head", warm_start=True).fit(X, y)
    stages = [(["features.4"], "network.features.4."), ("all", "network."), ("head", "no part")]
    for trainable, prefix in stages:
        if pickled:
            model = pickle.loads(pickle.dumps(model))
        before = weights_of(model.encoder_)
        head = model.module_.head.head.weight.detach().clone()
        getattr(model.set_params(trainable=trainable), goes_on_with)(X, y)
        for name, value in weights_of(model.encoder_).items():
            assert torch.equal(value, before[name]) != name.startswith(prefix), (trainable, name)
        assert not torch.equal(model.module_.head.head.weight, head)


def test__trainable_changed_after_fit__does_not_take_up_moments_of_other_weights(digits, embedder):
    X, y = digits
    model = quick(encoder=FrozenEstimator(embedder), trainable=["features.4"], warm_start=True)
    model.fit(X, y)
    assert model._prepare(X, y, going_on=True)[0].state is not None
    model.set_params(trainable="all")
    assert model._prepare(X, y, going_on=True)[0].state is None
    model.fit(X, y)
    for parameter, state in model._training_state["optimizer"].items():
        assert state["step"] == 3 * 7, parameter  # epochs and steps of this fit alone


@pytest.mark.parametrize("warm_start", [False, True])
def test__failed_training__leaves_the_fitted_model_as_it_was(digits, warm_start):
    X, y = digits
    model = quick(warm_start=warm_start, encoder__random_state=0).fit(X, y)
    outputs, features = model.decision_function(X), model.encoder_.transform(X)
    failing = {"learning_rate_init": 1e30, "loss": "squared_error", "precision": "float32"}
    with pytest.raises(ValueError, match="diverged"):
        model.set_params(**failing).fit(X, y)
    if not warm_start:  # then the encoder is trained, and may fail, too
        encoder = {"encoder__learning_rate_init": 1e30, "encoder__precision": "float32"}
        with pytest.raises(ValueError, match="diverged"):
            model.set_params(**encoder).fit(X, y)
    model.set_params(loss="cross_entropy")
    np.testing.assert_array_equal(model.decision_function(X), outputs)
    np.testing.assert_array_equal(model.encoder_.transform(X), features)
    assert model.encoder_.module_ is model.module_.encoder


# -- callbacks -------------------------------------------------------------------------------------


class LookAtEpochs:
    """A callback of scikit-learn's protocol that notes tasks and looks at each epoch's model."""

    max_propagation_depth = None

    def __init__(self, look, n_epochs=None):
        self.look = look
        self.n_epochs = n_epochs
        self.tasks = []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        self.tasks.append((type(estimator).__name__, context.task_name))

    def on_fit_task_end(self, estimator, context, *, X, y, fitted_estimator):
        if context.task_name != "epoch" or not isinstance(estimator, FineTunedClassifier):
            return False
        self.look(fitted_estimator)
        return self.tasks.count(("FineTunedClassifier", "epoch")) == self.n_epochs


@every_classifier
@pytest.mark.parametrize("warm_start", [False, True])
def test__callback_of_scikit_learn__sees_the_encoders_fit_and_a_whole_model_each_epoch(
    name, warm_start, digits
):
    X, y = digits
    seen = []

    def look(fitted):
        assert fitted.encoder_.module_ is fitted.module_.encoder
        assert_same(copy.deepcopy(fitted), fitted, X, 1e-12)
        seen.append((fitted.decision_function(X), fitted.encoder_.transform(X)))

    model = quick(name, max_iter=20, precision="float64", warm_start=warm_start)
    for _ in range(2):
        callback = LookAtEpochs(look, n_epochs=2)
        model.set_callbacks(callback).fit(X, y)
        fits_encoder = not (warm_start and len(seen) > 2)
        epochs = [("TripletEmbedder", "fit"), *[("TripletEmbedder", "epoch")] * 2]
        assert callback.tasks == [
            ("FineTunedClassifier", "fit"),
            *[("FineTunedClassifier", "encoder")] * fits_encoder,
            *(epochs if name != "features" else []) * fits_encoder,
            *[("FineTunedClassifier", "epoch")] * 2,
        ]
        outputs, features = seen[-1]
        np.testing.assert_array_equal(outputs, model.decision_function(X))
        np.testing.assert_array_equal(features, model.encoder_.transform(X))
    assert len(seen) == 4 and not np.array_equal(seen[0][0], seen[1][0])
    assert model.n_iter_ == (4 if warm_start else 2)


@pytest.mark.parametrize("name", ["embedder", "features"])
def test__progress_bar_of_scikit_learn__shows_the_encoders_fit(name, digits, capsys):
    pytest.importorskip("rich")
    X, y = digits
    search = GridSearchCV(quick(name), {"alpha": [0.1, 1.0]}, cv=2)
    search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(X, y)
    shown = capsys.readouterr().out
    assert "FineTunedClassifier" in shown
    assert ("FineTunedClassifier - encoder | TripletEmbedder" in shown) == (name == "embedder")


class RecordLosses(Callback):
    def __init__(self):
        self.losses = []

    def on_epoch_end(self, net, **kwargs):
        self.losses.append(net.history[-1]["train_loss"])
        if len(self.losses) == 2:
            raise KeyboardInterrupt  # skorch's way to end a training


def test__skorch_callbacks__see_epochs_and_may_stop(digits):
    X, y = digits
    callback = RecordLosses()
    model = quick(max_iter=9, skorch_callbacks=[callback]).fit(X, y)
    (trained,) = model.skorch_callbacks_
    assert trained.losses == model.loss_curve_ and model.n_iter_ == 2
    assert callback.losses == []


# -- pickles, randomness ---------------------------------------------------------------------------


@every_classifier
@pytest.mark.parametrize("way", ["joblib", "joblib mmap"])
def test__stored_model__predicts_the_same(name, way, digits, tmp_path):
    X, y = digits
    model = quick(name).fit(X, y)
    joblib.dump(model, tmp_path / "model.joblib")
    other = joblib.load(tmp_path / "model.joblib", mmap_mode="r" if "mmap" in way else None)
    assert_same(model, other, X)
    assert repr(clone(other)) == repr(clone(model))
    assert other.set_params(warm_start=True).fit(X, y).n_iter_ == 6


@every_classifier
def test__result__is_the_same_in_any_thread_and_order(name, digits):
    X, y = digits

    def outputs(seed):
        return quick(name, random_state=seed).fit(X, y).decision_function(X)

    seeds = [0, 1, 0, 1]
    alone = [outputs(seed) for seed in seeds[:2]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(outputs, seeds))
    for seed, found in zip(seeds, together, strict=True):
        np.testing.assert_allclose(found, alone[seed], rtol=0, atol=1e-12)
    assert not np.allclose(alone[0], alone[1])


@every_classifier
def test__global_generators__are_untouched(name, digits):
    X, y = digits
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    quick(name, early_stopping=True).fit(X, y).predict(X)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == expected  # noqa: NPY002


def test__encoder_trained_further_by_itself__copies_and_pickles_predict_as_before(digits):
    X, y = digits
    model = quick(max_iter=2).fit(X, y)
    expected = model.decision_function(X)
    model.encoder_.set_params(channels=(4,), n_components=3).fit(X, y % 2)
    np.testing.assert_array_equal(model.decision_function(X), expected)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(other.decision_function(X), expected)
        np.testing.assert_array_equal(other.encoder_.transform(X), model.encoder_.transform(X))


def test__column_names__reach_the_encoder_and_must_be_the_frozen_ones(digits):
    X, y = digits
    frame = pd.DataFrame(X).add_prefix("pixel")
    model = quick(max_iter=1).fit(frame, y)
    np.testing.assert_array_equal(model.encoder_.feature_names_in_, frame.columns)
    frozen = FrozenEstimator(model.encoder_)
    quick(encoder=frozen, max_iter=1).fit(frame, y)
    with pytest.raises(ValueError, match="other column names, or in another order"):
        quick(encoder=frozen, max_iter=1).fit(frame[frame.columns[::-1]], y)
