"""The sweep, as a user meets it: plan, progress, table, files, errors and Ctrl-C."""

import io
import json
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit, cross_val_score

from skcifar import MLPClassifier, _sweep_command
from skcifar.__main__ import main
from skcifar.datasets import load_digits

RATES = "learning_rate_init=0.3,0.1,0.0001"
SHORT = ["--n-train", "300", "--set", "max_iter=3 solver=sgd hidden_layer_sizes=8 batch_size=50"]


def sweep(*arguments):
    return main(["sweep", *map(str, arguments)])


def table_of(out):
    """The table that was printed: rows of a dict a line, by titles; "failed" lines left out."""
    lines = out.split("\n\n")[1].splitlines()
    lines = [line for line in lines if not re.match(r"  failed: |~ |\d+ more failed", line)]
    titles = re.split(r"\s{2,}", lines[0])
    return [dict(zip(titles, re.split(r"\s{2,}", line.strip()), strict=True)) for line in lines[1:]]


@pytest.fixture
def searches(monkeypatch):
    """What the command searches with: each class's calls, arguments by name; none is fitted."""
    calls = []

    def record(estimator, grid, **options):
        calls.append({"estimator": estimator, "grid": grid, **options})
        raise KeyboardInterrupt

    monkeypatch.setattr(_sweep_command, "BatchedGridSearchCV", record)
    monkeypatch.setattr(_sweep_command, "BatchedHalvingSearchCV", record)
    return calls


# -- the table -------------------------------------------------------------------------------------


def test__table__has_the_best_first_with_scores_of_scikit_learn(capsys):
    assert sweep("--grid", RATES, "alpha=0,0.1", *SHORT, "--top", 4, "--quiet", "--cv", 2) == 0
    out, err = capsys.readouterr()
    assert err == ""
    title, blank, header, *rows = out.splitlines()
    assert title == "digits: 300 images of 10 classes, 2 folds, seed 0; mlp, 6 candidates"
    assert blank == "" and rows[-1].startswith("~ within chance")
    assert re.split(r"\s{2,}", header) == [
        *("rank", "learning_rate_init", "alpha", "accuracy", "difference"),
        *("train loss", "valid loss", "epochs", "fit s"),
    ]
    table = table_of(out)
    assert [row["rank"] for row in table] == ["1", "2", "3", "4"]
    accuracies = [float(row["accuracy"].split(" ± ")[0]) for row in table]
    assert accuracies == sorted(accuracies, reverse=True)
    assert table[0]["difference"] == "best" and {row["epochs"] for row in table} == {"3"}
    for row, accuracy in zip(table[1:], accuracies[1:], strict=True):
        found = float(row["difference"].removeprefix("~ "))
        assert found == pytest.approx(accuracy - accuracies[0], abs=1.1e-4)


def test__one_candidate__scores_those_of_cross_val_score(capsys):
    settings = "max_iter=3 solver=sgd hidden_layer_sizes=8"
    arguments = ["--grid", "alpha=0.1", "--set", settings, "--seed", 4, "--cv", 3, "--quiet"]
    assert sweep(*arguments) == 0
    X, y = load_digits(return_X_y=True)
    model = MLPClassifier(8, max_iter=3, solver="sgd", alpha=0.1, random_state=4)
    scores = cross_val_score(model, X, y, cv=3)
    (row,) = table_of(capsys.readouterr().out)
    assert row["accuracy"] == f"{scores.mean():.4f} ± {scores.std():.4f}"
    assert "difference" not in row


def test__share_held_out__is_one_stratified_split_and_tells_nothing_of_chance(capsys):
    assert sweep("--grid", RATES, *SHORT, "--cv", "0.2", "--quiet") == 0
    out = capsys.readouterr().out
    assert out.startswith("digits: 300 images of 10 classes, 20% held out, seed 0;")
    assert "±" not in out and "~" not in out


def test__repeats__are_told_of_and_give_a_spread_of_one_split(capsys):
    assert sweep("--grid", RATES, *SHORT, "--cv", "0.2", "--repeats", 3, "--quiet") == 0
    out = capsys.readouterr().out
    assert ", 3 seeds from 0; mlp" in out.splitlines()[0]
    assert all(" ± " in row["accuracy"] for row in table_of(out))


