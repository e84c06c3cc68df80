"""The table of the reports' systems, and how one of them becomes a record."""

import json
import re
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.callback import ProgressBar
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix

from skcifar import _reproduction
from skcifar.__main__ import main
from skcifar._exercises import Blur, Diverging, Gradients
from skcifar._fitted import describe
from skcifar._protocols import (
    FULL,
    QUICK,
    Holdout,
    Images,
    Look,
    Outcome,
    Projection,
    Scale,
    Sweep,
    TrainingSizes,
    UntilTrainAccuracy,
    joined,
)
from skcifar._reproduce_command import markdown_table
from skcifar._reproduction import Row, System
from skcifar.cnn import CNNClassifier
from skcifar.datasets import load_digits
from skcifar.mlp import MLPClassifier
from skcifar.preprocessing import GaussianBlur
from skcifar.reproduce import OURS, REPORT, SYSTEMS, reproduce
from skcifar.softmax import SoftmaxRegression

SMALL = Scale(n_train=200, n_test=100, epochs=2, n_pictured=50)
# Of the studies' rows, as they number them.
IDS = """
000-logistic 000-softmax 000-lenet5 000-vgg11 000-vgg16 000-tsne 000-frozen 000-finetune
001-hidden 001-lr 001-activations 001-lasthidden 001-eda 001-alexnet
002-linear 002-mlp-gd 002-mlp-sgd 002-cnn 002-compare
003-linear 003-linear-grid 003-subset 003-mlp 003-conv 003-convloss 003-autograd
004-base 004-small 004-tuned 004-resnet18 004-report
""".split()


@pytest.fixture
def images():
    """1,200 digits to train on and 597 to test, as a data set with a split."""
    digits = load_digits()
    X, y = digits.data * np.uint8(15), digits.target
    return Images(X[:1200], y[:1200], X[1200:], y[1200:], list("0123456789"), (8, 8, 1))


@pytest.fixture
def on_digits(monkeypatch, images):
    """Every system reads digits instead of its own data."""
    monkeypatch.setattr(_reproduction, "read", lambda data, data_home, classes: images)


# -- the table -------------------------------------------------------------------------------------


def test__table__holds_every_system_once_in_order():
    assert list(SYSTEMS) == IDS


@pytest.mark.parametrize("name", IDS)
def test__system__is_described_and_has_rows_with_estimators(name):
    system = SYSTEMS[name]
    assert system.data in ("cifar10", "mnist")
    assert system.title and system.reported and system.rows
    for row_name, row in system.rows.items():
        estimators = row.estimator if isinstance(row.estimator, dict) else {"": row.estimator}
        for estimator in estimators.values():
            assert estimator is None or isinstance(clone(estimator), BaseEstimator)
        assert row_name.startswith((REPORT, OURS, "with "))


# The reports' figures once more, typed from the reports: (train, validation, test) accuracies in
# percent, or by the figure's own name.
REPORTED = {
    "000-logistic": {"train accuracy": 80},
    "000-lenet5": {"test accuracy": 57},
    "000-vgg11": {"test accuracy": 76},
    "000-frozen": {"train accuracy": 78, "validation accuracy": 52},
    "000-finetune": {"test accuracy": 85.88},
    "001-alexnet": {"train accuracy": 63, "test accuracy": 63.48},
    "002-linear": {"train accuracy": 42.4, "validation accuracy": 40.4, "test accuracy": 40.6},
    "002-mlp-gd": {"train accuracy": 47.0, "validation accuracy": 43.8, "test accuracy": 43.5},
    "002-mlp-sgd": {"train accuracy": 57.0, "validation accuracy": 48.2, "test accuracy": 47.3},
    "003-linear": {"validation accuracy": 85.56},
    "003-linear-grid": {"validation accuracy": 91.51, "test accuracy": 91.81},
    "003-mlp": {"train accuracy": 99.99, "validation accuracy": 97.56, "test accuracy": 97.87},
    "004-base": {"test accuracy": 78.08},
    "004-small": {"test accuracy": 68.17},
    "004-tuned": {"test accuracy": 78.08},
    "004-resnet18": {"test accuracy": 66.53},
}
REPORTED_BY_MODEL = {
    "001-activations": [[93.88, 90.36, 91, 81.63]] * 2,  # relu, logistic, tanh, identity
    "002-compare": [[40.6, 43.5, 47.3, 50.7], [40.6, 47.3, 60.3]],  # the better MLP, 300 epochs
}
LOSSES = [0.66, 0.29, 0.17, 0.12, 0.09, 0.79, 0.56, 0.59, 0.52, 0.52]  # train, then validation


