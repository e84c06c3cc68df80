"""The command line, as a user meets it: output, files, errors and exit statuses."""

import builtins
import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

import skcifar.__main__ as command_line
from skcifar import PretrainedFeatures
from skcifar.__main__ import main

PNG = b"\x89PNG\r\n\x1a\n"


class Failing(DummyClassifier):
    """Raises what it is given."""

    def __init__(self, error=ValueError):
        super().__init__()
        self.error = error

    def fit(self, X, y):
        raise self.error("no luck " * 30)


class Recorded(DummyClassifier):
    """Keeps the history of two epochs."""

    def fit(self, X, y):
        self.history_ = [
            {"epoch": i, "train_loss": 1 / i, "train_accuracy": 0.1 * i, "valid_loss": 2 / i}
            for i in (1, 2)
        ]
        self.n_iter_ = 2
        return super().fit(X, y)


@pytest.fixture
def models(monkeypatch):
    """The command line's models, to add to: name -> function of the device."""
    models = dict(command_line.MODELS, recorded=lambda device: Recorded())
    monkeypatch.setattr(command_line, "MODELS", models)
    return models


@pytest.fixture
def small_mnist(monkeypatch):
    """Instead of MNIST, 100 training and 30 test rows of 4 pixels; class k has 20 + 20 k rows."""
    asked = []

    def fetch(*, data_home, subset, return_X_y, verbose):
        asked.append((data_home, subset))
        rng = np.random.default_rng(0)
        y = np.repeat([0, 1, 2], [17, 33, 50] if subset == "train" else [10, 10, 10])
        X = rng.integers(0, 256, (len(y), 4)).astype(np.uint8)
        return X, y

    monkeypatch.setitem(command_line.FETCHERS, "mnist", fetch)
    return asked


