"""A folder of image files, looked over and then decoded: of any kind, size and colour mode.

The headers of all files are read first, so that what is too large is never decoded, and sizes and
colours are known of all before the result is allocated.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

PARTS = ("train", "test")  # in this order
PART_OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # any case
SUFFIXES = set(
    ".avif .bmp .dib .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm "
    ".tif .tiff .webp".split()
)
# Not all that Pillow opens: a decoder like that of EPS, which runs a program, is not for files
# that only claim to be photographs.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
ORIENTATION = 0x0112  # EXIF's tag, whose values 5 to 8 swap height and width
SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
FIRST_FEW = 3  # files that a message names
PROGRESS_EVERY = 1_000


@dataclass
class File:
    """An image file that has a readable header."""

    path: Path
    part: str
    class_name: str
    size: tuple[int, int] = (0, 0)  # height, width as shown, after EXIF's rotation
    is_grey: bool = False


@dataclass
class Folder:
    """What a folder holds, found without decoding.

    Attributes
    ----------
    files : list of File
        Sorted by part (training first), class and path.
    class_names : list of str
        Of classes with a readable header in any part, sorted.
    unreadable : list of (part, path, reason)
        Image files whose header is no good.
    empty : list of Path
        Class folders without any image file.
    nested : list of Path
        Class folders whose images all lie in folders of their own.
    left_out : list of Path
        Folders with images beside those of the parts.
    stray : list of Path
        Image files in the folder of a part, in no class.
    n_skipped : int
        Hidden files, those of another kind, and what lies outside the classes.
    """

    path: Path
    files: list[File] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, Path, str]] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    nested: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    stray: list[Path] = field(default_factory=list)
    n_skipped: int = 0

    def of(self, parts: list[str], class_names: list[str]) -> list[File]:
        return [f for f in self.files if f.part in parts and f.class_name in class_names]


def look_over(path: Path) -> Folder:
    """Find the classes and read the header of every file."""
    pillow = import_pillow()
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; expected a folder of images, {_LAYOUTS}.")
    folder = Folder(path)
    for part, place in _places(folder):
        _check_name(place)
        found = list(_image_files(folder, part, place))
        if not found:
            folder.empty.append(place)
        elif all(file.parent != place for file in found):
            folder.nested.append(place)
        for file in found:
            _read_header(folder, File(file, part, place.name), pillow)
    folder.class_names = sorted({file.class_name for file in folder.files})
    if len(folder.class_names) < 2:
        raise ValueError(_too_few_classes(folder, path))
    return folder


def decode(
    files: list[File], image_size: tuple[int, int] | None, grey: bool, verbose: bool
) -> tuple[NDArray[np.uint8], list[File], list[tuple[Path, str]]]:
    """Read files into images (n, h, w) or (n, h, w, 3); give them, their files, and what failed."""
    pillow = import_pillow()
    height, width = image_size or _common_size(files)
    images = np.empty((len(files), height, width, *(() if grey else (3,))), dtype=np.uint8)
    read: list[File] = []
    failed = []
    for number, file in enumerate(files, start=1):
        try:
            with _opened(file.path, pillow) as image:
                images[len(read)] = _pixels(image, (height, width), grey, pillow)
        except Exception as error:  # a decoder fed with anything may raise anything
            failed.append((file.path, _reason(error, file.path)))
        else:
            read.append(file)
        if verbose and number % PROGRESS_EVERY == 0:
            print(f"read {number:,} of {len(files):,} images", file=sys.stderr, flush=True)
    return images[: len(read)], read, failed


def checked_size(image_size: Any) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = (image_size, image_size) if np.ndim(image_size) == 0 else tuple(image_size)
    whole = all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in size)
    if len(size) != 2 or not whole or min(size) < 1:
        raise ValueError(
            f"image_size={image_size!r} is neither a number of pixels from 1, nor a height and a "
            "width, nor None."
        )
    return int(size[0]), int(size[1])


def warn_of(found: Folder, n_read: int, unreadable: list[tuple[Path, str]]) -> None:
    told = []
    if unreadable:
        told.append(
            f"{len(unreadable):,} of {n_read + len(unreadable):,} image files in {found.path} "
            f"cannot be read and are left out: {named(found, unreadable)}."
        )
    told += _remarks(found)
    for sentence in told:
        warnings.warn(sentence, UserWarning, stacklevel=3)  # at who calls the loader


def _remarks(found: Folder) -> list[str]:
    """What may not be as it was meant, in sentences."""
    told = []
    if found.empty:
        told.append(f"No image files are in {_few_paths(found.empty)}.")
    if found.nested:
        told.append(
            f"All images of {_few_paths(found.nested)} lie in folders inside; each of the former "
            "was taken for one class, whatever the folders inside are called."
        )
    if found.left_out:
        told.append(
            f"The images in {_few_paths(found.left_out)} are left out: only folders of classes in "
            "a training and a test folder are read; move there what is to be used."
        )
    if found.stray:
        told.append(
            f"Image files beside the folders of classes are left out ({len(found.stray):,}): "
            f"{_few_paths(found.stray)}."
        )
    return told


def named(found: Folder, files: list[tuple[Path, str]]) -> str:
    return _few([f"{path.relative_to(found.path)} ({why})" for path, why in files])


def describe(found: Folder, X: NDArray[np.uint8]) -> str:
    colours = "grey" if X.ndim == 3 else "RGB"
    return (
        f"{len(X):,} {colours} images of {X.shape[1]} x {X.shape[2]} pixels (height x width) from "
        f"the folder {found.path}, of the classes {', '.join(found.class_names)}.\n"
    )


def import_pillow() -> SimpleNamespace:
    try:
        from PIL import Image, ImageOps
    except Exception as error:  # a broken installation may raise anything
        raise ImportError(
            "image files are read by Pillow, which is not installed: pip install 'skcifar[images]'"
        ) from error
    Image.init()  # so that all decoders are known
    return SimpleNamespace(Image=Image, ImageOps=ImageOps)


def _few_paths(paths: list[Path]) -> str:
    return _few([str(path) for path in paths])


def _few(items: list[str]) -> str:
    more = len(items) - FIRST_FEW
    return ", ".join(items[:FIRST_FEW]) + (f" and {more:,} more" if more > 0 else "")


# -- which files -----------------------------------------------------------------------------------

_LAYOUTS = "with a folder for each class (DIR/cat/1.png), or these in DIR/train and DIR/test"


def _places(folder: Folder) -> list[tuple[str, Path]]:
    """The part and the folder of each class."""
    inside = _class_folders(folder, folder.path)
    parts = _part_folders(folder, inside)
    if "train" not in parts:
        return [("train", each) for each in inside]
    for beside in (each for each in inside if each not in parts.values()):
        folder.n_skipped += 1
        if _holds_images(beside):
            folder.left_out.append(beside)
        elif beside.name.lower() in PART_OF:
            folder.empty.append(beside)
    for part in parts.values():
        entries = (each for each in sorted(part.iterdir()) if not _is_hidden(each.name))
        folder.stray += filter(_is_image, entries)
    places = [(name, parts[name]) for name in PARTS if name in parts]
    return [(name, each) for name, part in places for each in _class_folders(folder, part)]


def _part_folders(folder: Folder, inside: list[Path]) -> dict[str, Path]:
    """Those which are named like a part and hold classes; a class of trains, say, does not."""
    parts: dict[str, Path] = {}
    for each in inside:
        name = PART_OF.get(each.name.lower())
        if name is None or not any(map(_holds_images, _subfolders(folder, each))):
            continue
        if name in parts:
            raise ValueError(
                f"{folder.path} has two folders for the {name} images, {parts[name].name} and "
                f"{each.name}; expected one: merge them, or move one elsewhere."
            )
        parts[name] = each
    return parts


def _class_folders(folder: Folder, path: Path) -> list[Path]:
    found = _subfolders(folder, path)
    folder.n_skipped += len(list(path.iterdir())) - len(found)
    return found


def _subfolders(folder: Folder, path: Path) -> list[Path]:
    """The folders in `path`, sorted; a link to one is good, one that leads back up is not."""
    above = {parent.resolve() for parent in [folder.path, path, *path.resolve().parents]}
    return [
        each
        for each in sorted(path.iterdir())
        if not _is_hidden(each.name) and each.is_dir() and each.resolve() not in above
    ]


def _holds_images(path: Path) -> bool:
    """Whether there is a file named like an image at any depth."""
    for directory, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        if any(not _is_hidden(name) and _is_image(Path(directory, name)) for name in names):
            return True
    return False


def _check_name(place: Path) -> None:
    """Refuse the name of a class that cannot be written to a table, after hours of training."""
    try:
        place.name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the name of the class folder {os.fsencode(place)!r} is not UTF-8, so that the class "
            "could not be written to files; rename the folder."
        ) from error


def _image_files(folder: Folder, part: str, place: Path) -> Iterator[Path]:
    """All files below `place` that are named like images, sorted; links to folders are left out."""

    def note(error: OSError) -> None:
        path = Path(error.filename)
        folder.unreadable.append((part, path, _reason(error, path)))

    for directory, subfolders, names in os.walk(place, onerror=note):
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        for name in sorted(names):
            path = Path(directory, name)
            # what is no regular file, such as a pipe, might never end
            if not _is_hidden(name) and _is_image(path) and (path.is_file() or not path.exists()):
                yield path
            else:
                folder.n_skipped += 1


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _read_header(folder: Folder, file: File, pillow: SimpleNamespace) -> None:
    try:
        with _opened(file.path, pillow) as image:
            width, height = image.size
            if image.mode == "F":
                raise ValueError("pixels are floating-point numbers, of which no range is known")
            file.size = (width, height) if _is_turned(image) else (height, width)
            file.is_grey = _is_grey(image)
    except Exception as error:  # a decoder fed with anything may raise anything
        folder.unreadable.append((file.part, file.path, _reason(error, file.path)))
    else:
        folder.files.append(file)


@contextmanager
def _opened(path: Path, pillow: SimpleNamespace) -> Iterator[PillowImage]:
    """A file's image, its header read; one that is too large is an error, no warning."""
    with warnings.catch_warnings():
        # What else Pillow warns of, such as damaged EXIF data, leaves the pixels as they are.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", pillow.Image.DecompressionBombWarning)
        formats = [each for each in FORMATS if each in pillow.Image.OPEN]
        with pillow.Image.open(path, formats=formats) as image:
            yield image