@pytest.mark.parametrize("name", IDS)
def test__reported_figures__are_the_reports(name):
    for i, (row_name, row) in enumerate(SYSTEMS[name].rows.items()):
        percent = {figure: 100 * value for figure, value in row.reported.items()}
        if name in REPORTED:
            assert percent == pytest.approx(REPORTED[name])
        elif name in REPORTED_BY_MODEL:
            assert list(percent.values()) == pytest.approx(REPORTED_BY_MODEL[name][i])
        elif name == "001-hidden":
            assert list(row.reported.values()) == LOSSES
        elif name == "002-cnn":
            ten_epochs = row_name == REPORT
            assert percent == pytest.approx({"test accuracy": 50.7 if ten_epochs else 60.3})
        else:
            assert not row.reported


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__networks_of_the_reports__have_their_numbers_of_parameters(images):
    cifar = images._replace(X=np.zeros((20, 3072), np.uint8), y=np.arange(20) % 10)
    for name, n_parameters in {"002-cnn": 122_570, "004-small": 75_186}.items():
        for row in SYSTEMS[name].rows.values():
            one = clone(row.estimator).set_params(max_iter=1, tta=False, precision="float32")
            assert one.fit(cifar.X, cifar.y).n_parameters_ == n_parameters


# -- protocols -------------------------------------------------------------------------------------


def test__holdout__figures_are_those_of_the_fitted_model(images):
    model = LogisticRegression(max_iter=30)
    outcome = Holdout(validation=0.25)(model, images, FULL)
    predicted = model.predict(images.X_test)
    right = [a == b for a, b in zip(predicted, images.y_test, strict=True)]
    assert outcome.figures["test accuracy"] == sum(right) / len(right)
    assert 0.5 < outcome.figures["validation accuracy"] < 1
    assert outcome.confusion == confusion_matrix(images.y_test, predicted).tolist()
    threes = [one for one, y in zip(right, images.y_test, strict=True) if y == 3]
    assert outcome.classes["3"] == sum(threes) / len(threes)
    assert outcome.seconds > 0


def test__holdout__shows_validation_images_to_estimators_that_take_them(images):
    outcome = Holdout(validation=0.1)(MLPClassifier((8,), max_iter=3), images, FULL)
    assert outcome.epochs == 3 and len(outcome.curve) == 3
    assert all("valid_loss" in row for row in outcome.curve)


def test__saved_holdout__scores_what_came_back_from_a_file(images, monkeypatch):
    from skcifar import _protocols

    monkeypatch.setattr(
        _protocols, "_through_a_file", lambda model: DummyClassifier().fit(images.X, images.y)
    )
    outcome = Holdout(saved=True)(LogisticRegression(max_iter=30), images, FULL)
    assert outcome.figures["test accuracy"] < 0.2


def test__model_through_a_file__predicts_the_same(images):
    from skcifar._protocols import _through_a_file

    model = SoftmaxRegression().fit(images.X, images.y)
    again = _through_a_file(model)
    assert again is not model
    np.testing.assert_array_equal(
        again.decision_function(images.X_test), model.decision_function(images.X_test)
    )


