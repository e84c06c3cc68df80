"""Folders of images: every layout, size and mode, and what cannot or must not be read."""

import builtins
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from skcifar import _image_folder
from skcifar.datasets import load_image_folder

Image = pytest.importorskip("PIL.Image")
ImageFile = pytest.importorskip("PIL.ImageFile")


def random_pixels(seed, height=6, width=8, n_channels=3):
    rng = np.random.default_rng(seed)
    shape = (height, width, n_channels) if n_channels > 1 else (height, width)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.fixture
def pets(tmp_path):
    """Two classes with two pictures of 6 x 8 pixels each: pixels(seed) 0 to 3, in this order."""
    for seed, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]):
        save(tmp_path / "pets" / name, random_pixels(seed))
    return tmp_path / "pets"


# -- layouts ---------------------------------------------------------------------------------------


def test__class_folders__give_pixels_codes_names_and_files_in_order(pets):
    bunch = load_image_folder(pets)
    expected = np.stack([random_pixels(seed) for seed in range(4)])
    np.testing.assert_array_equal(bunch.images, expected)
    np.testing.assert_array_equal(bunch.data, expected.reshape(4, -1))
    assert np.shares_memory(bunch.data, bunch.images) and bunch.data.dtype == np.uint8
    assert bunch.target.tolist() == [0, 0, 1, 1] and bunch.target.dtype == np.int64
    assert bunch.target_names.tolist() == ["cat", "dog"]
    names = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    assert bunch.filenames == [str(pets / name) for name in names]
    assert (bunch.unreadable, bunch.n_skipped, bunch.subsets) == ([], 0, ["train"])
    assert "4 RGB images of 6 x 8 pixels" in bunch.DESCR and "cat, dog" in bunch.DESCR


def test__tuple_and_as_images__are_those_of_the_bunch(pets):
    bunch = load_image_folder(pets)
    X, y = load_image_folder(str(pets), as_images=True, return_X_y=True)
    np.testing.assert_array_equal(X, bunch.images)
    np.testing.assert_array_equal(y, bunch.target)
    assert load_image_folder(pets, return_X_y=True)[0].shape == (4, 144)


@pytest.fixture
def split(tmp_path):
    """Training and test images, of which either has a class that the other lacks."""
    files = ["train/ant/1.png", "train/cat/1.png", "train/cat/2.png", "test/cat/1.png"]
    for seed, name in enumerate([*files, "test/bee/1.png"]):
        save(tmp_path / "split" / name, random_pixels(seed))
    (tmp_path / "split" / "notes").mkdir()
    return tmp_path / "split"


@pytest.mark.parametrize(
    ("subset", "seeds", "codes"),
    [("train", [0, 1, 2], [0, 2, 2]), ("test", [4, 3], [1, 2]), ("all", range(5), None)],
)
def test__train_and_test_folders__are_subsets_with_codes_in_common(split, subset, seeds, codes):
    bunch = load_image_folder(split, subset=subset)
    assert bunch.target_names.tolist() == ["ant", "bee", "cat"]
    assert bunch.subsets == ["train", "test"] and bunch.n_skipped == 1
    if codes is None:
        seeds, codes = [0, 1, 2, 4, 3], [0, 2, 2, 1, 2]
    assert bunch.target.tolist() == codes
    np.testing.assert_array_equal(bunch.images, np.stack([random_pixels(s) for s in seeds]))


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "Testing")]
)
def test__parts_by_other_names__are_parts(split, train, test):
    (split / "train").rename(split / train)
    (split / "test").rename(split / test)
    bunch = load_image_folder(split, subset="all")
    assert bunch.target_names.tolist() == ["ant", "bee", "cat"]
    assert bunch.subsets == ["train", "test"]
    np.testing.assert_array_equal(
        bunch.images, np.stack([random_pixels(s) for s in [0, 1, 2, 4, 3]])
    )
    assert load_image_folder(split, subset="test").target.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["val", "Valid", "validation", "more"])
