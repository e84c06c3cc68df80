"""CIFAR-10, MNIST, scikit-learn's digits and folders of images as rows of whole-valued pixels.

Each loader returns the pixels as uint8 and the classes as integer codes, those of the data's own
files where they have any. CIFAR-10 and MNIST are read where they lie below scikit-learn's data
home; what is missing is downloaded there and checked against a SHA-256.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn import datasets as sklearn_datasets
from sklearn.datasets import fetch_file, get_data_home
from sklearn.utils import Bunch

from skcifar import _image_folder

__all__ = ["fetch_cifar10", "fetch_mnist", "load_digits", "load_image_folder"]

Pixels = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]
Loaded: TypeAlias = Bunch | tuple[Pixels, Codes]
Subset = Literal["train", "test", "all"]

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
_CIFAR10_FILES = {
    "train": [f"data_batch_{batch}.bin" for batch in range(1, 6)],
    "test": ["test_batch.bin"],
}
_CIFAR10_RECORDS = 10_000  # in each file
_CIFAR10_RECORD = 1 + 3 * 1024  # bytes: the class, then the red, green and blue plane, row by row

_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# Per subset: the images, the number of them, and the classes; each file with the SHA-256 of the
# gzip archive that is published.
_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", 60_000, "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", 10_000, "t10k-labels-idx1-ubyte"),
}
_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}

_DIGIT_NAMES = list("0123456789")


def fetch_cifar10(
    *,
    data_home: str | os.PathLike[str] | None = None,
    subset: Subset = "train",
    classes: Iterable[int | str] | None = None,
    as_images: bool = False,
    download_if_missing: bool = True,
    return_X_y: bool = False,
    n_retries: int = 3,
    delay: float = 1.0,
    verbose: bool = False,
) -> Loaded:
    """Load CIFAR-10: 60,000 colour photographs of 32 x 32 pixels in ten classes.

    The files `cifar-10-batches-bin/*.bin` below `data_home` are used as they are, after a check
    of their sizes and classes. Where that folder is missing, the binary archive of the
    collection's home page (170 MB) is downloaded, checked against its SHA-256 and unpacked
    there. Any number of processes may call at once.

    Parameters
    ----------
    data_home : str or path-like, default=None
        The folder that holds `cifar-10-batches-bin`. By default scikit-learn's data home,
        `~/scikit_learn_data` or what the environment variable `SCIKIT_LEARN_DATA` names.
    subset : {"train", "test", "all"}, default="train"
        The 50,000 training images, the 10,000 test images, or both in this order.
    classes : iterable of int or str, default=None
        The classes to keep, by code (0 to 9) or by name ("airplane", ...); all by default. The
        images keep their order and their codes.
    as_images : bool, default=False
        Whether `data` has the shape (n_samples, 32, 32, 3) instead of (n_samples, 3072).
    download_if_missing : bool, default=True
        Whether to download what is not there, or to raise an OSError.
    return_X_y : bool, default=False
        Whether to return `(data, target)` instead of a Bunch.
    n_retries : int, default=3
        Number of times that a broken download is tried again.
    delay : float, default=1.0
        Seconds between two tries.
    verbose : bool, default=False
        Whether a download is announced on standard error.

    Returns
    -------
    cifar10 : :class:`~sklearn.utils.Bunch` or tuple (data, target)
        With these attributes.

        data : ndarray of uint8, shape (n_samples, 3072)
            One image a row, 0 to 255: height, width, then red, green and blue (HWC).
        images : ndarray of uint8, shape (n_samples, 32, 32, 3)
            The same memory as images.
        target : ndarray of int64, shape (n_samples,)
            The classes, as codes.
        target_names : ndarray of str, shape (10,)
            The names of all ten classes; `target` indexes them.
        filenames : list of str
            The files that were read.
        DESCR : str
            A description of the data.

    Raises
    ------
    ValueError
        If `subset` or `classes` names what does not exist, or a file is truncated or corrupt;
        the message names the file, what was expected and what was found.
    OSError
        If the data are missing and may not, or cannot, be downloaded.

    References
    ----------
    .. [1] A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009,
       https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf

    Examples
    --------
    >>> from skcifar.datasets import fetch_cifar10
    >>> X, y = fetch_cifar10(classes=["cat", "dog"], return_X_y=True)  # doctest: +SKIP
    >>> X.shape, X.dtype  # doctest: +SKIP
    ((10000, 3072), dtype('uint8'))
    """
    kept = _class_codes(classes, _CIFAR10_NAMES)
    names = [name for part in _parts_of(subset) for name in _CIFAR10_FILES[part]]
    folder = Path(get_data_home(data_home)) / "cifar-10-batches-bin"
    every_name = [name for files in _CIFAR10_FILES.values() for name in files]
    if not any((folder / name).exists() for name in every_name):
        _refuse_unless(download_if_missing, "CIFAR-10", folder)
        _download_cifar10(folder, n_retries, delay, verbose)
    paths = [folder / name for name in names]
    X, y = _read_cifar10(paths, kept)
    return _as_asked(X, y, _CIFAR10_NAMES, paths, _CIFAR10_DESCR, as_images, return_X_y)


def fetch_mnist(
    *,
    data_home: str | os.PathLike[str] | None = None,
    subset: Subset = "train",
    classes: Iterable[int | str] | None = None,
    as_images: bool = False,
    download_if_missing: bool = True,
    return_X_y: bool = False,
    n_retries: int = 3,
    delay: float = 1.0,
    verbose: bool = False,
) -> Loaded:
    """Load MNIST: 70,000 handwritten digits of 28 x 28 grey pixels.

    The idx files in `MNIST/raw` below `data_home`, gzipped or not, are used as they are, after a
    check of their headers, lengths and classes (and of gzip's own checksum). Those that are
    missing are downloaded (11 MB in all) and checked against their SHA-256. Any number of
    processes may call at once.

    Parameters
    ----------
    data_home : str or path-like, default=None
        The folder that holds `MNIST/raw`. By default scikit-learn's data home,
        `~/scikit_learn_data` or what the environment variable `SCIKIT_LEARN_DATA` names.
    subset : {"train", "test", "all"}, default="train"
        The 60,000 training images, the 10,000 test images, or both in this order.
    classes : iterable of int or str, default=None
        The digits to keep, as numbers or as strings; all by default. The images keep their order
        and their codes.
    as_images : bool, default=False
        Whether `data` has the shape (n_samples, 28, 28) instead of (n_samples, 784).
    download_if_missing : bool, default=True
        Whether to download what is not there, or to raise an OSError.
    return_X_y : bool, default=False
        Whether to return `(data, target)` instead of a Bunch.
    n_retries : int, default=3
        Number of times that a broken download is tried again.
    delay : float, default=1.0
        Seconds between two tries.
    verbose : bool, default=False
        Whether a download is announced on standard error.

    Returns
    -------
    mnist : :class:`~sklearn.utils.Bunch` or tuple (data, target)
        With these attributes.

        data : ndarray of uint8, shape (n_samples, 784)
            One image a row, 0 (paper) to 255 (ink).
        images : ndarray of uint8, shape (n_samples, 28, 28)
            The same memory as images.
        target : ndarray of int64, shape (n_samples,)
            The digits.
        target_names : ndarray of str, shape (10,)
            "0" to "9"; `target` indexes them.
        filenames : list of str
            The files that were read.
        DESCR : str
            A description of the data.

    Raises
    ------
    ValueError
        If `subset` or `classes` names what does not exist, or a file is truncated or corrupt;
        the message names the file, what was expected and what was found.
    OSError
        If the data are missing and may not, or cannot, be downloaded.

    References
    ----------
    .. [1] Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-based learning applied to
       document recognition", Proceedings of the IEEE 86(11), 1998,
       https://doi.org/10.1109/5.726791

    Examples
    --------
    >>> from skcifar.datasets import fetch_mnist
    >>> mnist = fetch_mnist(subset="test")  # doctest: +SKIP
    >>> mnist.images.shape, mnist.target.shape  # doctest: +SKIP
    ((10000, 28, 28), (10000,))
    """
    kept = _class_codes(classes, _DIGIT_NAMES)
    folder = Path(get_data_home(data_home)) / "MNIST" / "raw"
    parts = [_MNIST_FILES[part] for part in _parts_of(subset)]
    paths = {}
    for name in (name for images, _, labels in parts for name in (images, labels)):
        found = [path for path in (folder / f"{name}.gz", folder / name) if path.exists()]
        if not found:
            _refuse_unless(download_if_missing, "MNIST", folder / f"{name}.gz")
            found = [_download_mnist(folder, name, n_retries, delay, verbose)]
        paths[name] = found[0]
    X, y = _read_mnist([(paths[images], n, paths[labels]) for images, n, labels in parts])
    if len(kept) < len(_DIGIT_NAMES):
        chosen = np.isin(y, kept)
        X, y = X[chosen], y[chosen]
    files = list(paths.values())
    return _as_asked(X, y, _DIGIT_NAMES, files, _MNIST_DESCR, as_images, return_X_y)


def load_digits(
    *,
    classes: Iterable[int | str] | None = None,
    as_images: bool = False,
    return_X_y: bool = False,
) -> Loaded:
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 grey pixels.

    The data of :func:`sklearn.datasets.load_digits`, which are part of scikit-learn and need no
    download, as uint8 like the other data sets here.

    Parameters
    ----------
    classes : iterable of int or str, default=None
        The digits to keep, as numbers or as strings; all by default. The images keep their order
        and their codes.
    as_images : bool, default=False
        Whether `data` has the shape (n_samples, 8, 8) instead of (n_samples, 64).
    return_X_y : bool, default=False
        Whether to return `(data, target)` instead of a Bunch.

    Returns
    -------
    digits : :class:`~sklearn.utils.Bunch` or tuple (data, target)
        With these attributes.

        data : ndarray of uint8, shape (n_samples, 64)
            One image a row, 0 (paper) to 16 (ink).
        images : ndarray of uint8, shape (n_samples, 8, 8)
            The same memory as images.
        target : ndarray of int64, shape (n_samples,)
            The digits.
        target_names : ndarray of str, shape (10,)
            "0" to "9"; `target` indexes them.
        filenames : list of str
            Empty: the data come with scikit-learn.
        DESCR : str
            A description of the data.

    Raises
    ------
    ValueError
        If `classes` names what does not exist.

    References
    ----------
    .. [1] E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI Machine
       Learning Repository, 1998, https://doi.org/10.24432/C50P49

    Examples
    --------
    >>> from skcifar.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> X.shape, X.dtype, int(X.max())
    ((1797, 64), dtype('uint8'), 16)
    >>> load_digits(classes=[3, 8]).images.shape
    (357, 8, 8)
    """
    kept = _class_codes(classes, _DIGIT_NAMES)
    digits = sklearn_datasets.load_digits()
    chosen = np.isin(digits.target, kept)
    X, y = digits.images[chosen].astype(np.uint8), digits.target[chosen].astype(np.int64)
    return _as_asked(X, y, _DIGIT_NAMES, [], digits.DESCR, as_images, return_X_y)


def load_image_folder(
    folder: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    subset: Subset = "train",
    classes: Iterable[int | str] | None = None,
    grey: bool | None = None,
    as_images: bool = False,
    return_X_y: bool = False,
    verbose: bool = False,
) -> Loaded:
    """Load one's own images: a folder of image files for each class.

    The folder has a subfolder for each class (`pets/cat/1.png`), or two subfolders `train` and
    `test` which have these (`pets/train/cat/1.png`); they may be called `training` and `testing`,
    too, in capitals or not. Files may be AVIF, BMP, GIF (its first
    picture), JPEG, JPEG 2000, PNG, PBM to PPM, TIFF or WebP, of any size and colour mode, at any
    depth below their class. They are turned as their EXIF data say, transparent ones laid on
    white. Files that cannot be read are left out, with a warning. Pillow is needed: `pip install
    'skcifar[images]'`.

    Parameters
    ----------
    folder : str or path-like
        The folder.
    image_size : int or (int, int), default=None
        Height and width in pixels; an integer is both. Each image is resized, keeping its
        proportions, until it just covers that size, and what juts out on two sides is cut off
        evenly. None keeps the size that all images must then have.
    subset : {"train", "test", "all"}, default="train"
        What is in `train`, in `test`, or both in this order. Without a folder `train` in which
        there are folders with images, all images are training images.
    classes : iterable of int or str, default=None
        The classes to keep, by code or by name; all by default. The images keep their order and
        their codes.
    grey : bool, default=None
        Whether images become grey (True) or RGB (False). None makes them RGB unless all image
        files of the folder are grey.
    as_images : bool, default=False
        Whether `data` has the shape (n_samples, height, width, 3), or (n_samples, height, width)
        for grey images, instead of (n_samples, height * width * n_channels).
    return_X_y : bool, default=False
        Whether to return `(data, target)` instead of a Bunch.
    verbose : bool, default=False
        Whether to tell on standard error how many images have been read.

    Returns
    -------
    images : :class:`~sklearn.utils.Bunch` or tuple (data, target)
        With these attributes.

        data : ndarray of uint8, shape (n_samples, height * width * n_channels)
            One image a row: height, width, then red, green and blue (HWC), or one grey channel.
            The order is that of the sorted names of classes, then of files.
        images : ndarray of uint8, shape (n_samples, height, width[, 3])
            The same memory as images.
        target : ndarray of int64, shape (n_samples,)
            The classes, as codes.
        target_names : ndarray of str, shape (n_classes,)
            The names of the classes in `train` and `test`, sorted; `target` indexes them.
        filenames : list of str
            The file of each image.
        unreadable : list of (str, str)
            The files that were left out, each with the reason.
        n_skipped : int
            How many entries are no image files by their name or kind, hidden, or outside the
            classes.
        subsets : list of str
            Those that the folder has: "train", and "test" where there is such a folder.
        DESCR : str
            A description of the data.

    Raises
    ------
    ValueError
        If `subset`, `classes` or `image_size` is not as described, there are fewer than two
        classes, the name of one is not UTF-8, there are two folders for training or test images,
        no file can be read, or `image_size` is None and sizes differ.
    OSError
        If there is no such folder.
    ImportError
        If Pillow is not installed.

    Warns
    -----
    UserWarning
        With the number of files that cannot be read and the first few of them; with the folders
        of classes that hold no image, or only in folders of their own; with folders of images
        beside `train` and `test` (of validation images, say), and image files in these that are
        in no class: both are left out. Files of more pixels than Pillow deems safe
        (`PIL.Image.MAX_IMAGE_PIXELS`) are not read, nor are those whose pixels are floating-point
        numbers, or integers beyond 0 to 65,535.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from skcifar.datasets import load_image_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, colour in [("sea", "navy"), ("sky", "skyblue")]:
    ...         Path(folder, name).mkdir()
    ...         Image.new("RGB", (60, 40), colour).save(Path(folder, name, "1.png"))
    ...     X, y = load_image_folder(folder, image_size=32, return_X_y=True)
    >>> X.shape, y.tolist()
    ((2, 3072), [0, 1])
    """
    parts, size = _parts_of(subset), _image_folder.checked_size(image_size)
    found = _image_folder.look_over(Path(folder))
    subsets = [part for part in ("train", "test") if any(f.part == part for f in found.files)]
    kept = _class_codes(classes, found.class_names)
    files = found.of(parts, [found.class_names[code] for code in kept])
    if not files:
        raise ValueError(
            f"{folder} holds no image of the classes asked for with subset={subset!r}; it has "
            f"the subsets {subsets}."
        )
    if grey is None:
        grey = all(file.is_grey for file in found.files)
    X, read, failed = _image_folder.decode(files, size, grey, verbose)
    unreadable = [(path, why) for part, path, why in found.unreadable if part in parts] + failed
    if not read:
        named = _image_folder.named(found, unreadable)
        raise ValueError(f"none of the images in {folder} can be read: {named}")
    _image_folder.warn_of(found, len(read), unreadable)
    code_of = {name: code for code, name in enumerate(found.class_names)}
    y = np.array([code_of[file.class_name] for file in read], dtype=np.int64)
    paths, description = [file.path for file in read], _image_folder.describe(found, X)
    loaded = _as_asked(X, y, found.class_names, paths, description, as_images, return_X_y)
    if isinstance(loaded, Bunch):
        loaded.unreadable = [(str(path), why) for path, why in unreadable]
        loaded.n_skipped, loaded.subsets = found.n_skipped, subsets
    return loaded


def _parts_of(subset: str) -> list[str]:
    if subset not in ("train", "test", "all"):
        raise ValueError(f'subset={subset!r} is none of "train", "test" and "all".')
    return ["train", "test"] if subset == "all" else [subset]


def _class_codes(classes: Iterable[int | str] | None, names: list[str]) -> list[int]:
    """Return the codes of the chosen classes, ascending; all codes for None."""
    if classes is None:
        return list(range(len(names)))
    # A string would be read letter by letter, which is never meant.
    chosen = [classes] if isinstance(classes, str) else list(classes)
    code_of: dict[Any, int] = {name: code for code, name in enumerate(names)}
    code_of |= {code: code for code in range(len(names))}
    unknown = [one for one in chosen if one not in code_of]
    if unknown or not chosen:
        what = f"names {unknown}, which do not exist" if unknown else "is empty"
        raise ValueError(
            f"classes={classes!r} {what}: give some of the codes 0 to {len(names) - 1} or of the "
            f"names {', '.join(names)}; or None for all."
        )
    return sorted({code_of[one] for one in chosen})


def _refuse_unless(download_if_missing: bool, what: str, where: Path) -> None:
    if not download_if_missing:
        raise OSError(
            f"{what} is missing: {where} does not exist, and download_if_missing=False. Lay the "
            f"files out there, name another data_home, or let them be downloaded."
        )


def _download_cifar10(folder: Path, n_retries: int, delay: float, verbose: bool) -> None:
    """Download the archive and put its files in `folder`: all of them at once, or none."""
    # Everything happens in a folder of this call's own, on the same disk, so that the last step
    # is a rename and no other process ever sees a part.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        archive = _download(
            _CIFAR10_URL, Path(scratch), _CIFAR10_SHA256, folder, n_retries, delay, verbose
        )
        unpacked = Path(scratch) / folder.name
        _unpack_cifar10(archive, unpacked)
        try:
            os.rename(unpacked, folder)
        except OSError:
            # Another process was first: its files passed the same checks.
            if not all((folder / path.name).exists() for path in unpacked.iterdir()):
                raise