def test__diverged_candidate__has_a_dash_and_its_error_and_the_rest_goes_on(capsys):
    rates = "learning_rate_init=0.1,1e30,1e31"
    assert sweep("--grid", rates, *SHORT, "--top", 1, "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    best, failed = table_of(out)
    assert best["rank"] == "1" and best["learning_rate_init"] == "0.1"
    assert failed["rank"] == failed["accuracy"] == failed["epochs"] == "-"
    assert "\n  failed: ValueError: The training loss became " in out
    assert out.endswith("\n1 more failed\n")


def test__all_candidates_diverging__is_status_1_with_their_errors(capsys):
    assert sweep("--grid", "learning_rate_init=1e30,1e31", *SHORT, "--quiet") == 1
    out, err = capsys.readouterr()
    assert err == "" and out.count("  failed: ValueError: The training loss became ") == 2
    assert [row["accuracy"] for row in table_of(out)] == ["-", "-"]


def test__halving__shows_each_candidate_once_with_the_epochs_it_had(capsys, tmp_path):
    grid = ["learning_rate_init=0.3,0.1,0.03", "alpha=0,0.01,0.1"]
    settings = ["--set", "max_iter=9 solver=sgd hidden_layer_sizes=8", "--n-train", 300]
    arguments = ["--grid", *grid, *settings, "--halving", "--top", 9, "--output", tmp_path]
    assert sweep(*arguments, "--quiet") == 0
    table = table_of(capsys.readouterr().out)
    assert [row["epochs"] for row in table] == ["9"] + ["3"] * 2 + ["1"] * 6
    assert len({(row["learning_rate_init"], row["alpha"]) for row in table}) == 9
    assert "difference" not in table[0]  # the last round has no other to compare with
    written = pd.read_csv(tmp_path / "table.csv")
    assert sorted(written["round"]) == [0] * 9 + [1] * 3 + [2]
    assert sorted(written["rank"].dropna()) == [*range(1, 10)]


def test__steps_of_a_pipeline__are_set_and_have_short_titles(capsys):
    grid = ["tripletembedder__alpha=0,0.1", "n_neighbors=1,5"]
    arguments = ["--model", "triplet", "--grid", *grid, "--set", "max_iter=1", "--n-train", 100]
    assert sweep(*arguments, "--cv", 2, "--quiet") == 0
    table = table_of(capsys.readouterr().out)
    assert sorted((row["alpha"], row["n_neighbors"]) for row in table) == [
        *(("0", "1"), ("0", "5"), ("0.1", "1"), ("0.1", "5"))
    ]
    assert "valid loss" not in table[0] and table[0]["epochs"] == "1"


def test__foreign_model__has_neither_losses_nor_epochs(capsys):
    assert sweep("--model", "dummy", "--grid", "strategy=prior,uniform", "--quiet") == 0
    table = table_of(capsys.readouterr().out)
    assert list(table[0]) == ["rank", "strategy", "accuracy", "difference", "fit s"]


def test__classes__are_all_that_is_trained_on(capsys):
    arguments = ["--model", "dummy", "--grid", "strategy=prior", "--classes", "3,8", "--quiet"]
    assert sweep(*arguments) == 0
    assert capsys.readouterr().out.startswith("digits: 357 images of 2 classes, 3 folds")


def test__official_test_split__has_a_line_of_its_own(small_mnist, capsys):
    arguments = ["--data", "mnist", "--model", "dummy", "--grid", "strategy=uniform,prior"]
    assert sweep(*arguments, "--data-home", "somewhere", "--quiet") == 0
    assert small_mnist == [("somewhere", "train"), ("somewhere", "test")]
    # always class 2, of 50 in 100 and of 10 in 30
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "",
        "official test split, 30 images: accuracy 0.3333; best class two with 1.0000, worst class "
        "zero with 0.0000",
    ]


def test__best__is_fitted_to_all_training_rows(small_mnist, capsys, models):
    fitted = []

    class Watched(LogisticRegression):
        def fit(self, X, y):
            fitted.append((self.C, len(y)))
            if len(y) == 100 and self.C == 1e-9:
                raise ValueError("too many rows")
            return super().fit(X, y)

    models["watched"] = lambda device: Watched(max_iter=1000)
    arguments = ["--data", "mnist", "--model", "watched", "--quiet"]
    assert sweep(*arguments, "--grid", "C=1e-9") == 0
    assert fitted[-1] == (1e-9, 100) and len(fitted) == 4
    assert "the best failed when fitted to all training images: too many" in capsys.readouterr().out


# -- what is searched ------------------------------------------------------------------------------


