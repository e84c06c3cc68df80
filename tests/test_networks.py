"""Networks: sizes, gradients, the layers the course reports name, and what stands around them."""

import copy
import gc
import math
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from skcifar._networks import (
    ConvolutionalNetwork,
    Dropout,
    Encoder,
    FineTunedNetwork,
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


def test__dropout_made_ours__keeps_its_mode_and_its_hooks():
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5).eval())
    calls = []
    network[1].register_forward_hook(lambda *_: calls.append("dropout"))
    use_generator(network, torch.Generator().manual_seed(0))
    rows = torch.ones(2, 4)
    assert torch.equal(network(rows), network[0](rows))
    assert calls == ["dropout"]


def test__per_layer__wants_one_or_all():
    assert per_layer("relu", 2, "activation") == ["relu", "relu"]
    assert per_layer((3, 1), 2, "kernel_size") == [3, 1]
    with pytest.raises(ValueError, match=r"kernel_size=.* has 3 values for 2 layers"):
        per_layer([3, 1, 1], 2, "kernel_size")


# -- Encoder ---------------------------------------------------------------------------------------


class Small(nn.Module):
    """Three stages, of which one nests, and a head; RGB images of any size."""

    def __init__(self, n_outputs=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.stage = nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), nn.ReLU(inplace=True)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.ModuleList([nn.Identity()])
        self.fc = nn.Linear(6, n_outputs)

    def forward(self, x):
        x = self.pool(self.stage(self.bn(self.conv(x))))
        return self.fc(self.dropout(x.flatten(1)))


def small_encoder(**options):
    torch.manual_seed(0)
    return Encoder(Small, {"n_outputs": 5}, **options).eval()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(5, 7), (32, 32), (8, 20), (9, 40)])
@pytest.mark.parametrize("size", [8, 20])
def test__resize__is_the_antialiased_filter_in_float64(interpolation, shape, size):
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)).double()
    encoder = Encoder(nn.Identity, {}, image_size=size, interpolation=interpolation)
    rows, columns = (filter_matrix(n, size, interpolation) for n in shape)
    expected = torch.einsum("ih,nchw,jw->ncij", rows, images, columns)
    torch.testing.assert_close(encoder(images), expected.flatten(1))


def filter_matrix(n_in, n_out, interpolation):
    """Weights of each input pixel in each output pixel; a smaller image widens the filter."""
    scale = n_in / n_out
    width = max(scale, 1.0)
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        for j in range(n_in):
            distance = abs(j + 0.5 - (i + 0.5) * scale) / width
            matrix[i, j] = triangle(distance) if interpolation == "bilinear" else cubic(distance)
    return matrix / matrix.sum(1, keepdim=True)


def triangle(distance):
    return max(0.0, 1 - distance)


def cubic(distance, a=-0.5):
    """Keys (1981)."""
    if distance < 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    if distance < 2:
        return a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return 0.0


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test__resize__keeps_dtype_and_channels_last_memory(interpolation):
    seen = []
    encoder = Encoder(nn.Identity, {}, image_size=8, interpolation=interpolation)
    encoder.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    wide = encoder(images.contiguous(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    narrow = encoder(images.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0.02, atol=0.02)


def test__images_of_the_size_wanted__are_not_resized():
    seen = []
    encoder = Encoder(nn.Identity, {}, image_size=8)
    encoder.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 8, 8)
    encoder(images)
    assert seen[0] is images


@pytest.mark.parametrize("layer", ["conv", "bn", "stage.0.0", "stage.0", "stage", "pool", "fc"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test__layer__is_its_output_and_nothing_behind_it_is_computed(layer, context):
    encoder, images = small_encoder(layer=layer), torch.randn(2, 3, 8, 8)
    order = ["conv", "bn", "stage.0.0", "stage.0.1", "stage.0", "stage.1", "stage", "pool"]
    order += ["dropout", "fc"]
    outputs, calls = {}, []

    def record(name):
        def hook(module, inputs, output):
            calls.append(name)
            outputs.setdefault(name, output.clone())

        return hook

    for name in order:
        # in front of the encoder's own hook, behind which none is called
        encoder.network.get_submodule(name).register_forward_hook(record(name), prepend=True)
    with context():
        whole = encoder.network(images)  # runs to its end outside of the encoder
        assert whole.shape == (2, 5) and calls == order
        calls.clear()
        rows = encoder(images)
    assert calls == order[: order.index(layer) + 1]
    assert torch.equal(rows, outputs[layer].flatten(1))
    assert rows.requires_grad == (context is torch.enable_grad)


def test__gradients_of_a_layer__are_those_of_the_layers_before_it():
    encoder, images = small_encoder(layer="stage.0"), torch.randn(2, 3, 8, 8)
    encoder(images).square().sum().backward()
    twin = small_encoder().network
    twin.stage[0](twin.bn(twin.conv(images))).square().sum().backward()
    for (name, found), expected in zip(
        encoder.network.named_parameters(), twin.parameters(), strict=True
    ):
        assert (found.grad is None) == name.startswith("fc")
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


def test__early_exit__lets_go_of_what_it_computed():
    encoder, images = small_encoder(layer="pool"), torch.randn(2, 3, 8, 8)
    kept = []
    encoder.network.conv.register_forward_hook(
        lambda module, inputs, output: kept.append(weakref.ref(output))
    )
    gc.disable()
    try:
        with torch.no_grad():
            encoder(images)
        assert kept[0]() is None
    finally:
        gc.enable()


def test__layer_called_twice__gives_its_first_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.twofold = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.twofold.weight, 2.0)

        def forward(self, x):
            return self.twofold(self.twofold(x))

    encoder = Encoder(Twice, {}, layer="twofold").requires_grad_(False)
    assert encoder(torch.ones(1, 1)).item() == 2
    assert encoder.network(torch.ones(1, 1)).item() == 4


def test__copies_and_state__carry_the_layer_and_no_more():
    encoder, images = small_encoder(layer="stage.0"), torch.randn(2, 3, 8, 8)
    expected = encoder(images)
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(images), expected)
    copied = copy.deepcopy(encoder)
    assert torch.equal(copied(images), expected)
    with torch.no_grad():
        copied.network.conv.weight.zero_()
    assert not torch.equal(copied(images), expected)
    assert torch.equal(encoder(images), expected)
    assert list(encoder.state_dict()) == [f"network.{key}" for key in Small().state_dict()]
    other = Encoder(Small, {"n_outputs": 5}, layer="stage.0").eval()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(images), expected)


