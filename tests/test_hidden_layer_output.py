"""hidden_layer_output: the activations of every hidden layer, against networks run by hand."""

import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skcifar import (
    CNNClassifier,
    FineTunedClassifier,
    MLPClassifier,
    PretrainedFeatures,
    SoftmaxRegression,
    TripletEmbedder,
)
from skcifar.datasets import load_digits

DIGITS, LABELS = (part[:200] for part in load_digits(return_X_y=True))
RNG = np.random.default_rng(0)

IN_NUMPY = {
    "identity": lambda z: z,
    "logistic": expit,
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * (1 + erf(z / np.sqrt(2))) / 2,
    "silu": lambda z: z * expit(z),
}


def fitted(classifier, X=DIGITS, y=LABELS):
    return clone(classifier).set_params(max_iter=1, random_state=0).fit(X, y)


def normalised(classifier, images):
    """Images (n, height, width, channels) in float32 as the network reads them, NCHW."""
    pixels = (images - classifier.mean_) / classifier.scale_
    return torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)


# -- perceptrons -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", sorted(IN_NUMPY))
def test__perceptron__layers_are_those_of_coefs_and_intercepts(activation):
    # Dropout is off, and the coefficients act on X as it is given: uint8, normalised inside.
    model = fitted(MLPClassifier((9, 7, 5), activation, dropout=0.5, precision="float64"))
    h = DIGITS.astype(np.float64)
    for i in range(3):
        h = IN_NUMPY[activation](h @ model.coefs_[i] + model.intercepts_[i])
        for layer in (i, i - 3):
            found = model.hidden_layer_output(DIGITS, layer=layer)
            assert found.shape == (200, (9, 7, 5)[i])
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, h, rtol=1e-9, atol=1e-11)
    outputs = model.hidden_layer_output(DIGITS) @ model.coefs_[-1] + model.intercepts_[-1]
    np.testing.assert_allclose(outputs, model.decision_function(DIGITS), rtol=1e-12, atol=1e-12)


def test__float32_fit__gives_float32():
    assert fitted(MLPClassifier((4,))).hidden_layer_output(DIGITS).dtype == np.float32


@pytest.mark.parametrize(
    "classifier", [SoftmaxRegression(solver="sgd"), MLPClassifier(())], ids=str
)
def test__linear_model__has_no_hidden_layer(classifier):
    name = type(classifier).__name__
    with pytest.raises(ValueError, match=f"this {name} has no hidden layer"):
        fitted(classifier).hidden_layer_output(DIGITS)


# -- convolutional networks ------------------------------------------------------------------------


def test__convolutional_network__has_its_stages_and_its_dense_layers():
    model = fitted(
        CNNClassifier(
            (3, (4, 5)), (6, 7), batch_norm=False, dropout=0.5, tta=True, precision="float32"
        )
    )
    convolution1, convolution2, convolution3 = (
        part for part in model.module_.features if isinstance(part, nn.Conv2d)
    )
    dense1, dense2 = (part for part in model.module_.dense if isinstance(part, nn.Linear))
    pool, relu = nn.MaxPool2d(2), torch.relu
    with torch.no_grad():
        x = normalised(model, DIGITS.reshape(-1, 8, 8, 1))
        stage1 = relu(pool(convolution1(x)))  # (n, 3, 4, 4)
        stage2 = relu(pool(convolution3(relu(convolution2(stage1))))).amax((2, 3))  # (n, 5)
        hidden1 = relu(stage2 @ dense1.weight.T + dense1.bias)
        hidden2 = relu(hidden1 @ dense2.weight.T + dense2.bias)
        outputs = hidden2 @ model.module_.head.weight.T + model.module_.head.bias
    for layer, expected in enumerate([stage1.flatten(1), stage2, hidden1, hidden2]):
        found = model.hidden_layer_output(DIGITS, layer)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found, model.hidden_layer_output(DIGITS, layer - 4))
    plain = model.set_params(tta=False).decision_function(DIGITS)
    np.testing.assert_allclose(outputs.numpy(), plain, rtol=1e-4, atol=1e-5)