def test__images_beside_training_images__are_left_out_with_a_warning(split, name):
    save(split / name / "ant" / "1.png", random_pixels(9))
    with pytest.warns(UserWarning, match=rf"images in \S+/{name} are left out: .* move there"):
        bunch = load_image_folder(split, subset="all")
    assert bunch.target_names.tolist() == ["ant", "bee", "cat"] and len(bunch.target) == 5
    assert bunch.n_skipped == 2


def test__test_images_without_classes__are_left_out_with_a_warning(split):
    for name in "bee", "cat":
        (split / "test" / name / "1.png").rename(split / "test" / f"{name}.png")
        (split / "test" / name).rmdir()
    with pytest.warns(UserWarning, match=r"images in \S+/test are left out"):
        bunch = load_image_folder(split)
    assert bunch.subsets == ["train"] and bunch.target_names.tolist() == ["ant", "cat"]


def test__test_folder_without_images__is_named_as_empty(split):
    for name in "bee", "cat":
        (split / "test" / name / "1.png").unlink()
    with pytest.warns(UserWarning, match=r"No image files are in \S+/test\."):
        assert load_image_folder(split).subsets == ["train"]


def test__stray_image_beside_classes_of_a_part__is_skipped_and_named(split):
    save(split / "train" / "preview.png", random_pixels(9))
    with pytest.warns(UserWarning, match=r"left out \(1\): \S+/train/preview\.png\.$"):
        bunch = load_image_folder(split)
    assert bunch.target_names.tolist() == ["ant", "bee", "cat"]
    assert bunch.target.tolist() == [0, 2, 2] and bunch.n_skipped == 2


def test__two_folders_for_one_part__are_refused(split):
    save(split / "Training" / "ant" / "1.png", random_pixels(9))
    with pytest.raises(ValueError, match="two folders for the train images, Training and train;"):
        load_image_folder(split)