def _unpack_cifar10(archive: Path, folder: Path) -> None:
    """Write the expected members of the archive, and nothing else, into a new folder."""
    size = _CIFAR10_RECORDS * _CIFAR10_RECORD
    missing = {name for files in _CIFAR10_FILES.values() for name in files}
    folder.mkdir()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            place, _, name = member.name.rpartition("/")
            if place != "cifar-10-batches-bin" or name not in missing:
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None or member.size != size:
                raise ValueError(
                    f"{member.name} in {archive.name} is a member of type {member.type!r} and "
                    f"{member.size:,} bytes; expected a regular file of {size:,} bytes."
                )
            with content, open(folder / name, "wb") as file:
                shutil.copyfileobj(content, file)
            missing.remove(name)
    if missing:
        raise ValueError(f"{archive.name} lacks {', '.join(sorted(missing))}.")


def _download_mnist(folder: Path, name: str, n_retries: int, delay: float, verbose: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    url = f"{_MNIST_URL}{name}.gz"
    return _download(url, folder, _MNIST_SHA256[name], folder, n_retries, delay, verbose)


def _download(
    url: str,
    into: Path,
    sha256: str,
    home: Path,
    n_retries: int,
    delay: float,
    verbose: bool,
) -> Path:
    if verbose:
        print(f"downloading {url} to {home}", file=sys.stderr, flush=True)
    try:
        return Path(fetch_file(url, into, sha256=sha256, n_retries=n_retries, delay=delay))
    except OSError as error:
        raise OSError(
            f"{url} could not be downloaded: {error} Try again later, or lay the files out in "
            f"{home} yourself."
        ) from error


def _read_cifar10(paths: list[Path], kept: list[int]) -> tuple[Pixels, Codes]:
    """Return images (n, 32, 32, 3) and codes (n,) of the kept classes, in the files' order."""
    # Two passes, so that the result is allocated once in its final size and little beside it:
    # the training set's 154 MB are held once, not two or three times.
    codes = [_cifar10_codes(path) for path in paths]
    y = np.concatenate(codes)
    chosen = np.isin(y, kept)
    X = np.empty((int(chosen.sum()), 32 * 32, 3), dtype=np.uint8)
    written = seen = 0
    for path in paths:
        for records in _cifar10_records(path):
            rows = chosen[seen : seen + len(records)]
            seen += len(records)
            planes = records if rows.all() else records[rows]  # (rows, 3073)
            block = X[written : written + len(planes)]
            written += len(planes)
            # Plane by plane is 3x faster than one transposed assignment.
            for channel in range(3):
                first = 1 + channel * 1024
                block[:, :, channel] = planes[:, first : first + 1024]
    return X.reshape(-1, 32, 32, 3), y[chosen]


def _cifar10_codes(path: Path) -> Codes:
    codes = np.concatenate([records[:, 0] for records in _cifar10_records(path)])
    return _checked_codes(codes, path)


def _cifar10_records(path: Path) -> Iterator[Pixels]:
    """Yield the file's records, (1000, 3073) at a time, which is 3 MB."""
    size = _CIFAR10_RECORDS * _CIFAR10_RECORD
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, but other files of the set do. {_remedy(path)}"
        )
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise ValueError(
                f"{path} has {found:,} bytes; expected {size:,}: {_CIFAR10_RECORDS:,} records of "
                f"{_CIFAR10_RECORD:,}. {_remedy(path)}"
            )
        for _ in range(_CIFAR10_RECORDS // 1_000):
            records = np.fromfile(file, dtype=np.uint8, count=1_000 * _CIFAR10_RECORD)
            yield records.reshape(1_000, _CIFAR10_RECORD)


def _read_mnist(parts: list[tuple[Path, int, Path]]) -> tuple[Pixels, Codes]:
    """Return images (n, 28, 28) and codes (n,) of (images, number, labels) files, joined."""
    total = sum(n for _, n, _ in parts)
    X, y = np.empty((total, 28, 28), dtype=np.uint8), np.empty(total, dtype=np.uint8)
    start = 0
    for images, n, labels in parts:
        _read_idx(images, X[start : start + n])
        _read_idx(labels, y[start : start + n])
        _checked_codes(y[start : start + n], labels)
        start += n
    return X, y.astype(np.int64)


def _read_idx(path: Path, out: Pixels) -> None:
    """Fill `out` from an idx file of unsigned bytes, gzipped or not, that has its shape."""
    # The header: a magic number (two zeros, 8 for unsigned bytes, the number of axes), then the
    # length of each axis, all as big-endian 32-bit integers.
    expected = [0x0800 + out.ndim, *out.shape]
    bytes_left = math.prod(out.shape)
    view = out.reshape(-1).data
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * len(expected)), dtype=np.uint8)
            found = header[: len(header) // 4 * 4].view(">i4").tolist()
            if found != expected:
                raise ValueError(
                    f"{path} begins with {found}; expected {expected}: the magic number of an idx "
                    f"file and its shape. {_remedy(path)}"
                )
            while bytes_left and (count := file.readinto(view[-bytes_left:][: 1 << 20])):
                bytes_left -= count
            # Reading on to the end is what makes gzip compare its checksum.
            surplus = len(file.read())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}. {_remedy(path)}") from error
    if bytes_left or surplus:
        raise ValueError(
            f"{path} holds {out.size - bytes_left + surplus:,} bytes after its header; expected "
            f"{out.size:,}. {_remedy(path)}"
        )