def test__encoder_within_an_encoder__takes_each_its_own_layer():
    inner = small_encoder(layer="stage")
    outer = Encoder(lambda: nn.Sequential(inner, nn.Linear(6 * 6 * 6, 2), nn.Tanh()), {}, layer="1")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(outer(images), outer.network[1](inner(images)))
    assert inner(images).shape == (2, 6 * 6 * 6)


def test__threads_in_one_encoder__get_their_own_rows():
    meeting = threading.Barrier(3, timeout=30)

    class Meeting(nn.Module):
        def forward(self, x):
            meeting.wait()  # all threads are in the network, before the layer
            return x

    encoder = Encoder(
        lambda: nn.Sequential(Meeting(), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2)),
        {},
        layer="2",
    )
    inputs = torch.randn(3, 5, 1, 2, 2)
    with ThreadPoolExecutor(3) as pool:
        # the third uses the network by itself, and is to see all of it
        calls = (encoder, encoder, encoder.network)
        found = [
            task.result()
            for task in [pool.submit(call, x) for call, x in zip(calls, inputs, strict=True)]
        ]
    linear, last = encoder.network[2], encoder.network[3]
    expected = [linear(x.flatten(1)) for x in inputs]
    expected[2] = last(expected[2])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test__dropout_as_layer__is_found_after_use_generator():
    encoder = small_encoder(layer="dropout").train()
    use_generator(encoder, torch.Generator().manual_seed(0))
    rows = encoder(torch.randn(4, 3, 8, 8))
    assert rows.shape == (4, 6)
    assert bool((rows == 0).any())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "layer9",
            r"layer='layer9' is no part of Small\..* the network are conv, bn, stage, pool,",
        ),
        ("stage.7.1", r"layer='stage.7.1' .* 'stage' are stage\.0, stage\.1;"),
        ("fc.weight", r"layer='fc.weight' .* 'fc' are none;"),
        ("", r"layer='' is no part of Small"),
    ],
)
def test__unknown_layer__is_named_with_those_there_are(layer, message):
    with pytest.raises(ValueError, match=message):
        small_encoder(layer=layer)


def test__unknown_layer_of_a_long_network__is_answered_in_few_words():
    with pytest.raises(ValueError, match=r"are 0, 1, .*, 22, \.\.\., 499;") as raised:
        Encoder(lambda: nn.Sequential(*[nn.Identity() for _ in range(500)]), {}, layer="conv")
    assert len(str(raised.value)) < 300


def test__layer_that_never_runs__is_an_error_and_not_the_networks_output():
    encoder = small_encoder(layer="unused")
    with pytest.raises(RuntimeError, match=r"layer='unused' took no part .* of Small"):
        encoder(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("layer", "message"), [(None, "of LSTM is a"), ("0", "'s layer='0' is a")])