def test__classes_with_images_in_folders_only__are_warned_of(tmp_path):
    for name in "north/cat", "north/dog", "south/cat", "south/dog":
        save(tmp_path / name / "1.png", random_pixels(0))
    with pytest.warns(UserWarning, match=r"All images of \S+/north, \S+/south lie in folders ins"):
        bunch = load_image_folder(tmp_path)
    assert bunch.target.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"one class only, pets; .* All images of \S+/pets lie in"):
        tmp_path.joinpath("one").mkdir()
        for name in "north", "south":
            (tmp_path / name).rename(tmp_path / "one" / name)
        (tmp_path / "one").rename(tmp_path / "pets")
        load_image_folder(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX systems only")
@pytest.mark.parametrize("part", ["", "train"])
def test__class_name_that_is_not_utf8__is_refused_with_its_bytes(tmp_path, part):
    place = tmp_path / part / os.fsdecode(b"caf\xe9")
    for folder in place, tmp_path / part / "caf\u00e9":
        try:
            save(folder / "1.png", random_pixels(0))
        except OSError:
            pytest.skip("this file system wants names in UTF-8")
    with pytest.raises(
        ValueError, match=r"class folder b'.*caf\\xe9' is not UTF-8.*rename"
    ) as caught:
        load_image_folder(tmp_path)
    str(caught.value).encode()  # it can be printed itself


def test__classes_called_train_and_test__are_classes(tmp_path):
    for name in "train", "bus", "test":
        save(tmp_path / name / "1.png", random_pixels(0))
    bunch = load_image_folder(tmp_path)
    assert bunch.target_names.tolist() == ["bus", "test", "train"]
    assert bunch.target.tolist() == [0, 1, 2]


def test__classes__are_kept_by_name_or_code(split):
    for classes in ["ant", "cat"], [0, "cat"], [2, 0]:
        assert load_image_folder(split, classes=classes).target.tolist() == [0, 2, 2]
    assert load_image_folder(split, classes=["cat"], subset="test").target.tolist() == [2]
    with pytest.raises(ValueError, match=r"names \['cow'\], which do not exist.*ant, bee, cat"):
        load_image_folder(split, classes=["cow"])
    with pytest.raises(ValueError, match="no image of the classes asked for with subset='train'"):
        load_image_folder(split, classes=["bee"])


def test__nested_files_and_other_entries__are_read_and_counted(pets):
    save(pets / "cat" / "a" / "b" / "3.PNG", random_pixels(9))
    save(pets / "cat" / ".hidden.png", random_pixels(9))
    save(pets / ".cache" / "1.png", random_pixels(9))
    save(pets / "loose.png", random_pixels(9))
    (pets / "cat" / "notes.txt").write_text("no image")
    (pets / "cat" / "folder.png").mkdir()
    os.mkfifo(pets / "dog" / "pipe.png")  # to open it would wait for ever
    bunch = load_image_folder(pets)
    assert [Path(name).name for name in bunch.filenames[:3]] == ["1.png", "2.png", "3.PNG"]
    assert len(bunch.target) == 5
    assert bunch.n_skipped == 5  # hidden twice, loose, the text and the pipe


def test__links__are_followed_to_files_and_classes_but_never_round(pets, tmp_path):
    elsewhere = save(tmp_path / "elsewhere" / "1.png", random_pixels(7)).parent
    (pets / "emu").symlink_to(elsewhere)
    (pets / "cat" / "3.png").symlink_to(elsewhere / "1.png")
    (pets / "cat" / "round").symlink_to(pets)
    (pets / "pets").symlink_to(pets)
    (pets / "up").symlink_to(tmp_path)
    bunch = load_image_folder(pets)
    assert bunch.target_names.tolist() == ["cat", "dog", "emu"]
    assert bunch.target.tolist() == [0, 0, 0, 1, 1, 2]
    for row in 2, 5:
        np.testing.assert_array_equal(bunch.images[row], random_pixels(7))


# -- sizes -----------------------------------------------------------------------------------------


def test__sizes_that_differ__are_an_error_that_names_two_and_the_remedy(pets):
    save(pets / "dog" / "1.png", random_pixels(2, height=5))
    with pytest.raises(ValueError, match=r"cat/1.png has 6 x 8 pixels .*dog/1.png 5 x 8.*_size=32"):
        load_image_folder(pets)
    assert load_image_folder(pets, classes=["cat"]).images.shape == (2, 6, 8, 3)


def test__image_size__covers_and_cuts_about_the_centre(tmp_path):
    # Three stripes: what juts out is red, what is kept is blue with a green right half.
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, :20, 0] = wide[:, 40:, 0] = 255
    wide[:, 20:40, 2] = 255
    wide[:, 30:40] = (0, 255, 0)
    save(tmp_path / "a" / "wide.png", wide)
    save(tmp_path / "b" / "tall.png", wide.swapaxes(0, 1).copy())
    for size in 10, (10, 10), np.int64(40):
        bunch = load_image_folder(tmp_path, image_size=size)
        side = 40 if size == 40 else 10
        assert bunch.images.shape == (2, side, side, 3)
        inner = slice(side // 5, side * 2 // 5)  # away from where resizing blends
        outer = slice(side * 3 // 5, side * 4 // 5)
        assert (bunch.images[0, :, inner] == [0, 0, 255]).all()
        assert (bunch.images[0, :, outer] == [0, 255, 0]).all()
        np.testing.assert_array_equal(bunch.images[1], bunch.images[0].swapaxes(0, 1))
    assert load_image_folder(tmp_path, image_size=(5, 7)).images.shape == (2, 5, 7, 3)


def test__same_size__leaves_pixels_alone(pets):
    kept = load_image_folder(pets, image_size=(6, 8)).images
    np.testing.assert_array_equal(kept, load_image_folder(pets).images)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, (1, 2, 3), (4,), (4, 0), "32"])