def error_line(capsys, *arguments):
    """What a wrong call says on stderr, once it is sure that it says one line and no more."""
    try:
        status = main([*arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    told, line = err.splitlines()[:-1], err.splitlines()[-1]
    assert status == 2
    assert out == ""
    assert line.startswith("skcifar: error: ")
    assert not [t for t in told if not t.startswith("skcifar: reading")]
    return line


# -- a process of its own ------------------------------------------------------------------------


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


# -- the table -----------------------------------------------------------------------------------


def test__table__has_aligned_columns_best_first_within_110(models, capsys):
    models["a-name-of-16-char"] = lambda device: DecisionTreeClassifier(max_depth=3)
    names = "dummy,recorded,a-name-of-16-char,sklearn-logistic"
    assert main(["compare", "--models", names, "--cv", "3", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    title, blank, header, *rows = out.splitlines()
    assert title == "digits: 1,797 images of 10 classes, 3 folds, seed 0" and blank == ""
    assert [row.split()[0] for row in rows] == [
        "sklearn-logistic",
        "a-name-of-16-char",
        "dummy",
        "recorded",
    ]
    assert max(map(len, out.splitlines())) <= 110
    assert {len(line) for line in [header, *rows]} == {len(header)}
    starts = header.index("cv accuracy"), header.index("difference")
    assert all(row[start - 1] == " " != row[start] for row in rows for start in starts)
    assert rows[0][starts[1] :].startswith("best ")
    assert rows[1][starts[1] :].startswith("-0.")
    assert rows[2].split()[-1] == "-" and rows[3].split()[-1] == "2"


def test__failing_model__has_its_error_below_its_row_and_status_0(models, capsys):
    models["bad"] = lambda device: Failing()
    assert main(["compare", "--models", "bad,dummy", "--quiet"]) == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split()[0] for row in rows] == ["dummy", "bad", "failed:"]
    assert rows[1].split()[1:] == ["-"] * 7
    assert rows[2].startswith("  failed: ValueError: no luck no luck") and len(rows[2]) <= 110


def test__all_models_failing__is_status_1(models, capsys):
    models["bad"] = lambda device: Failing()
    assert main(["compare", "--models", "bad", "--quiet"]) == 1
    assert "failed: ValueError" in capsys.readouterr().out


def test__interrupt__is_one_line_and_status_130(models, capsys):
    models["stopped"] = lambda device: Failing(KeyboardInterrupt)
    assert main(["compare", "--models", "stopped,dummy", "--quiet"]) == 130
    assert capsys.readouterr() == ("", "skcifar: interrupted\n")


def test__seed_and_device__reach_every_model(models, small_mnist):
    devices = []

    def build(device):
        devices.append(device)
        tree = make_pipeline(StandardScaler(), DecisionTreeClassifier(splitter="random"))
        built.append(tree)
        return tree

    built = []
    models["tree"] = build
    for seed in "7", "7", "8":
        arguments = ["--data", "mnist", "--models", "tree", "--device", "cpu", "--seed", seed]
        assert main(["compare", *arguments, "--quiet"]) == 0
    assert devices == ["cpu"] * 3
    assert [tree[-1].random_state for tree in built] == [7, 7, 8]


@pytest.mark.parametrize(
    "name", ["softmax", "mlp", "cnn", "triplet", "finetuned", "alexnet", "resnet18"]
)
def test__own_models__are_built_for_the_device(name):
    estimator = command_line.MODELS[name]("cuda:1")
    parameters = estimator.get_params()
    devices = {key: value for key, value in parameters.items() if key.split("__")[-1] == "device"}
    assert devices and set(devices.values()) == {"cuda:1"}


def one_convolution(image_shape):
    return torch.nn.Conv2d(image_shape[2], 3, 1)


def test__features__are_stored_below_the_data_home(models, small_mnist, tmp_path):
    built = []

    def build(device):
        features = PretrainedFeatures(one_convolution, weights=None, image_size=None, device=device)
        built.append(make_pipeline(features, DecisionTreeClassifier(max_depth=3)))
        return built[-1]

    models["features"] = build
    arguments = ["--data", "mnist", "--models", "features", "--data-home", str(tmp_path)]
    assert main(["compare", *arguments, "--cv", "2", "--quiet"]) == 0
    assert built[0][0].data_home == str(tmp_path)
    assert list((tmp_path / "skcifar-features").iterdir())


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


# -- data ----------------------------------------------------------------------------------------


def test__official_test_split__is_scored(small_mnist, capsys):
    arguments = ["--data", "mnist", "--models", "dummy", "--data-home", "somewhere"]
    assert main(["compare", *arguments, "--quiet"]) == 0
    assert small_mnist == [("somewhere", "train"), ("somewhere", "test")]
    assert not Path("somewhere").exists()  # there was nothing to keep
    title, _, header, row = capsys.readouterr().out.splitlines()
    assert title.startswith("mnist: 100 images of 3 classes")
    # Two columns beside each other, ranged right: always class 2, of 50 in 100 and of 10 in 30.
    assert row[: header.index("test") + 4].split()[-2:] == ["0.5000", "0.3333"]


def test__n_train__takes_a_seeded_stratified_subset(small_mnist, monkeypatch):
    taken = []

    def compare(estimators, X, y, **arguments):
        taken.append((X, y))
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "compare", compare)
    for seed in "0", "0", "1":
        options = ["--data", "mnist", "--n-train", "60", "--seed", seed, "--models", "dummy"]
        assert main(["compare", *options]) == 130
    (X, y), (X_again, y_again), (X_other, _) = taken
    assert X.shape == (60, 4) and X.dtype == np.uint8
    np.testing.assert_allclose(np.bincount(y), [17 * 0.6, 33 * 0.6, 50 * 0.6], atol=1)
    np.testing.assert_array_equal(X, X_again)
    np.testing.assert_array_equal(y, y_again)
    assert not np.array_equal(X, X_other)
    # Rows and labels still belong together, and no row was taken twice.
    whole_X, whole_y = command_line.FETCHERS["mnist"](
        data_home=None, subset="train", return_X_y=True, verbose=False
    )
    whole = {(*x, label) for x, label in zip(whole_X, whole_y, strict=True)}
    subset = {(*x, label) for x, label in zip(X, y, strict=True)}
    assert len(subset) == 60 and subset < whole


def test__real_cifar10__is_compared(cifar10, capsys):
    arguments = ["--data", "cifar10", "--n-train", "200", "--cv", "2", "--models", "dummy"]
    assert main(["compare", *arguments, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cifar10: 200 images of 10 classes, 2 folds, seed 0\n")
    assert " 0.1000 " in out.splitlines()[-1]  # ten classes of equal size


def test__fetch__tells_what_is_there_and_where(small_mnist, tmp_path, capsys):
    assert main(["fetch", "mnist", "--data-home", str(tmp_path)]) == 0
    assert small_mnist == [(str(tmp_path), "all")]
    out, err = capsys.readouterr()
    assert out == f"mnist: 30 images of 3 classes in {tmp_path}\n"
    assert err == "skcifar: reading mnist, downloading what is missing\n"


# -- wrong arguments -----------------------------------------------------------------------------


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
def test__wrong_arguments__are_one_line_and_status_2(arguments, expected, capsys):
    assert expected in error_line(capsys, *arguments)


@pytest.mark.parametrize("command", [["compare", "--data", "cifar10"], ["fetch", "cifar10"]])
def test__damaged_data__is_one_line_that_names_the_file(command, tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(b"short")
    line = error_line(capsys, *command, "--data-home", str(tmp_path))
    assert "cannot read cifar10: " in line and "data_batch_1.bin has 5 bytes" in line


def test__missing_data_without_network__is_one_line(monkeypatch, capsys):
    def fetch(**arguments):
        raise OSError("could not be\ndownloaded")

    monkeypatch.setitem(command_line.FETCHERS, "mnist", fetch)
    line = error_line(capsys, "compare", "--data", "mnist")
    assert line == "skcifar: error: cannot read mnist: could not be downloaded"


def test__unwritable_output__is_noticed_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "compare", None)  # to call it would be a TypeError
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "results"
    assert f"cannot write to {folder}" in error_line(capsys, "compare", "--output", str(folder))


# -- files ---------------------------------------------------------------------------------------


def test__output__holds_table_histories_and_picture(models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    models["bad"] = lambda device: Failing()
    folder = tmp_path / "new" / "results"
    arguments = ["--models", "bad,recorded,dummy", "--cv", "2", "--output", str(folder)]
    assert main(["compare", *arguments]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "histories.csv",
        "learning_curves.png",
        "table.csv",
    ]
    table = pd.read_csv(folder / "table.csv")
    assert sorted(table["model"]) == ["bad", "dummy", "recorded"]
    assert {"parameters", "split0_score", "split1_score", "difference_low"} <= set(table.columns)
    assert table["traceback"].str.contains("raise self.error").sum() == 1
    histories = pd.read_csv(folder / "histories.csv")
    assert histories.columns[:4].tolist() == ["model", "fold", "epoch", "train_loss"]
    assert histories[["fold", "epoch"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert (folder / "learning_curves.png").read_bytes().startswith(PNG)
    assert f"skcifar: wrote learning_curves.png to {folder}" in capsys.readouterr().err


def test__output_without_matplotlib__says_how_to_get_the_picture(
    models, tmp_path, capsys, monkeypatch
):
    real_import = builtins.__import__

    def without_matplotlib(name, *arguments):
        if name.startswith("matplotlib"):
            raise RuntimeError("a broken installation")
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert main(["compare", "--models", "recorded", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["histories.csv", "table.csv"]
    assert "pip install 'skcifar[plot]'" in capsys.readouterr().err


def test__output_without_epochs__has_no_picture_and_an_empty_history(tmp_path, capsys):
    assert main(["compare", "--models", "dummy", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "histories.csv").read_text().split() == ["model,fold,epoch"]
    assert not (tmp_path / "learning_curves.png").exists()
    assert "no model recorded its epochs" in capsys.readouterr().err


def test__learning_curves__draw_what_was_recorded():
    pytest.importorskip("matplotlib")
    histories = pd.DataFrame(
        {
            "model": ["a", "a", "a", "b"],
            "fold": [0, 1, 0, 0],
            "epoch": [1, 1, 2, 1],
            "train_loss": [4.0, 2.0, 1.0, 3.0],
            "train_accuracy": [0.1, 0.3, 0.5, np.nan],
            "valid_loss": [np.nan, np.nan, np.nan, 5.0],
        }
    )
    table = pd.DataFrame({"model": ["b", "dummy", "a"], "cv_mean": [0.7, 0.1, 0.6]})
    figure = command_line._draw_learning_curves(histories, table, "title")
    drawn = [[(line.get_label(), line.get_ydata()) for line in axis.lines] for axis in figure.axes]
    (b_loss, a_loss), (b_accuracy, a_accuracy) = drawn[:2], drawn[2:]
    assert [axis.get_title() for axis in figure.axes] == ["b", "a", "", ""]
    assert [(label, list(y)) for label, y in a_loss] == [("training rows", [3.0, 1.0])]
    assert [(label, list(y)) for label, y in b_loss] == [
        ("training rows", [3.0]),
        ("validation rows", [5.0]),
    ]
    assert [list(y) for _, y in a_accuracy] == [[0.2, 0.5], [0.6, 0.6]]
    assert [list(y) for _, y in b_accuracy] == [[0.7, 0.7]]
    assert len(figure.legends[0].get_texts()) == 3


def test__interrupted_write__leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), command_line._replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with command_line._replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
