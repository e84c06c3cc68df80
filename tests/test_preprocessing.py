"""GaussianBlur against scipy's correlation and a loop over pixels; images of every form."""

import pickle
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from sklearn import config_context
from sklearn.pipeline import make_pipeline

from skcifar import CNNClassifier, SoftmaxRegression, preprocessing
from skcifar.preprocessing import GaussianBlur

RNG = np.random.default_rng(0)
IN_SCIPY = {
    "reflect": "mirror",
    "symmetric": "reflect",
    "edge": "nearest",
    "wrap": "grid-wrap",
    "constant": "constant",
}


def images(n=5, height=8, width=8, channels=3):
    return RNG.integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def blurred_by_scipy(pixels, kernel, border="reflect"):
    """Float64 of the shape of `pixels` (n, height, width, channels)."""
    planes = np.moveaxis(pixels.astype(np.float64), 3, 1)
    filtered = [[ndimage.correlate(p, kernel, mode=IN_SCIPY[border]) for p in i] for i in planes]
    return np.moveaxis(np.array(filtered), 1, 3)


# -- the filter ------------------------------------------------------------------------------------


def test__kernel__is_a_gaussian_cut_off_and_of_sum_one():
    kernel = GaussianBlur().fit(images()).kernel_
    expected = np.array(
        [[np.exp(-(i**2 + j**2) / (2 * 0.8**2)) for j in range(-2, 3)] for i in range(-2, 3)]
    )
    np.testing.assert_allclose(kernel, expected / expected.sum(), rtol=1e-13)
    assert kernel.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("border", IN_SCIPY)
@pytest.mark.parametrize(("sigma", "kernel_size"), [(0.8, 5), (1.5, 3), (3.0, 9), (1.0, 1)])
def test__blurred_images__are_scipys_correlation(border, sigma, kernel_size):
    pixels = images(3, 6, 9)
    blur = GaussianBlur(sigma, kernel_size, border=border).fit(pixels)
    expected = blurred_by_scipy(pixels, blur.kernel_, border)
    found = blur.transform(pixels.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-11)


def test__blurred_pixel__is_the_weighted_sum_of_those_around_it():
    pixels = images(2, 10, 12).astype(np.float64)
    blur = GaussianBlur(1.1, 5).fit(pixels)
    found = blur.transform(pixels)
    for i, row, column, channel in [(0, 2, 2, 0), (1, 7, 9, 2), (0, 5, 6, 1)]:
        total = 0.0
        for down in range(-2, 3):
            for right in range(-2, 3):
                weight = blur.kernel_[down + 2, right + 2]
                total += weight * pixels[i, row + down, column + right, channel]
        assert found[i, row, column, channel] == pytest.approx(total, rel=1e-13)


def test__border_wider_than_the_image__is_numpys():
    line = np.arange(3.0)[None, :, None, None]  # one image of three rows and one column
    blur = GaussianBlur(2.0, 9).fit(line)
    padded = np.pad(line[0, :, :, 0], [(4, 4), (4, 4)], mode="reflect")
    expected = [(padded[i : i + 9] * blur.kernel_).sum() for i in range(3)]
    np.testing.assert_allclose(blur.transform(line).ravel(), expected, rtol=1e-13)


def test__many_images__are_those_one_by_one(monkeypatch):
    pixels = images(20)
    blur = GaussianBlur().fit(pixels)
    expected = np.concatenate([blur.transform(pixels[i : i + 1]) for i in range(20)])
    monkeypatch.setattr(preprocessing, "_BLOCK_VALUES", 3 * 192 + 10)  # three images and a rest
    np.testing.assert_array_equal(blur.transform(pixels), expected)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "uint16"])
def test__integers__become_the_nearest_ones_of_their_dtype(dtype):
    pixels = images().astype(dtype) * (1 if dtype == "uint8" else 100)
    blur = GaussianBlur()
    found = blur.fit_transform(pixels)
    assert found.dtype == dtype
    # a value in the middle of two may go to either
    exact = blurred_by_scipy(pixels, blur.kernel_)
    assert np.abs(found - exact).max() < 0.5 + 1e-2
    assert (found == np.rint(exact)).mean() > 0.99


