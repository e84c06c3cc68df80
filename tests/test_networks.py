"""Networks: sizes, gradients, and the layers the course reports name."""

import pytest
import torch
from torch import nn

from skcifar._networks import (
    ARCHITECTURES,
    ConvolutionalNetwork,
    Dropout,
    Linear,
    MultilayerPerceptron,
    has_batch_norm,
    per_layer,
    use_generator,
)

CIFAR = (32, 32, 3)


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def shapes(module):
    return [
        tuple(layer.weight.shape)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test__gradients__are_the_numerical_ones(activation, batch_norm):
    torch.manual_seed(0)
    network = ConvolutionalNetwork(
        (5, 4, 2),
        3,
        channels=[3, [2, 4]],
        hidden_layer_sizes=[3],
        activation=activation,
        batch_norm=batch_norm,
    ).double()
    images = torch.randn(4, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, (images,))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of torch's own switch of oneDNN
@pytest.mark.parametrize("n_outputs", [1, 10, 200])
def test__dense_layer__is_torchs_to_rounding(n_outputs):
    torch.manual_seed(0)
    ours, theirs = Linear(300, n_outputs), nn.Linear(300, n_outputs)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(64, 300)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, rows in zip((ours, theirs), inputs, strict=True):
        layer(rows).square().sum().backward()
    pairs = [
        (ours(x), theirs(x)),
        (inputs[0].grad, inputs[1].grad),
        (ours.weight.grad, theirs.weight.grad),
        (ours.bias.grad, theirs.bias.grad),
    ]
    for one, other in pairs:
        one, other = one.detach(), other.detach()
        assert float((one - other).abs().max() / other.abs().max()) < 5e-6
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.double()(x.double()), theirs.double()(x.double()))


def test__gradients_of_the_perceptron__are_the_numerical_ones():
    torch.manual_seed(0)
    network = MultilayerPerceptron(5, 3, [4], "tanh").double()
    rows = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, (rows,))


def test__pooling_before_the_activation__is_pooling_after_it():
    torch.manual_seed(0)
    network = ConvolutionalNetwork(CIFAR, 10, channels=[4, 8], batch_norm=False, global_pool=None)
    images = torch.randn(2, 3, 32, 32)
    layers = [layer for layer in network.features if isinstance(layer, nn.Conv2d)]
    x = images
    for layer in layers:
        x = torch.nn.functional.max_pool2d(torch.relu(layer(x)), 2)
    torch.testing.assert_close(network.features(images), x.flatten(1))


def test__cnn_of_report_002__has_122570_parameters():
    network = ConvolutionalNetwork(
        CIFAR,
        10,
        channels=[32, 64, 64],
        hidden_layer_sizes=[64],
        activation=["relu", "relu", "relu", "logistic"],
        batch_norm=False,
        global_pool=None,
    )
    assert n_parameters(network) == 122_570
    assert isinstance(network.dense[2], nn.Sigmoid)


def test__tuned_cnn_of_report_004__has_its_layers():
    network = ConvolutionalNetwork(
        CIFAR,
        10,
        channels=[16, 32, 64],
        hidden_layer_sizes=[500],
        batch_norm=False,
        dropout=0.25,
        global_pool=None,
    )
    assert shapes(network) == [
        (16, 3, 3, 3),
        (32, 16, 3, 3),
        (64, 32, 3, 3),
        (500, 1024),
        (10, 500),
    ]
    assert [layer.p for layer in network.modules() if isinstance(layer, Dropout)] == [0.25, 0.25]


def test__small_cnn_of_report_004__has_75186_parameters():
    # The report gives BatchNorm, 1x1 convolutions and the number; the widths are ours.
    network = ConvolutionalNetwork(
        CIFAR,
        10,
        channels=[[8, 16], 128, 48],
        kernel_size=[3, 1, 3, 1],
        hidden_layer_sizes=[64],
        global_pool=None,
    )
    assert n_parameters(network) == 75_186


def test__base_cnn_of_report_004__is_ours_since_the_report_gives_no_layers():
    network = ConvolutionalNetwork(
        CIFAR,
        10,
        channels=[[32, 32], [64, 64], [128, 128]],
        hidden_layer_sizes=[128],
        batch_norm=False,
        global_pool=None,
    )
    assert [shape[0] for shape in shapes(network)] == [32, 32, 64, 64, 128, 128, 128, 10]


@pytest.mark.parametrize(
    "shape", [(1, 1, 5), (1, 7, 1), (2, 3, 1), (8, 8, 1), (28, 28, 1), (33, 31, 4)]
)
@pytest.mark.parametrize("global_pool", [None, "max", "average"])
def test__parametric_network__runs_on_any_image(shape, global_pool):
    height, width, channels = shape
    network = ConvolutionalNetwork(
        shape, 3, channels=[4, [4, 8], 8, 8], global_pool=global_pool
    ).eval()
    assert network(torch.zeros(2, channels, height, width)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "n_convolutions", "n_expected"),
    [
        # weights and biases of 2 convolutions and 3 dense layers
        ("lenet5", 2, 456 + 2416 + (576 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)),
        # convolutions with biases, BatchNorm's two vectors each, one dense layer
        ("vgg11", 8, 9_220_480 + 2 * 2752 + 5130),
        ("vgg16", 13, 14_714_688 + 2 * 4224 + 5130),
        ("resnet18", 20, 11_173_962),
    ],
)
def test__architectures__have_their_layers(name, n_convolutions, n_expected):
    network = ARCHITECTURES[name](image_shape=CIFAR, n_outputs=10)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == n_convolutions
    assert n_parameters(network) == n_expected
    smallest = ARCHITECTURES[name].smallest_image
    small = ARCHITECTURES[name](image_shape=(smallest, smallest, 1), n_outputs=2).eval()
    assert small(torch.zeros(1, 1, smallest, smallest)).shape == (1, 2)


def test__dropout_of_torch__is_replaced_and_draws_from_the_generator_given():
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5)))
    use_generator(network, torch.Generator().manual_seed(0))
    (dropout,) = (layer for layer in network.modules() if isinstance(layer, Dropout))
    assert dropout.p == 0.5
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = network(torch.ones(5, 4))
    assert torch.equal(torch.rand(1), expected)
    use_generator(network, torch.Generator().manual_seed(0))
    assert torch.equal(network(torch.ones(5, 4)), first)


def test__has_batch_norm__looks_inside():
    assert has_batch_norm(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))))
    assert not has_batch_norm(nn.Sequential(nn.GroupNorm(1, 3)))


def test__per_layer__wants_one_or_all():
    assert per_layer("relu", 2, "activation") == ["relu", "relu"]
    assert per_layer((3, 1), 2, "kernel_size") == [3, 1]
    with pytest.raises(ValueError, match=r"kernel_size=.* has 3 values for 2 layers"):
        per_layer([3, 1, 1], 2, "kernel_size")