def test__image_size_that_is_none__is_refused(pets, size):
    with pytest.raises(ValueError, match=r"image_size=.* is neither a number of pixels from 1"):
        load_image_folder(pets, image_size=size)


def test__large_jpeg__is_nearly_what_full_decoding_gives(tmp_path):
    # It is decoded at a fraction of its size, which must not show beyond a few grey values.
    steps = np.linspace(0, 1, 600)
    waves = 127 + 100 * np.sin(6 * steps[:, None] + 9 * steps + np.array([0, 1, 2])[:, None, None])
    photo = Image.fromarray(waves.transpose(1, 2, 0).astype(np.uint8))
    for name in "a", "b":
        save(tmp_path / name / "1.jpg", photo, quality=95)
    found = load_image_folder(tmp_path, image_size=16).images[0]
    whole = Image.open(tmp_path / "a" / "1.jpg").resize((16, 16), Image.Resampling.BICUBIC)
    assert np.abs(found.astype(int) - np.asarray(whole)).max() <= 4


# -- modes -----------------------------------------------------------------------------------------

GREYS = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
MASK = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8) * np.ones((6, 1), dtype=np.uint8)


def with_alpha():
    return Image.fromarray(np.dstack([random_pixels(0), MASK]))


def grey_palette():
    image = Image.fromarray(GREYS).convert("P")
    image.putpalette([v for v in range(256) for _ in range(3)])
    return image


RED = np.full((6, 8, 3), [255, 0, 0], dtype=np.uint8)
OVER_WHITE = np.where(MASK[:, :, None] > 0, random_pixels(0), 255)
GREYS_OVER_WHITE = np.where(MASK > 0, GREYS, 255)
HALF_RED = np.full((6, 8, 4), [255, 0, 0, 128], dtype=np.uint8)
DEEP = GREYS.astype(np.uint16) * 257

MODES = {
    "RGB": (Image.fromarray(RED), "png", RED),
    "palette": (Image.fromarray(RED).convert("P"), "png", RED),
    "palette of GIF": (Image.fromarray(RED).convert("P"), "gif", RED),
    "transparent": (with_alpha(), "png", OVER_WHITE),
    "half transparent": (Image.fromarray(HALF_RED), "png", [255, 127, 127]),
    "transparent colour": (Image.fromarray(RED), "png", [255, 255, 255]),
    "CMYK": (Image.fromarray(RED).convert("CMYK"), "tif", RED),
    "grey": (Image.fromarray(GREYS), "png", GREYS),
    "grey palette": (grey_palette(), "png", GREYS),
    "grey over white": (Image.fromarray(np.dstack([GREYS, MASK])), "png", GREYS_OVER_WHITE),
    "black and white": (Image.fromarray(GREYS > 100), "png", (GREYS > 100) * 255),
    "16 bits": (Image.fromarray(DEEP), "png", GREYS),
    "16 bits of PGM": (Image.fromarray(DEEP.astype(np.int32)), "pgm", GREYS),
}


@pytest.mark.parametrize("mode", MODES)
def test__modes__become_rgb_beside_a_colour_image(tmp_path, mode):
    image, suffix, expected = MODES[mode]
    options = {"transparency": (255, 0, 0)} if mode == "transparent colour" else {}
    save(tmp_path / "a" / f"1.{suffix}", image, **options)
    save(tmp_path / "b" / "1.png", RED)
    found = load_image_folder(tmp_path)
    expected = np.asarray(expected)
    if expected.ndim == 2:
        expected = np.dstack([expected] * 3)
    assert found.images.shape == (2, 6, 8, 3)
    np.testing.assert_array_equal(found.images[0], np.broadcast_to(expected, (6, 8, 3)))


