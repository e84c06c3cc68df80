"""Rows to batches, statistics, augmentation, seeds and precision."""

import numpy as np
import pytest
import torch

from skcifar._device import (
    Augmentation,
    BatchReader,
    Generators,
    as_tensor,
    pixel_statistics,
    reflected,
    resolve_device,
    resolve_precision,
    seeded_construction,
)

RNG = np.random.default_rng(0)
SHAPE = (6, 5, 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def reader(layout="HWC", *, as_images=True, mean=None, scale=None, dtype=torch.float64):
    return BatchReader(SHAPE, layout, as_images, mean, scale, torch.device("cpu"), dtype)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test__reader__normalises_each_channel_of_each_layout(layout):
    images = RNG.integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    rows = images if layout == "HWC" else images.transpose(0, 3, 1, 2)
    rows = torch.from_numpy(np.ascontiguousarray(rows).reshape(4, -1))
    mean, scale = np.array([10.0, 20.0, 30.0]), np.array([2.0, 3.0, 4.0])
    expected = ((images - mean) / scale).transpose(0, 3, 1, 2)
    batch = reader(layout, mean=mean, scale=scale)(rows)
    np.testing.assert_allclose(batch.numpy(), expected)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    flat = reader(layout, as_images=False, mean=mean, scale=scale)(rows)
    in_row_order = expected.transpose(0, 2, 3, 1) if layout == "HWC" else expected
    np.testing.assert_allclose(flat.numpy(), in_row_order.reshape(4, -1))


def test__reader__never_writes_its_rows():
    rows = torch.from_numpy(RNG.normal(size=(4, 90)))
    before = rows.clone()
    for as_images in (True, False):
        read = reader(as_images=as_images, mean=np.array([1.0]), scale=np.array([2.0]))
        read(rows)
        read(rows, lambda images: images.flip(2)) if as_images else None
    assert torch.equal(rows, before)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("is_weighted", [True, False])
def test__statistics__are_numpys(layout, dtype, is_weighted):
    images = RNG.integers(0, 256, (1300, *SHAPE)).astype(dtype)
    weight = RNG.uniform(0, 2, 1300)
    index = np.flatnonzero(weight > 0.5)
    rows = images if layout == "HWC" else images.transpose(0, 3, 1, 2)
    rows = as_tensor(np.ascontiguousarray(rows).reshape(1300, -1))
    weight = weight if is_weighted else np.ones(1300)
    given = torch.from_numpy(weight) if is_weighted else None
    mean, scale = pixel_statistics(rows, SHAPE, layout, torch.from_numpy(index), given)
    pixels = images[index].astype(float).reshape(len(index), -1, 3)
    shares = (weight[index] / weight[index].sum())[:, None, None] / pixels.shape[1]
    expected = (shares * pixels).sum((0, 1))
    np.testing.assert_allclose(mean, expected)
    variance = (shares * (pixels - expected) ** 2).sum((0, 1))
    np.testing.assert_allclose(scale, np.sqrt(variance))


def test__statistics_of_bytes__are_exact_however_many_rows(monkeypatch):
    monkeypatch.setattr("skcifar._device._BLOCK_NUMBERS", 2 * 90)  # 650 blocks of two rows
    images = RNG.integers(200, 256, (1300, *SHAPE), dtype=np.uint8)
    images[..., 0] = 255  # squares of a pixel add up to 3e7 in 650 rows: float32 counts to 1.7e7
    mean, scale = pixel_statistics(as_tensor(images.reshape(1300, -1)), SHAPE, "HWC", None, None)
    pixels = images.reshape(-1, 3).astype(np.int64)
    variance = (pixels**2).mean(0) - pixels.mean(0) ** 2
    assert (mean[0], scale[0]) == (255, 1)  # constant: it has scale 1
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-14)
    np.testing.assert_allclose(scale[1:], np.sqrt(variance[1:]), rtol=1e-12)


def test__constant_channel__has_scale_one():
    rows = torch.full((10, 90), 7, dtype=torch.uint8)
    mean, scale = pixel_statistics(rows, SHAPE, "HWC", None, None)
    np.testing.assert_array_equal((mean, scale), ([7.0] * 3, [1.0] * 3))


def test__as_tensor__shares_memory_read_only_or_not():
    writeable = RNG.normal(size=(3, 4))
    read_only = writeable.copy()
    read_only.flags.writeable = False
    for array in (writeable, read_only, np.asfortranarray(writeable)):
        assert as_tensor(array).data_ptr() == array.ctypes.data
    for array in (writeable[::-1], writeable.astype(">f8"), RNG.integers(0, 9, 5).astype("u2")):
        np.testing.assert_array_equal(as_tensor(array).numpy(), array)