def _checked_codes(codes: Pixels, path: Path) -> Codes:
    if codes.max() > 9:
        at = int(np.argmax(codes > 9))
        raise ValueError(
            f"{path} gives record {at:,} the class {codes[at]}; expected 0 to 9. {_remedy(path)}"
        )
    return codes.astype(np.int64)


def _remedy(path: Path) -> str:
    return f"Nothing of it was used: remove {path.parent} to have the data fetched anew."


def _as_asked(
    X: Pixels,
    y: Codes,
    names: list[str],
    paths: list[Path],
    description: str,
    as_images: bool,
    return_X_y: bool,
) -> Loaded:
    data = X if as_images else X.reshape(len(X), -1)
    if return_X_y:
        return data, y
    return Bunch(
        data=data,
        images=X,
        target=y,
        target_names=np.array(names),
        filenames=[str(path) for path in paths],
        DESCR=description,
    )


_CIFAR10_DESCR = """\
CIFAR-10: 60,000 colour photographs of 32 x 32 pixels, 6,000 of each of ten classes (airplane,
automobile, bird, cat, deer, dog, frog, horse, ship, truck), 50,000 for training and 10,000 for
testing. Labelled subsets of the 80 million tiny images, collected by Alex Krizhevsky, Vinod Nair
and Geoffrey Hinton.

Source: https://www.cs.toronto.edu/~kriz/cifar.html (the binary version).
"""

_MNIST_DESCR = """\
MNIST: 70,000 handwritten digits, size-normalised and centred in 28 x 28 grey pixels, 60,000 for
training and 10,000 for testing, by different writers. Collected by Yann LeCun, Corinna Cortes and
Christopher Burges from databases of the National Institute of Standards and Technology.

Source: http://yann.lecun.com/exdb/mnist/ (the idx files).
"""
