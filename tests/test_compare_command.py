"""The comparison, as a user meets it: table, files and picture."""

import builtins
import json
import shlex
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import RadiusNeighborsClassifier
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from skcifar import _compare_command
from skcifar.__main__ import main
from skcifar._provenance import data_provenance, machine, variant_of, versions
from skcifar.datasets import load_digits

PNG = b"\x89PNG\r\n\x1a\n"


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
    assert main(["compare", "--models", "bad,dummy", "--quiet"]) == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split()[0] for row in rows] == ["dummy", "bad", "failed:"]
    assert rows[1].split()[1:] == ["-"] * 7
    assert rows[2].startswith("  failed: ValueError: no luck no luck") and len(rows[2]) <= 110


def test__all_models_failing__is_status_1(models, capsys):
    assert main(["compare", "--models", "bad", "--quiet"]) == 1
    assert "failed: ValueError" in capsys.readouterr().out


def test__official_test_split__is_scored(small_mnist, capsys):
    arguments = ["--data", "mnist", "--models", "dummy", "--data-home", "somewhere"]
    assert main(["compare", *arguments, "--quiet"]) == 0
    assert small_mnist == [("somewhere", "train"), ("somewhere", "test")]
    assert not Path("somewhere").exists()  # there was nothing to keep
    title, _, header, row = capsys.readouterr().out.splitlines()
    assert title.startswith("mnist: 100 images of 3 classes")
    # Two columns beside each other, ranged right: always class 2, of 50 in 100 and of 10 in 30.
    assert row[: header.index("test") + 4].split()[-2:] == ["0.5000", "0.3333"]