def test__image_of_a_convolution__is_flat_channel_by_channel_and_row_by_row():
    model = fitted(CNNClassifier((3, 4), batch_norm=False, precision="float32"))
    convolution = model.module_.features[0]
    with torch.no_grad():
        filtered = convolution(normalised(model, DIGITS[:1].reshape(1, 8, 8, 1)))[0].numpy()
    found = model.hidden_layer_output(DIGITS[:1], 0)[0]
    for k, row, column in [(0, 0, 1), (1, 3, 2), (2, 1, 0)]:
        window = filtered[k, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert found[k * 16 + row * 4 + column] == pytest.approx(max(window.max(), 0), abs=1e-5)


CONVOLUTIONAL = {
    "batch_norm": (CNNClassifier((3, 4)), [48, 4]),
    "flat": (CNNClassifier((3, (4, 5)), (6,), global_pool=None), [48, 20, 6]),
    "average": (CNNClassifier((3,), (6, 7), global_pool="average"), [3, 6, 7]),
    "no stage": (CNNClassifier((), (6, 7)), [6, 7]),
    "lenet5": (CNNClassifier(architecture="lenet5"), [6 * 256, 16 * 36, 120, 84]),
    "vgg11": (
        CNNClassifier(architecture="vgg11"),
        [64 * 256, 128 * 64, 256 * 16, 512 * 4, 512],
    ),
    "resnet18": (
        CNNClassifier(architecture="resnet18"),
        [64 * 1024, 64 * 1024, 128 * 256, 256 * 64, 512],
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test__last_layer__is_what_the_head_reads(name):
    classifier, widths = CONVOLUTIONAL[name]
    X, y = DIGITS, LABELS
    if classifier.architecture is not None:
        X, y = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), np.arange(6) % 3
    model = fitted(classifier.set_params(precision="float32"), X, y)
    shapes = [model.hidden_layer_output(X[:6], layer).shape for layer in range(len(widths))]
    assert shapes == [(6, width) for width in widths]
    head = model.module_.fc if name == "resnet18" else model.module_.head
    scale = getattr(model.module_, "output_scale", 1)
    with torch.no_grad():
        outputs = head(torch.from_numpy(model.hidden_layer_output(X))) * scale
    np.testing.assert_allclose(outputs.numpy(), model.decision_function(X), rtol=1e-5, atol=1e-6)


# -- networks of one's own -------------------------------------------------------------------------


def sequential(image_shape, n_outputs):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, n_outputs))


class Wrapped(nn.Sequential):
    """Not what its parts are in turn."""

    def __init__(self, image_shape, n_outputs):
        super().__init__(sequential(image_shape, n_outputs))

    def forward(self, x):
        return super().forward(x) * 2


def test__sequential_of_ones_own__has_its_parts_but_the_last():
    model = fitted(CNNClassifier(architecture=sequential, precision="float32"))
    first, second, third = (model.hidden_layer_output(DIGITS, layer) for layer in range(3))
    assert first.shape == second.shape == (200, 72)
    assert first.min() < 0
    np.testing.assert_array_equal(second, np.maximum(first, 0))
    np.testing.assert_array_equal(third, second)
    with pytest.raises(ValueError, match=r"layer=3, but this CNNClassifier has 3 hidden layer"):
        model.hidden_layer_output(DIGITS, 3)


def test__other_network_of_ones_own__error_names_it_and_a_way():
    model = fitted(CNNClassifier(architecture=Wrapped))
    with pytest.raises(TypeError, match=r"module_ is a Wrapped; make it a Sequential"):
        model.hidden_layer_output(DIGITS)


# -- fine-tuning -----------------------------------------------------------------------------------


class Backbone(nn.Sequential):
    """Eight features of images of any size."""

    def __init__(self, image_shape):
        super().__init__(nn.Conv2d(image_shape[2], 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))


ENCODERS = {
    "embedder": TripletEmbedder(8, channels=(4,), max_iter=1, tta=True),
    "features": PretrainedFeatures(Backbone, weights=None, image_size=None),
}


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test__fine_tuned_classifier__has_its_encoders_output_and_the_heads_layers(encoder):
    model = fitted(FineTunedClassifier(encoder, (6, 5), dropout=0.5, tta=True, precision="float32"))
    embedding = model.encoder_.set_params(**_without_tta(encoder)).transform(DIGITS)
    np.testing.assert_allclose(model.hidden_layer_output(DIGITS, 0), embedding, rtol=1e-5)
    assert [model.hidden_layer_output(DIGITS, i).shape[1] for i in (-3, -2, -1)] == [8, 6, 5]
    head = model.module_.head.head
    with torch.no_grad():
        outputs = head(torch.from_numpy(model.hidden_layer_output(DIGITS)))
    plain = model.set_params(tta=False).decision_function(DIGITS)
    np.testing.assert_allclose(outputs.numpy(), plain, rtol=1e-5, atol=1e-6)


