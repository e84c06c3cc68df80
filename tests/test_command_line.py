import os
import shutil

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from skcifar import PretrainedFeatures, _compare_command
from skcifar.__main__ import main
from skcifar._command_line import FETCHERS, MODELS, read, replacing, write_learning_curves


@pytest.mark.parametrize(
    "name", ["softmax", "mlp", "cnn", "triplet", "finetuned", "alexnet", "resnet18"]
)
def test__own_models__are_built_for_the_device(name):
    estimator = MODELS[name]("cuda:1")
    parameters = estimator.get_params()
    devices = {key: value for key, value in parameters.items() if key.split("__")[-1] == "device"}
    assert devices and set(devices.values()) == {"cuda:1"}


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


def test__n_train__takes_a_seeded_stratified_subset(small_mnist, monkeypatch):
    taken = []

    def compare(estimators, X, y, **arguments):
        taken.append((X, y))
        raise KeyboardInterrupt

    monkeypatch.setattr(_compare_command, "compare", compare)
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
    whole_X, whole_y = FETCHERS["mnist"](
        data_home=None, subset="train", return_X_y=True, verbose=False
    )
    whole = {(*x, label) for x, label in zip(whole_X, whole_y, strict=True)}
    subset = {(*x, label) for x, label in zip(X, y, strict=True)}
    assert len(subset) == 60 and subset < whole


def test__read__gives_rows_and_codes_of_a_subset(small_mnist):
    X, y = read("mnist", "home", "test", [0, 2], verbose=False)
    assert X.shape == (20, 4) and sorted(set(y)) == [0, 2] and small_mnist == [("home", "test")]


def recorded_rows(monkeypatch, *options):
    """What `compare` of skcifar.model_selection is called with: rows, classes, test rows."""
    calls = []

    def compare(estimators, X, y, *, X_test, y_test, **arguments):
        calls.append((list(estimators), X, y, X_test, y_test))
        raise KeyboardInterrupt

    monkeypatch.setattr(_compare_command, "compare", compare)
    assert main(["compare", *map(str, options)]) == 130
    return calls[0]


def test__folder__is_read_as_squares_with_its_test_split(image_folder, monkeypatch):
    names, X, y, X_test, y_test = recorded_rows(monkeypatch, "--data", image_folder)
    assert names == ["softmax", "mlp", "cnn", "triplet", "dummy"]
    assert X.shape == (18, 32 * 32 * 3) and X_test.shape == (9, 32 * 32 * 3)
    assert y.tolist() == [0] * 6 + [1] * 6 + [2] * 6 and y_test.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
    ]
    # class cat has the images 1, 4, 7, ... of its part
    assert X[6:12, 0].tolist() == [10 * i for i in range(1, 18, 3)]
    options = ["--image-size", 8, "--n-train", 9, "--cv", 3, "--models", "dummy"]
    _, X, _, X_test, _ = recorded_rows(monkeypatch, "--data", image_folder / "train", *options)
    assert X.shape == (9, 192) and X_test is None


def test__bad_file_in_a_folder__is_a_warning_of_one_line(
    image_folder, monkeypatch, capsys, recwarn
):
    (image_folder / "train" / "cat" / "bad.png").write_text("no image")
    _, X, *_ = recorded_rows(monkeypatch, "--data", image_folder)
    (line,) = [t for t in capsys.readouterr().err.splitlines() if "warning" in t]
    assert line.startswith("skcifar: warning: UserWarning: 1 of 19 image files in ")
    assert len(X) == 18


def test__warnings_about_a_folder__are_told_once(image_folder, monkeypatch, capsys, recwarn):
    (image_folder / "train").rename(image_folder / "Training")
    shutil.copytree(image_folder / "test" / "cat", image_folder / "valid" / "cat")
    for part in "test", "Training":
        (image_folder / part / "cat" / "bad.png").write_text("no image")
    _, X, _, X_test, _ = recorded_rows(monkeypatch, "--data", image_folder)
    lines = [t for t in capsys.readouterr().err.splitlines() if t.startswith("skcifar: warning")]
    assert len(lines) == 3
    assert sum(f"The images in {image_folder}/valid are left out" in t for t in lines) == 1
    assert [" 1 of 19 " in lines[0], " 1 of 10 " in lines[2]] == [True, True]
    assert (len(X), len(X_test)) == (18, 9)


def test__folder_that_cannot_be_used__is_one_line(tmp_path, error_line, image_folder):
    line = error_line("compare", "--data", str(tmp_path / "nowhere"))
    assert "choose from digits, mnist, cifar10" in line and "no such folder" in line
    (tmp_path / "empty").mkdir()
    line = error_line("compare", "--data", str(tmp_path / "empty"))
    assert "cannot read the folder" in line and "holds no image" in line
    assert "no such folder" in error_line("sweep", "--grid", "alpha=0", "--data", "")
    line = error_line("compare", "--image-size", "32")
    assert "argument --image-size: it is for folders; those of digits have a size" in line
    line = error_line("compare", "--data", str(image_folder), "--image-size", "4")
    assert "4 is out of range: give at least 8" in line
    line = error_line("sweep", "--grid", "alpha=0", "--data", str(image_folder), "--classes", "0,1")
    assert "names ['0', '1'], which do not exist" in line and "7, cat, dog" in line


def renamed(path, name):
    try:
        return path.rename(path.with_name(os.fsdecode(name)))
    except OSError:
        pytest.skip("this file system wants names in UTF-8")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX systems only")
def test__names_that_are_not_utf8__are_refused_before_any_training(image_folder, error_line):
    cats = renamed(image_folder / "train" / "cat", b"caf\xe9")
    line = error_line("compare", "--data", str(image_folder))
    assert f"class folder {os.fsencode(cats)!r} is not UTF-8" in line
    pets = renamed(image_folder, b"p\xe9ts")
    for command in ["compare"], ["sweep", "--grid", "alpha=0"]:
        line = error_line(*command, "--data", str(pets))
        assert f"argument --data: the name of the folder {os.fsencode(pets)!r}" in line
        assert "is not UTF-8" in line and line.endswith("rename the folder")


def test__interrupted_write__leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test__picture__is_written_and_closed_whatever_window_there_is(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("svg")

    def draw():
        return plt.figure()

    write_learning_curves(tmp_path, draw, print, why_none=None)
    assert (tmp_path / "learning_curves.png").stat().st_size > 0
    assert not plt.get_fignums() and plt.get_backend() == "agg"
