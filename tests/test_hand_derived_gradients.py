"""Gradients derived by hand, against autograd's and against differences of the loss.

Each derivation is written for the package's own networks and losses. Letters: N rows, D features,
H hidden units, K outputs; dA is the gradient of the loss with respect to A, in A's shape.
"""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from skcifar._networks import ConvolutionalNetwork, MultilayerPerceptron
from skcifar._optimization import ClassificationLoss

N, D, H, K = 7, 5, 4, 3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def double(network):
    """The network in float64, with biases that are not 0."""
    network.double()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return network


def weights(network):
    """Weights and biases by name, as arrays."""
    return {name: p.detach().numpy() for name, p in network.named_parameters()}


def one_hot(y):
    return np.eye(K)[y]  # (N, K)


def by_autograd(network, criterion, X, y):
    """Gradients of the loss with respect to every weight and bias, and to the rows as "X"."""
    rows = torch.tensor(X, requires_grad=True)
    network.zero_grad()
    criterion(network(rows), torch.tensor(y)).backward()
    gradients = {name: p.grad.numpy() for name, p in network.named_parameters()}
    return gradients | {"X": rows.grad.numpy()}


def by_differences(network, criterion, X, y, step=1e-5):
    """The same, each entry from the loss a step before and a step behind it."""
    network, rows = copy.deepcopy(network), torch.tensor(X)
    varied = dict(network.named_parameters()) | {"X": rows}
    gradients = {}
    with torch.no_grad():
        for name, tensor in varied.items():
            flat, gradient = tensor.view(-1), np.empty(tensor.numel())
            for i, value in enumerate(flat.tolist()):
                flat[i] = value + step
                behind = float(criterion(network(rows), torch.tensor(y)))
                flat[i] = value - step
                before = float(criterion(network(rows), torch.tensor(y)))
                flat[i] = value
                gradient[i] = (behind - before) / (2 * step)
            gradients[name] = gradient.reshape(tensor.shape)
    return gradients


def assert_gradients(network, criterion, X, y, by_hand):
    automatic = by_autograd(network, criterion, X, y)
    differences = by_differences(network, criterion, X, y)
    assert set(by_hand) == set(automatic) == set(differences)
    for name, gradient in by_hand.items():
        assert np.abs(gradient).max() > 1e-4, f"{name}: nothing to compare"
        np.testing.assert_allclose(automatic[name], gradient, rtol=1e-10, atol=1e-14, err_msg=name)
        np.testing.assert_allclose(differences[name], gradient, rtol=1e-5, atol=1e-8, err_msg=name)


# -- dense layers ----------------------------------------------------------------------------------


def test__scalar_chain__product_of_the_local_derivatives():
    # x -> a = w1 x + b1 -> h = 1 / (1 + e^-a) -> z = w2 h + b2 -> loss = (z - t)^2 / 2: from the
    # loss back, each module multiplies what reaches it by the derivative of its output. Of two
    # classes the second has t = 1.
    x, t = 1.7, 1.0
    network = double(MultilayerPerceptron(1, 1, (1,), "logistic"))
    w1, b1, w2, b2 = (p.item() for p in weights(network).values())
    a = w1 * x + b1
    h = 1 / (1 + math.exp(-a))
    z = w2 * h + b2
    dz = z - t
    dw2, db2, dh = dz * h, dz, dz * w2
    da = dh * h * (1 - h)
    dw1, db1, dx = da * x, da, da * w1
    by_hand = {
        "features.0.weight": np.array([[dw1]]),
        "features.0.bias": np.array([db1]),
        "head.weight": np.array([[dw2]]),
        "head.bias": np.array([db2]),
        "X": np.array([[dx]]),
    }
    criterion = ClassificationLoss("squared_error")
    assert_gradients(network, criterion, np.array([[x]]), np.array([1]), by_hand)


