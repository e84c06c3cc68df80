"""CNNClassifier: image shapes, architectures, augmentation, averaging at prediction."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from skcifar import CNNClassifier

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


@pytest.mark.parametrize(("name", "size"), [("lenet5", 12), ("vgg11", 32), ("resnet18", 8)])
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