def test__real_cifar10__is_compared(cifar10, capsys):
    arguments = ["--data", "cifar10", "--n-train", "200", "--cv", "2", "--models", "dummy"]
    assert main(["compare", *arguments, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cifar10: 200 images of 10 classes, 2 folds, seed 0\n")
    assert " 0.1000 " in out.splitlines()[-1]  # ten classes of equal size


def test__unwritable_output__is_noticed_before_any_work(tmp_path, monkeypatch, error_line):
    monkeypatch.setattr(_compare_command, "compare", None)  # to call it would be a TypeError
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "results"
    assert f"cannot write to {folder}" in error_line("compare", "--output", str(folder))


def test__output__holds_table_histories_and_picture(models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "results"
    arguments = ["--models", "bad,recorded,dummy", "--cv", "2", "--output", str(folder)]
    assert main(["compare", *arguments]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "gallery.npz",
        "histories.csv",
        "learning_curves.png",
        "predictions.csv",
        "provenance.json",
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


def test__predictions_and_gallery__are_those_of_scikit_learn(tmp_path, models):
    models["tree"] = lambda device: DecisionTreeClassifier(max_depth=4, random_state=0)
    models["svm"] = lambda device: LinearSVC(random_state=0)
    names = "bad,tree,svm"
    assert (
        main(["compare", "--models", names, "--cv", "3", "--output", str(tmp_path), "--quiet"]) == 0
    )
    predictions = pd.read_csv(tmp_path / "predictions.csv", dtype={"predicted": str, "actual": str})
    assert list(predictions) == ["model", "part", "row", "actual", "predicted", "confidence"]
    assert set(predictions["part"]) == {"left out"} and len(predictions) == 2 * 1797
    assert predictions["confidence"].isna().tolist() == (predictions["model"] == "svm").tolist()

    X, y = load_digits(return_X_y=True)
    tree = DecisionTreeClassifier(max_depth=4, random_state=0)
    probabilities = cross_val_predict(tree, X, y, cv=3, method="predict_proba")
    of_tree = predictions[predictions["model"] == "tree"].set_index("row").sort_index()
    assert of_tree["actual"].tolist() == [str(code) for code in y]
    assert of_tree["predicted"].tolist() == [str(code) for code in probabilities.argmax(axis=1)]
    np.testing.assert_allclose(of_tree["confidence"], probabilities.max(axis=1), rtol=1e-5)

    with np.load(tmp_path / "gallery.npz", allow_pickle=False) as gallery:
        part, rows, images = (gallery[name] for name in ("part", "rows", "images"))
    assert part[()] == "left out" and rows.dtype == np.int64 and images.dtype == np.uint8
    kept = set(rows)
    assert rows.tolist() == sorted(kept) and 16 <= len(kept) <= 32
    right = of_tree["predicted"] == of_tree["actual"]
    for chosen, n in (right, 4), (~right, 12):
        confidences = of_tree["confidence"][chosen]
        threshold = sorted(confidences, reverse=True)[n - 1]
        assert {*confidences.index[confidences > threshold]} <= kept
        assert len(kept & {*confidences.index[confidences >= threshold]}) >= n
    stretched = np.rint(X[rows].reshape(-1, 8, 8) * (255 / 16))
    np.testing.assert_array_equal(images, stretched)


def test__predictions_of_a_test_split__have_names_of_classes(small_mnist, tmp_path):
    arguments = ["--data", "mnist", "--models", "dummy", "--output", str(tmp_path), "--quiet"]
    assert main(["compare", *arguments]) == 0
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert predictions["row"].tolist() == list(range(30)) and set(predictions["part"]) == {"test"}
    assert predictions["actual"].tolist() == ["zero"] * 10 + ["one"] * 10 + ["two"] * 10
    assert set(predictions["predicted"]) == {"two"}
    with np.load(tmp_path / "gallery.npz") as gallery:
        assert gallery["part"][()] == "test"
        # all as sure as the others: the first twelve wrong ones and the first four right ones
        assert gallery["rows"].tolist() == [*range(12), *range(20, 24)]
        assert gallery["images"].shape == (16, 2, 2)


def test__gallery_of_a_folder__has_its_colours(image_folder, tmp_path):
    output = tmp_path / "out"
    arguments = ["--data", image_folder, "--models", "dummy", "--cv", "2", "--output", output]
    assert main(["compare", *map(str, arguments), "--quiet"]) == 0
    predictions = pd.read_csv(output / "predictions.csv")
    assert predictions["actual"].tolist() == ["7"] * 3 + ["cat"] * 3 + ["dog"] * 3
    with np.load(output / "gallery.npz") as gallery:
        assert gallery["images"].shape == (9, 32, 32, 3)
        order = [0, 30, 60, 10, 40, 70, 20, 50, 80]
        assert gallery["images"][:, 5, 5].tolist() == [[red, 0, 0] for red in order]
    provenance = json.loads((output / "provenance.json").read_text())
    assert provenance["data"] | {"sha256": None} == {
        "name": "folder pets",
        "variant": f"folder {image_folder}",
        "sha256": None,
        "n_train": 18,
        "n_test": 9,
        "image_shape": [32, 32, 3],
        "class_names": ["7", "cat", "dog"],
    }


def test__provenance__has_command_title_seed_data_machine_and_versions(tmp_path, monkeypatch):
    arguments = [
        "compare",
        "--models",
        "dummy",
        "--seed",
        "3",
        "--output",
        str(tmp_path),
        "--quiet",
    ]
    monkeypatch.setattr(sys, "argv", ["skcifar", *arguments])
    assert main() == 0
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert shlex.split(provenance["command"]) == ["python", "-m", "skcifar", *arguments]
    assert provenance["kind"] == "comparison" and provenance["seed"] == 3
    assert provenance["title"] == "digits: 1,797 images of 10 classes, 5 folds, seed 3"
    X, y = load_digits(return_X_y=True)
    expected = data_provenance("digits", X, y, class_names=range(10))
    assert provenance["data"] == expected and expected["variant"] == "as published"
    assert set(provenance["machine"]) == set(machine())
    assert provenance["versions"] == versions()
    assert datetime.fromisoformat(provenance["date"])


def test__variant_of_real_cifar10__is_of_all_images_not_of_a_small_subset(cifar10, tmp_path):
    arguments = [
        "--data",
        "cifar10",
        "--n-train",
        "20",
        "--cv",
        "2",
        "--models",
        "dummy",
        "--quiet",
    ]
    assert main(["compare", *arguments, "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "provenance.json").read_text())["data"]
    assert data["variant"] == variant_of(*cifar10) and data["n_train"] == 20
    assert data["class_names"][3] == "cat" and data["image_shape"] == [32, 32, 3]


def test__all_models_failing__leaves_empty_predictions(models, tmp_path):
    assert main(["compare", "--models", "bad", "--output", str(tmp_path), "--quiet"]) == 1
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 0
    with np.load(tmp_path / "gallery.npz") as gallery:
        assert gallery["images"].shape == (0, 8, 8) and gallery["rows"].shape == (0,)


@pytest.mark.filterwarnings("ignore:Outlier label")
def test__label_that_is_no_class__is_written_as_it_is(models, tmp_path):
    models["radius"] = lambda device: RadiusNeighborsClassifier(radius=20, outlier_label=-1)
    arguments = ["--models", "radius", "--cv", "2", "--output", str(tmp_path), "--quiet"]
    assert main(["compare", *arguments]) == 0
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert set(predictions["predicted"]) == {-1, *range(10)}
    assert (predictions["confidence"].isna() == (predictions["predicted"] == -1)).all()


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no such character")])
def test__results_that_cannot_be_written__are_printed_and_one_line(
    tmp_path, monkeypatch, capsys, error
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(_compare_command, "write_provenance", fail)
    arguments = ["--models", "dummy", "--output", str(tmp_path), "--quiet"]
    assert main(["compare", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[3].startswith("dummy ")
    assert err == f"skcifar: error: cannot write the results: {error}\n"


def test__title_with_dollar_signs__is_drawn_as_it_is():
    pytest.importorskip("matplotlib")
    histories = pd.DataFrame({"model": ["a"], "fold": [0], "epoch": [1], "train_loss": [4.0]})
    table = pd.DataFrame({"model": ["a"], "cv_mean": [0.7]})
    title = r"folder $\frac{$"
    figure = _compare_command._draw_learning_curves(histories, table, title)
    figure.canvas.draw()  # a formula that is none would raise
    assert figure.get_suptitle().splitlines()[0] == title


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
    assert (tmp_path / "table.csv").exists()
    assert not (tmp_path / "learning_curves.png").exists()
    assert "pip install 'skcifar[plot]'" in capsys.readouterr().err


def test__output_without_epochs__has_no_picture_and_an_empty_history(tmp_path, capsys):
    assert main(["compare", "--models", "dummy", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "histories.csv").read_text().split() == ["model,fold,epoch"]
    assert not (tmp_path / "learning_curves.png").exists()
    assert "no model recorded its epochs" in capsys.readouterr().err


def test__learning_curves__draw_what_was_recorded():
    plt = pytest.importorskip("matplotlib.pyplot")
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
    figure = _compare_command._draw_learning_curves(histories, table, "title")
    loss, accuracy = figure.axes
    b_loss, b_valid, a_loss = (list(line.get_ydata()) for line in loss.lines)
    assert (b_loss, b_valid, a_loss) == ([3.0], [5.0], [3.0, 1.0])
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[20, 50]]
    assert loss.collections[-1].get_datalim(loss.transData).intervaly.tolist() == [1.0, 4.0]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["b (70.0%)", "a (60.0%)", "training", "validation"]
    plt.close(figure)