def test__until_train_accuracy__stops_in_the_first_epoch_above(images):
    model = SoftmaxRegression(solver="sgd", learning_rate_init=1e-2, random_state=0)
    outcome = UntilTrainAccuracy(0.93)(model, images, FULL)
    again = SoftmaxRegression(solver="sgd", learning_rate_init=1e-2, random_state=0)
    scores = [
        again.partial_fit(images.X, images.y, classes=range(10)).score(images.X, images.y)
        for _ in range(int(outcome.epochs))
    ]
    assert scores[-1] == outcome.figures["train accuracy"] > 0.93
    assert all(score <= 0.93 for score in scores[:-1]) and len(scores) > 1


def test__until_train_accuracy__gives_up_in_the_end(images):
    model = SoftmaxRegression(solver="sgd", learning_rate_init=1e-9)
    outcome = UntilTrainAccuracy(0.99, most_epochs=3)(model, images, FULL)
    assert outcome.epochs == 3 and outcome.figures["train accuracy"] < 0.99


def test__sweep__scores_the_best_on_the_test_split(images):
    grid = {"learning_rate_init": [1e-9, 1e-2], "batch_size": [32, 64]}
    model = SoftmaxRegression(solver="sgd", learning_rate="constant", max_iter=4)
    outcome = Sweep(grid, cv=0.2)(model, images, FULL)
    assert outcome.figures["test accuracy"] > 0.8
    assert outcome.note.startswith("best on validation images: learning_rate_init=0.01")
    worst, best = (
        next(x for name, x in outcome.figures.items() if f"the {which} class" in name)
        for which in ("worst", "best")
    )
    assert worst <= outcome.figures["test accuracy"] <= best


def test__sweep_of_losses__gives_means_over_folds_for_each_value(images):
    values = [1e-9, 1e-2]
    model = SoftmaxRegression(solver="sgd", learning_rate="constant", max_iter=2, random_state=0)
    sweep = Sweep({"learning_rate_init": values}, cv=2, losses_of="learning_rate_init")
    outcome = sweep(model, images, FULL)
    assert outcome.figures["train loss, 1e-09"] > outcome.figures["train loss, 0.01"] > 0
    curve = [row for row in outcome.curve if row["model"] == "learning_rate_init 0.01"]
    assert [row["epoch"] for row in curve] == [1, 2]
    assert curve[-1]["valid_loss"] == pytest.approx(outcome.figures["validation loss, 0.01"])


def test__scaled_sweep__has_no_more_epochs_than_that(images):
    sweep = Sweep({"max_iter": [1, 50, 100]}, cv=0.2)
    model = SMALL.estimator(SoftmaxRegression(solver="sgd", learning_rate="constant"))
    assert "max_iter=2" in sweep(model, SMALL.images(images), SMALL).note


def test__training_sizes__scores_each_share(images):
    outcome = TrainingSizes((0.1, 1.0))(SoftmaxRegression(), images, FULL)
    full = SoftmaxRegression().fit(images.X, images.y).score(images.X_test, images.y_test)
    assert outcome.figures["test accuracy, 100% of the images"] == pytest.approx(full, abs=0.01)
    assert outcome.figures["test accuracy, 10% of the images"] < full


def test__blur__agrees_with_scipy(images):
    outcome = Blur()(GaussianBlur(), images, FULL)
    # whole pixels are rounded
    assert outcome.figures["largest difference from SciPy (of 255)"] <= 0.5 + 1e-6


def test__hand_derived_gradients__are_torchs(images):
    figures = Gradients()(None, images, FULL).figures
    assert len(figures) == 3 and all(0 <= each < 1e-12 for each in figures.values())


def test__convolution__diverges_and_says_so_unless_gradients_are_clipped(mnist):
    X, y = (part[:200] for part in mnist)
    images = Images(X, y, X, y, list("0123456789"), (28, 28, 1))
    free, clipped = (
        list(SYSTEMS["003-convloss"].rows.values())[i].estimator["batches of 8"] for i in (0, 1)
    )
    outcome = Diverging()(clone(free).set_params(random_state=0), images, FULL)
    assert outcome.figures == {"diverged": 1.0}
    assert "clip_grad_value=1" in outcome.note
    outcome = Diverging()(clone(clipped).set_params(random_state=0), images, FULL)
    assert outcome.figures["diverged"] == 0.0
    assert outcome.figures["last loss"] < outcome.figures["first loss"] / 10


