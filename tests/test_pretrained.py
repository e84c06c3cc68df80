"""PretrainedFeatures: its features against plain functions of a checkpoint, and the store."""

import hashlib
import pickle
import sqlite3
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.error import URLError

import joblib
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_architectures import official_shapes, plain_alexnet, plain_resnet, random_state

from skcifar import MLPClassifier, PretrainedFeatures, SoftmaxRegression, _checkpoints, pretrained
from skcifar._checkpoints import CHECKPOINTS, Checkpoint

MEAN, SCALE = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 40, 48, 3), dtype=np.uint8)
# The plain functions' names of what the estimator calls by its own.
OUTPUTS = {
    "resnet18": {"pool": "avgpool", "logits": "fc", "layer4.1": "layer4"},
    "alexnet": {"pool": "avgpool", "logits": "classifier.6"},
}


def official_checkpoint(backbone, path):
    """A file of torchvision's names and shapes, and what is in it, as float64."""
    state = {
        name: value if value.dtype == torch.int64 else value.float()
        for name, value in random_state(official_shapes(backbone, 1000)).items()
    }
    save = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
    save(state, path)
    return path, {name: value.double() for name, value in state.items()}


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    return official_checkpoint("resnet18", tmp_path_factory.mktemp("resnet18") / "weights.pth")


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("alexnet") / "weights.safetensors"
    return official_checkpoint("alexnet", path)


def exact(backbone="resnet18", **parameters):
    return PretrainedFeatures(backbone, **({"precision": "float32"} | parameters))


def small(**parameters):
    """A quick one, of random weights."""
    defaults = {"weights": None, "image_size": 16, "precision": "float32", "random_state": 0}
    return PretrainedFeatures(**({"backbone": Counting} | defaults | parameters))