def _is_turned(image: PillowImage) -> bool:
    try:
        return image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF data turn nothing; damaged pixels show when they are decoded
        return False


def _is_grey(image: PillowImage) -> bool:
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB"), dtype=int).reshape(-1, 3)
        return bool((np.ptp(palette, axis=1) == 0).all())
    return image.mode in ("1", "L", "LA", "La", *SIXTEEN_BITS)


def _reason(error: Exception, path: Path) -> str:
    message = str(error).replace(repr(str(path)), "").rstrip(": ")  # which is named beside it
    return " ".join(f"{type(error).__name__}: {message}".split())


def _too_few_classes(folder: Folder, path: Path) -> str:
    files = named(folder, [(each, why) for _, each, why in folder.unreadable])
    if not folder.files and folder.unreadable:
        return f"none of the {len(folder.unreadable):,} image files in {path} can be read: {files}"
    found = f"the images of one class only, {folder.class_names[0]}" if folder.files else "no image"
    text = [f"{path} holds {found}; expected those of two or more, {_LAYOUTS}."]
    if files:
        text.append(f"What cannot be read: {files}.")
    return " ".join(text + _remarks(folder))


# -- pixels ----------------------------------------------------------------------------------------


def _common_size(files: list[File]) -> tuple[int, int]:
    first = files[0]
    for file in files:
        if file.size != first.size:
            (h, w), (other_h, other_w) = first.size, file.size
            raise ValueError(
                f"images differ in size: {first.path} has {h} x {w} pixels (height x width), "
                f"{file.path} {other_h} x {other_w}. With image_size=32 or image_size=(32, 48), "
                "say, all are resized to cover that size and cut about their centre."
            )
    return first.size