def test__error_that_is_no_divergence__is_not_taken_for_one(images):
    model = CNNClassifier(image_shape=(28, 28))
    with pytest.raises(ValueError, match="image_shape"):
        Diverging()(model, images, FULL)


def test__joined_outcomes__name_their_models(images):
    one, two = Outcome({"test accuracy": 0.5}, 1.0), Outcome({"test accuracy": 0.75}, 2.0)
    two.curve = [{"epoch": 1, "train_loss": 3.0}]
    whole = joined({"a": one, "b": two})
    assert whole.figures == {"test accuracy, a": 0.5, "test accuracy, b": 0.75}
    assert whole.seconds == 3 and whole.curve == [{"model": "b", "epoch": 1, "train_loss": 3.0}]


def test__scale__keeps_shares_of_classes_and_cuts_epochs_of_every_step(images):
    less = QUICK.images(images._replace(y=np.repeat([0, 1], [900, 300])))
    assert len(less.X) == QUICK.n_train and np.mean(less.y) == pytest.approx(0.25, abs=0.01)
    model = QUICK.estimator(CNNClassifier(max_iter=300))
    assert model.max_iter == QUICK.epochs
    assert QUICK.estimator(SoftmaxRegression()).max_iter == QUICK.epochs
    assert FULL.estimator(SoftmaxRegression()).max_iter == "auto"


@pytest.mark.parametrize(
    ("protocol", "estimator", "n_pictures"),
    [
        (Holdout(pictured=True), SoftmaxRegression(), 4),
        (Sweep({"alpha": [0.1, 1.0], "batch_size": [32, 64]}, 0.5), SoftmaxRegression(), 1),
        (Sweep({"alpha": [0.1, 1.0]}, 2, losses_of="alpha"), MLPClassifier(max_iter=2), 1),
        (TrainingSizes((0.5, 1.0)), SoftmaxRegression(), 1),
        (Projection(layer=-1), MLPClassifier((8,), max_iter=2), 1),
        (Look(), None, 3),
        (Blur(), GaussianBlur(), 1),
    ],
    ids=str,
)
def test__pictures__are_drawn(images, protocol, estimator, n_pictures):
    plt = pytest.importorskip("matplotlib.pyplot")
    pictures = protocol(estimator, SMALL.images(images), SMALL).pictures
    assert len(pictures) == n_pictures
    for draw in pictures:
        figure = draw().figure_
        assert figure.axes
        plt.close(figure)


# -- records ---------------------------------------------------------------------------------------


def test__record__says_what_was_run_and_how(on_digits):
    record = reproduce("003-linear", quick=True, seed=3)
    assert json.loads(json.dumps(record)) == record
    assert record["quick"] is True and record["id"] == "003-linear"
    assert [row["name"] for row in record["rows"]] == [REPORT, OURS]
    row = record["rows"][0]
    assert row["reported_figures"] == {"validation accuracy": 0.8556}
    assert row["scaled"] == "600 of 1,200 images, at most 2 epochs"
    assert "SoftmaxRegression(" in row["estimator"] and "Holdout(" in row["protocol"]
    provenance = record["provenance"]
    assert provenance["kind"] == "reproduction" and provenance["seed"] == 3
    assert provenance["command"].endswith("reproduce 003-linear --quick --device auto --seed 3")
    assert row["seed"] == 3 and row["device"] in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["003-linear", "003-mlp", "003-subset", "001-activations"])
def test__progress_bars__disturb_no_protocol(on_digits, name):
    # Of a Pipeline, and of what searches clone, scikit-learn refuses callbacks on parts.
    pytest.importorskip("rich")
    told = []
    reproduce(name, quick=True, callbacks=[ProgressBar()], progress=told.append)
    assert told == list(SYSTEMS[name].rows)


