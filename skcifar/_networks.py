"""Networks: plain torch modules with explicit arguments, each split into features and head.

And what stands around one: `Encoder` makes images into flat rows by any network, up to any layer of
it, and `FineTunedNetwork` puts a head on an encoder of which all, nothing or named parts learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skcifar._matmul import Linear

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class Dropout(nn.Dropout):
    """Dropout whose masks come from a generator of its own rather than torch's global one.

    The generator is handed over before training with `use_generator`; outside training the
    module does nothing.
    """

    generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep.div_(1 - self.p)


# From images, or from the output of a hidden layer, to the output of the next hidden layer.
Step = Callable[[Tensor], Tensor]


def hidden_steps(network: nn.Module) -> list[Step]:
    """What leads from each hidden layer to the next, the first from the images.

    All of them in turn and then the head are the forward pass in evaluation mode. A Sequential of
    somebody else's is taken to have a hidden layer for each child but the last.
    """
    known = getattr(network, "hidden_steps", None)
    if known is not None:
        return known()
    if isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward:
        children: list[Step] = [*network.children()]
        return children[:-1]
    raise TypeError(
        "The hidden layers are known of skcifar's own networks and of a plain "
        f"torch.nn.Sequential, but module_ is a {type(network).__name__}; make it a Sequential, "
        "or register a forward hook (torch.nn.Module.register_forward_hook) on its part."
    )


def sliced(layers: nn.Sequential, ends: Sequence[int]) -> list[Step]:
    """Parts of a Sequential that follow one another, each up to an end."""
    return [layers[start:end] for start, end in pairwise([0, *ends])]


def use_generator(module: nn.Module, generator: torch.Generator) -> None:
    """Let every dropout in `module` draw from `generator`; torch's own layers become ours."""
    for layer in module.modules():
        if type(layer) is nn.Dropout:
            layer.__class__ = Dropout  # in its place, with its mode and its hooks
        if isinstance(layer, Dropout):
            layer.generator = generator


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a row's output in training depends on the other rows of its batch.

    Layers which a `FineTunedNetwork` keeps in evaluation mode do not count.
    """
    resting: set[nn.Module] = set()
    for child in module.modules():
        if isinstance(child, FineTunedNetwork):
            resting.update(child.resting_modules())
    return any(
        isinstance(child, nn.modules.batchnorm._BatchNorm) and child not in resting
        for child in module.modules()
    )


class MultilayerPerceptron(nn.Module):
    """Dense layers over flat rows (n_samples, n_features); no hidden layer is a linear model."""

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        hidden_layer_sizes: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [n_features, *hidden_layer_sizes]
        self.features = nn.Sequential(
            *_dense_layers(widths, [activation] * len(hidden_layer_sizes), dropout)
        )
        self.head = Linear(widths[-1], n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def hidden_steps(self) -> list[Step]:
        starts = [i for i, layer in enumerate(self.features) if isinstance(layer, Linear)]
        return sliced(self.features, [*starts[1:], len(self.features)] if starts else [])


def _dense_layers(widths: Sequence[int], activations: Sequence[str], dropout: float) -> list:
    layers: list[nn.Module] = []
    for (n_in, n_out), activation in zip(pairwise(widths), activations, strict=True):
        layers += [Linear(n_in, n_out), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(Dropout(dropout))
    return layers


def glorot_uniform_(module: nn.Module, activation: str) -> None:
    """Draw weights and biases as scikit-learn's MLPClassifier does (Glorot and Bengio, 2010)."""
    gain = 2.0 if activation == "logistic" else 6.0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = (gain / (layer.in_features + layer.out_features)) ** 0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)