def test__output_that_is_a_tuple__is_an_error_that_says_so(layer, message):
    def factory():
        return nn.LSTM(4, 2) if layer is None else nn.Sequential(nn.LSTM(4, 2))

    with pytest.raises(TypeError, match=f"the output {message}|{message} tuple, not a tensor"):
        Encoder(factory, {}, layer=layer)(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test__unit_norm__gives_rows_of_length_one_in_float32_at_least(dtype):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = small_encoder().to(dtype)(images)
    unit = small_encoder(unit_norm=True).to(dtype)(images)
    assert unit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    lengths = [math.sqrt(sum(value * value for value in row)) for row in rows.tolist()]
    expected = rows.double() / torch.tensor(lengths, dtype=torch.float64)[:, None]
    torch.testing.assert_close(unit.double(), expected, rtol=1e-6, atol=1e-7)


# -- FineTunedNetwork ------------------------------------------------------------------------------


LEAVES = ["conv", "bn", "stage.0.0", "stage.0.1", "stage.1", "pool", "dropout", "unused.0", "fc"]


def fine_tuned(trainable, **options):
    return FineTunedNetwork(small_encoder(**options), nn.Linear(5, 3), trainable)


@pytest.mark.parametrize(
    ("trainable", "learning"),
    [
        ("all", LEAVES),
        ("head", []),
        ([], []),
        (["stage"], ["stage.0.0", "stage.0.1", "stage.1"]),
        (("stage.0.1", "bn"), ["bn", "stage.0.1"]),
        (["conv.weight"], []),
    ],
)
def test__trainable__says_what_learns_and_is_in_training(trainable, learning):
    encoder = small_encoder()
    for parameter in list(encoder.parameters())[::2]:  # a copied encoder may come so
        parameter.requires_grad_(False)
    head = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.1)).requires_grad_(False)
    network = FineTunedNetwork(encoder, head, trainable)
    assert all(parameter.requires_grad for parameter in head.parameters())
    for name, parameter in encoder.network.named_parameters():
        expected = name.rpartition(".")[0] in learning or name in trainable
        assert parameter.requires_grad == expected, name
    for mode in (True, False, True):
        assert network.train(mode) is network
        assert network.training == mode and head[1].training == mode
        for name in LEAVES:
            part = encoder.network.get_submodule(name)
            assert part.training == (mode and name in learning), (name, mode)
    assert not any(module.training for module in network.eval().modules())


def test__prefix__does_not_reach_names_that_only_begin_like_it():
    network = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    FineTunedNetwork(Encoder(lambda: network, {}), nn.Linear(2, 2), ["layer1"])
    assert network["layer1"].weight.requires_grad
    assert not network["layer10"].weight.requires_grad


@pytest.mark.parametrize(
    ("trainable", "moving"),
    [
        ("all", ["bn", "stage.0.1"]),
        ("head", []),
        (["stage"], ["stage.0.1"]),
        (["bn", "fc"], ["bn"]),
    ],
)
def test__training_step__leaves_what_is_frozen_as_it_was(trainable, moving):
    network = fine_tuned(trainable).train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network(images).square().sum().backward()
    optimizer.step()
    parts = network.encoder.network
    learning = [name for name, p in parts.named_parameters() if p.requires_grad]
    for name, value in parts.state_dict().items():
        owner, _, entry = name.rpartition(".")
        moves = owner in moving if "running" in entry or "tracked" in entry else name in learning
        # a bias in front of BatchNorm in training has no gradient but rounding
        if name not in ("conv.bias", "stage.0.0.bias"):
            assert torch.equal(value, before[f"encoder.network.{name}"]) != moves, name
    assert not torch.equal(network.head.weight, before["head.weight"])


def test__frozen_encoder__has_no_dropout_in_training_and_no_gradients():
    network = fine_tuned("head").train()
    images = torch.randn(4, 3, 8, 8)
    rows = network.encoder(images)
    assert not rows.requires_grad
    assert torch.equal(rows, network.encoder(images))
    network(images).sum().backward()
    assert all(p.grad is None for p in network.encoder.parameters())
    assert all(p.grad is not None for p in network.head.parameters())


def test__forward__is_the_head_on_the_encoders_rows():
    network = fine_tuned("all", layer="pool", unit_norm=True)
    network.head = nn.Linear(6, 3)
    network.eval()
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(network(images), network.head(network.encoder(images)))


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [("all", True), ("head", False), (["fc"], False), (["stage"], True), (["stage.0.0"], False)],
)
def test__has_batch_norm__leaves_out_what_rests(trainable, expected):
    network = fine_tuned(trainable)
    assert has_batch_norm(network) == expected
    assert has_batch_norm(copy.deepcopy(network).train()) == expected
    assert has_batch_norm(nn.Sequential(network, nn.BatchNorm1d(3)))
    # by its flags alone a layer does not rest
    assert has_batch_norm(nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False)))


def test__rows__do_not_depend_on_each_other_where_no_batch_norm_is_said_to_learn():
    network = fine_tuned(["fc"]).train()
    images = torch.randn(4, 3, 8, 8)
    assert not has_batch_norm(network)
    torch.testing.assert_close(network(images), torch.cat([network(x[None]) for x in images]))


def test__encoder_that_is_any_module__is_named_from_itself():
    network = FineTunedNetwork(Small(), nn.Linear(5, 3), ["fc"])
    assert [n for n, p in network.encoder.named_parameters() if p.requires_grad] == [
        "fc.weight",
        "fc.bias",
    ]


@pytest.mark.parametrize("prefix", ["layer4", "stag", "stage.0.2", "dropout", "network.stage", ""])
def test__prefix_that_fits_nothing__is_named_with_the_parts_there_are(prefix):
    with pytest.raises(ValueError, match=rf"trainable holds '{prefix}'.* Small .* conv, bn, stage"):
        fine_tuned(["stage", prefix])


def test__unknown_word_for_trainable__is_told_from_a_prefix():
    with pytest.raises(ValueError, match=r"trainable='stage' is neither .* such as \['stage'\]"):
        fine_tuned("stage")