def test__callbacks__hear_of_epochs(on_digits):
    heard = []

    class Recording(ProgressBar):
        def setup(self, estimator, context):
            heard.append(type(estimator).__name__)

        def on_fit_task_begin(self, estimator, context):
            pass

        def on_fit_task_end(self, estimator, context, **data):
            pass

        def teardown(self, estimator, context):
            pass

    reproduce("003-linear", quick=True, callbacks=[Recording()])
    assert heard == ["SoftmaxRegression"] * 2


def test__error_in_a_row__costs_no_row_before_it(on_digits, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    rows = {REPORT: Row(None, lambda *_: Outcome({"n": 1.0}, 0.0)), OURS: Row(None, fail)}
    monkeypatch.setattr("skcifar.reproduce.SYSTEMS", {"x": System("t", "mnist", "r", "", rows)})
    kept = []
    with pytest.raises(KeyboardInterrupt):
        reproduce("x", keep=lambda record: kept.append([row["name"] for row in record["rows"]]))
    assert kept == [[], [REPORT]]


def test__seed_and_device__reach_every_step(on_digits, monkeypatch):
    seen = []
    row = Row(
        CNNClassifier((4,), max_iter=1), lambda model, *_: seen.append(model) or Outcome({}, 0.0)
    )
    systems = {"x": System("t", "mnist", "r", "", {REPORT: row})}
    monkeypatch.setattr("skcifar.reproduce.SYSTEMS", systems)
    reproduce("x", seed=5, device="cpu")
    assert seen[0].random_state == 5 and seen[0].device == "cpu"
    assert row.estimator.random_state is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "004-vgg"}, ["004-vgg", "004-tuned"]),
        ({"name": "003-mlp", "rows": ["mine"]}, ["mine", OURS]),
    ],
)
def test__unknown_names__are_errors_that_list_the_known(arguments, words):
    with pytest.raises(ValueError) as caught:
        reproduce(**arguments)
    assert all(word in str(caught.value) for word in words)


