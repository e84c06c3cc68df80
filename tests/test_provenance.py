"""What is told of data, machine and versions, and how recoding as JPEG is seen in the pixels."""

import hashlib
import io
import json
import shlex
import sys
from datetime import datetime

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

import skcifar
from skcifar import _provenance
from skcifar._provenance import data_provenance, provenance, sha256_of, shows_jpeg, variant_of
from skcifar.datasets import load_digits

N = 120


def recoded(images, quality, subsampling=2):
    """Through Pillow's JPEG codec, one by one."""
    Image = pytest.importorskip("PIL.Image")
    decoded = []
    for image in images:
        file = io.BytesIO()
        options = {"subsampling": subsampling} if image.shape[2] == 3 else {}
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality, **options)
        decoded.append(np.asarray(Image.open(file)).reshape(image.shape))
    return np.stack(decoded)


def noise(n_channels, side=32):
    """Images with the spectrum of photographs, some pixels clipped: amplitudes fall as 1/f."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    frequency[0, 0] = 1 / side
    waves = np.fft.fft2(rng.normal(size=(N, side, side, n_channels)), axes=(1, 2))
    pixels = np.fft.ifft2(waves / frequency[:, :, None], axes=(1, 2)).real
    pixels = 128 + 40 * pixels / pixels.std()
    return np.clip(pixels, 0, 255).round().astype(np.uint8)


def photos():
    """Random squares of two photographs, scaled down to 32 pixels."""
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    squares = []
    for i in range(N):
        photo = load_sample_images().images[i % 2]
        side = rng.integers(64, 120)
        top, left = (rng.integers(0, size - side) for size in photo.shape[:2])
        square = photo[top : top + side, left : left + side]
        squares.append(np.asarray(Image.fromarray(square).resize((32, 32))))
    return np.stack(squares)


def digits():
    """Scikit-learn's, whose every block has clipped pixels once levels are 0 to 255."""
    return load_digits().images[:500, :, :, None] * 15


IMAGES = {
    "colour noise": lambda: noise(3),
    "grey noise": lambda: noise(1),
    "photos": photos,
    "digits": digits,
}


@pytest.mark.parametrize("quality", [50, 60, 75, 85, 90, 95])
@pytest.mark.parametrize("name", IMAGES)
def test__images_recoded_as_jpeg__are_recognised_at_every_quality(name, quality):
    assert shows_jpeg(recoded(IMAGES[name](), quality)) is True


@pytest.mark.parametrize("name", ["colour noise", "photos"])
def test__recoded_images__are_recognised_without_subsampling_too(name):
    assert shows_jpeg(recoded(IMAGES[name](), 75, subsampling=0)) is True


@pytest.mark.parametrize("name", IMAGES)
def test__images_never_recoded__show_no_trace(name):
    assert shows_jpeg(IMAGES[name]()) is False


def test__images_off_the_codec_s_grid__show_no_trace():
    images = recoded(noise(3, side=40), 75)
    assert shows_jpeg(images) is True
    assert shows_jpeg(images[:, 3:35, 5:37]) is False