class Counting(torch.nn.Module):
    """Keeps what it was run on: the bytes of each image in `seen`, the mode in `modes`."""

    seen: list = []
    modes: list = []

    def __init__(self, image_shape, activation="relu", factor=1.0):
        super().__init__()
        self.factor = factor
        self.convolution = torch.nn.Conv2d(image_shape[2], 6, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(6)
        self.pool = torch.nn.AdaptiveAvgPool2d(2)
        self.activation = {"relu": torch.nn.ReLU(), "tanh": torch.nn.Tanh()}[activation]

    def forward(self, x):
        self.seen.extend(image.numpy().tobytes() for image in x)
        self.modes.append(any(module.training for module in self.modules()))
        return self.factor * self.pool(self.activation(self.norm(self.convolution(x))))


@pytest.fixture(autouse=True)
def _nothing_seen():
    Counting.seen.clear()
    Counting.modes.clear()


# -- features of a checkpoint ----------------------------------------------------------------------


def plain_features(backbone, state, images, layer, size, mode):
    """From uint8 images (n, height, width, 3) alone, in float64."""
    pixels = (images.astype(np.float64) / 255 - MEAN) / SCALE
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    if size is not None:
        x = F.interpolate(x, (size, size), mode=mode, antialias=True, align_corners=False)
    outputs = (plain_alexnet if backbone == "alexnet" else plain_resnet)(x, state)
    return outputs[OUTPUTS[backbone].get(layer, layer)].flatten(1).numpy()


def assert_equal_relatively(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("layer", ["logits", "pool", "layer2", "layer4.1", "bn1"])
@pytest.mark.parametrize(
    ("size", "mode"), [(None, "bilinear"), (64, "bilinear"), (64, "bicubic"), (32, "bicubic")]
)
def test__resnet18__is_the_plain_functions_of_its_checkpoint(resnet18, layer, size, mode):
    path, state = resnet18
    model = exact(weights=path, layer=layer, image_size=size, interpolation=mode).fit(IMAGES)
    expected = plain_features("resnet18", state, IMAGES, layer, size, mode)
    assert_equal_relatively(model.transform(IMAGES), expected)


@pytest.mark.parametrize("layer", ["logits", "pool", "features.4", "classifier.4"])
def test__alexnet__is_the_plain_functions_of_its_checkpoint(alexnet, layer):
    path, state = alexnet
    model = exact("alexnet", weights=str(path), layer=layer, image_size=64).fit(IMAGES)
    expected = plain_features("alexnet", state, IMAGES, layer, 64, "bilinear")
    assert_equal_relatively(model.transform(IMAGES), expected)


def test__resnet50__is_the_plain_functions_of_its_checkpoint(tmp_path):
    path, state = official_checkpoint("resnet50", tmp_path / "weights.safetensors")
    model = exact("resnet50", weights=path, image_size=64).fit(IMAGES)
    expected = plain_resnet(
        F.interpolate(
            torch.from_numpy(((IMAGES / 255.0 - MEAN) / SCALE).transpose(0, 3, 1, 2)),
            (64, 64),
            mode="bilinear",
            antialias=True,
        ),
        state,
    )["avgpool"]
    assert_equal_relatively(model.transform(IMAGES), expected.flatten(1).numpy())


def test__both_file_formats__give_the_same_features(resnet18, tmp_path):
    path, _ = resnet18
    safetensors.torch.save_file(torch.load(path), tmp_path / "weights.safetensors")
    features = [
        exact(weights=weights, image_size=32).fit_transform(IMAGES)
        for weights in (path, str(path), tmp_path / "weights.safetensors")
    ]
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(features[0], features[2])


def test__float64__is_the_plain_functions_to_its_own_rounding(resnet18):
    path, state = resnet18
    model = exact(weights=path, image_size=64, precision="float64").fit(IMAGES)
    expected = plain_features("resnet18", state, IMAGES, "pool", 64, "bilinear")
    assert_equal_relatively(model.transform(IMAGES.astype(np.float64)), expected, 1e-10)


def test__bfloat16__is_close_to_float32(resnet18):
    path, _ = resnet18
    features = exact(weights=path, image_size=64).fit_transform(IMAGES)
    rough = exact(weights=path, image_size=64, precision="bfloat16").fit_transform(IMAGES)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - features).max() < 0.1 * np.abs(features).max()


def test__weights_of_another_head__serve_every_layer_before_it(resnet18, tmp_path):
    path, _ = resnet18
    state = torch.load(path)
    state |= {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "ten-classes.pth")
    for layer in ("pool", "layer2"):
        features = [
            exact(weights=weights, layer=layer, image_size=32).fit_transform(IMAGES)
            for weights in (path, tmp_path / "ten-classes.pth")
        ]
        np.testing.assert_array_equal(features[0], features[1])
    for layer in ("logits", "fc"):
        with pytest.raises(ValueError, match=r"fc\.weight \(10, 512\) instead of \(1000, 512\)"):
            exact(weights=tmp_path / "ten-classes.pth", layer=layer).fit(IMAGES)


def test__weights_of_another_backbone__error_names_what_does_not_fit(resnet18):
    path, _ = resnet18
    with pytest.raises(ValueError, match=r"does not fit ImageNetResNet34: it lacks layer1\.2\."):
        exact("resnet34", weights=path).fit(IMAGES)
    with pytest.raises(FileNotFoundError, match=r"'missing\.pth' is no file"):
        exact(weights="missing.pth").fit(IMAGES)


@pytest.mark.parametrize(
    ("backbone", "n_parameters"),
    [
        ("alexnet", 61_100_840),
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
    ],
)
def test__logits__are_1000_of_the_official_number_of_parameters(backbone, n_parameters):
    model = PretrainedFeatures(backbone, weights=None, layer="logits", image_size=64)
    assert model.fit_transform(IMAGES[:1]).shape == (1, 1000)
    assert model.n_parameters_ == n_parameters
    assert sum(p.numel() for p in model.module_.parameters()) == n_parameters


def test__random_weights__follow_random_state_alone():
    first, again, other = (small(random_state=seed).fit_transform(IMAGES) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    state = torch.random.get_rng_state()
    PretrainedFeatures(weights=None, image_size=32).fit(IMAGES)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- ImageNet's weights ----------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def fail(*arguments, **keywords):
        raise URLError("no network")

    monkeypatch.setattr(_checkpoints, "fetch_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))


@pytest.mark.parametrize("folder", ["home/imagenet-weights", "torch-home/hub/checkpoints"])
def test__imagenet__is_the_file_put_by_hand(offline, monkeypatch, resnet18, tmp_path, folder):
    path, _ = resnet18
    content = path.read_bytes()
    checkpoint = Checkpoint("by-hand.pth", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CHECKPOINTS, "resnet18", checkpoint)
    model = exact(image_size=32, data_home=tmp_path / "home")
    with pytest.raises(OSError, match=r"by-hand\.pth"):
        model.fit(IMAGES)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / checkpoint.name).write_bytes(content)
    expected = exact(weights=path, image_size=32).fit_transform(IMAGES)
    np.testing.assert_array_equal(model.fit_transform(IMAGES), expected)


@pytest.mark.parametrize("backbone", sorted(CHECKPOINTS))
def test__imagenet_without_network__error_says_what_to_put_where(offline, tmp_path, backbone):
    with pytest.raises(OSError, match="no network") as caught:
        PretrainedFeatures(backbone, data_home=tmp_path).fit(IMAGES)
    name = CHECKPOINTS[backbone].name
    assert f"https://download.pytorch.org/models/{name}" in str(caught.value)
    assert f"at {tmp_path / 'imagenet-weights' / name} or " in str(caught.value)


def test__imagenet_for_a_callable__error_says_what_to_give(offline):
    with pytest.raises(ValueError, match="give a callable backbone the path of its weights"):
        small(weights="imagenet").fit(IMAGES)


def test__callable__takes_weights_from_a_path(tmp_path):
    model = small(random_state=3).fit(IMAGES)
    torch.save(model.module_.network.state_dict(), tmp_path / "weights.pth")
    loaded = small(weights=tmp_path / "weights.pth").fit(IMAGES)
    np.testing.assert_array_equal(loaded.transform(IMAGES), model.transform(IMAGES))


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", Counting])
def test__pixels_of_any_kind__give_the_same_features(backbone):
    features = small(backbone=backbone).fit_transform(IMAGES)
    pixels = [
        IMAGES.astype(np.int64),
        IMAGES.astype(np.float16),
        IMAGES.astype(np.float32),
        IMAGES.astype(np.float64),
        (IMAGES / 255).astype(np.float32),
        IMAGES / 255,
        torch.from_numpy(IMAGES),
        IMAGES.tolist(),
    ]
    for X in pixels:
        model = small(backbone=backbone).fit(X)
        assert_equal_relatively(model.transform(X), features)
        unit = 1 if float(np.max(np.asarray(X))) <= 1 else 255
        np.testing.assert_allclose(model.mean_, np.multiply(MEAN, unit))
        np.testing.assert_allclose(model.scale_, np.multiply(SCALE, unit))


def test__normalize__is_for_pixels_unless_told():
    beyond = IMAGES.astype(np.float32) - 100
    model = small().fit(beyond)
    assert model.mean_ is None and model.scale_ is None
    by_hand = ((IMAGES / 255 - MEAN) / SCALE).astype(np.float32)
    assert_equal_relatively(
        small(normalize=False).fit_transform(by_hand), small().fit_transform(IMAGES)
    )
    np.testing.assert_array_equal(small(normalize=True).fit(beyond).mean_, np.multiply(MEAN, 255))
    assert small(normalize=False).fit(IMAGES).mean_ is None


@pytest.mark.parametrize("layer", ["pool", "layer1"])
def test__grey_images__are_repeated_to_three_channels(resnet18, layer):
    path, _ = resnet18
    grey = IMAGES[..., 0]
    model = exact(weights=path, image_size=64, layer=layer).fit(grey)
    assert model.image_shape_ == (40, 48, 1)
    assert model.mean_.shape == model.scale_.shape == (3,)
    stacked = np.stack([grey] * 3, axis=-1)
    expected = exact(weights=path, image_size=64, layer=layer).fit_transform(stacked)
    assert_equal_relatively(model.transform(grey), expected, 1e-6)
    assert_equal_relatively(model.transform(grey[..., None]), expected, 1e-6)


@pytest.mark.parametrize("n_channels", [2, 4])
def test__other_channels__are_a_clear_error(n_channels):
    X = np.zeros((3, 8, 8, n_channels), np.uint8)
    message = rf"takes grey or colour images, .* of {n_channels} channels; give image_shape"
    with pytest.raises(ValueError, match=message):
        small(backbone="resnet18").fit(X)
    assert small().fit(X).mean_.shape == (n_channels,)  # a callable's own business
    with pytest.raises(ValueError, match="of 65 channels"):
        small(backbone="resnet18").fit(np.zeros((3, 65), np.uint8))


def test__too_small_images__error_names_the_least(tmp_path):
    with pytest.raises(ValueError, match="at least 63 x 63 pixels, but image_size=None"):
        small(backbone="alexnet", image_size=None).fit(IMAGES)
    with pytest.raises(ValueError, match="at least 63 x 63 pixels, but image_size=62"):
        small(backbone="alexnet", image_size=62).fit(IMAGES)
    small(backbone="alexnet", image_size=63).fit(IMAGES)


@pytest.mark.parametrize("backbone", ["resnet18", Counting])
def test__rows_images_and_layouts__give_the_same_features(backbone):
    images = IMAGES[:, :40, :40]
    expected = small(backbone=backbone).fit_transform(images)
    planar = images.transpose(0, 3, 1, 2)
    for X, parameters in [
        (images.reshape(5, -1), {}),
        (images.reshape(5, -1), {"image_shape": (40, 40, 3)}),
        (planar, {"layout": "CHW"}),
        (planar.reshape(5, -1), {"layout": "CHW"}),
        (torch.from_numpy(planar.copy()), {"layout": "CHW"}),
    ]:
        found = small(backbone=backbone, **parameters).fit_transform(X)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test__layer_that_is_not_there__error_lists_those_that_are():
    with pytest.raises(ValueError, match=r"layer='layer5' is no part of .*layer4, avgpool, fc"):
        small(backbone="resnet18", layer="layer5").fit(IMAGES)
    with pytest.raises(ValueError, match=r"The parts of 'classifier' are classifier\.0"):
        small(backbone="alexnet", layer="classifier.9", image_size=64).fit(IMAGES)


# -- the forward pass ------------------------------------------------------------------------------


def test__network__is_in_evaluation_mode_always(tmp_path):
    model = small().fit(IMAGES)
    before = {name: value.clone() for name, value in model.module_.state_dict().items()}
    model.transform(IMAGES)
    others = [pickle.loads(pickle.dumps(model)), clone(model).fit(IMAGES)]
    others.append(small(memory=tmp_path).fit(IMAGES))
    for other in (model, *others):
        assert not any(module.training for module in other.module_.modules())
        other.transform(IMAGES)
        for name, value in other.module_.state_dict().items():
            assert torch.equal(value, before[name])
    assert len(Counting.modes) > 4 and not any(Counting.modes)


@pytest.mark.parametrize("image_size", [16, None])
def test__batch_size__is_of_no_consequence(image_size):
    X = RNG.integers(0, 256, (70, 12, 12, 3), dtype=np.uint8)
    expected = small(image_size=image_size).fit_transform(X)
    for batch_size in (1, 3, 69, 70, 1000):
        found = small(image_size=image_size, batch_size=batch_size).fit_transform(X)
        assert_equal_relatively(found, expected, 1e-6)


def test__batch_size_auto__falls_with_the_size_of_the_images():
    most = {}
    for image_size in (None, 32, 448):
        model = small(image_size=image_size, device="cpu").fit(IMAGES)
        most[image_size] = model._rows_of_a_forward_pass()[0]
    height, width = IMAGES.shape[1:3]
    assert most == {None: 16 * 224**2 // (height * width), 32: 784, 448: 4}


def test__forward_passes__are_of_batch_size_images():
    model = small(backbone=Fragile, batch_size=4).fit(IMAGES)
    Fragile.tried.clear()
    model.transform(np.concatenate([IMAGES, IMAGES]))
    assert Fragile.tried == [4, 4, 2]


class Fragile(Counting):
    """Has memory for so many images only."""

    tried: list = []

    def __init__(self, image_shape, most=1000, error=None):
        super().__init__(image_shape)
        self.most, self.error = most, error

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.most:
            raise self.error
        return super().forward(x)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("image_size", [16, None])
@pytest.mark.parametrize("with_memory", [False, True])
def test__out_of_memory__halves_the_batches(error, image_size, with_memory, tmp_path):
    X = RNG.integers(0, 256, (50, 12, 12, 3), dtype=np.uint8)
    error.__traceback__ = None  # of an earlier test; where distributed is imported, it pickles
    memory = tmp_path if with_memory else None
    parameters = {"image_size": image_size, "memory": memory, "batch_size": 128}
    expected = small(image_size=image_size).fit_transform(X)
    model = small(backbone=partial(Fragile, most=9, error=error), **parameters).fit(X)
    Fragile.tried.clear()
    assert_equal_relatively(model.transform(X), expected, 1e-6)
    # 128 and 64 are all of the 50; batches of small images are filled up
    whole, last = (50, 2) if image_size else (52, 4)
    assert Fragile.tried == [whole, whole, 32, 16, *[8] * 6, last]
    assert model.batch_size == 128


def test__no_memory_for_one_image_and_other_errors__pass_through():
    for most, error in [(0, OUT_OF_MEMORY[0]), (0, OUT_OF_MEMORY[1]), (3, RuntimeError("a bug"))]:
        with pytest.raises(type(error)) as caught:
            small(backbone=partial(Fragile, most=most, error=error)).fit_transform(IMAGES)
        assert caught.value is error
    assert Fragile.tried[-1] == 5  # a bug is not tried again


def test__verbose__tells_of_progress_on_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "_SECONDS_BETWEEN_REPORTS", 0.0)
    small(batch_size=2).fit_transform(IMAGES)
    assert capsys.readouterr() == ("", "")
    small(batch_size=2, verbose=True).fit_transform(IMAGES)
    out, err = capsys.readouterr()
    assert out == ""
    told = [line.rpartition(", ")[0] for line in err.splitlines()]
    assert told == [f"PretrainedFeatures: {done} images computed" for done in (2, 4, 5)]
    assert err.count(" a second\n") == 3


# -- the store -------------------------------------------------------------------------------------

GRID_IMAGES = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
GRID_IMAGES[30:] = GRID_IMAGES[:10]  # 30 distinct ones
GRID_LABELS = np.arange(40) % 2


@pytest.mark.parametrize("classifier", [SoftmaxRegression, LogisticRegression])
def test__grid_search__runs_the_backbone_once_for_each_image(tmp_path, classifier):
    pipeline = make_pipeline(small(memory=tmp_path), classifier())
    name = classifier.__name__.lower()
    parameter, values = ("alpha", [1e-3, 1.0]) if classifier is SoftmaxRegression else ("C", [1, 2])
    search = GridSearchCV(pipeline, {f"{name}__{parameter}": values}, cv=5)
    search.fit(GRID_IMAGES, GRID_LABELS)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    n_fits = 5 * 2 + 1  # each tries the network on one image, to count its features
    assert len(set(Counting.seen)) == 30
    assert len(Counting.seen) == 30 + n_fits
    Counting.seen.clear()
    search.predict(GRID_IMAGES)
    assert Counting.seen == []


def test__grid_search_without_store__runs_the_backbone_in_every_fold():
    search = GridSearchCV(make_pipeline(small(), LogisticRegression()), {}, cv=5)
    search.fit(GRID_IMAGES, GRID_LABELS)
    assert len(Counting.seen) == 6 + 5 * 40 + 40


class CountingInFile(Counting):
    """Leaves a line for each image in a file that processes share."""

    def __init__(self, image_shape, path):
        super().__init__(image_shape)
        self.path = path

    def forward(self, x):
        with open(self.path, "a") as file:
            for image in x:
                file.write(hashlib.sha256(image.numpy().tobytes()).hexdigest() + "\n")
        return super().forward(x)


def counting_in_file(image_shape, path):
    return CountingInFile(image_shape, path)


def test__processes__run_the_backbone_once_for_each_image(tmp_path):
    log = tmp_path / "images"
    features = small(backbone=partial(counting_in_file, path=str(log)), memory=tmp_path / "store")
    grid = {"logisticregression__C": [0.1, 1.0]}
    search = GridSearchCV(make_pipeline(features, LogisticRegression()), grid, cv=5, n_jobs=2)
    search.fit(GRID_IMAGES, GRID_LABELS)
    assert Counting.seen  # the last fit, here
    lines = Counter(log.read_text().split())
    assert len(lines) == 30
    assert lines.total() == 30 + 11


def test__threads__run_the_backbone_once_for_each_image(tmp_path):
    model = small(memory=tmp_path).fit(GRID_IMAGES)
    expected = small().fit_transform(GRID_IMAGES)
    Counting.seen.clear()
    results = {}

    def run(number):
        results[number] = model.transform(np.roll(GRID_IMAGES, number, axis=0))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Counting.seen) == 30
    for number in range(4):
        assert_equal_relatively(results[number], np.roll(expected, number, axis=0), 1e-6)


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test__store__changes_no_feature(tmp_path, precision, dtype):
    X = GRID_IMAGES[:30].astype(dtype)
    expected = small(precision=precision).fit_transform(X)
    model = small(precision=precision, memory=str(tmp_path)).fit(X)
    for _ in range(2):  # computed, and read
        found = model.transform(X)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(model.transform(X[::-1]), expected[::-1])
    Counting.seen.clear()
    np.testing.assert_array_equal(clone(model).fit(X).transform(X), expected)
    assert len(Counting.seen) == 1


def counting_with(activation):
    return lambda image_shape: Counting(image_shape, activation)


VARIANTS: dict = {
    "plain": {},
    "weights": {"random_state": 1},
    "layer": {"layer": "convolution"},
    "size": {"image_size": 12},
    "interpolation": {"interpolation": "bicubic"},
    "no size": {"image_size": None},
    "no normalisation": {"normalize": False},
    "layout": {"layout": "CHW", "image_shape": (8, 8, 3)},
    "shape": {"image_shape": (4, 16, 3)},
    "double precision": {"precision": "float64"},
    "half precision": {"precision": "bfloat16"},
    # of equal weights
    "argument": {"backbone": partial(Counting, activation="tanh")},
    "argument that is not printed": {"backbone": partial(Counting, factor=2.0)},
    "other arguments": {"backbone": partial(Counting, factor=3.0)},
    "other name": {"backbone": lambda image_shape: Counting(image_shape, factor=4.0)},
    "closure": {"backbone": counting_with("relu")},
    "closure of the same name": {"backbone": counting_with("tanh")},
    "named": {"backbone": "resnet18", "image_shape": (8, 8, 3)},
    "shape of a named one": {"backbone": "resnet18", "image_shape": (4, 16, 3)},
}


def test__store__does_not_mix_up(tmp_path):
    rows = GRID_IMAGES[:30].reshape(30, -1)
    models = {name: small(**parameters) for name, parameters in VARIANTS.items()}
    expected = {name: model.fit_transform(rows) for name, model in models.items()}
    for name, model in [*models.items(), *reversed(models.items())]:
        found = clone(model).set_params(memory=tmp_path).fit_transform(rows)
        np.testing.assert_array_equal(found, expected[name], err_msg=name)
    different = {features.tobytes() for features in expected.values()}
    assert len(different) == len(VARIANTS) - 2  # the closures are as other variants


def test__store__knows_statistics_and_dtypes_of_rows(tmp_path):
    dark = GRID_IMAGES[:30].reshape(30, -1) // 255  # zeros and ones
    bright = np.concatenate([dark, np.full((1, 192), 255, np.uint8)])
    for fitted in (dark, bright):
        for dtype in (np.uint8, np.float32, np.float64):
            plain = small().fit(fitted.astype(dtype))
            stored = small(memory=tmp_path).fit(fitted.astype(dtype))
            X = dark.astype(dtype)
            np.testing.assert_array_equal(stored.transform(X), plain.transform(X))


def test__store_named_after_fit__is_used(tmp_path):
    model = small().fit(GRID_IMAGES)
    expected = model.transform(GRID_IMAGES)
    model.set_params(memory=tmp_path)
    np.testing.assert_array_equal(model.transform(GRID_IMAGES), expected)
    Counting.seen.clear()
    np.testing.assert_array_equal(small(memory=tmp_path).fit_transform(GRID_IMAGES), expected)
    assert len(Counting.seen) == 1


def test__corrupt_entries__are_computed_again(tmp_path):
    model = small(memory=tmp_path).fit(GRID_IMAGES)
    expected = model.transform(GRID_IMAGES)
    connection = sqlite3.connect(tmp_path / "rows.sqlite")
    with connection:
        ((value,),) = connection.execute("SELECT value FROM entry WHERE rowid = 3").fetchall()
        damaged = bytes([value[0] ^ 1]) + value[1:]
        connection.execute("UPDATE entry SET value = ? WHERE rowid = 3", (damaged,))
        connection.execute("UPDATE entry SET value = x'00' WHERE rowid = 7")
    connection.close()
    Counting.seen.clear()
    assert_equal_relatively(model.transform(GRID_IMAGES), expected, 1e-6)
    assert len(Counting.seen) == 2
    Path(tmp_path / "rows.sqlite").write_bytes(b"no database at all" * 1000)
    with pytest.warns(UserWarning, match="are damaged"):
        assert_equal_relatively(model.transform(GRID_IMAGES), expected, 1e-6)


def test__cache_size__bounds_the_file_and_leaves_features_right(tmp_path):
    X = RNG.integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    expected = small(layer="convolution").fit_transform(X)  # 6 kB an image
    model = small(layer="convolution", memory=tmp_path, cache_size=2_000_000).fit(X)
    for _ in range(2):
        np.testing.assert_allclose(model.transform(X), expected, atol=1e-6)
        # whole pages of 65,536 bytes, of which one may be free
        assert 1_000_000 < (tmp_path / "rows.sqlite").stat().st_size <= 2_000_000 + 65_536
    Counting.seen.clear()
    small(layer="convolution", memory=tmp_path / "new", cache_size=2_000_000).fit_transform(X)
    model.set_params(memory=tmp_path / "new").transform(X[500:])
    assert len(Counting.seen) == 1 + 600  # the last ones were still there
    small(memory=tmp_path / "none", cache_size=0).fit_transform(X[:20])
    assert not (tmp_path / "none").exists()


# -- an estimator ----------------------------------------------------------------------------------


def test__dtype__follows_the_images():
    for dtype, expected in [
        *((dtype, np.float32) for dtype in (np.uint8, np.int64, np.float16, np.float32)),
        (np.float64, np.float64),
    ]:
        for precision in ("float32", "float64"):
            model = small(precision=precision).fit(IMAGES.astype(dtype))
            assert model.transform(IMAGES.astype(dtype)).dtype == expected


def test__labels__are_ignored():
    model = small()
    np.testing.assert_array_equal(
        model.fit_transform(IMAGES, [0, 1, 0, 1, 2]), model.fit_transform(IMAGES)
    )


def test__refit__starts_afresh():
    model = small(memory=None).fit(IMAGES)
    model.set_params(image_size=None, random_state=5).fit(IMAGES[:, :20, :, 0])
    fresh = small(image_size=None, random_state=5).fit(IMAGES[:, :20, :, 0])
    assert vars(model).keys() == vars(fresh).keys()
    X = IMAGES[:, :20, :, 0]
    np.testing.assert_array_equal(model.transform(X), fresh.transform(X))


def test__set_output__gives_named_columns():
    model = small().fit(IMAGES).set_output(transform="pandas")
    frame = model.transform(IMAGES)
    assert isinstance(frame, pd.DataFrame) and frame.shape == (5, 24)
    assert list(frame.columns) == [f"pretrainedfeatures{i}" for i in range(24)]
    assert list(model.get_feature_names_out()) == list(frame.columns)
    np.testing.assert_array_equal(
        frame.to_numpy(), model.set_output(transform="default").transform(IMAGES)
    )


def test__pickles_and_memory_maps__give_the_same_features(tmp_path):
    model = exact(weights=None, image_size=32, layer="layer2", random_state=0).fit(IMAGES)
    expected = model.transform(IMAGES)
    content = pickle.dumps(model)
    assert len(content) < 4.2 * model.n_parameters_
    joblib.dump(model, tmp_path / "model.joblib")
    others = [
        pickle.loads(content),
        joblib.load(tmp_path / "model.joblib"),
        joblib.load(tmp_path / "model.joblib", mmap_mode="r"),
    ]
    for other in others:
        assert_equal_relatively(other.transform(IMAGES), expected, 1e-6)
        assert other.n_parameters_ == model.n_parameters_
        assert repr(other) == repr(model)


def test__pickle__finds_its_features_in_the_store(tmp_path):
    model = small(memory=tmp_path).fit(GRID_IMAGES)
    model.transform(GRID_IMAGES)
    Counting.seen.clear()
    other = pickle.loads(pickle.dumps(model))
    other.transform(GRID_IMAGES)
    other._weights_digest = None  # computed again, from the weights as they are now
    other.transform(GRID_IMAGES)
    assert Counting.seen == []


def test__alexnet_up_to_a_convolution__is_pickled_without_its_dense_layers():
    model = exact("alexnet", weights=None, image_size=64, layer="features.3").fit(IMAGES)
    assert model.n_parameters_ == 2_469_696
    assert len(pickle.dumps(model)) < 10_000_000


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": "vgg16"}, "'backbone' parameter"),
        ({"image_size": 0}, "'image_size' parameter"),
        ({"interpolation": "nearest"}, "'interpolation' parameter"),
        ({"batch_size": 0}, "'batch_size' parameter"),
        ({"cache_size": -1}, "'cache_size' parameter"),
        ({"layer": None}, "'layer' parameter"),
        ({"weights": 3}, "'weights' parameter"),
    ],
)
def test__wrong_parameters__are_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        small(**parameters).fit(IMAGES)


