import numpy as np
import pandas as pd
import pytest

from skcifar._sweep_results import (
    draw_learning_curves,
    format_table,
    partial_table,
    results_table,
    write_results,
)


class Fitted:
    """Only what is read of a search: three candidates of two parameters on two splits."""

    def __init__(self, scores, rounds=None, epochs=None):
        scores = np.asarray(scores, dtype=float)
        self.param_grid = {"b__rate": [1, 2, 3], "a__rate": [0]}
        self.n_splits_ = scores.shape[1]
        self.cv_results_ = {
            "params": [{"a__rate": 0, "b__rate": rate} for rate in (1, 2, 3, 2)[: len(scores)]],
            "mean_test_score": scores.mean(axis=1),
            "std_test_score": scores.std(axis=1),
            "indistinguishable_from_best": scores.mean(axis=1) > 0.75,
            "seed_std_test_score": np.full(len(scores), np.nan),
            "mean_fit_time": np.arange(len(scores)) + 0.125,
            "mean_score_time": np.ones(len(scores)),
        }
        self.cv_results_ |= {f"split{i}_test_score": scores[:, i] for i in range(scores.shape[1])}
        if rounds is not None:
            self.cv_results_["iter"] = np.array(rounds)
        columns = ["candidate", "fold", "repeat", "fit", "epoch", "train_loss", "valid_loss"]
        self.epoch_results_ = pd.DataFrame(epochs or [], columns=columns)


EPOCHS = [
    (0, 0, 0, 0, 1, 4.0, 5.0),
    (0, 0, 0, 0, 2, 2.0, 3.0),
    (0, 1, 0, 0, 1, 1.0, 2.0),
    (1, 0, 0, 0, 1, 99.0, 99.0),  # of an embedding, before the classifier
    (1, 0, 0, 1, 1, 0.5, np.nan),
]


def test__table__ranks_by_score_and_takes_losses_of_last_epochs():
    search = Fitted([[0.7, 0.7], [0.9, 0.8], [np.nan, 0.9]], epochs=EPOCHS)
    table = results_table(search, {2: "ValueError: no"})
    assert list(table.index) == [1, 0, 2] and list(table["rank"]) == [1, 2, 3]
    np.testing.assert_allclose(table["difference"], [0, -0.15, np.nan])
    assert list(table["like_best"]) == [True, False, False]
    np.testing.assert_allclose(table["train_loss"], [0.5, 1.5, np.nan])
    np.testing.assert_allclose(table["valid_loss"], [np.nan, 2.5, np.nan])
    np.testing.assert_allclose(table["epochs"], [1, 1.5, np.nan])
    assert table["error"].tolist()[2] == "ValueError: no" and table["error"].isna().sum() == 2


def test__later_round__takes_the_place_of_an_earlier_and_goes_before_better_scores_there():
    search = Fitted([[0.9, 0.9], [0.8, 0.8], [0.1, 0.1], [0.7, 0.7]], rounds=[0, 0, 0, 1])
    table = results_table(search, {})
    assert list(table.index) == [3, 0, 2, 1]
    assert table["rank"].tolist()[:3] == [1, 2, 3] and table["rank"].isna().tolist()[3]
    np.testing.assert_array_equal(table["difference"], [0, np.nan, np.nan, np.nan])


def test__text__is_aligned_and_names_steps_where_parameters_are_alike():
    search = Fitted([[0.7, 0.7], [0.9, 0.8], [0.8, 0.76]], epochs=EPOCHS)
    assert format_table(results_table(search, {}), top=2).splitlines() == [
        "rank  b__rate  a__rate  accuracy         difference  train loss  epochs  fit s",
        "   1  2        0        0.8500 ± 0.0500        best      0.5000       1   1.12",
        "   2  3        0        0.7800 ± 0.0200   ~ -0.0700           -       -   2.12",
        "~ within chance of the best (corrected resampled t-test, 5%)",
    ]


def test__one_split__is_never_within_chance():
    text = format_table(results_table(Fitted([[0.9], [0.9]]), {}), top=5)
    assert "~" not in text and "±" not in text and "+0.0000" in text