@pytest.mark.parametrize("value", [65_536, 2**31 - 1, -1])
def test__integers_beyond_16_bits__are_unreadable_with_their_range(pets, value):
    pixels = np.full((6, 8), 7, dtype=np.int32)
    pixels[2, 3] = value
    save(pets / "cat" / "3.tif", pixels)
    low, high = sorted([7, value])
    with pytest.warns(UserWarning, match="1 of 5 image files"):
        bunch = load_image_folder(pets)
    ((name, why),) = bunch.unreadable
    assert name == str(pets / "cat" / "3.tif")
    assert why.startswith(f"ValueError: pixels are integers from {low:,} to {high:,}, of which")
    assert len(bunch.target) == 4


def test__integers_of_32_bits_within_16__are_read(pets):
    save(pets / "cat" / "3.tif", DEEP.astype(np.int32))
    image = load_image_folder(pets, grey=True).images[2]
    np.testing.assert_array_equal(image, GREYS)


def test__all_grey_modes__stay_grey_and_either_can_be_asked_for(tmp_path):
    grey = [mode for mode in MODES if mode.split()[0] in ("grey", "black", "16")]
    assert len(grey) == 6
    for mode in grey:
        image, suffix, _ = MODES[mode]
        save(tmp_path / mode / f"1.{suffix}", image)
    bunch = load_image_folder(tmp_path)
    assert bunch.images.shape == (6, 6, 8) and bunch.data.shape == (6, 48)
    names = bunch.target_names.tolist()
    for mode in "grey", "grey palette", "16 bits", "16 bits of PGM":
        np.testing.assert_array_equal(bunch.images[names.index(mode)], GREYS)
    colour = load_image_folder(tmp_path, grey=False).images
    np.testing.assert_array_equal(colour, np.stack([bunch.images] * 3, axis=3))
    save(tmp_path / "grey" / "2.png", RED)
    assert load_image_folder(tmp_path).images.shape == (7, 6, 8, 3)
    luma = load_image_folder(tmp_path, grey=True).images
    assert luma.shape == (7, 6, 8) and (luma[names.index("grey") + 1] == 76).all()


def test__test_images__have_the_channels_of_training_images(tmp_path):
    save(tmp_path / "train" / "a" / "1.png", GREYS)
    save(tmp_path / "train" / "b" / "1.png", GREYS)
    save(tmp_path / "test" / "a" / "1.png", RED)
    assert load_image_folder(tmp_path).images.shape == (2, 6, 8, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test__exif_rotation__is_undone_as_its_definition_says(tmp_path, orientation):
    stored = random_pixels(0, height=5, width=7)
    # EXIF 2.3, tag 274: which side of the picture the first row and the first column are.
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in "a/1.png", "b/1.png":
        save(tmp_path / name, stored, exif=exif)
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], shown)


def test__damaged_exif__turns_nothing_and_tells_nothing(tmp_path):
    for name in "a", "b":
        save(tmp_path / name / "1.jpg", RED, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x00garbage")
    assert load_image_folder(tmp_path).images.shape == (2, 6, 8, 3)


# -- what cannot be read ---------------------------------------------------------------------------


def test__unreadable_files__are_left_out_listed_and_warned_of(pets):
    whole = (pets / "cat" / "1.png").read_bytes()
    (pets / "cat" / "1a.png").write_bytes(whole[:60])  # a whole header
    (pets / "cat" / "empty.jpg").touch()
    (pets / "cat" / "page.jpeg").write_text("<html>not found</html>")
    (pets / "dog" / "gone.png").symlink_to(pets / "nowhere")
    save(pets / "dog" / "measured.tif", np.zeros((6, 8), dtype=np.float32))
    with pytest.warns(UserWarning, match="5 of 9 image files.* cannot be read") as caught:
        bunch = load_image_folder(pets)
    reasons = {Path(name).name: why for name, why in bunch.unreadable}
    assert set(reasons) == {"1a.png", "empty.jpg", "page.jpeg", "gone.png", "measured.tif"}
    assert "floating-point" in reasons["measured.tif"] and "FileNotFound" in reasons["gone.png"]
    assert reasons["page.jpeg"] == "UnidentifiedImageError: cannot identify image file"
    assert reasons["1a.png"].startswith("OSError: ")
    np.testing.assert_array_equal(bunch.images, np.stack([random_pixels(s) for s in range(4)]))
    assert bunch.target.tolist() == [0, 0, 1, 1]
    (warning,) = caught
    text = str(warning.message)
    assert text.count("Error: ") == 3 and "and 2 more" in text
    assert warning.filename == __file__


def test__nothing_readable__is_an_error_with_the_first_reasons(tmp_path):
    for name in "abcde":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"none of the 5 image files .*a/1.png \(Uniden.* 2 more"):
        load_image_folder(tmp_path)


