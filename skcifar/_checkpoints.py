"""Weights from files: the official ImageNet checkpoints, and those of the caller."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import fetch_file, get_data_home
from torch import Tensor, nn


class Checkpoint(NamedTuple):
    """An official file. The first eight digits of its SHA-256 are in its name."""

    name: str
    n_bytes: int
    sha256: str

    @property
    def url(self) -> str:
        return f"https://download.pytorch.org/models/{self.name}"


# torchvision's weights IMAGENET1K_V1. Names and addresses are those of torchvision's model
# documentation; the full digests were taken from several independent projects that publish what
# they downloaded, which agree with each other and with the digits in the names.
CHECKPOINTS = {
    "alexnet": Checkpoint(
        "alexnet-owt-7be5be79.pth",
        244_408_911,
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "resnet18": Checkpoint(
        "resnet18-f37072fd.pth",
        46_830_571,
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    ),
    "resnet34": Checkpoint(
        "resnet34-b627a593.pth",
        87_319_819,
        "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",
    ),
    "resnet50": Checkpoint(
        "resnet50-0676ba61.pth",
        102_530_333,
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
}


def fetch_checkpoint(
    backbone: str, data_home: str | os.PathLike[str] | None, *, verbose: bool = False
) -> Path:
    """The official file, from data_home, torch's own cache (TORCH_HOME) or the network.

    Raises
    ------
    OSError
        When it is nowhere and cannot be downloaded. The message says where to put it by hand.
    """
    checkpoint = CHECKPOINTS[backbone]
    folder = Path(get_data_home(data_home)) / "imagenet-weights"
    cached_by_torch = Path(torch.hub.get_dir()) / "checkpoints" / checkpoint.name
    for path in (folder / checkpoint.name, cached_by_torch):
        if path.is_file() and _sha256(path, path.stat().st_mtime_ns) == checkpoint.sha256:
            return path
    if verbose:
        megabytes = checkpoint.n_bytes // 10**6
        print(f"downloading {checkpoint.url} ({megabytes} MB)", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(fetch_file(checkpoint.url, folder, sha256=checkpoint.sha256, delay=1))
    except (OSError, HTTPException) as error:  # urllib's errors and failed checksums are such
        raise OSError(
            f"The ImageNet weights of {backbone} are not at hand and could not be downloaded "
            f"({error}). Put the file of {checkpoint.url} ({checkpoint.n_bytes:,} bytes, SHA-256 "
            f"{checkpoint.sha256}) at {folder / checkpoint.name} or {cached_by_torch}, or give "
            "weights the path of another checkpoint."
        ) from error


@functools.lru_cache(maxsize=32)
def _sha256(path: Path, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name, from a file of torch's or of safetensors, running no code.

    Raises
    ------
    FileNotFoundError
    ImportError
        For a .safetensors file without that package.
    ValueError
        When the file holds no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(path)!r} is no file; give the path of a checkpoint (.pth or "
            ".safetensors), 'imagenet', or None for random weights."
        )
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    state = read(path)
    if isinstance(state, Mapping):
        others = [repr(name) for name, value in state.items() if not _is_entry(name, value)]
        if not others:
            return {name: value.detach() for name, value in state.items()}
    else:
        others = [f"a {type(state).__name__}"]
    raise ValueError(
        f"{path} does not hold a state dict (tensors by name) alone but {_some(others)}; save a "
        "network's state_dict() alone."
    )


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file brings about in zip or pickle
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors ({error}). It is damaged, or holds "
            "objects other than tensors, which are not loaded for safety: save a network's "
            "state_dict() alone."
        ) from error


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors.torch import load_file
    except Exception as error:  # a broken installation may raise anything
        raise ImportError(
            f"reading {path} needs safetensors: pip install 'skcifar[safe]'"
        ) from error
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}).") from error


def load_weights(network: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Give a network the tensors of a checkpoint, which may hold a head that it has not.

    Raises
    ------
    ValueError
        When names or shapes do not fit, with the first of those that do not.
    """
    wanted = network.state_dict()
    head = getattr(network, "head_prefix", None)
    if head is not None and not any(name.startswith(head) for name in wanted):
        state = {name: value for name, value in state.items() if not name.startswith(head)}
    # counters that files of an older torch lack, and that evaluation does not read
    missing = [n for n in wanted if n not in state and not n.endswith(".num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    problems = [("lacks", missing), ("also has", unexpected), ("has", misshapen)]
    if any(names for _, names in problems):
        told = "; ".join(f"it {verb} {_some(names)}" for verb, names in problems if names)
        raise ValueError(
            f"weights={str(source)!r} does not fit {type(network).__name__}: {told}. Give the "
            "state dict of the same network, with torchvision's names."
        )
    tensors = {
        name: state[name].to(value.dtype) if name in state else torch.zeros((), dtype=value.dtype)
        for name, value in wanted.items()
    }
    network.load_state_dict(tensors, assign=True)


def _some(names: list[str], at_most: int = 3) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def digest_of(module: nn.Module) -> bytes:
    """What tells these weights from any others."""
    digest = hashlib.blake2b(digest_size=16)
    update: Callable[[bytes], None] = digest.update
    for name, tensor in module.state_dict().items():
        update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