def test__failures__follow_the_best_with_their_errors_and_the_rest_is_counted():
    search = Fitted([[np.nan], [0.9], [np.nan], [np.nan]])
    search.cv_results_["params"][3] = {"a__rate": 1, "b__rate": 9}
    table = results_table(search, dict.fromkeys((0, 2, 3), "ValueError: " + "no " * 99))
    text = format_table(table, top=2).splitlines()
    assert [line.split()[0] for line in text] == ["rank", "1", "-", "failed:", "-", "failed:", "1"]
    assert text[3].startswith("  failed: ValueError: no no") and len(text[3]) <= 110
    assert text[-1] == "1 more failed"


def test__partial_table__is_the_mean_of_what_is_finished():
    search = Fitted([[0.0, 0.0]])
    rows = [(0, 1, 0.5), (0, 1, 0.7), (1, 2, 0.9), (2, 3, np.nan)]
    search.partial_results_ = pd.DataFrame(
        [
            {"candidate": c, "params": {"a__rate": 0, "b__rate": r}, "test_score": s, "fit_time": 2}
            for c, r, s in rows
        ]
    )
    table = partial_table(search, 3, {2: "ValueError: no"})
    assert list(table.index) == [1, 0, 2]
    np.testing.assert_allclose(table["score_mean"], [0.9, 0.6, np.nan])
    assert list(table["fits"]) == ["1 of 3", "2 of 3", "1 of 3"]
    assert "failed: ValueError: no" in format_table(table, 5)


def curves(n_candidates, valid=True):
    search = Fitted([[0.5]])
    rows = [
        (c, fold, 0, fit, epoch, 10.0 * c + fold + epoch, 2.0 if valid else np.nan)
        for c in range(n_candidates)
        for fold in (0, 1)
        for fit in (0, 1)
        for epoch in (1, 2)
    ]
    search.epoch_results_ = pd.DataFrame(rows, columns=search.epoch_results_.columns)
    index = list(range(n_candidates))[::-1]
    table = pd.DataFrame({"rank": range(1, n_candidates + 1), "step__rate": index}, index=index)
    table.attrs["parameters"] = ["step__rate"]
    return table, search.epoch_results_


@pytest.mark.parametrize(("n_candidates", "n_drawn"), [(3, 3), (10, 10), (11, 5)])
def test__learning_curves__are_means_over_folds_a_line_a_candidate(n_candidates, n_drawn):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = draw_learning_curves(*curves(n_candidates), "title")
    (loss,) = figure.axes  # there are no accuracies
    assert len(loss.lines) == 2 * n_drawn and loss.get_yscale() == "log"
    best = n_candidates - 1
    train, valid = (line.get_ydata() for line in loss.lines[:2])
    np.testing.assert_allclose(train, [10 * best + 1.5, 10 * best + 2.5])
    np.testing.assert_allclose(valid, [2, 2])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    shown = [f"rate={best - i}" for i in range(n_drawn)]
    assert names == [*shown, "training", "validation"]
    assert figure.get_suptitle().splitlines()[0] == "title"
    assert figure.get_suptitle().endswith(f"{n_drawn} of {n_candidates} candidates")
    plt.close(figure)


def test__losses_that_are_missing__have_no_lines():
    pytest.importorskip("matplotlib")
    (loss,) = draw_learning_curves(*curves(2, valid=False), "title").axes
    assert len(loss.lines) == 2


def test__candidates_of_one_name__are_told_apart_by_their_numbers():
    pytest.importorskip("matplotlib")
    table, epochs = curves(3)
    table["step__rate"] = [1, "1", 2]  # of the candidates 2, 1 and 0
    (legend,) = draw_learning_curves(table, epochs, "title").legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:3] == ["2: rate=1", "1: rate=1", "rate=2"]


def test__no_epochs__leave_no_picture(tmp_path):
    search, told = Fitted([[0.5]]), []
    write_results(results_table(search, {}), search.epoch_results_, tmp_path, "", told.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.csv", "table.csv"]
    assert told[-1] == "no learning_curves.png: no candidate recorded its epochs"
    assert len(pd.read_csv(tmp_path / "epochs.csv")) == 0


def test__failed_write__leaves_the_old_files_alone(tmp_path, monkeypatch):
    (tmp_path / "table.csv").write_text("old")

    def half(self, path, **options):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    search = Fitted([[0.5]])
    with pytest.raises(OSError, match="disk full"):
        write_results(results_table(search, {}), search.epoch_results_, tmp_path, "", print)
    assert (tmp_path / "table.csv").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