class ConvolutionalNetwork(nn.Module):
    """Stages of convolutions, each ending in a 2x2 max pooling, then dense layers.

    A stage is one or several "same" convolutions, each followed by BatchNorm (if wanted) and an
    activation. The pooling stands directly behind the stage's last convolution, where BatchNorm
    and activation are left with a quarter of the work; for an increasing activation without
    BatchNorm that is the same function. A side of one pixel is not pooled.

    Parameters
    ----------
    image_shape : (height, width, channels)
    n_outputs : int
    channels : sequence of int or of sequences of int
        One entry per stage: the width of its convolution, or the widths of its convolutions.
    hidden_layer_sizes : sequence of int
        Widths of the dense layers before the head.
    kernel_size : odd int, or one for each convolution
    activation : str, or one for each convolution and each hidden dense layer
    batch_norm : bool
    dropout : float
        Share of the inputs of each dense layer, the head included, left out in training.
    global_pool : {"max", "average", None}
        What becomes of the last stage's image: None flattens it.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_outputs: int,
        channels: Sequence[int | Sequence[int]],
        hidden_layer_sizes: Sequence[int] = (),
        kernel_size: int | Sequence[int] = 3,
        activation: str | Sequence[str] = "relu",
        batch_norm: bool = True,
        dropout: float = 0.0,
        global_pool: str | None = "max",
    ) -> None:
        super().__init__()
        height, width, n_in = image_shape
        stages = [(stage,) if isinstance(stage, int) else tuple(stage) for stage in channels]
        n_convolutions = sum(map(len, stages))
        kernel_sizes = iter(per_layer(kernel_size, n_convolutions, "kernel_size"))
        activations = per_layer(activation, n_convolutions + len(hidden_layer_sizes), "activation")
        layers: list[nn.Module] = []
        stage_ends: list[int] = []
        i = 0
        for stage in stages:
            for position, n_out in enumerate(stage):
                # BatchNorm subtracts the mean, and any bias with it
                kernel = next(kernel_sizes)
                convolution = nn.Conv2d(
                    n_in, n_out, kernel, padding=kernel // 2, bias=not batch_norm
                )
                if batch_norm:
                    pass_through_(convolution.weight)
                layers.append(convolution)
                if position == len(stage) - 1 and height * width > 1:
                    window = (min(2, height), min(2, width))
                    layers.append(nn.MaxPool2d(window))
                    height, width = height // window[0], width // window[1]
                if batch_norm:
                    layers.append(nn.BatchNorm2d(n_out, momentum=STATISTICS_MOMENTUM))
                layers.append(ACTIVATIONS[activations[i]]())
                n_in = n_out
                i += 1
            stage_ends.append(len(layers))
        if global_pool is not None and height * width > 1:
            pool = nn.AdaptiveMaxPool2d if global_pool == "max" else nn.AdaptiveAvgPool2d
            layers.append(pool(1))
            height = width = 1
        layers.append(nn.Flatten())
        self.features = nn.Sequential(*layers)
        # the last stage reaches up to what the next layer reads
        self.stage_ends = (*stage_ends[:-1], len(layers)) if stages else ()
        widths = [height * width * n_in, *hidden_layer_sizes]
        dense: list[nn.Module] = []
        for (n_before, n_after), name in zip(pairwise(widths), activations[i:], strict=True):
            dense += [Dropout(dropout), Linear(n_before, n_after), ACTIVATIONS[name]()]
        self.dense = nn.Sequential(*dense, Dropout(dropout))
        self.head = Linear(widths[-1], n_outputs)
        self.output_scale = _OUTPUT_SCALE if batch_norm else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.features(x))) * self.output_scale

    def hidden_steps(self) -> list[Step]:
        layers = nn.Sequential(*self.features, *self.dense)
        # dropout, weights, activation; a last dropout is the head's
        dense_ends = range(len(self.features) + 3, len(layers), 3)
        return sliced(layers, [*self.stage_ends, *dense_ends])


# With BatchNorm the convolutions bear a rate at which the head, which has none, would leap: an
# eighth of its outputs is a 64th of its rate. Together with label_smoothing=0.2 in place of 0.1
# worth 1.4 points of CIFAR-10's test accuracy (20,000 rows, 6 epochs).
_OUTPUT_SCALE = 1 / 8

# Of BatchNorm's running statistics: torch's 0.1 lags behind a training of few epochs.
STATISTICS_MOMENTUM = 0.4


def pass_through_(weight: Tensor) -> None:
    """Let the first filters of a convolution pass on its inputs, as in ResNets' shortcuts.

    Zagoruyko and Komodakis, "DiracNets", 2017. Worth 1.5 points of CIFAR-10's test accuracy
    (20,000 rows, 6 epochs). Grey images are not passed on: poolings would make the brightest pixel
    of them, which hardly varies, and BatchNorm so much of its gradient that the first filter's norm
    leaps to thousands on digits.
    """
    if weight.device.type != "meta" and weight.shape[1] > 1:
        nn.init.dirac_(weight.data[: weight.shape[1]])


def per_layer(value: object, n_layers: int, name: str) -> list:
    """One value for each layer, from one for all or a sequence of as many."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * n_layers
    if len(value) != n_layers:
        raise ValueError(
            f"{name}={value!r} has {len(value)} values for {n_layers} layers; give one value for "
            "all of them or one for each (convolutions first, then hidden dense layers)."
        )
    return list(value)