# -- real images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [None, 64])
def test__pipelines_on_real_images__give_finite_scores(cifar10, tmp_path, image_size):
    X, y = (part[:200] for part in cifar10)
    features = PretrainedFeatures(
        weights=None, image_size=image_size, memory=tmp_path, random_state=0
    )
    classifier = MLPClassifier((16,), max_iter=5, learning_rate="one_cycle", random_state=0)
    pipeline = make_pipeline(features, StandardScaler(), classifier)
    scores = cross_val_score(pipeline, X, y, cv=3, error_score="raise")
    assert np.isfinite(scores).all()
    grid = {"mlpclassifier__alpha": [1e-4, 1.0], "mlpclassifier__hidden_layer_sizes": [(), (8,)]}
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.score(X, y) > 0.2  # of images that were learned from


def test__black_and_white_images__are_the_same_in_every_type():
    X = RNG.integers(0, 2, (20, 12, 12)).astype(bool)
    expected = small().fit_transform(X.astype(np.uint8) * 255)
    for values in (X, X.astype(float), X.astype(np.int64), X.astype(np.uint8)):
        assert_equal_relatively(small().fit_transform(values), expected, 1e-5)


@pytest.mark.parametrize("backbone", ["alexnet", "resnet18", "resnet34", "resnet50"])
def test__outputs__are_those_of_torchvisions_own_networks(backbone, tmp_path):
    try:
        from torchvision import models
        from torchvision.transforms.v2 import functional as transforms
    except Exception as error:  # beside another build of torch it raises RuntimeError
        pytest.skip(f"no torchvision that imports: {error!r}")
    torch.manual_seed(0)
    network = getattr(models, backbone)(weights=None).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    X = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy(X).permute(0, 3, 1, 2).float() / 255
    images = transforms.resize(images, [224, 224], antialias=True)
    images = transforms.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network(images).numpy()
    features = PretrainedFeatures(
        backbone, weights=tmp_path / "weights.pth", layer="logits", precision="float32"
    )
    assert_equal_relatively(features.fit_transform(X), expected, 1e-5)