def test__white_and_black_images__stay_so():
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    pixels[1] = 255
    np.testing.assert_array_equal(GaussianBlur().fit_transform(pixels), pixels)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", "float32"), ("float64", "float64"), ("float16", "float32"), ("bool", "float32")],
)
def test__other_values__become_floats(dtype, expected):
    pixels = (images() > 100).astype(dtype)
    blur = GaussianBlur().fit(pixels)
    found = blur.transform(pixels)
    assert found.dtype == expected
    np.testing.assert_allclose(found, blurred_by_scipy(pixels, blur.kernel_), atol=1e-6)


def test__what_is_given__is_not_written_to():
    pixels = images().astype(np.float32)
    before = pixels.copy()
    pixels.flags.writeable = False
    GaussianBlur().fit_transform(pixels)
    np.testing.assert_array_equal(pixels, before)


# -- forms of images -------------------------------------------------------------------------------


def test__every_form_of_images__is_blurred_alike_and_keeps_its_form():
    pixels = images()
    rows = pixels.reshape(5, -1)
    planar = np.ascontiguousarray(np.moveaxis(pixels, 3, 1))
    expected = GaussianBlur().fit_transform(pixels)
    assert expected.shape == pixels.shape
    flat = GaussianBlur().fit_transform(rows)
    np.testing.assert_array_equal(flat, expected.reshape(5, -1))
    np.testing.assert_array_equal(GaussianBlur(image_shape=(8, 8, 3)).fit_transform(rows), flat)
    np.testing.assert_array_equal(GaussianBlur().fit_transform(torch.tensor(rows)), flat)
    np.testing.assert_array_equal(GaussianBlur().fit_transform(pixels.tolist()), expected)
    of_planes = GaussianBlur(layout="CHW").fit_transform(planar)
    np.testing.assert_array_equal(np.moveaxis(of_planes, 1, 3), expected)
    of_planes = GaussianBlur(layout="CHW").fit_transform(planar.reshape(5, -1))
    np.testing.assert_array_equal(of_planes, np.moveaxis(expected, 3, 1).reshape(5, -1))
    grey = GaussianBlur().fit_transform(pixels[..., 1])
    np.testing.assert_array_equal(grey, expected[..., 1])


@pytest.mark.parametrize("n_features", [3, 49, 64, 65, 147, 192, 300, 784, 3072])
def test__flat_rows__are_the_images_that_they_are_to_a_network(n_features):
    rows = RNG.integers(0, 256, (4, n_features), dtype=np.uint8)
    network = CNNClassifier((2,), batch_norm=False, max_iter=1).fit(rows, [0, 1, 0, 1])
    blur = GaussianBlur().fit(rows)
    assert blur.image_shape_ == network.image_shape_
    if blur.image_shape_[0] == 1:  # images of one pixel
        np.testing.assert_array_equal(blur.transform(rows), rows)


def test__one_pixel_images__are_changed_by_constant_border_only():
    rows = RNG.uniform(0, 255, (4, 5))
    for border in IN_SCIPY:
        blur = GaussianBlur(border=border).fit(rows)
        expected = rows * (blur.kernel_[2, 2] if border == "constant" else 1)
        np.testing.assert_allclose(blur.transform(rows), expected, rtol=1e-13)