def test__pixels_all_damaged__is_an_error_too(pets):
    for path in pets.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"none of the .*can be read: .*cat/1.png \("):
        load_image_folder(pets)


def test__file_of_a_format_not_listed__is_not_decoded(pets):
    # A decoder that runs a program must not be reached by a name that ends in .png.
    (pets / "cat" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n")
    with pytest.warns(UserWarning, match="1 of 4 image files"):
        bunch = load_image_folder(pets)
    assert "UnidentifiedImageError" in bunch.unreadable[0][1]


@pytest.mark.parametrize("limit", [47, 23])  # beyond twice its limit Pillow raises by itself
def test__decompression_bombs__are_refused_by_their_header(pets, monkeypatch, limit):
    for name in "cat/1.png", "cat/2.png", "dog/1.png":
        save(pets / name, random_pixels(0, height=2, width=3))
    decoded = []
    load = ImageFile.ImageFile.load

    def recorded(image):
        decoded.append(image.filename)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", recorded)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.warns(UserWarning, match=r"1 of 4 image files.*DecompressionBomb"):
        bunch = load_image_folder(pets)
    assert [Path(name).name for name, _ in bunch.unreadable] == ["2.png"]
    assert {Path(name).parent.name for name in decoded} == {"cat", "dog"}
    assert not [name for name in decoded if Path(name) == pets / "dog" / "2.png"]


def test__empty_class_folder__is_ignored_with_a_warning(pets):
    (pets / "cow").mkdir()
    with pytest.warns(UserWarning, match=r"No image files are in .*cow\."):
        bunch = load_image_folder(pets)
    assert bunch.target_names.tolist() == ["cat", "dog"]


def test__one_class_or_none__is_an_error_with_the_layouts(tmp_path):
    with pytest.raises(ValueError, match="holds no image; expected those of two or more"):
        load_image_folder(tmp_path)
    save(tmp_path / "1.png", RED)
    with pytest.raises(ValueError, match="holds no image; expected"):
        load_image_folder(tmp_path)
    save(tmp_path / "cat" / "1.png", RED)
    with pytest.raises(ValueError, match=r"images of one class only, cat; .*DIR/cat/1.png"):
        load_image_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"one class only, cat; .* read: dog/1.png \(Unident"):
        load_image_folder(tmp_path)


def test__missing_folder_or_subset__is_an_error(pets):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_image_folder(pets / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"1.png is no folder"):
        load_image_folder(pets / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"subset='test'; it has the subsets \['train'\]"):
        load_image_folder(pets, subset="test")
    with pytest.raises(ValueError, match="subset='valid' is none of"):
        load_image_folder(pets, subset="valid")


def test__missing_pillow__is_an_error_with_the_hint(pets, monkeypatch):
    real_import = builtins.__import__

    def without_pillow(name, *arguments):
        if name.startswith("PIL"):
            raise RuntimeError("a broken installation")
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(ImportError, match=r"pip install 'skcifar\[images\]'"):
        load_image_folder(pets)


def test__verbose__tells_of_progress_and_otherwise_nothing_is_told(pets, capsys, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(_image_folder, "PROGRESS_EVERY", 3)
        load_image_folder(pets, verbose=True)
        assert capsys.readouterr().err == "read 3 of 4 images\n"
        load_image_folder(pets)
    assert capsys.readouterr() == ("", "")