def test__translation__moves_each_image_as_a_loop_would():
    images = torch.from_numpy(RNG.integers(0, 256, (200, 7, 6, 3), dtype=np.uint8))
    moved = Augmentation(translate=2)(images, generator())
    padded = np.pad(images.numpy(), [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
    offsets = set()
    for original, result in zip(padded, moved.numpy(), strict=True):
        matches = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if np.array_equal(original[dy : dy + 7, dx : dx + 6], result)
        ]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) == 25


def test__horizontal_flip__mirrors_half_of_the_images():
    images = torch.from_numpy(RNG.integers(0, 256, (400, 4, 5, 1), dtype=np.uint8))
    result = Augmentation(horizontal_flip=True)(images, generator())
    same = (result == images).flatten(1).all(1)
    mirrored = (result == images.flip(2)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 160 < int(mirrored.sum()) < 240


def test__cutout__blanks_one_square_with_the_mean():
    images = torch.from_numpy(RNG.integers(1, 255, (300, 12, 12, 2), dtype=np.uint8))
    result = Augmentation(cutout=3)(images, generator())
    changed = (result != images).any(-1)
    for image, original, where in zip(result, images, changed, strict=True):
        rows, columns = np.nonzero(where.numpy())
        assert 0 < len(rows) <= 9
        assert np.ptp(rows) <= 2
        assert np.ptp(columns) <= 2
        mean = original.float().mean((0, 1)).to(torch.uint8)
        assert bool((image[where] == mean).all())


def test__augmentation_of_one_pixel__leaves_it():
    images = torch.arange(10, dtype=torch.uint8).reshape(5, 1, 1, 2)
    result = Augmentation(horizontal_flip=True, translate=2)(images, generator())
    assert torch.equal(result, images)


def test__reflected__is_numpys_reflection():
    expected = np.pad(np.arange(5), 3, mode="reflect")
    np.testing.assert_array_equal(reflected(torch.arange(-3, 8), 5), expected)


def test__generators__are_independent_and_resume():
    one = Generators.from_seed(5, torch.device("cpu"))
    draws = [torch.rand(3, generator=g).tolist() for g in vars(one).values()]
    assert draws[0] != draws[1] != draws[2] != draws[0]
    state = one.get_state()
    ahead = torch.rand(4, generator=one.order)
    other = Generators.from_seed(6, torch.device("cpu"))
    other.set_state(state)
    assert torch.equal(torch.rand(4, generator=other.order), ahead)


def test__seeded_construction__leaves_the_global_generator():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded_construction(9):
        first = torch.nn.Linear(3, 3).weight
    with seeded_construction(9):
        second = torch.nn.Linear(3, 3).weight
    assert torch.equal(first, second)
    assert torch.equal(torch.rand(2), expected)


def test__precision_auto__follows_rows_and_network():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    choose = resolve_precision
    assert choose("auto", cpu, torch.float64, convolutional=False).name == "float64"
    assert choose("auto", cpu, torch.float32, convolutional=False).name == "float32"
    assert choose("auto", cpu, torch.uint8, convolutional=False).name == "float32"
    assert choose("auto", cuda, torch.float64, convolutional=False).name == "float32"
    assert choose("auto", cpu, torch.float64, convolutional=True).name in ("float32", "bfloat16")
    assert choose("float64", cuda, torch.uint8, convolutional=True).weights == torch.float64
    assert choose("bfloat16", cpu, torch.uint8, convolutional=True).weights == torch.float32


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test__reader_of_grey_images__repeats_the_channel_before_it_normalises(layout):
    rows = torch.arange(12, dtype=torch.uint8).reshape(1, 12)
    mean, scale = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 8.0])
    read = BatchReader(
        (3, 4, 1), layout, True, mean, scale, torch.device("cpu"), torch.float64, grey_to_rgb=True
    )
    expected = (rows.reshape(1, 1, 3, 4).double().numpy() - mean[:, None, None]) / scale[
        :, None, None
    ]
    np.testing.assert_allclose(read(rows).numpy(), expected)


def test__reader_on_meta__needs_no_data():
    """The path to another device than the rows' own, as far as it can go without one."""
    read = BatchReader(
        SHAPE, "CHW", True, np.array([1.0]), np.array([2.0]), torch.device("meta"), torch.float32
    )
    batch = read(torch.zeros(4, 90, dtype=torch.uint8))
    assert batch.shape == (4, 3, 6, 5)
    assert batch.device.type == "meta"


def test__device_auto__is_a_device():
    assert resolve_device("auto").type in ("cpu", "cuda")


def test__device_of_the_environment__is_what_auto_means_there(monkeypatch):
    monkeypatch.setenv("SKCIFAR_DEVICE", "cpu:0")
    assert resolve_device("auto") == torch.device("cpu:0") != torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("SKCIFAR_DEVICE", "auto")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("SKCIFAR_DEVICE", "gpu 1")
    with pytest.raises(ValueError, match="SKCIFAR_DEVICE=gpu 1 in the environment is not a torch"):
        resolve_device("auto")
