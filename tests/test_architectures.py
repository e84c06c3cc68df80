"""Networks with a name: their layers, and ImageNet's against plain functions of their weights."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skcifar._architectures import ARCHITECTURES, BACKBONES, ResNet18
from skcifar._networks import Encoder

CIFAR = (32, 32, 3)
N_BLOCKS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}
# Krizhevsky (2014): position in the sequence, outputs, kernel, stride, padding
ALEXNET = [(0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1)]
ALEXNET += [(10, 256, 3, 1, 1)]


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# -- for small images ------------------------------------------------------------------------------


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


def test__small_resnet18__is_the_plain_forward_of_weights_drawn_layer_by_layer():
    torch.manual_seed(0)
    network = ResNet18(CIFAR, 10).eval()
    state = network.state_dict()
    torch.manual_seed(0)
    # torch's own draws, in the order of the layers; a block's shortcut comes last
    for name, shape in small_resnet18_shapes():
        if len(shape) == 4:
            n_out, n_in, kernel, _ = shape
            drawn = nn.Conv2d(n_in, n_out, kernel, bias=False)
        else:
            drawn = nn.Linear(shape[1], shape[0])
            assert torch.equal(drawn.bias, state["fc.bias"])
        assert torch.equal(drawn.weight, state[name]), name
    assert network.smallest_image == 8
    images = torch.randn(2, 3, 16, 16)
    x = torch.relu(normalised(F.conv2d(images, state["conv1.weight"], padding=1), state, "bn1"))
    for stage in (1, 2, 3, 4):
        x = basic_block(x, state, f"layer{stage}.0", 1 if stage == 1 else 2)
        x = basic_block(x, state, f"layer{stage}.1", 1)
    expected = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(network(images), expected)


def small_resnet18_shapes():
    shapes = resnet_shapes("resnet18", 10) | {"conv1.weight": (64, 3, 3, 3)}
    return [(name, shape) for name, shape in shapes.items() if len(shape) > 1]


# -- for ImageNet: names and shapes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_expected"),
    [
        ("alexnet", 61_100_840),
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
    ],
)
def test__backbones__have_the_official_parameter_counts(name, n_expected):
    with torch.device("meta"):
        network = BACKBONES[name]()
    assert n_parameters(network) == n_expected


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("n_outputs", [1000, 7, None])
def test__backbones__have_the_names_and_shapes_of_official_weights(name, n_outputs):
    expected = official_shapes(name, n_outputs)
    with torch.device("meta"):
        network = BACKBONES[name](n_outputs=n_outputs)
    found = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert found == expected
    assert list(found) == list(expected)  # in their order too


@pytest.mark.parametrize("name", BACKBONES)
def test__head_prefix__covers_what_a_backbone_without_head_leaves_out(name):
    whole, headless = official_shapes(name, 1000), official_shapes(name, None)
    prefix = BACKBONES[name].head_prefix
    assert {key for key in whole if not key.startswith(prefix)} == set(headless)
    assert len(headless) < len(whole)


@pytest.mark.parametrize("name", BACKBONES)
def test__factories__are_pickled_by_name(name):
    assert pickle.loads(pickle.dumps(BACKBONES[name])) is BACKBONES[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test__resnets__are_drawn_as_he_et_al_by_their_outputs(name):
    torch.manual_seed(0)
    network = BACKBONES[name]()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            n_out, _, height, width = layer.weight.shape
            deviation = (2 / (n_out * height * width)) ** 0.5
            # of a sample deviation around its own, five standard errors
            slack = 5 / (2 * layer.weight.numel()) ** 0.5
            assert float(layer.weight.detach().std(correction=0)) == pytest.approx(
                deviation, rel=slack
            )
        elif isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight))
            assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def official_shapes(name, n_outputs):
    return alexnet_shapes(n_outputs) if name == "alexnet" else resnet_shapes(name, n_outputs)


def alexnet_shapes(n_outputs):
    shapes, n_in = {}, 3
    for position, n_out, kernel, _, _ in ALEXNET:
        shapes[f"features.{position}.weight"] = (n_out, n_in, kernel, kernel)
        shapes[f"features.{position}.bias"] = (n_out,)
        n_in = n_out
    if n_outputs is not None:
        for position, (n_in, n_out) in {
            1: (9216, 4096),
            4: (4096, 4096),
            6: (4096, n_outputs),
        }.items():
            shapes[f"classifier.{position}.weight"] = (n_out, n_in)
            shapes[f"classifier.{position}.bias"] = (n_out,)
    return shapes


def resnet_shapes(name, n_outputs):
    """Table 1 of He et al. (2016)."""
    shapes = {"conv1.weight": (64, 3, 7, 7)} | batch_norm_shapes("bn1", 64)
    n_in = 64
    for stage, n_blocks in enumerate(N_BLOCKS[name]):
        width = [64, 128, 256, 512][stage]
        for i in range(n_blocks):
            block = f"layer{stage + 1}.{i}"
            if name == "resnet50":
                n_out = 4 * width
                convolutions = [(width, n_in, 1), (width, width, 3), (n_out, width, 1)]
            else:
                n_out = width
                convolutions = [(width, n_in, 3), (width, width, 3)]
            for j, (outputs, inputs, kernel) in enumerate(convolutions, start=1):
                shapes[f"{block}.conv{j}.weight"] = (outputs, inputs, kernel, kernel)
                shapes |= batch_norm_shapes(f"{block}.bn{j}", outputs)
            if i == 0 and (n_in != n_out or stage > 0):
                shapes[f"{block}.downsample.0.weight"] = (n_out, n_in, 1, 1)
                shapes |= batch_norm_shapes(f"{block}.downsample.1", n_out)
            n_in = n_out
    if n_outputs is not None:
        shapes |= {"fc.weight": (n_outputs, n_in), "fc.bias": (n_outputs,)}
    return shapes


def batch_norm_shapes(name, width):
    entries = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{entry}": (width,) for entry in entries} | {f"{name}.num_batches_tracked": ()}


# -- for ImageNet: the forward pass against plain functions ----------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test__forward__is_the_plain_functions_stage_by_stage(name):
    state = random_state(official_shapes(name, 11))
    # 160 pixels become AlexNet's 4, whose average pooling to 6 takes one or two at a time
    height, width = (160, 64) if name == "alexnet" else (64, 70)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double()
    expected = plain_alexnet(images, state) if name == "alexnet" else plain_resnet(images, state)
    assert len(expected) > 7
    network = loaded(BACKBONES[name], 11, state)
    headless_state = {
        key: value
        for key, value in state.items()
        if not key.startswith(BACKBONES[name].head_prefix)
    }
    headless = loaded(BACKBONES[name], None, headless_state)
    with torch.inference_mode():
        for layer, output in expected.items():
            encoder = Encoder(lambda: network, {}, layer=layer)
            assert_equal_relatively(encoder(images), output.flatten(1))
        assert_equal_relatively(network(images), output)  # the last stage's
        assert_equal_relatively(headless(images), expected["avgpool"].flatten(1))


def loaded(factory, n_outputs, state):
    with torch.device("meta"):
        network = factory(n_outputs=n_outputs)
    network.load_state_dict(state, assign=True)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "n_features"),
    [("alexnet", 9216), ("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)],
)
def test__smallest_image__runs_and_a_smaller_one_does_not(name, n_features):
    smallest = BACKBONES[name].smallest_image
    network = BACKBONES[name](n_outputs=None).eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, smallest, smallest)).shape == (2, n_features)
        with pytest.raises(RuntimeError):
            network(torch.zeros(2, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize("name", BACKBONES)
def test__gradients__reach_every_parameter(name):
    torch.manual_seed(0)
    network = BACKBONES[name](n_outputs=3)
    images = torch.randn(2, 3, 64, 64)
    F.cross_entropy(network(images), torch.tensor([0, 2])).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key


@pytest.mark.parametrize("name", BACKBONES)
def test__dropout__is_alexnets_alone(name):
    network = BACKBONES[name]()
    dropouts = {
        key: part.p for key, part in network.named_modules() if isinstance(part, nn.Dropout)
    }
    assert dropouts == ({"classifier.0": 0.5, "classifier.3": 0.5} if name == "alexnet" else {})


def random_state(shapes):
    """Weights that keep activations near 1, and statistics that are not BatchNorm's first ones."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) == 1:
            lowest, width = (0.5, 1.0) if name.endswith(("weight", "var")) else (-0.5, 1.0)
            draws = torch.rand(shape, generator=generator, dtype=torch.float64)
            state[name] = lowest + width * draws
        else:
            fan_in = math.prod(shape[1:])
            draws = torch.randn(shape, generator=generator, dtype=torch.float64)
            state[name] = draws * (2 / fan_in) ** 0.5
    return state