def test__options__reach_the_search(searches, tmp_path):
    journal = tmp_path / "j"
    arguments = ["--grid", "alpha=0,1", "--set", "tol=0.5", "--seed", 7, "--device", "cpu"]
    assert sweep(*arguments, "--journal", journal, "--repeats", 2, "--quiet") == 130
    assert sweep("--model", "triplet", "--grid", "alpha=0", "--cv", "0.25", "--seed", 3) == 130
    assert sweep("--model", "triplet", "--grid", "alpha=0,1", "--halving") == 130
    grid, share, halving = searches
    model = grid["estimator"]
    assert (model.random_state, model.device, model.tol) == (7, "cpu", 0.5)
    assert grid["grid"] == {"alpha": [0, 1]} and grid["journal"] == journal
    assert grid["n_repeats"] == 2 and grid["validate_epochs"] and not grid["refit"]
    assert isinstance(grid["cv"], StratifiedKFold) and grid["cv"].n_splits == 3
    assert isinstance(share["cv"], StratifiedShuffleSplit)
    assert (share["cv"].test_size, share["cv"].random_state) == (0.25, 3)
    assert share["grid"] == {"tripletembedder__alpha": [0]} and not share["validate_epochs"]
    assert halving["resource"] == "tripletembedder__max_iter"


def test__set_and_grid_given_twice__add_up(searches):
    options = [
        "--grid",
        "alpha=0",
        "--grid",
        "tol=0,1",
        "--set",
        "max_iter=2",
        "--set",
        "solver=sgd",
    ]
    assert sweep(*options) == 130
    assert searches[0]["grid"] == {"alpha": [0], "tol": [0, 1]}
    model = searches[0]["estimator"]
    assert (model.max_iter, model.solver) == (2, "sgd")


# -- plan and progress -----------------------------------------------------------------------------


def test__dry_run__prints_the_plan_and_trains_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_sweep_command, "results_table", None)  # to call it would be a TypeError
    sizes = "hidden_layer_sizes=8,(8,8),9,10,11"
    arguments = ["--grid", sizes, "--set", "solver=sgd max_iter=7", "--n-train", 300, "--cv", 2]
    assert sweep(*arguments, "--dry-run", "--quiet", "--journal", tmp_path / "j") == 0
    out, err = capsys.readouterr()
    assert err == "" and not (tmp_path / "j").exists()
    total, *groups = out.splitlines()
    assert re.match(r"plan: 10 fits in \d groups, about \d+ s of training, \d+ MiB$", total)
    assert all("MLPClassifier" in line and ", 7 epochs, " in line for line in groups)


def test__plan__comes_first_and_says_what_is_not_trained_together(capsys):
    arguments = ["--model", "cnn", "--grid", "alpha=0,1", "--set", "max_iter=1", "--n-train", 100]
    assert sweep(*arguments, "--cv", 2) == 0
    reading, total, group, *_ = capsys.readouterr().err.splitlines()
    assert reading == "skcifar: reading digits"
    assert total.startswith("skcifar: plan: 4 fits in 1 group, about ")
    assert group.startswith("skcifar:   4 × CNNClassifier 32-64-") and "each by itself: " in group


def test__plan_of_many_groups__names_each_kind_once_and_some_only():
    row = {"estimator": "A", "batch_size": 8, "epochs": 9, "reason": None, "seconds": 4000.0}
    rows = [{**row, "models": n, "widths": f"{n}-10"} for n in range(1, 21) for _ in range(3)]
    rows.append({"models": 5, "estimator": "B", "reason": "it is foreign"})
    plan = pd.DataFrame(rows)
    plan.attrs = {"total_seconds": 60 * 4000.0, "total_bytes": 3 * 2**20}
    total, first, *_, last = _sweep_command._described(plan)
    assert total == (
        "plan: 635 fits in 61 groups, about 66 h 40 min of training, 3 MiB; no estimate for 5 of "
        "them"
    )
    assert first == "  3 groups of 1 × A 1-10, batches of 8, 9 epochs, 67 min"
    assert last == "  and 9 more kinds of groups"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def event(done_fits=0, total_fits=4, done_epochs=0, seconds=0.0, best=None, expected=40):
    return {
        "done_fits": done_fits,
        "total_fits": total_fits,
        "done_epochs": done_epochs,
        "expected_epochs": expected,
        "best_score": best,
        "seconds": seconds,
    }


class Search:
    """Only what a watch asks for."""

    class _study:
        values = {}

    def set_params(self, progress):
        self.progress = progress