def _without_tta(encoder):
    return {"tta": False} if "tta" in encoder.get_params() else {}


# -- of all of them --------------------------------------------------------------------------------

EACH = {
    "mlp": MLPClassifier((6, 5)),
    "cnn": CNNClassifier((3, 4), (5,), horizontal_flip=True, tta=True),
    "fine-tuned": FineTunedClassifier(ENCODERS["features"], (5,)),
}


@pytest.fixture(params=EACH)
def model(request):
    return fitted(EACH[request.param])


def test__single_row__is_that_row_of_many(model):
    for layer in (0, -1):
        many = model.hidden_layer_output(DIGITS, layer)
        one = model.hidden_layer_output(DIGITS[3:4], layer)
        assert one.shape == (1, many.shape[1])
        np.testing.assert_allclose(one[0], many[3], rtol=1e-5, atol=1e-6)


def test__too_little_memory__halves_the_batches(model):
    expected = model.hidden_layer_output(DIGITS, 0)
    sizes = []
    original = type(model)._reader

    def reader(self, attributes, device):
        read = original(self, attributes, device)

        def refuse_many(rows):
            sizes.append(len(rows))
            if len(rows) > 64:
                raise torch.OutOfMemoryError("too many")
            return read(rows)

        return refuse_many

    with patch.object(type(model), "_reader", reader):
        found = model.hidden_layer_output(DIGITS, 0)
    assert max(sizes) > 64 >= sizes[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test__pickled_copy__gives_the_same(model):
    copy = pickle.loads(pickle.dumps(model))
    for layer in (0, -1):
        np.testing.assert_array_equal(
            copy.hidden_layer_output(DIGITS, layer), model.hidden_layer_output(DIGITS, layer)
        )


def test__reading_a_hidden_layer__changes_nothing_of_the_classifier(model):
    before, attributes = model.decision_function(DIGITS), set(vars(model))
    model.hidden_layer_output(DIGITS, 0)
    assert set(vars(model)) == attributes
    np.testing.assert_array_equal(model.decision_function(DIGITS), before)


@pytest.mark.parametrize("layer", [7, -8])
def test__layer_out_of_range__error_gives_the_number_of_layers(model, layer):
    n_layers = 3 if isinstance(model, CNNClassifier) else 2
    expected = rf"layer={layer}, .* has {n_layers} hidden .* 0 to {n_layers - 1}, .*-{n_layers}\."
    with pytest.raises(ValueError, match=expected):
        model.hidden_layer_output(DIGITS, layer)


def test__layer_that_is_no_integer__is_refused(model):
    with pytest.raises(TypeError, match="layer must be an instance of int"):
        model.hidden_layer_output(DIGITS, "dense")
    for layer in True, False:
        with pytest.raises(TypeError, match=f"layer must be an instance of int, not {layer}"):
            model.hidden_layer_output(DIGITS, layer)


def test__rows_of_another_length__are_refused(model):
    with pytest.raises(ValueError, match=r"X has 63 features, but .* expecting 64"):
        model.hidden_layer_output(DIGITS[:, 1:])


@pytest.mark.parametrize("name", EACH)
def test__unfitted_classifier__says_so(name):
    with pytest.raises(NotFittedError):
        clone(EACH[name]).hidden_layer_output(DIGITS)


def test__last_step_of_a_pipeline__goes_into_a_picture():
    pipeline = fitted_pipeline()
    hidden = pipeline[-1].hidden_layer_output(pipeline[:-1].transform(DIGITS))
    scaled = StandardScaler().fit_transform(DIGITS)
    np.testing.assert_array_equal(hidden, pipeline[-1].hidden_layer_output(scaled))
    tsne = TSNE(perplexity=5, max_iter=250, init="random", random_state=0)
    assert tsne.fit_transform(hidden[:40]).shape == (40, 2)


def fitted_pipeline():
    pipeline = make_pipeline(StandardScaler(), MLPClassifier((5,), max_iter=1, random_state=0))
    return pipeline.fit(DIGITS, LABELS)