def plain_alexnet(x, state):
    """Output of each position in the sequence, the pooled image, and the dense layers."""
    outputs = {}
    for position, _, _, stride, padding in ALEXNET:
        weight, bias = (state[f"features.{position}.{entry}"] for entry in ("weight", "bias"))
        x = outputs[f"features.{position}"] = F.conv2d(x, weight, bias, stride, padding)
        x = outputs[f"features.{position + 1}"] = x.clamp(min=0)
        if position in (0, 3, 10):
            x = outputs[f"features.{position + 2}"] = F.max_pool2d(x, 3, 2)
    x = outputs["avgpool"] = F.adaptive_avg_pool2d(x, (6, 6))
    x = x.flatten(1)
    for position in (1, 4, 6):
        weight, bias = (state[f"classifier.{position}.{entry}"] for entry in ("weight", "bias"))
        x = outputs[f"classifier.{position}"] = F.linear(x, weight, bias)
        x = x.clamp(min=0)
    return outputs


def plain_resnet(x, state):
    """Output of the stem's parts, of each block and stage, the pooled image and the dense layer."""
    outputs = {}
    x = outputs["conv1"] = F.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = outputs["bn1"] = normalised(x, state, "bn1")
    x = outputs["maxpool"] = F.max_pool2d(x.clamp(min=0), 3, stride=2, padding=1)
    block = bottleneck if "layer1.0.conv3.weight" in state else basic_block
    for stage in (1, 2, 3, 4):
        i = 0
        while f"layer{stage}.{i}.conv1.weight" in state:
            x = block(x, state, f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1)
            i += 1
        outputs[f"layer{stage}"] = x
    x = outputs["avgpool"] = x.mean((2, 3), keepdim=True)
    outputs["fc"] = F.linear(x.flatten(1), state["fc.weight"], state["fc.bias"])
    return outputs


def basic_block(x, state, name, stride):
    y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
    y = normalised(y, state, f"{name}.bn1").clamp(min=0)
    y = normalised(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), state, f"{name}.bn2")
    return (y + shortcut(x, state, name, stride)).clamp(min=0)


def bottleneck(x, state, name, stride):
    y = normalised(F.conv2d(x, state[f"{name}.conv1.weight"]), state, f"{name}.bn1").clamp(min=0)
    y = F.conv2d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1)
    y = normalised(y, state, f"{name}.bn2").clamp(min=0)
    y = normalised(F.conv2d(y, state[f"{name}.conv3.weight"]), state, f"{name}.bn3")
    return (y + shortcut(x, state, name, stride)).clamp(min=0)


def shortcut(x, state, name, stride):
    weight = state.get(f"{name}.downsample.0.weight")
    if weight is None:
        return x
    return normalised(F.conv2d(x, weight, stride=stride), state, f"{name}.downsample.1")


def normalised(x, state, name):
    mean, variance, weight, bias = (
        state[f"{name}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)


def assert_equal_relatively(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