def watched(stream, events):
    search = Search()
    with _sweep_command._Watch(search, stream).during():
        for each in events:
            search.progress(each)
    return stream.getvalue()


def test__progress_on_a_terminal__rewrites_one_line():
    epochs = [event(done_epochs=k, seconds=0.5 * k) for k in range(1, 11)]
    ends = [event(4, done_epochs=40, seconds=20.0, best=0.91234)]
    text = watched(Terminal(), [*epochs, *ends])
    assert text.count("\n") == 1 and text.endswith("\n")
    lines = text.rstrip("\n").split("\r")[1:]
    assert lines[0].rstrip() == "skcifar: 0/4 fits, 1/40 epochs, about 20 s left"
    assert lines[-1].rstrip() == "skcifar: 4/4 fits, 40/40 epochs, best so far 0.9123"
    # what is shorter blanks the rest of what it takes the place of
    shorter = watched(Terminal(), [event(best=0.5, seconds=1.0), event(seconds=2.0)])
    first, second = shorter.rstrip("\n").split("\r")[1:]
    assert len(first) == len(second) > len(second.rstrip())


def test__progress_on_a_terminal__is_not_redrawn_for_each_of_many_epochs():
    text = watched(Terminal(), [event(done_epochs=k, seconds=k / 1000) for k in range(1, 1000)])
    assert 5 < text.count("\r") < 15


def test__progress_elsewhere__is_a_line_now_and_then():
    text = watched(io.StringIO(), [event(done_epochs=k, seconds=k) for k in range(1, 36)])
    lines = text.splitlines()
    assert [line.split(", ")[1] for line in lines] == [f"{k}/40 epochs" for k in (10, 20, 30)]
    assert lines[0] == "skcifar: 0/4 fits, 10/40 epochs, about 30 s left"


def test__fits_from_the_journal__do_not_make_the_time_left_shorter():
    known = [event(1, done_epochs=10), event(2, done_epochs=20)]
    trained = [event(2, done_epochs=20 + k, seconds=10.0 * k) for k in (1, 2)]
    text = watched(io.StringIO(), [*known, *trained])
    # 18 epochs are left, each takes ten seconds
    assert text.splitlines()[-1] == "skcifar: 2/4 fits, 22/40 epochs, about 3 min left"


def test__fits_without_epochs__have_a_time_left_by_fits():
    text = watched(io.StringIO(), [event(1, expected=0, seconds=20.0, best=0.5)])
    assert text == "skcifar: 1/4 fits, best so far 0.5000, about 60 s left\n"


def test__warning_in_training__has_its_own_line_once():
    stream, search = Terminal(), Search()
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: shown.append(stream.getvalue()[-1])
        with _sweep_command._Watch(search, stream).during():
            search.progress(event(done_epochs=1))
            for _ in range(2):
                warnings.warn("slow", ConvergenceWarning, stacklevel=1)
    assert shown == ["\n"]


def test__quiet__shows_nothing_but_the_table(capsys):
    assert sweep("--grid", RATES, *SHORT, "--quiet") == 0
    assert capsys.readouterr().err == ""


# -- Ctrl-C and the journal ------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """Presses Ctrl-C after so many fits: interrupted(n_fits)."""
    hear = _sweep_command._Watch._hear

    def after(n_fits):
        def hear_and_press(self, event):
            hear(self, event)
            if n_fits is not None and event["done_fits"] >= n_fits:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(_sweep_command._Watch, "_hear", hear_and_press)

    return after


def test__ctrl_c__prints_what_is_finished_and_how_to_go_on(interrupted, tmp_path, capsys):
    journal = tmp_path / "j"
    arguments = ["--grid", RATES, "alpha=0,0.1", *SHORT, "--quiet", "--top", 9]
    assert sweep(*arguments) == 0
    whole = {
        (row["learning_rate_init"], row["alpha"]): row for row in table_of(capsys.readouterr().out)
    }
    interrupted(8)
    assert sweep(*arguments, "--journal", journal) == 130
    out, err = capsys.readouterr()
    done, stopped = err.splitlines()
    n_done = int(re.match(r"skcifar: (\d+) of 18 fits are done; the same command goes on", done)[1])
    assert str(journal) in done and stopped == "skcifar: interrupted"
    table = table_of(out)
    assert sum(int(row["fits"].split()[0]) for row in table) == n_done >= 8
    assert all(row["fits"].endswith(" of 3") for row in table)
    for row in table:
        if row["fits"] == "3 of 3":
            key = row["learning_rate_init"], row["alpha"]
            assert row["accuracy"] == whole[key]["accuracy"]
    interrupted(None)
    assert sweep(*arguments, "--journal", journal) == 0
    again = table_of(capsys.readouterr().out)
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in whole.values()]


