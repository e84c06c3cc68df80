"""Checkpoints: where the official ones are looked for, and that files hold tensors alone."""

import hashlib
import os
import pickle
import zipfile
from http.client import IncompleteRead
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from skcifar import _checkpoints
from skcifar._architectures import BACKBONES
from skcifar._checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    digest_of,
    fetch_checkpoint,
    load_weights,
    read_state_dict,
)

CONTENT = b"weights that someone made up"


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """A small file that passes for the official one; no network; an empty TORCH_HOME."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    checkpoint = Checkpoint(f"resnet18-{digest[:8]}.pth", len(CONTENT), digest)
    monkeypatch.setitem(CHECKPOINTS, "resnet18", checkpoint)
    monkeypatch.setattr(_checkpoints, "fetch_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    return checkpoint


def offline(url, *arguments, **keywords):
    raise URLError("no network")


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# -- the official ones -----------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test__official_digest__begins_with_the_digits_in_the_name(backbone):
    checkpoint = CHECKPOINTS[backbone]
    assert len(checkpoint.sha256) == 64 and set(checkpoint.sha256) <= set("0123456789abcdef")
    stem, _, digits = checkpoint.name.removesuffix(".pth").rpartition("-")
    assert stem.startswith(backbone)
    assert len(digits) == 8 and checkpoint.sha256.startswith(digits)
    assert checkpoint.url == f"https://download.pytorch.org/models/{checkpoint.name}"
    # float32 weights, and less than 1% of names
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in BACKBONES[backbone]().parameters())
    assert 4 * n_parameters < checkpoint.n_bytes < 4.04 * n_parameters


def test__file_in_data_home__is_used(made_up, tmp_path):
    path = put(tmp_path / "home" / "imagenet-weights" / made_up.name)
    assert fetch_checkpoint("resnet18", tmp_path / "home") == path


def test__file_in_torch_home__is_used(made_up, tmp_path):
    path = put(tmp_path / "torch-home" / "hub" / "checkpoints" / made_up.name)
    assert fetch_checkpoint("resnet18", tmp_path / "home") == path
    first = put(tmp_path / "home" / "imagenet-weights" / made_up.name)
    assert fetch_checkpoint("resnet18", tmp_path / "home") == first


def test__file_of_wrong_content__is_not_used(made_up, tmp_path):
    put(tmp_path / "home" / "imagenet-weights" / made_up.name, CONTENT[:-1])
    path = put(tmp_path / "torch-home" / "hub" / "checkpoints" / made_up.name, b"truncated")
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch_checkpoint("resnet18", tmp_path / "home")
    path.write_bytes(CONTENT)  # mended, and seen to be
    assert fetch_checkpoint("resnet18", tmp_path / "home") == path


def test__download__is_asked_for_with_the_whole_digest(made_up, monkeypatch, tmp_path, capsys):
    asked = []

    def download(url, folder, sha256, delay):
        asked.append((url, sha256))
        return put(folder / made_up.name)

    monkeypatch.setattr(_checkpoints, "fetch_file", download)
    path = fetch_checkpoint("resnet18", tmp_path / "home")
    assert path.read_bytes() == CONTENT
    assert asked == [(made_up.url, made_up.sha256)]
    assert capsys.readouterr().err == ""
    path.unlink()
    fetch_checkpoint("resnet18", tmp_path / "home", verbose=True)
    assert capsys.readouterr().err == f"downloading {made_up.url} (0 MB)\n"


@pytest.mark.parametrize(
    "error", [URLError("no network"), OSError("The SHA256 checksum differs"), IncompleteRead(b"")]
)
def test__no_network_and_no_file__error_says_what_to_put_where(
    made_up, monkeypatch, tmp_path, error
):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(_checkpoints, "fetch_file", fail)
    with pytest.raises(OSError, match="ImageNet weights of resnet18 are not at hand") as caught:
        fetch_checkpoint("resnet18", tmp_path / "home")
    expected = tmp_path / "home" / "imagenet-weights" / made_up.name
    in_torch_home = tmp_path / "torch-home" / "hub" / "checkpoints" / made_up.name
    for part in (str(error), made_up.url, made_up.sha256, f"{made_up.n_bytes} bytes"):
        assert part in str(caught.value)
    assert f"at {expected} or {in_torch_home}" in str(caught.value)
    # as the message says
    put(expected)
    assert fetch_checkpoint("resnet18", tmp_path / "home") == expected


# -- reading ---------------------------------------------------------------------------------------


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(3, 4, generator=generator), "a.count": torch.tensor(7)}


def save_as_zip(state, path):
    torch.save(state, path)


def save_as_in_old_torch(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_as_zip, "weights.pth"),
        (save_as_zip, "weights"),
        (save_as_in_old_torch, "weights.pt"),
        (safetensors.torch.save_file, "weights.safetensors"),
    ],
)
@pytest.mark.parametrize("kind", [str, os.fspath, lambda path: path])
def test__file__is_read_whatever_wrote_it(state, tmp_path, save, name, kind):
    save(state, tmp_path / name)
    found = read_state_dict(kind(tmp_path / name))
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("save", [save_as_zip, save_as_in_old_torch, None])
def test__pickle_that_would_run_code__is_refused_and_not_run(state, tmp_path, save):
    mark, path = tmp_path / "was-run", tmp_path / "weights.pth"
    harmful = state | {"b": RunsCode(mark)}
    if save is None:
        path.write_bytes(pickle.dumps({"b": RunsCode(mark)}))
    else:
        save(harmful, path)
    with pytest.raises(ValueError, match="objects other than tensors, which are not loaded"):
        read_state_dict(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(RunsCode(mark)))
    assert mark.exists()  # it would have done so


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "alone but a list; save a network's"),
        (torch.zeros(2), "alone but a Tensor"),
        ({"epoch": 3, "state_dict": {"a": torch.zeros(2)}}, "alone but 'epoch', 'state_dict'; "),
        ({0: torch.zeros(2), "a": torch.zeros(2)}, "alone but 0; "),
    ],
)
def test__file_of_other_things__error_says_which(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold a state dict") as caught:
        read_state_dict(tmp_path / "other.pth")
    assert message in str(caught.value)


def test__file_of_a_whole_module__is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"save a network's state_dict\(\) alone"):
        read_state_dict(tmp_path / "module.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "page of html"])
def test__damaged_file__error_names_it(state, tmp_path, name, damage):
    path = tmp_path / name
    save = torch.save if name.endswith(".pth") else safetensors.torch.save_file
    save(state, path)
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) - 20],
        "garbage": np.random.default_rng(0).bytes(len(content)),
        "empty": b"",
        "page of html": b"<!DOCTYPE html><html>Not found</html>",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=rf"{name} cannot be read as"):
        read_state_dict(path)


def test__zip_of_other_things__error_names_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(ValueError, match=r"archive\.pth cannot be read as a checkpoint"):
        read_state_dict(tmp_path / "archive.pth")


def test__missing_file__error_says_what_weights_may_be(tmp_path):
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no file; give the path of a checkpoint"):
            read_state_dict(path)


def test__safetensors_missing__error_says_how_to_install(monkeypatch, state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'skcifar\[safe\]'"):
        read_state_dict(tmp_path / "weights.safetensors")


# -- loading ---------------------------------------------------------------------------------------


class Network(nn.Module):
    head_prefix = "head."

    def __init__(self, n_outputs=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Identity() if n_outputs is None else nn.Linear(4, n_outputs)


def weights_of(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) if value.ndim else torch.tensor(5)
        for name, value in network.state_dict().items()
    }


def test__tensors__become_the_networks_in_its_own_dtypes():
    state = {name: value.double() for name, value in weights_of(Network(2)).items()}
    with torch.device("meta"):
        network = Network(2)
    load_weights(network, state, "here")
    for name, value in network.state_dict().items():
        assert value.device.type == "cpu"
        assert value.dtype == (torch.int64 if value.ndim == 0 else torch.float32)
        np.testing.assert_array_equal(value.numpy(), state[name].float().numpy())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert len(list(network.buffers())) == 3


def test__checkpoint_of_parameters__leaves_buffers_buffers(tmp_path):
    state = {name: value for name, value in weights_of(Network()).items() if value.ndim}
    torch.save({name: nn.Parameter(value) for name, value in state.items()}, tmp_path / "it.pth")
    network = Network()
    load_weights(network, read_state_dict(tmp_path / "it.pth"), "here")
    assert {name for name, _ in network.named_parameters()} == {
        *("stem.weight", "stem.bias", "norm.weight", "norm.bias")
    }
    assert torch.equal(network.norm.running_mean, state["norm.running_mean"])


def test__counters__may_be_missing():
    state = weights_of(Network(2))
    del state["norm.num_batches_tracked"]
    network = Network(2)
    load_weights(network, state, "here")
    assert network.norm.num_batches_tracked == 0
    assert torch.equal(network.norm.running_var, state["norm.running_var"])


def test__head__is_left_out_of_a_network_without_one():
    state = weights_of(Network(7))
    network = Network()
    load_weights(network, state, "here")
    assert torch.equal(network.stem.weight, state["stem.weight"])
    with pytest.raises(ValueError, match=r"it lacks head\.weight, head\.bias\. Give"):
        load_weights(Network(2), weights_of(Network()), "here")


def test__names_and_shapes_that_do_not_fit__are_named():
    state = weights_of(Network(2))
    before = {name: value.clone() for name, value in state.items()}
    del state["stem.bias"]
    state |= {"extra": torch.zeros(1), "head.weight": torch.zeros(9, 4)}
    network = Network(2)
    untouched = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(network, state, "my/weights.pth")
    assert str(caught.value) == (
        "weights='my/weights.pth' does not fit Network: it lacks stem.bias; it also has extra; "
        "it has head.weight (9, 4) instead of (2, 4). Give the state dict of the same network, "
        "with torchvision's names."
    )
    assert all(torch.equal(value, untouched[n]) for n, value in network.state_dict().items())
    prefixed = {f"module.{name}": value for name, value in before.items()}
    with pytest.raises(
        ValueError,
        match=r"lacks stem\.weight, stem\.bias, norm\.weight and 5 more; it also has "
        r"module\.stem\.weight, module\.stem\.bias, module\.norm\.weight and 6 more\.",
    ):
        load_weights(network, prefixed, "here")


# -- telling weights apart -------------------------------------------------------------------------


def test__digest__tells_values_names_and_shapes_apart_and_nothing_else():
    network = Network(2)
    load_weights(network, weights_of(network), "here")
    digest = digest_of(network)
    copies = [Network(2), Network(2).to(memory_format=torch.channels_last), Network(2)]
    for copy in copies:
        copy.load_state_dict(network.state_dict())
        assert digest_of(copy) == digest
    copies[0].norm.running_mean[1] += 1e-6
    with torch.no_grad():
        copies[1].stem.weight[0, 0, 0, 0] += 1e-6
    copies[2].head.weight = nn.Parameter(copies[2].head.weight.detach().reshape(4, 2))
    others = [*copies, Network(2).double(), nn.ModuleDict({"inner": network})]
    assert len({digest, *map(digest_of, others)}) == 6
