"""CNNClassifier: image shapes, architectures, augmentation, averaging at prediction."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from torch import nn

from skcifar import CNNClassifier, FineTunedClassifier, TripletEmbedder

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:500].astype(np.uint8), y[:500]


def tiny(**parameters):
    return CNNClassifier((4,), max_iter=1, random_state=0, **parameters)


@pytest.mark.parametrize(
    ("n_features", "shape"),
    [
        (64, (8, 8, 1)),
        (192, (8, 8, 3)),
        (784, (28, 28, 1)),
        (3072, (32, 32, 3)),
        (49, (1, 1, 49)),
        (65, (1, 1, 65)),
        (3, (1, 1, 3)),
        (147, (1, 1, 147)),
    ],
)
def test__flat_rows__are_square_images_of_8_pixels_or_more(n_features, shape):
    X = RNG.integers(0, 256, (20, n_features), dtype=np.uint8)
    assert tiny().fit(X, np.arange(20) % 2).image_shape_ == shape


def test__guess_on_values_that_are_not_whole__warns_and_can_be_declined(digits):
    X, y = digits
    pipeline = make_pipeline(PCA(64, random_state=0), tiny())
    with pytest.warns(UserWarning, match=r"image_shape=\(1, 1, 64\)"):
        pipeline.fit(X, y)
    pipeline.set_params(cnnclassifier__image_shape=(1, 1, 64)).fit(X, y)
    assert pipeline[-1].image_shape_ == (1, 1, 64)
    pipeline.set_params(cnnclassifier__image_shape=(8, 8)).fit(X, y)
    assert pipeline[-1].image_shape_ == (8, 8, 1)


@pytest.mark.parametrize(
    ("name", "size"), [("airbench94", 9), ("lenet5", 12), ("vgg11", 32), ("resnet18", 8)]
)
def test__architecture__runs_at_its_smallest_image_and_names_it_below(name, size):
    y = np.arange(8) % 2
    model = CNNClassifier(architecture=name, max_iter=1, random_state=0)
    images = RNG.integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    assert model.fit(images, y).predict(images).shape == (8,)
    with pytest.raises(ValueError, match=f"at least {size} x {size} pixels"):
        model.fit(images[:, 1:], y)


def test__factory__gets_shape_and_outputs_and_survives_pickling(digits):
    import pickle

    X, y = digits
    model = CNNClassifier(architecture=TwoLayers, max_iter=2, random_state=0).fit(X, y)
    assert isinstance(model.module_, TwoLayers)
    assert model.n_parameters_ == 64 * 10 + 10
    other = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(other.decision_function(X), model.decision_function(X))


class TwoLayers(torch.nn.Sequential):
    def __init__(self, image_shape, n_outputs):
        height, width, channels = image_shape
        super().__init__(
            torch.nn.Flatten(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(height * width * channels, n_outputs),
        )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kernel_size": 2}, "even number"),
        ({"kernel_size": (3, 4)}, "even number"),
        ({"kernel_size": (3, 3)}, "has 2 values for 1 layers"),
        ({"activation": ["relu", "relu"]}, "has 2 values for 1 layers"),
        ({"hidden_layer_sizes": (0,)}, "hidden_layer_sizes"),
        ({"batch_size": 1}, "BatchNorm cannot train on batches of one"),
    ],
)
def test__parameters_that_make_no_network__error_says_why(digits, parameters, message):
    X, y = digits
    with pytest.raises(ValueError, match=message):
        tiny(**parameters).fit(X, y)


def test__augmentation__is_for_training_only_and_fits_the_image(digits):
    X, y = digits
    model = tiny(translate=8, horizontal_flip=True).fit(X, y)
    np.testing.assert_array_equal(model.decision_function(X), model.decision_function(X))
    big = RNG.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    job, _ = tiny(translate=2)._prepare(big, np.arange(20) % 2, None, going_on=False)
    assert job.augment.translate == 2
    job, _ = tiny(translate=2)._prepare(X, y, None, going_on=False)
    assert job.augment is None
    without = tiny(translate=0).fit(big, np.arange(20) % 2)
    assert not np.allclose(
        without.decision_function(big),
        tiny(translate=2).fit(big, np.arange(20) % 2).decision_function(big),
    )


def test__alternating_flip__shows_every_image_from_both_sides_in_two_epochs():
    X = np.arange(20 * 64, dtype=np.float64).reshape(20, 8, 8, 1)
    shown = []

    class Seen(nn.Module):
        def __init__(self, image_shape, n_outputs):
            super().__init__()
            self.head = nn.Linear(64, n_outputs)

        def forward(self, x):
            if self.training:
                shown.append(x.detach().clone())
            return self.head(x.flatten(1))

    CNNClassifier(
        architecture=Seen,
        horizontal_flip="alternating",
        batch_size=6,
        max_iter=4,
        learning_rate_init=1e-9,
        precision="float64",
        random_state=0,
    ).fit(X, np.arange(20) % 2)
    epochs = torch.cat(shown).numpy().reshape(4, 20, 8, 8)
    rows = epochs.min((2, 3)).astype(int) // 64  # which image it is, from either side
    flipped = epochs[:, :, 0, 0] > epochs[:, :, 0, 7]
    sides = np.array([side[np.argsort(row)] for side, row in zip(flipped, rows, strict=True)])
    assert 0 < sides[0].sum() < 20
    np.testing.assert_array_equal(sides[1:], ~sides[:-1])


def test__auto__is_the_recipe_of_the_architecture_unless_it_is_said_otherwise():
    X = RNG.integers(0, 256, (2600, 12, 12, 3), dtype=np.uint8)
    y = np.arange(2600) % 2

    def recipe(X=X, **parameters):
        return CNNClassifier(**parameters)._prepare(X, y[: len(X)], None, going_on=False)[0]

    job = recipe(architecture="airbench94")
    names = ("solver", "max_iter", "momentum", "learning_rate_init", "batch_size", "lookahead")
    assert [getattr(job.recipe, n) for n in names] == ["muon", 8, 0.6, 0.24, 104, False]
    assert job.augment.alternating
    job = recipe(architecture="airbench94", solver="sgd", max_iter=3, batch_size=32)
    assert [getattr(job.recipe, n) for n in names] == ["sgd", 3, 0.85, 1.5, 32, True]
    job = recipe(architecture="airbench94", solver="adam", horizontal_flip=False)
    assert [getattr(job.recipe, n) for n in names] == ["adam", 13, 0.9, 1e-3, 64, False]
    assert job.augment is None
    assert recipe(X[..., 0], architecture="airbench94").augment is None
    job = recipe(solver="muon")
    assert [getattr(job.recipe, n) for n in names] == ["muon", 13, 0.6, 0.24, 64, False]
    assert job.recipe.rate_factor_beside_muon == pytest.approx(0.5 / 0.24)
    assert [getattr(recipe().recipe, n) for n in names] == ["sgd", 13, 0.9, 0.5, 64, False]


def test__whitening__is_of_all_the_images_and_survives_pickling_and_partial_fit():
    rng = np.random.default_rng(0)
    # smooth images of two kinds, sorted: neighbouring pixels and channels are alike
    X = rng.normal(0, 40, (300, 12, 12, 3)).cumsum(1).cumsum(2).clip(-99, 99) + 100
    X = X.astype(np.uint8)
    y = np.repeat([0, 1], 150)
    X[y == 1, :, :, 0] //= 4
    model = CNNClassifier(architecture="airbench94", max_iter=1, precision="float32")
    model.fit(X, y)
    layer = model.module_.whitening
    images = model._reader(vars(model), torch.device("cpu"))(torch.from_numpy(X.reshape(300, -1)))
    with torch.no_grad():
        outputs = (layer(images) - layer.bias[:, None, None]).transpose(0, 1).flatten(1)
    moments = (outputs[:12] @ outputs[:12].T / outputs.shape[1]).numpy()
    off_diagonal = moments - np.diag(np.diag(moments))
    np.testing.assert_allclose(off_diagonal, 0, atol=1e-4)
    assert 0.5 < np.diag(moments).min() <= np.diag(moments).max() < 1.0001  # eps of 5e-4
    np.testing.assert_allclose(outputs[:12], -outputs[12:], atol=1e-5)
    weight = layer.weight.clone()
    again = pickle.loads(pickle.dumps(model)).partial_fit(X, y)
    assert torch.equal(again.module_.whitening.weight, weight)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(model)).decision_function(X), model.decision_function(X)
    )


def test__whitening_of_a_frozen_encoder__stays_as_it_is():
    X = RNG.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8)
    y = np.arange(60) % 2
    embedder = TripletEmbedder(4, architecture="airbench94", max_iter=1, random_state=0).fit(X, y)
    weight = embedder.module_.network.whitening.weight
    assert not torch.equal(weight[:12], torch.zeros_like(weight[:12]))
    model = FineTunedClassifier(
        FrozenEstimator(embedder), trainable="head", translate=0, max_iter=1, random_state=0
    )
    model.fit(np.repeat(X[..., :1], 3, axis=3), y)
    assert torch.equal(model.encoder_.module_.network.whitening.weight, weight)


@pytest.mark.parametrize("horizontal_flip", [False, True])
def test__tta__is_the_mean_over_moved_and_mirrored_images(digits, horizontal_flip):
    X, y = digits
    model = tiny(horizontal_flip=horizontal_flip, precision="float32").fit(X, y)
    images = X.reshape(-1, 8, 8)

    def over_moves(images):
        padded = np.pad(images, [(0, 0), (1, 1), (1, 1)], mode="reflect")
        views = [(images, 0.5), (padded[:, :8, :8], 0.25), (padded[:, 2:, 2:], 0.25)]
        return sum(share * model.decision_function(view) for view, share in views)

    expected = over_moves(images)
    if horizontal_flip:
        expected = (expected + over_moves(images[:, :, ::-1])) / 2
    averaged = model.set_params(tta=True).decision_function(images)
    np.testing.assert_allclose(averaged, expected, atol=1e-5)


def test__full_batch__is_read_in_pieces_with_the_same_gradient(digits, monkeypatch):
    from skcifar import _training

    X, y = digits
    model = tiny(batch_size="full", batch_norm=False, precision="float64", solver="sgd")
    whole = model.fit(X, y).decision_function(X)
    monkeypatch.setattr(_training, "PIECE_ROWS", 70)
    np.testing.assert_allclose(model.fit(X, y).decision_function(X), whole, atol=1e-10)


def test__digits__are_told_apart():
    X, y = load_digits(return_X_y=True)
    scores = cross_val_score(CNNClassifier(random_state=0), X.astype(np.uint8), y, cv=3)
    assert scores.mean() > 0.96


def test__real_images__are_learned(cifar10):
    X, y = cifar10
    model = CNNClassifier((16, 32, 64), max_iter=4, random_state=0).fit(X[:4000], y[:4000])
    assert model.image_shape_ == (32, 32, 3)
    assert model.score(X[4000:6000], y[4000:6000]) > 0.4