def test__linear_map_with_squared_error__gradients_by_hand(rng):
    # Z = X W' + b (N, K), loss = sum (Z - T)^2 / (2 N K), so dZ = (Z - T) / (N K); an entry of W
    # meets one feature in every row: dW = dZ' X (K, D), db = the sum of dZ over rows, dX = dZ W.
    X, y = rng.normal(size=(N, D)), rng.integers(K, size=N)
    network = double(MultilayerPerceptron(D, K))
    W, b = weights(network).values()
    dZ = (X @ W.T + b - one_hot(y)) / (N * K)
    by_hand = {"head.weight": dZ.T @ X, "head.bias": dZ.sum(0), "X": dZ @ W}
    assert_gradients(network, ClassificationLoss("squared_error"), X, y, by_hand)


def test__two_sigmoid_layers_with_squared_error__gradients_by_hand(rng):
    # A = X U' + c (N, H), S = sigmoid(A), Z = S W' + b: above S as in the linear map, and
    # sigmoid' = S (1 - S), so dA = dZ W * S (1 - S), which takes the place of dZ below.
    X, y = rng.normal(size=(N, D)), rng.integers(K, size=N)
    network = double(MultilayerPerceptron(D, K, (H,), "logistic"))
    U, c, W, b = weights(network).values()
    S = expit(X @ U.T + c)
    dZ = (S @ W.T + b - one_hot(y)) / (N * K)
    dA = dZ @ W * S * (1 - S)
    by_hand = {
        "features.0.weight": dA.T @ X,  # (H, D)
        "features.0.bias": dA.sum(0),
        "head.weight": dZ.T @ S,  # (K, H)
        "head.bias": dZ.sum(0),
        "X": dA @ U,
    }
    assert_gradients(network, ClassificationLoss("squared_error"), X, y, by_hand)


def test__softmax_with_cross_entropy__gradients_by_hand(rng):
    # P = softmax(Z), loss = -sum T log P / N. d log P_k / dZ_j = [j = k] - P_j, and a row of T
    # sums to 1: dZ = (P - T) / N.
    X, y = rng.normal(size=(N, D)), rng.integers(K, size=N)
    network = double(MultilayerPerceptron(D, K))
    W, b = weights(network).values()
    dZ = (softmax(X @ W.T + b, axis=1) - one_hot(y)) / N
    by_hand = {"head.weight": dZ.T @ X, "head.bias": dZ.sum(0), "X": dZ @ W}
    assert_gradients(network, ClassificationLoss(), X, y, by_hand)


def test__logistic_regression__gradients_by_hand(rng):
    # One output, p = sigmoid(z), loss = -sum (y log p + (1 - y) log(1 - p)) / N. With
    # p' = p (1 - p): dz = (p - y) / N.
    X, y = rng.normal(size=(N, D)), rng.integers(2, size=N)
    network = double(MultilayerPerceptron(D, 1))
    W, b = weights(network).values()
    dZ = (expit(X @ W.T + b) - y[:, None]) / N
    by_hand = {"head.weight": dZ.T @ X, "head.bias": dZ.sum(0), "X": dZ @ W}
    assert_gradients(network, ClassificationLoss(), X, y, by_hand)


# -- convolution -----------------------------------------------------------------------------------