def _pixels(
    image: PillowImage, size: tuple[int, int], grey: bool, pillow: SimpleNamespace
) -> NDArray[np.uint8]:
    """Decode to (h, w) or (h, w, 3): upright, in one mode, resized to cover and cut."""
    # A JPEG is decoded at a half to an eighth of its size where at least four times the length
    # asked for remains: 12 million pixels take 21 instead of 199 ms, and differ by a grey value.
    image.draft(None, (4 * max(size), 4 * max(size)))
    image.load()
    try:
        upright = pillow.ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, for the pixels are there
        upright = image
    upright = _in_mode(upright, grey, pillow)
    height, width = size
    if upright.size != (width, height):
        how = pillow.Image.Resampling.BICUBIC  # over all pixels that one of the result covers
        upright = pillow.ImageOps.fit(upright, (width, height), method=how)
    return np.asarray(upright)


def _in_mode(image: PillowImage, grey: bool, pillow: SimpleNamespace) -> PillowImage:
    """Convert to L or RGB: transparent over white, 16 bits to 8."""
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:  # of 32 bits
            raise ValueError(
                f"pixels are integers from {values.min():,} to {values.max():,}, of which no "
                "range is known; 0 to 65,535 are read"
            )
        image = pillow.Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow.Image.new("RGBA", image.size, "white")
        image = pillow.Image.alpha_composite(white, image)
    return image.convert("L" if grey else "RGB")
