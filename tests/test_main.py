"""The command line, as a user meets it: commands, errors and exit statuses."""

import doctest
import subprocess
import sys

import pytest
from sklearn.linear_model import LogisticRegression

import skcifar.__main__ as command_line
from skcifar.__main__ import main
from skcifar._command_line import FETCHERS


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "skcifar", *arguments], capture_output=True, text=True, timeout=300
    )


def test__process__prints_table_on_stdout_and_progress_on_stderr():
    done = run("compare", "--models", "dummy,softmax", "--n-train", "100", "--cv", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "digits: 100 images of 10 classes, 2 folds, seed 0"
    assert [line.split()[0] for line in lines[2:]] == ["model", "softmax", "dummy"]
    assert "[1/2] dummy: fold 1 of 2" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


def test__process__wrong_model_is_one_line_and_status_2():
    done = run("compare", "--models", "softmax,forest")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "skcifar: error: argument --models: unknown model 'forest'; choose from softmax, mlp, cnn, "
        "triplet, finetuned, alexnet, resnet18, sklearn-logistic, sklearn-mlp, dummy\n"
    )


def test__interrupt__is_one_line_and_status_130(models, capsys):
    assert main(["compare", "--models", "stopped,dummy", "--quiet"]) == 130
    assert capsys.readouterr() == ("", "skcifar: interrupted\n")


def test__warnings__are_one_line_each(models, capsys, recwarn):
    # The suite turns warnings into errors; the program shows them.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        models["short"] = lambda device: LogisticRegression(max_iter=1)
        assert main(["compare", "--models", "short", "--cv", "2", "--quiet"]) == 0
        assert warnings.showwarning is not command_line._show_warning_on_one_line
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("skcifar: warning: ConvergenceWarning: lbfgs") for line in lines)


def test__docstring__runs():
    # pytest collects no doctests from a __main__.py.
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(command_line, optionflags=flags)
    assert attempted > 0 and failed == 0


def test__fetch__tells_what_is_there_and_where(small_mnist, tmp_path, capsys):
    assert main(["fetch", "mnist", "--data-home", str(tmp_path)]) == 0
    assert small_mnist == [(str(tmp_path), "all")]
    out, err = capsys.readouterr()
    assert out == f"mnist: 30 images of 3 classes in {tmp_path}\n"
    assert err == "skcifar: reading mnist, downloading what is missing\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["compare", "--data", "svhn"], "invalid choice: 'svhn'"),
        (["compare", "--models", "dummy,,mlp"], "unknown model ''"),
        (["compare", "--models", "dummy,dummy"], "'dummy' is named more than once"),
        (["compare", "--device", "gpu"], "argument --device: device='gpu'"),
        (["compare", "--cv", "1"], "argument --cv: 1 is out of range: give at least 2"),
        (["compare", "--cv", "three"], "argument --cv: 'three' is not an integer"),
        (["compare", "--seed", "-1"], "argument --seed"),
        (["compare", "--n-train", "0"], "argument --n-train: 0 is out of range"),
        (["compare", "--n-train", "1798"], "1,798 is more than the 1,797 training images of"),
        (["compare", "--n-train", "40"], "fewer than the 5 folds: raise --n-train or lower --cv"),
        (["compare", "--cv", "175"], "fewer than the 175 folds"),
        (["compare", "--colour"], "unrecognized arguments: --colour"),
        (["fetch", "digits"], "invalid choice: 'digits'"),
    ],
)
def test__wrong_arguments__are_one_line_and_status_2(arguments, expected, error_line):
    assert expected in error_line(*arguments)


@pytest.mark.parametrize("command", [["compare", "--data", "cifar10"], ["fetch", "cifar10"]])
def test__damaged_data__is_one_line_that_names_the_file(command, tmp_path, error_line):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(b"short")
    line = error_line(*command, "--data-home", str(tmp_path))
    assert "cannot read cifar10: " in line and "data_batch_1.bin has 5 bytes" in line


def test__missing_data_without_network__is_one_line(monkeypatch, error_line):
    def fetch(**arguments):
        raise OSError("could not be\ndownloaded")

    monkeypatch.setitem(FETCHERS, "mnist", fetch)
    line = error_line("compare", "--data", "mnist")
    assert line == "skcifar: error: cannot read mnist: could not be downloaded"