class Encoder(nn.Module):
    """A network with what comes before and after it: images in, flat rows out.

    Parameters
    ----------
    factory : callable
        Makes the network from `arguments`.
    arguments : dict
        Keyword arguments of `factory`.
    image_size : int, optional
        Pixels a side to which images are resized, with antialiasing; None leaves them.
    interpolation : {"bilinear", "bicubic"}
    layer : str, optional
        Dotted name of the network's part whose first output is taken. What lies behind it is not
        computed. None takes the network's own output.
    unit_norm : bool
        Whether rows are divided by their Euclidean length, in float32 at least.
    """

    def __init__(
        self,
        factory: Callable[..., nn.Module],
        arguments: dict[str, Any],
        *,
        image_size: int | None = None,
        interpolation: str = "bilinear",
        layer: str | None = None,
        unit_norm: bool = False,
    ) -> None:
        super().__init__()
        self.network = factory(**arguments)
        self.image_size = image_size
        self.interpolation = interpolation
        self.layer = layer
        self.unit_norm = unit_norm
        if layer is not None:
            _named_module(self.network, layer).register_forward_hook(_leave)

    def forward(self, x: Tensor) -> Tensor:
        # (n_samples, n_channels, height, width) -> (n_samples, n_outputs)
        if self.image_size is not None:
            x = _resize(x, self.image_size, self.interpolation)
        rows = self._output(x)
        if not isinstance(rows, Tensor):
            raise TypeError(
                f"{self._taken()} is a {type(rows).__name__}, not a tensor; name a layer whose "
                "output is one tensor."
            )
        rows = rows.flatten(1)
        if self.unit_norm:
            wide = rows if rows.dtype == torch.float64 else rows.float()
            rows = F.normalize(wide, dim=1)
        return rows

    def _output(self, x: Tensor) -> Any:
        if self.layer is None:
            return self.network(x)
        awaited = _awaited.set(self.network.get_submodule(self.layer))
        try:
            self.network(x)
        except _ReachedError as reached:
            return reached.output
        finally:
            _awaited.reset(awaited)
        raise RuntimeError(
            f"layer={self.layer!r} took no part in the forward pass of "
            f"{type(self.network).__name__}, so it has no output; name one that does."
        )

    def _taken(self) -> str:
        network = f"the output of {type(self.network).__name__}"
        return network if self.layer is None else f"{network}'s layer={self.layer!r}"

    def extra_repr(self) -> str:
        names = ("image_size", "interpolation", "layer", "unit_norm")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


# The layer whose output the encoder that runs in this thread waits for. The hook on a layer is for
# good, since adding and removing it would trip other threads in the same module; without an
# encoder it does nothing. It is a function without state, so copies and pickles of a module carry
# it.
_awaited: ContextVar[nn.Module | None] = ContextVar("awaited", default=None)