@pytest.mark.parametrize("levels", [2, 4, 16])
def test__few_levels__are_not_taken_for_steps_of_a_codec(levels):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, levels, (N, 32, 32, 1)) * (255 // (levels - 1))
    assert shows_jpeg(pixels.astype(np.uint8)) is False


def test__what_is_too_little_to_tell__is_not_told():
    assert shows_jpeg(noise(3)[:1]) is None
    assert shows_jpeg(np.tile(noise(3)[:1], (N, 1, 1, 1))) is None  # one image many times
    assert shows_jpeg(noise(3)[:, :7]) is None  # without a whole block
    assert shows_jpeg(np.zeros((N, 32, 32, 3), dtype=np.uint8)) is None
    assert shows_jpeg(noise(1) / 255) is None
    assert shows_jpeg(np.zeros((0, 32, 32, 3), dtype=np.uint8)) is None


def test__real_cifar10__is_told_from_the_published_by_its_pixels(cifar10):
    # The images that tests find may be either; their shifted blocks are on no codec's grid.
    X, y = cifar10
    assert variant_of(X, y) in ("recoded as JPEG", "no trace of JPEG")
    images = X[:2000].reshape(-1, 32, 32, 3)
    assert shows_jpeg(images[:, 4:, 4:]) is False
    assert shows_jpeg(recoded(images[:N], 75)) is True


def test__real_mnist__is_as_published_whole_and_without_trace_in_part(mnist):
    X, y = mnist
    assert variant_of(X, y) == "as published"
    assert variant_of(X.reshape(-1, 28, 28), y) == "as published"
    assert variant_of(X[:2000], y[:2000]) == "no trace of JPEG"


def test__digits__are_as_published_until_one_pixel_or_class_differs():
    X, y = load_digits(return_X_y=True)
    assert variant_of(X, y) == "as published"
    X_other, y_other = X.copy(), y.copy()
    X_other[-1, -1] += 1
    y_other[0] += 1
    assert "as published" not in (variant_of(X_other, y), variant_of(X, y_other))


# -- the record ------------------------------------------------------------------------------------


def test__sha256__is_over_type_shape_and_bytes():
    X, y = np.arange(12, dtype=np.uint8).reshape(2, 6), np.array([3, 4])
    expected = hashlib.sha256(b"|u1 (2, 6);" + X.tobytes() + b"<i8 (2,);" + y.tobytes())
    assert sha256_of(X, y) == expected.hexdigest()
    assert sha256_of(X.reshape(2, 2, 3), y) == sha256_of(X, y)  # images are rows
    assert sha256_of(np.asfortranarray(X), y) == sha256_of(X, y)
    others = [(X[:, ::-1], y), (X.astype(np.int8), y), (X.reshape(3, 4), y), (X, y + 1), (X,)]
    assert len({sha256_of(*arrays) for arrays in [*others, (X, y)]}) == 6


@pytest.mark.parametrize(
    ("shape", "image_shape", "expected"),
    [
        ((5, 784), None, [28, 28, 1]),
        ((5, 3072), None, [32, 32, 3]),
        ((5, 7), None, [1, 1, 7]),
        ((5, 12), (4, 3), [4, 3, 1]),
        ((5, 36), (4, 3, 3), [4, 3, 3]),
        ((5, 4, 3), None, [4, 3, 1]),
        ((5, 4, 3, 3), None, [4, 3, 3]),
    ],
)
def test__image_shape__is_height_width_channels(shape, image_shape, expected):
    X = np.zeros(shape, dtype=np.uint8)
    assert data_provenance("x", X, np.zeros(5), image_shape=image_shape)["image_shape"] == expected


def test__data__names_numbers_and_hash_of_both_splits():
    X, y = load_digits(return_X_y=True)
    whole = data_provenance("digits", X, y, class_names=range(10))
    assert (whole["n_train"], whole["n_test"]) == (1797, None)
    assert whole["variant"] == "as published" and whole["class_names"] == list("0123456789")
    split = data_provenance("digits", X[:9], y[:9], X[9:], y[9:], variant="as published")
    assert (split["n_train"], split["n_test"]) == (9, 1788)
    assert split["sha256"] == sha256_of(X[:9], y[:9], X[9:], y[9:]) != whole["sha256"]


def test__provenance__survives_json_and_repeats_the_command():
    data = data_provenance("digits", *load_digits(return_X_y=True))
    words = ["sweep", "--grid", "hidden_layer_sizes=(20, 10)", "it's $HOME"]
    record = provenance("sweep", "title", 3, data, command=words, parameters=["alpha"])
    assert json.loads(json.dumps(record)) == record
    assert shlex.split(record["command"]) == ["python", "-m", "skcifar", *words]
    assert (record["kind"], record["title"], record["seed"]) == ("sweep", "title", 3)
    assert record["parameters"] == ["alpha"] and record["data"] == data
    assert datetime.fromisoformat(record["date"]).utcoffset().total_seconds() == 0
    assert "parameters" not in provenance("comparison", "title", 3, data, command=["compare"])


def test__machine_and_versions__are_those_of_this_process(monkeypatch):
    assert _provenance.versions()["skcifar"] == skcifar.__version__
    assert _provenance.versions()["python"] == sys.version.split()[0]
    assert _provenance.versions()["numpy"] == np.__version__
    assert _provenance.machine()["cores"] >= 1 and _provenance.machine()["cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _provenance.machine()["gpu"] is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert _provenance.machine()["gpu"] == "a GPU"