def test__ctrl_c_of_halving_without_journal__tells_of_it(interrupted, capsys):
    interrupted(19)  # in the second round
    arguments = ["--grid", RATES, "alpha=0,0.1", "--halving", "--n-train", 300, "--quiet"]
    assert sweep(*arguments, "--set", "max_iter=9 solver=sgd hidden_layer_sizes=8") == 130
    out, err = capsys.readouterr()
    assert "with --journal FILE a sweep can go on" in err.splitlines()[0]
    rows = table_of(out)
    assert len({(row["learning_rate_init"], row["alpha"]) for row in rows}) == len(rows) == 5


def test__ctrl_c_in_a_process__is_status_130_and_the_next_run_goes_on(tmp_path):
    journal = tmp_path / "j"
    command = [sys.executable, "-m", "skcifar", "sweep", "--model", "cnn", "--n-train", "200"]
    command += [
        "--grid",
        "alpha=0,0.1,0.2,0.3",
        "--set",
        "max_iter=60",
        "channels=[4]",
        "--cv",
        "2",
    ]
    command += ["--journal", str(journal), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # once the second fit is being written to the journal, the first one is counted
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.endswith("skcifar: interrupted\n")
    assert table_of(out)[0]["fits"].endswith(" of 2")
    kept = journal.read_text().splitlines()
    assert 1 <= len(kept) - 1 < 8
    assert main(command[3:]) == 0
    assert journal.read_text().splitlines()[: len(kept)] == kept
    assert len(journal.read_text().splitlines()) == 1 + 8


def test__journal_of_another_sweep__is_one_line(tmp_path, capsys, error_line):
    journal = str(tmp_path / "j")
    common = [*SHORT, "--journal", journal, "--cv", "2"]
    assert sweep("--grid", "alpha=0", *common, "--quiet") == 0
    capsys.readouterr()
    line = error_line("sweep", "--grid", "alpha=1", *common, "--quiet")
    assert "what differs" in line and "grid" in line and journal in line
    assert json.loads((tmp_path / "j").read_text().splitlines()[0])


# -- files -----------------------------------------------------------------------------------------


def test__output__holds_table_epochs_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "results"
    grid = ["learning_rate_init=0.1,1e30", "hidden_layer_sizes=4,(4,3)"]
    options = ["--set", "max_iter=3 solver=sgd", "--n-train", 300, "--cv", 2, "--repeats", 2]
    assert sweep("--grid", *grid, *options, "--output", folder) == 0
    assert f"skcifar: wrote learning_curves.png to {folder}" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == [
        *("epochs.csv", "learning_curves.png", "provenance.json", "table.csv")
    ]
    table = pd.read_csv(folder / "table.csv")
    assert list(table)[:5] == [
        *("candidate", "rank", "learning_rate_init", "hidden_layer_sizes", "round")
    ]
    splits = table[[f"split{i}_test_score" for i in range(4)]]
    np.testing.assert_allclose(splits.mean(axis=1), table["score_mean"])
    failed = table["learning_rate_init"] == 1e30
    assert table["error"].notna().tolist() == failed.tolist() == [False, False, True, True]
    assert table["error"].str.contains("ValueError: The training loss became").sum() == 2
    assert table[["fit_seconds", "score_seconds", "epochs"]][~failed].notna().all(axis=None)
    epochs = pd.read_csv(folder / "epochs.csv")
    assert len(epochs) == 2 * 4 * 3
    assert {"candidate", "fold", "repeat", "epoch", "train_loss", "valid_loss"} <= set(epochs)
    last = epochs[epochs["epoch"] == 3].groupby("candidate")["valid_loss"].mean()
    np.testing.assert_allclose(table.set_index("candidate")["valid_loss"][last.index], last)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["kind"] == "sweep" and provenance["title"].endswith("mlp, 4 candidates")
    assert provenance["parameters"] == ["learning_rate_init", "hidden_layer_sizes"]
    assert provenance["data"]["variant"] == "as published"
    assert (provenance["data"]["n_train"], provenance["data"]["n_test"]) == (300, None)


def test__folder_of_images__is_swept_with_its_test_split_and_names(image_folder, tmp_path, capsys):
    grid = "strategy=prior,most_frequent"  # both always say the first class
    arguments = ["--data", image_folder, "--model", "dummy", "--grid", grid]
    assert sweep(*arguments, "--classes", "7,cat", "--output", tmp_path / "out", "--quiet") == 0
    title, *_, last = capsys.readouterr().out.splitlines()
    assert title.startswith("folder pets: 12 images of 2 classes, 3 folds, seed 0; dummy")
    expected = "test split, 6 images: accuracy 0.5000; best class 7 with 1.0000, worst class cat"
    assert last.startswith(expected)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["data"]["variant"] == f"folder {image_folder}"
    assert provenance["data"]["class_names"] == ["7", "cat"]


def test__output_that_cannot_be_written__is_noticed_before_any_work(searches, tmp_path, error_line):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "results"
    line = error_line("sweep", "--grid", "alpha=0", "--output", str(folder))
    assert f"cannot write to {folder}" in line and not searches


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no such character")])
def test__results_that_cannot_be_written__are_printed_and_one_line(
    tmp_path, monkeypatch, capsys, error
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(_sweep_command, "write_provenance", fail)
    arguments = ["--model", "dummy", "--grid", "strategy=prior", "--output", tmp_path, "--quiet"]
    assert sweep(*arguments) == 2
    out, err = capsys.readouterr()
    assert out.startswith("digits: ") and len(table_of(out)) == 1
    assert err == f"skcifar: error: cannot write the results: {error}\n"


# -- wrong arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: --grid"),
        (["--grid", "alpha=0", "--model", "forest"], "invalid choice: 'forest'"),
        (
            ["--grid", "alpah=1"],
            "argument --grid: mlp has no parameter 'alpah'; did you mean alpha",
        ),
        (["--grid", "alpha=-1"], "argument --grid: The 'alpha' parameter of MLPClassifier must be"),
        (["--grid", "alpha=1,1"], "argument --grid: alpha has the value 1 more than once"),
        (["--grid", "alpha="], "argument --grid: 'alpha=' lacks a value"),
        (["--grid", "alpha=0", "--set", "tol=-2"], "argument --set: The 'tol' parameter"),
        (
            ["--grid", "alpha=0", "--set", "tol=1,2"],
            "argument --set: tol has 2 values, which belong",
        ),
        (
            ["--grid", "alpha=0", "--set", "alpha=1"],
            "argument --grid: alpha is given by --set, too",
        ),
        (
            ["--grid", "alpha=0", "--cv", "1"],
            "argument --cv: 1 is neither a number of folds from 2",
        ),
        (["--grid", "alpha=0", "--cv", "2.5"], "argument --cv: 2.5 is neither"),
        (["--grid", "alpha=0", "--cv", "few"], "argument --cv: 'few' is not a number"),
        (["--grid", "alpha=0", "--cv", "200"], "a class of 174, fewer than the 200 folds"),
        (["--grid", "alpha=0", "--cv", "0.001"], "argument --cv: 0.001 of 1,797 images: "),
        (["--grid", "alpha=0", "--classes", "3"], "argument --classes: '3' does not name two"),
        (["--grid", "alpha=0", "--classes", "3,3"], "argument --classes: '3,3' does not name two"),
        (["--grid", "alpha=0", "--classes", "3,12"], "names [12], which do not exist"),
        (["--grid", "alpha=0", "--device", "gpu"], "argument --device: device='gpu'"),
        (
            ["--grid", "alpha=0", "--journal", "none/j"],
            "argument --journal: there is no folder none",
        ),
        (["--grid", "alpha=0", "--repeats", "0"], "argument --repeats: 0 is out of range"),
        (
            ["--grid", "alpha=0", "--n-train", "1798"],
            "1,798 is more than the 1,797 training images",
        ),
        (
            ["--grid", "max_iter=1,2", "--halving"],
            "argument --halving: it hands out max_iter, which",
        ),
        (
            ["--model", "dummy", "--grid", "strategy=prior", "--halving"],
            "argument --halving: dummy has no epochs (max_iter)",
        ),
    ],
)
def test__wrong_arguments__are_one_line_and_status_2(arguments, expected, error_line):
    assert expected in error_line("sweep", *arguments)


def test__help__names_every_option_and_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        sweep("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "hidden_layer_sizes=20,(256,128)" in out
    options = "data model grid set cv repeats halving journal top output dry-run quiet".split()
    assert all(f"  --{option}" in out for option in options)