def test__long_rows_that_are_no_images__take_no_more_memory_than_themselves():
    rows = RNG.integers(0, 256, (2, 5003), dtype=np.uint8)
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(GaussianBlur().fit_transform(rows), rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20  # a matrix of 5003 x 5003 would be 190 MiB


def test__guess_on_values_that_are_not_whole__warns_and_can_be_confirmed():
    scores = RNG.normal(size=(10, 64))
    with pytest.warns(UserWarning, match=r"64 features .* \(8, 8, 1\) .* image_shape=\(8, 8, 1\)"):
        guessed = GaussianBlur().fit_transform(scores)
    confirmed = GaussianBlur(image_shape=(8, 8)).fit_transform(scores)
    np.testing.assert_array_equal(guessed, confirmed)


def test__data_frame__keeps_its_columns():
    frame = pd.DataFrame(RNG.integers(0, 9, (4, 64)), columns=[f"pixel{i}" for i in range(64)])
    blur = GaussianBlur().set_output(transform="pandas").fit(frame)
    found = blur.transform(frame)
    assert list(found.columns) == list(blur.get_feature_names_out()) == list(frame.columns)
    expected = GaussianBlur().fit_transform(frame.to_numpy())
    np.testing.assert_array_equal(found.to_numpy(), expected)


@pytest.mark.parametrize("is_global", [False, True])
def test__data_frame_of_images__is_refused_and_one_of_their_rows_is_given(is_global):
    pixels = images(5, 6, 9)
    blur, of_rows = GaussianBlur(), GaussianBlur(image_shape=(6, 9, 3))
    if not is_global:
        blur.set_output(transform="pandas")
        of_rows.set_output(transform="pandas")
    with config_context(transform_output="pandas" if is_global else "default"):
        for given, shape in (pixels, "(5, 6, 9, 3)"), (pixels[..., 0], "(5, 6, 9)"):
            with pytest.raises(ValueError, match=r"set_output\(transform='pandas'\)") as caught:
                blur.fit_transform(given)
            assert f"X holds images, of shape {shape}, of which" in str(caught.value)
        found = of_rows.fit_transform(pixels.reshape(5, -1))
    assert list(found.columns) == [f"x{i}" for i in range(162)]
    expected = GaussianBlur().fit_transform(pixels)
    np.testing.assert_array_equal(found.to_numpy(), expected.reshape(5, -1))


# -- wrong use -------------------------------------------------------------------------------------


def test__even_kernel__is_refused():
    with pytest.raises(ValueError, match="kernel_size=4 is even; give an odd one"):
        GaussianBlur(kernel_size=4).fit(images())


@pytest.mark.parametrize("image_shape", [(8, 9), (8, 8, 3, 1), (192,)])
def test__image_shape_that_does_not_fit__is_refused(image_shape):
    with pytest.raises(ValueError, match=r"does not fit X, which holds 192 features"):
        GaussianBlur(image_shape=image_shape).fit(images().reshape(5, -1))


@pytest.mark.parametrize(
    "image_shape", [(8.5, 8), (8.0, 8.0), (-8, -8), (0, 64), (True, 64), ("8", "8"), ()]
)
def test__image_shape_not_of_positive_integers__is_refused(image_shape):
    with pytest.raises(ValueError, match=r"image_shape=.* is not of positive integers; expected"):
        GaussianBlur(image_shape=image_shape).fit(images(channels=1).reshape(5, -1))


def test__image_shape_of_numpy_integers__is_good():
    blur = GaussianBlur(image_shape=np.array([4, 16])).fit(images(channels=1).reshape(5, -1))
    assert blur.image_shape_ == (4, 16, 1)


def test__image_shape_other_than_that_of_the_images__is_refused():
    with pytest.raises(
        ValueError, match=r"does not fit X, which holds images of shape \(8, 8, 3\)"
    ):
        GaussianBlur(image_shape=(4, 16, 3)).fit(images())


def test__images_of_another_shape_than_in_fit__are_refused():
    blur = GaussianBlur().fit(images(5, 8, 6))
    with pytest.raises(ValueError, match=r"shape \(6, 8, 3\) .* fitted on .* \(8, 6, 3\)"):
        blur.transform(images(5, 6, 8))


def test__device_that_is_not_there__is_refused():
    blur = GaussianBlur(device="no such device").fit(images())
    with pytest.raises(ValueError, match="device='no such device' is not to be had; give 'auto'"):
        blur.transform(images())


# -- in use ----------------------------------------------------------------------------------------


def test__classifier_behind_it__sees_pixels_as_before():
    pixels = images(30, 8, 6)
    y = np.arange(30) % 3
    network = CNNClassifier((2,), max_iter=1, random_state=0)
    pipeline = make_pipeline(GaussianBlur(), network).fit(pixels, y)
    assert pipeline[-1].image_shape_ == (8, 6, 3)
    assert pipeline[-1].mean_ is not None  # of whole values only
    expected = pipeline[-1].decision_function(GaussianBlur().fit_transform(pixels))
    np.testing.assert_array_equal(pipeline.decision_function(pixels), expected)


def test__pickled_pipeline__predicts_the_same():
    X, y = images(30).reshape(30, -1), np.arange(30) % 3
    pipeline = make_pipeline(GaussianBlur(1.5), SoftmaxRegression()).fit(X, y)
    copy = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(copy.predict_proba(X), pipeline.predict_proba(X))