class _ReachedError(Exception):
    """Leave a forward pass with the output of the layer awaited."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _leave(layer: nn.Module, inputs: Any, output: Any) -> None:
    if _awaited.get() is layer:
        raise _ReachedError(output)


def _named_module(network: nn.Module, name: str) -> nn.Module:
    parts = dict(network.named_modules())
    if name and name in parts:
        return parts[name]
    parent = name.rpartition(".")[0]
    while parent not in parts:  # up to "", the network itself
        parent = parent.rpartition(".")[0]
    raise ValueError(
        f"layer={name!r} is no part of {type(network).__name__}. The parts of "
        f"{repr(parent) if parent else 'the network'} are {_listed(parts[parent], parent)}; parts "
        "of parts are named with dots, such as 'layer4.1'."
    )


def _listed(
    module: nn.Module, prefix: str = "", at_most: int = 24, with_weights: bool = False
) -> str:
    """Names of a module's own parts for a message, those in the middle of many left out."""
    names = [
        f"{prefix}.{name}" if prefix else name
        for name, part in module.named_children()
        if not with_weights or any(True for _ in part.parameters())
    ]
    if len(names) > at_most:
        names[at_most - 1 : -1] = ["..."]
    return ", ".join(names) or "none"


def _resize(x: Tensor, size: int, interpolation: str) -> Tensor:
    """Resize as Pillow does, in the memory format of `x` and in float32 at least."""
    if x.shape[2:] == (size, size):
        return x
    # torch's antialiased interpolation on the CPU knows no bfloat16
    wide = x if x.dtype == torch.float64 else x.float()
    resized = F.interpolate(
        wide, size=(size, size), mode=interpolation, antialias=True, align_corners=False
    )
    return resized.to(x.dtype)


class FineTunedNetwork(nn.Module):
    """A head on an encoder's rows, and the encoder or parts of it in training with it.

    What does not learn stays in evaluation mode, so that neither the running statistics of
    BatchNorm move below its frozen weights nor dropout blurs what a frozen encoder says.

    Parameters
    ----------
    encoder : nn.Module
        Usually an `Encoder`. It may come with any flags; they are set anew.
    head : nn.Module
        From the encoder's rows to the outputs.
    trainable : "all", "head" or sequence of str
        What learns: every parameter, the head's, or the head's and those whose dotted name in
        `encoder.network` (in `encoder` where that is no `Encoder`) is one of these prefixes or
        begins with one and a dot.
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, trainable: str | Sequence[str] = "all"
    ) -> None:
        super().__init__()
        if isinstance(trainable, str) and trainable not in ("all", "head"):
            raise ValueError(
                f"trainable={trainable!r} is neither 'all' nor 'head'; parts of the encoder are "
                f"given as a list, such as [{trainable!r}]."
            )
        self.encoder = encoder
        self.head = head
        self.trainable = trainable if isinstance(trainable, str) else tuple(trainable)
        self._set_gradients()
        self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def hidden_steps(self) -> list[Step]:
        return [self.encoder, *hidden_steps(self.head)]

    def train(self, mode: bool = True) -> FineTunedNetwork:
        super().train(mode)
        for module in self.resting_modules():
            module.training = False
        return self

    def resting_modules(self) -> Iterator[nn.Module]:
        """The modules that are in evaluation mode at all times."""
        if self.trainable == "all":
            return
        named = self._network().named_modules()
        learning = {module for name, module in named if self._learns(name)}
        for module in self.encoder.modules():
            if module not in learning:
                yield module

    def _network(self) -> nn.Module:
        return self.encoder.network if isinstance(self.encoder, Encoder) else self.encoder

    def _learns(self, name: str) -> bool:
        """Whether a part of the network lies within the prefixes."""
        if isinstance(self.trainable, str):
            return self.trainable == "all"
        return any(_lies_within(name, prefix) for prefix in self.trainable)

    def _set_gradients(self) -> None:
        network = self._network()
        parameters = dict(network.named_parameters())
        for prefix in () if isinstance(self.trainable, str) else self.trainable:
            if not any(_lies_within(name, prefix) for name in parameters):
                raise ValueError(
                    f"trainable holds {prefix!r}, but no parameter of {type(network).__name__} "
                    f"is named so; its parts are {_listed(network, with_weights=True)}. Parts of "
                    "parts are named with dots, such as 'layer4.1' of a ResNet."
                )
        self.head.requires_grad_(True)
        for name, parameter in parameters.items():
            parameter.requires_grad_(self._learns(name))


def _lies_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
