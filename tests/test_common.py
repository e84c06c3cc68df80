"""scikit-learn's own checks on every class, with default and other parameters."""

from functools import partial

import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_param_validation,
    check_set_output_transform,
    estimator_checks_generator,
    parametrize_with_checks,
)

import skcifar
from skcifar import (
    CNNClassifier,
    FineTunedClassifier,
    MLPClassifier,
    PretrainedFeatures,
    SoftmaxRegression,
    TripletEmbedder,
    preprocessing,
)
from skcifar.preprocessing import GaussianBlur


class GroupNormNetwork(torch.nn.Sequential):
    """A network of the user's own, in which rows do not depend on their batch."""

    def __init__(self, image_shape, n_outputs):
        height, width, channels = image_shape
        super().__init__(
            torch.nn.Conv2d(channels, 16, 3, padding=1),
            torch.nn.GroupNorm(4, 16),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * height * width, n_outputs),
        )


class SmallBackbone(torch.nn.Sequential):
    """A feature extractor whose stem takes any number of channels."""

    def __init__(self, image_shape):
        super().__init__(
            torch.nn.Conv2d(image_shape[2], 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(2),
        )


def small_features(**parameters):
    return PretrainedFeatures(SmallBackbone, weights=None, image_size=None, **parameters)


# Checks that scikit-learn runs on its own estimators only.
KEPT_FOR_ITSELF = [
    check_dataframe_column_names_consistency,
    check_param_validation,
    check_set_output_transform,
]

# Repeating a row is not the same as doubling its weight where arithmetic rounds to 1e-7 of the
# value, rows meet in mini-batches, or noise is drawn for each row.
LOW_PRECISION = "float32 or bfloat16 arithmetic: equal to rounding, not to 1e-7"
MINI_BATCHES = "batch_size < n_samples: repeated rows fall into other batches"
BATCH_NORM = "BatchNorm and bfloat16: a row's output depends on its batch"
DROPOUT = "dropout draws a mask for every row"
ENCODER = "float32 or bfloat16 arithmetic, and an encoder that is fitted without weights"

INSTANCES = [
    (SoftmaxRegression(random_state=0), None),
    (SoftmaxRegression(solver="adam", learning_rate_init=0.05, max_iter=50, random_state=0), None),
    (
        SoftmaxRegression(
            solver="sgd",
            learning_rate_init=0.1,
            max_iter=50,
            batch_size=16,
            random_state=0,
        ),
        MINI_BATCHES,
    ),
    (SoftmaxRegression(precision="float32", random_state=0), LOW_PRECISION),
    (MLPClassifier(random_state=0), None),
    (MLPClassifier(solver="lbfgs", max_iter=200, random_state=0), None),
    (
        MLPClassifier(
            (32, 16),
            activation="tanh",
            batch_size=16,
            learning_rate="constant",
            learning_rate_init=0.01,
            random_state=0,
        ),
        MINI_BATCHES,
    ),
    (
        MLPClassifier(
            dropout=0.2, solver="adamw", weight_decay=1e-3, learning_rate_init=0.01, random_state=0
        ),
        DROPOUT,
    ),
    (MLPClassifier(precision="bfloat16", random_state=0), LOW_PRECISION),
    (CNNClassifier(random_state=0), BATCH_NORM),
    (
        CNNClassifier(
            (16, 32),
            batch_norm=False,
            solver="adam",
            learning_rate_init=0.01,
            batch_size=16,
            precision="float32",
            random_state=0,
        ),
        MINI_BATCHES,
    ),
    (
        CNNClassifier(
            (8, 8),
            solver="muon",
            lookahead=True,
            horizontal_flip="alternating",
            batch_size=16,
            precision="float32",
            random_state=0,
        ),
        BATCH_NORM,
    ),
    (
        CNNClassifier(architecture=GroupNormNetwork, precision="bfloat16", random_state=0),
        LOW_PRECISION,
    ),
    (TripletEmbedder(random_state=0), None),
    (
        TripletEmbedder(
            4,
            mining="all",
            p=1.0,
            channels=(16,),
            batch_norm=False,
            sampler="balanced",
            batch_size=16,
            precision="float64",
            random_state=0,
        ),
        None,
    ),
    (
        TripletEmbedder(
            8, loss="supcon", channels=(16,), normalize_embedding=True, tta=True, random_state=0
        ),
        None,
    ),
    (small_features(random_state=0), None),
    (small_features(layer="0", precision="float64", batch_size=7, random_state=0), None),
    (FineTunedClassifier(small_features(), random_state=0), ENCODER),
    (
        FineTunedClassifier(
            TripletEmbedder(8, channels=(16, 32), max_iter=5),
            (16,),
            trainable="head",
            learning_rate_init=0.01,
            max_iter=30,
            random_state=0,
        ),
        ENCODER,
    ),
    (GaussianBlur(), None),
    (GaussianBlur(1.5, 3, border="constant", layout="CHW", device="cpu"), None),
]
REASONS = {id(estimator): reason for estimator, reason in INSTANCES}


def expected_failures(estimator):
    reason = REASONS[id(estimator)]
    if reason is None:
        return {}
    return {"check_sample_weight_equivalence_on_dense_data": reason}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [estimator for estimator, _ in INSTANCES], expected_failed_checks=expected_failures
)
def test__scikit_learns_checks__pass(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [estimator for estimator, _ in INSTANCES], ids=str)
def test__checks__are_all_run_and_none_is_tagged_away(estimator):
    classifies = is_classifier(estimator)
    assert len(list(estimator_checks_generator(estimator))) >= (62 if classifies else 47)
    tags = get_tags(estimator)
    defaults = get_tags(LogisticRegression() if classifies else NeighborhoodComponentsAnalysis())
    if classifies:
        assert tags.classifier_tags.poor_score == defaults.classifier_tags.poor_score
    assert tags.input_tags.two_d_array == defaults.input_tags.two_d_array
    for name in ("non_deterministic", "no_validation", "_skip_test"):
        assert getattr(tags, name) == getattr(defaults, name)


# With all defaults but the seed, and what it cannot do without or would download.
DEFAULTS = {
    CNNClassifier: CNNClassifier,
    MLPClassifier: MLPClassifier,
    SoftmaxRegression: SoftmaxRegression,
    TripletEmbedder: TripletEmbedder,
    PretrainedFeatures: small_features,
    FineTunedClassifier: partial(FineTunedClassifier, small_features()),
    GaussianBlur: GaussianBlur,
}


def seeded(estimator):
    return (
        estimator.set_params(random_state=0)
        if "random_state" in estimator.get_params()
        else estimator
    )


def test__every_public_class__is_checked():
    public = {getattr(skcifar, name) for name in skcifar.__all__}
    public |= {getattr(preprocessing, name) for name in preprocessing.__all__}
    assert {type(estimator) for estimator, _ in INSTANCES} == public == set(DEFAULTS)
    for default in DEFAULTS.values():
        assert any(repr(clone(e)) == repr(seeded(default())) for e, _ in INSTANCES)


def test__weights_equal_repetition__in_float64_without_exception():
    exempt = {type(e) for e, reason in INSTANCES if reason is None}
    assert {SoftmaxRegression, MLPClassifier} <= exempt


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("check", KEPT_FOR_ITSELF, ids=lambda check: check.__name__)
def test__checks_that_scikit_learn_keeps_for_itself__pass(kind, check):
    estimator = seeded(DEFAULTS[kind]())
    if "max_iter" in estimator.get_params(deep=False):
        estimator.set_params(max_iter=2)
    check(kind.__name__, estimator)