def test__picture_that_fails__costs_only_itself(on_digits, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def fail():
        raise RuntimeError("no ink")

    row = Row(None, lambda *_: Outcome({"n": 1.0}, 0.0, pictures=[fail]))
    systems = {"x": System("t", "mnist", "r", "", {REPORT: row})}
    monkeypatch.setattr("skcifar.reproduce.SYSTEMS", systems)
    with pytest.warns(UserWarning, match="no ink"):
        record = reproduce("x", folder=tmp_path)
    assert record["rows"][0]["figures"] == {"n": 1.0} and record["pictures"] == []


# -- the command -----------------------------------------------------------------------------------


def test__command__prints_both_figures_and_writes_the_record(on_digits, tmp_path, capsys):
    command = ["reproduce", "003-linear", "--quick", "--output", str(tmp_path), "--quiet"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "report 85.56%" in out and REPORT in out and OURS in out
    record = json.loads((tmp_path / "003-linear.quick.json").read_text())
    shown = re.findall(r"validation accuracy +([\d.]+)%", out)
    figures = [row["figures"]["validation accuracy"] for row in record["rows"]]
    assert shown == [f"{100 * figure:.2f}" for figure in figures]


def test__rows_run_later__join_the_record_of_those_before(on_digits, tmp_path, capsys):
    path = tmp_path / "003-linear.quick.json"
    command = ["reproduce", "003-linear", "--quick", "--output", str(tmp_path), "--quiet"]
    assert main([*command, "--rows", "as skcifar"]) == 0
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == [OURS]
    before = json.loads(path.read_text())["rows"][0]
    assert main([*command, "--rows", "as in", "--seed", "7"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [REPORT, OURS] and rows[1] == before
    assert [row["seed"] for row in rows] == [7, 0]


def test__record_of_other_images__is_refused_before_anything_runs(on_digits, tmp_path, capsys):
    path = tmp_path / "003-linear.quick.json"
    command = ["reproduce", "003-linear", "--quick", "--output", str(tmp_path), "--quiet"]
    assert main([*command, "--rows", "as skcifar"]) == 0
    record = json.loads(path.read_text())
    record["provenance"]["data"]["sha256"] = "other"
    path.write_text(json.dumps(record))
    with patch("skcifar._reproduction._run_row") as run_row:
        assert main(command) == 2
    assert "is of other images" in capsys.readouterr().err
    assert not run_row.called


def test__pictures_of_a_quick_run__leave_those_of_the_full_run(images, monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(_reproduction, "read", lambda data, data_home, classes: images)
    draw = SimpleNamespace
    row = Row(
        None, lambda *_: Outcome({"n": 1.0}, 0.0, pictures=[lambda: draw(figure_=plt.figure())])
    )
    systems = {"x": System("t", "mnist", "r", "", {REPORT: row})}
    monkeypatch.setattr("skcifar.reproduce.SYSTEMS", systems)
    full = reproduce("x", folder=tmp_path)["pictures"]
    quick = reproduce("x", quick=True, folder=tmp_path)["pictures"]
    assert len(full) == len(quick) == 1 and full != quick
    assert all((tmp_path / file).exists() for file in full + quick)


def test__system_without_data__is_not_run_and_the_others_are(on_digits, monkeypatch, capsys):
    def fail(*_):
        raise OSError("weights are missing")

    systems = {
        name: System("t", "mnist", "r", "", {REPORT: Row(None, protocol)})
        for name, protocol in {"x": fail, "y": lambda *_: Outcome({}, 0.0)}.items()
    }
    for module in ("skcifar.reproduce", "skcifar._reproduce_command"):
        monkeypatch.setattr(f"{module}.SYSTEMS", systems)
    assert main(["reproduce", "--all", "--quiet"]) == 0
    assert "x: not run: OSError: weights are missing" in capsys.readouterr().out
    assert main(["reproduce", "x", "--quiet"]) == 1


def test__record_that_cannot_be_written__is_no_missing_data(on_digits, tmp_path, capsys):
    with patch("pathlib.Path.write_text", side_effect=OSError("disk full")):
        status = main(["reproduce", "003-linear", "--quick", "--output", str(tmp_path), "--quiet"])
    assert status == 2
    assert "003-linear.quick.json: disk full" in capsys.readouterr().err


def test__diverging_system__is_told_and_fails_the_command(on_digits, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("training diverged")

    systems = {"x": System("t", "mnist", "r", "", {REPORT: Row(None, fail)})}
    for module in ("skcifar.reproduce", "skcifar._reproduce_command"):
        monkeypatch.setattr(f"{module}.SYSTEMS", systems)
    assert main(["reproduce", "x", "--quiet"]) == 1
    assert "x: not run: ValueError: training diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--all", "003-mlp"],
        ["004-vgg"],
        ["--table"],
        ["--table", "--output", "no such folder"],
        ["003-mlp", "--device", "x"],
    ],
)
def test__wrong_arguments__are_one_line_and_status_2(arguments, capsys):
    assert main(["reproduce", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test__list__names_every_system(capsys):
    assert main(["reproduce", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[::2]] == IDS


def test__damaged_record__is_named(tmp_path, capsys):
    (tmp_path / "003-mlp.json").write_text("{")
    assert main(["reproduce", "--table", "--output", str(tmp_path)]) == 2
    assert "003-mlp.json is no record" in capsys.readouterr().err


def test__markdown_table__marks_what_was_scaled_down_or_not_run(on_digits, tmp_path):
    command = ["reproduce", "003-linear", "--quick", "--output", str(tmp_path), "--quiet"]
    assert main([*command, "--rows", "as skcifar"]) == 0
    lines = {line.split(":")[0].strip("| "): line for line in markdown_table(tmp_path).split("\n")}
    assert "(scaled down)" in lines["003-linear"] and "not yet run" in lines["003-linear"]
    assert "%" not in lines["004-tuned"].split("|")[-2] and "not yet run" in lines["004-tuned"]


def test__description__holds_no_addresses():
    row = SYSTEMS["001-lasthidden"].rows[REPORT]
    assert describe(row.estimator).startswith("FunctionTransformer(func=_to_unit) | MLPClassifier(")