def test__convolutional_network__gradients_by_hand(rng):
    # convolution -> pooling -> sigmoid -> flat -> dense -> softmax, each backwards in turn.
    images, y = rng.normal(size=(N, 2, 4, 4)), rng.integers(K, size=N)
    network = double(
        ConvolutionalNetwork(
            (4, 4, 2), K, [3], activation="logistic", batch_norm=False, global_pool=None
        )
    )
    filters, biases, W, b = weights(network).values()
    C = convolved(images, filters, biases)  # (N, 3, 4, 4)
    pooled, kept = max_pooled(C)  # (N, 3, 2, 2)
    S = expit(pooled)
    flat = S.reshape(N, -1)
    dZ = (softmax(flat @ W.T + b, axis=1) - one_hot(y)) / N
    dS = (dZ @ W).reshape(S.shape)
    # the largest of a window passes its gradient on, the others get none
    dC = np.repeat(np.repeat(dS * S * (1 - S), 2, axis=2), 2, axis=3) * kept
    d_images, d_filters, d_biases = convolution_backwards(dC, images, filters)
    by_hand = {
        "features.0.weight": d_filters,
        "features.0.bias": d_biases,
        "head.weight": dZ.T @ flat,
        "head.bias": dZ.sum(0),
        "X": d_images,
    }
    assert_gradients(network, ClassificationLoss(), images, y, by_hand)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test__fitted_convolution__gradients_by_hand(rng, kernel_size):
    # Without activation and with the mean over the image, outputs Z (N, K) are linear in the
    # filters; the squared error's dZ goes to each of the 5 x 6 positions in equal parts.
    images, y = rng.normal(size=(N, 2, 10, 12)), rng.integers(K, size=N)
    network = double(
        ConvolutionalNetwork(
            (10, 12, 2),
            K,
            [3],
            kernel_size=kernel_size,
            activation="identity",
            batch_norm=False,
            global_pool="average",
        )
    )
    filters, biases, W, b = weights(network).values()
    pooled, kept = max_pooled(convolved(images, filters, biases))  # (N, 3, 5, 6)
    means = pooled.mean((2, 3))
    dZ = (means @ W.T + b - one_hot(y)) / (N * K)
    dC = (dZ @ W)[:, :, None, None] / 30 * kept
    d_images, d_filters, d_biases = convolution_backwards(dC, images, filters)
    by_hand = {
        "features.0.weight": d_filters,
        "features.0.bias": d_biases,
        "head.weight": dZ.T @ means,
        "head.bias": dZ.sum(0),
        "X": d_images,
    }
    assert_gradients(network, ClassificationLoss("squared_error"), images, y, by_hand)


def convolved(images, filters, biases):
    """C[n, k, i, j] = biases[k] + the sum of filters[k, c, u, v] padded[n, c, i + u, j + v]."""
    n, _, height, width = images.shape
    size = filters.shape[2]
    padded = same_padded(images, size)
    output = np.empty((n, len(filters), height, width))
    for i in range(height):
        for j in range(width):
            window = padded[:, :, i : i + size, j : j + size]
            output[:, :, i, j] = np.einsum("ncuv,kcuv->nk", window, filters) + biases
    return output


def convolution_backwards(dC, images, filters):
    """Gradients with respect to images, filters and biases.

    C is linear in each of the three. At a position (i, j) an output's gradient goes to the filter
    times the pixels under it, to these pixels times the filter, and to the bias as it is; what
    falls on the border is nobody's.
    """
    _, _, height, width = images.shape
    size = filters.shape[2]
    padded = same_padded(images, size)
    d_padded, d_filters = np.zeros_like(padded), np.zeros_like(filters)
    for i in range(height):
        for j in range(width):
            under = (slice(None), slice(None), slice(i, i + size), slice(j, j + size))
            d_filters += np.einsum("nk,ncuv->kcuv", dC[:, :, i, j], padded[under])
            d_padded[under] += np.einsum("nk,kcuv->ncuv", dC[:, :, i, j], filters)
    radius = size // 2
    d_images = d_padded[:, :, radius : radius + height, radius : radius + width]
    return d_images, d_filters, dC.sum((0, 2, 3))


def same_padded(images, size):
    return np.pad(images, [(0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)])


def max_pooled(C):
    """The largest of each 2 x 2 window, and where it was: 1 there and 0 elsewhere, as C."""
    n, k, height, width = C.shape
    pooled = C.reshape(n, k, height // 2, 2, width // 2, 2).max((3, 5))
    kept = np.repeat(np.repeat(pooled, 2, axis=2), 2, axis=3) == C
    assert kept.sum() == pooled.size, "no two pixels are equal"
    return pooled, kept.astype(float)
