"""The report page, read back as a browser's parser reads it."""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix

from skcifar import _report_command
from skcifar._command_line import UsageError
from skcifar.report import write_report

pytest.importorskip("jinja2")
Image = pytest.importorskip("PIL.Image")

HOSTILE = "<script>alert(1)</script>"
CLASSES = ["cat", "</script>", "<img src=x onerror=alert(2)>"]
PROVENANCE = {
    "command": "python -m skcifar compare --data 'my <b>pictures</b>'",
    "title": "pictures & more: 40 images of 3 classes",
    "seed": 7,
    "data": {"name": "pictures", "variant": None, "sha256": "ab12", "class_names": CLASSES},
    "machine": {"cpu": "a fast one", "cores": 2, "gpu": None},
    "versions": {"python": "3.11", "torch": "2.13.0"},
}


def test__comparison__shows_every_figure_of_the_table(tmp_path):
    table = write_comparison(tmp_path)
    shown = page_of(tmp_path).table("Leaderboard")
    assert [row["model"] for row in shown.texts] == ["mlp", HOSTILE, "failing"]  # best first
    columns = {
        "cv_mean": "accuracy",
        "difference": "difference",
        "train_score": "train",
        "test_score": "test",
        "fit_seconds": "fit, s",
        "predict_seconds": "predict, s",
        "epochs": "epochs",
        "split0_score": "fold 0",
        "split1_score": "fold 1",
    }
    ranked = table.sort_values("cv_mean", ascending=False)
    for row, (_, expected) in zip(shown.keys, ranked.iterrows(), strict=True):
        for column, title in columns.items():
            assert float(row[title] or "nan") == pytest.approx(expected[column], nan_ok=True)
    assert shown.texts[0]["accuracy"] == "0.9000 ± 0.0200"
    assert shown.texts[0]["difference"] == "best"
    assert shown.texts[1]["difference"] == "−0.1000 [−0.1500, −0.0500]"
    assert shown.texts[1]["settings"] == "Model(kind='<b>')"


def test__missing_figure__is_a_dash_and_sorts_as_nothing(tmp_path):
    write_comparison(tmp_path)
    page = page_of(tmp_path)
    failing = page.table("Leaderboard").texts[2]
    assert {failing[name] for name in ["accuracy", "difference", "test", "epochs"]} == {"–"}
    assert page.table("Leaderboard").keys[2]["accuracy"] is None
    assert "NaN" not in page.source and ">nan<" not in page.source


def test__failure__is_told_with_its_traceback(tmp_path):
    write_comparison(tmp_path)
    text = page_of(tmp_path).text
    assert "failing: ValueError: no <luck>" in text
    assert "Traceback (most recent" in text


def test__confusion_matrices__are_scikit_learns(tmp_path):
    write_comparison(tmp_path)
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    (data,) = page_of(tmp_path).data("confusion")
    assert [option["label"] for option in data] == ["mlp", HOSTILE]
    for option in data:
        assert option["classes"] == CLASSES
        rows = predictions[predictions["model"] == option["label"]]
        expected = confusion_matrix(rows["actual"], rows["predicted"], labels=CLASSES)
        np.testing.assert_array_equal(option["counts"], expected)


def test__class_accuracies__are_shares_of_each_class(tmp_path):
    write_comparison(tmp_path)
    predictions = pd.read_csv(tmp_path / "predictions.csv").to_dict("records")
    shown = page_of(tmp_path).table("Class by class")
    assert [row["class"] for row in shown.texts] == CLASSES
    for model in ["mlp", HOSTILE]:
        for name, row in zip(CLASSES, shown.keys, strict=True):
            right = total = 0
            for each in predictions:
                if each["model"] == model and each["actual"] == name:
                    total += 1
                    right += each["predicted"] == name
            assert float(row[model]) == pytest.approx(right / total, rel=1e-5)


def test__numbers_and_none_as_classes__stay_text_in_their_order(tmp_path):
    write_comparison(tmp_path)
    rows = [("m", "left out", i, name, "10", "") for i, name in enumerate(["10", "9", "1", "10"])]
    columns = ["model", "part", "row", "actual", "predicted", "confidence"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "predictions.csv", index=False)
    (tmp_path / "provenance.json").unlink()
    assert page_of(tmp_path).data("confusion")[0][0]["classes"] == ["1", "9", "10"]
    rows[0] = ("m", "left out", 0, "NA", "nan", "")
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "predictions.csv", index=False)
    assert page_of(tmp_path).data("confusion")[0][0]["classes"] == ["1", "10", "9", "NA", "nan"]


def test__curves__are_means_over_folds_with_their_range(tmp_path):
    write_comparison(tmp_path)
    histories = pd.read_csv(tmp_path / "histories.csv").to_dict("records")
    (data,) = page_of(tmp_path).data("curves")
    assert data["labels"] == ["mlp", HOSTILE] and data["epochs"] == [1, 2, 3]
    assert [quantity["name"] for quantity in data["quantities"]] == ["loss", "accuracy"]
    seen = 0
    for quantity in data["quantities"]:
        for curve in quantity["curves"]:
            column = f"{curve['part']}_{quantity['name']}"
            for place, epoch in enumerate(data["epochs"]):
                values = [
                    row[column]
                    for row in histories
                    if row["model"] == data["labels"][curve["label"]] and row["epoch"] == epoch
                ]
                if not values or not np.isfinite(values).all():
                    assert curve["mean"][place] is None
                    continue
                assert curve["mean"][place] == pytest.approx(sum(values) / 2, rel=1e-5)
                assert curve["low"][place] == pytest.approx(min(values), rel=1e-5)
                assert curve["high"][place] == pytest.approx(max(values), rel=1e-5)
                seen += 1
    assert seen == 2 * (3 + 2) - 1  # columns and epochs; one loss has diverged


def test__diverged_curve__is_a_gap(tmp_path):
    write_comparison(tmp_path, models=["mlp"])
    epochs = [("mlp", 0, 1, "0.5"), ("mlp", 0, 2, "inf"), ("mlp", 0, 3, "")]
    frame = pd.DataFrame(epochs, columns=["model", "fold", "epoch", "train_loss"])
    frame.to_csv(tmp_path / "histories.csv", index=False)
    (data,) = page_of(tmp_path).data("curves")
    assert data["quantities"][0]["curves"][0]["mean"] == [0.5, None, None]


def test__gallery__holds_the_most_confident_mistakes_and_their_images(tmp_path):
    write_comparison(tmp_path)
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    with np.load(tmp_path / "gallery.npz") as file:
        images = dict(zip(file["rows"], file["images"], strict=True))
    page = page_of(tmp_path)
    pictures = [tag for tag in page.tags if tag[0] == "img"]
    expected = []
    for model in ["mlp", HOSTILE]:
        rows = predictions[predictions["model"] == model].sort_values(
            "confidence", ascending=False, kind="stable"
        )
        wrong = rows["actual"] != rows["predicted"]
        expected += [*rows[wrong].head(12).itertuples(), *rows[~wrong].head(4).itertuples()]
    assert len(pictures) == len(expected) == 32
    for (_, attributes), row in zip(pictures, expected, strict=True):
        assert attributes["alt"] == f"row {row.row}, a {row.actual}"
        np.testing.assert_array_equal(decoded(attributes["src"]), images[row.row])
    assert f"{expected[0].predicted} {100 * expected[0].confidence:.1f}%" in page.text


def test__large_gallery_image__is_shrunk(tmp_path):
    write_comparison(tmp_path)
    rows = np.load(tmp_path / "gallery.npz")["rows"]
    images = np.zeros((len(rows), 300, 200, 3), np.uint8)
    np.savez(tmp_path / "gallery.npz", part=np.array("test"), rows=rows, images=images)
    source = next(tag[1]["src"] for tag in page_of(tmp_path).tags if tag[0] == "img")
    assert decoded(source).shape == (96, 64, 3)


def test__table_alone__is_enough(tmp_path):
    write_comparison(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "table.csv":
            path.unlink()
    page = page_of(tmp_path)
    assert page.table("Leaderboard").texts
    assert not page.json_blocks and not [tag for tag in page.tags if tag[0] == "img"]


def test__provenance__is_told_whole(tmp_path):
    write_comparison(tmp_path)
    page = page_of(tmp_path)
    for text in [PROVENANCE["command"], PROVENANCE["title"], "ab12", "a fast one", "2.13.0"]:
        assert text in page.text
    assert "data: variant –" in page.text and "versions: torch 2.13.0" in page.text


# -- sweeps and reproductions ----------------------------------------------------------------------


def test__sweep__shows_every_figure_and_where_its_candidates_lie(tmp_path):
    table = write_sweep(tmp_path)
    page = page_of(tmp_path)
    shown = page.table("Candidates")
    assert [row["rank"] for row in shown.texts] == ["1", "2", "3", "4", "–"]
    assert [row["alpha"] for row in shown.texts] == ["0.1", "10", "0.1", "10", "10"]
    assert shown.texts[0]["score"] == "0.9000 ± 0.0100"
    differences = [row["difference"] for row in shown.texts]
    assert differences == ["best", "~ −0.1000", "−0.2000", "–", "–"]
    for row, (_, expected) in zip(shown.keys, table.iterrows(), strict=True):
        for column, title in {"score_mean": "score", "fit_seconds": "fit, s"}.items():
            assert float(row[title] or "nan") == pytest.approx(expected[column], nan_ok=True)
    (heat_map,), (lines,) = page.data("heatMap"), page.data("parallel")
    assert [axis["title"] for axis in lines["axes"]] == ["alpha", "layers"]
    assert [axis["values"] for axis in lines["axes"]] == [["0.1", "10"], ["(5,)", "<b>"]]
    assert [axis["at"] for axis in heat_map["axes"]] == [[0, 1, 0], [1, 1, 0]]
    assert lines["scores"] == [0.9, 0.8, 0.7] and lines["ranks"] == [1, 2, 3]
    assert "10, (5,): ValueError: burst" in page.text


def test__sweep_without_provenance__takes_its_parameters_from_the_table(tmp_path):
    write_sweep(tmp_path)
    before = page_of(tmp_path).data("parallel")
    (tmp_path / "provenance.json").unlink()
    assert page_of(tmp_path).data("parallel") == before


def test__sweep_curves__are_those_of_the_last_network(tmp_path):
    write_sweep(tmp_path)
    (data,) = page_of(tmp_path).data("curves")
    assert data["labels"] == ["1: 0.1, <b>", "2: 10, <b>"]
    (loss,) = data["quantities"]
    assert [curve["mean"] for curve in loss["curves"]] == [[0.4, 0.2], [0.8, 0.4]]


def test__parameter_that_a_candidate_lacks__comes_last(tmp_path):
    write_sweep(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv", dtype=str, keep_default_na=False)
    table["step__alpha"] = ["10", "9", "", "100", "9"]
    table.to_csv(tmp_path / "table.csv", index=False)
    page = page_of(tmp_path)
    assert page.data("parallel")[0]["axes"][0]["values"] == ["9", "10", "–"]
    keys = [row["alpha"] for row in page.table("Candidates").keys]
    assert [key and float(key) for key in keys] == [10, 9, None, 100, 9]
    assert page.data("curves")[0]["labels"] == ["1: 10, <b>", "2: 9, <b>"]


def test__parameter_of_many_values__is_left_out_of_the_heat_map(tmp_path):
    n = 40
    columns = {"candidate": range(n), "rank": range(1, n + 1), "a": range(n)}
    table = pd.DataFrame(columns).assign(b=[1, 2] * 20, c=[1, 1, 2, 2] * 10, round=[1, 0] * 20)
    table.assign(score_mean=0.5).to_csv(tmp_path / "table.csv", index=False)
    page = page_of(tmp_path)
    assert [axis["title"] for axis in page.data("heatMap")[0]["axes"]] == ["b", "c"]
    assert [axis["title"] for axis in page.data("parallel")[0]["axes"]] == ["a", "b", "c"]
    assert "Parameters of more than 30 values are left out: a." in page.text
    assert "of those given up early they are of a shorter training" in page.text


@pytest.mark.parametrize(
    "header", ["candidate,rank,alpha,round,score_mean", "model,cv_mean,cv_std"]
)
def test__table_without_rows__says_so(tmp_path, header):
    (tmp_path / "table.csv").write_text(header + "\n")
    assert "There is no row in the table yet." in page_of(tmp_path).text


def test__large_sweep__says_how_much_it_leaves_out(tmp_path):
    n = 1500
    score = np.linspace(0.9, 0.1, n)
    columns = {"candidate": range(n), "rank": range(1, n + 1), "a": range(n), "b": range(n)}
    table = pd.DataFrame(columns).assign(round=0, score_mean=score)
    table.to_csv(tmp_path / "table.csv", index=False)
    epochs = pd.DataFrame({"candidate": np.repeat(range(n), 2), "fold": 0, "repeat": 0, "fit": 0})
    epochs.assign(epoch=[1, 2] * n, train_loss=1.0).to_csv(tmp_path / "epochs.csv", index=False)
    page = page_of(tmp_path)
    assert len(page.table("Candidates").texts) == 1000
    assert "The best 1,000 of 1,500 candidates; 500 are left out." in page.text
    assert "The best 200 of 1,500 candidates; 1,300 are left out." in page.text
    assert "The best 12 of 1,500 curves; 1,488 are left out." in page.text
    assert len(page.data("parallel")[0]["scores"]) == 200


def test__long_curve__keeps_its_ends(tmp_path):
    write_comparison(tmp_path, models=["mlp"])
    frame = pd.DataFrame({"model": "mlp", "fold": 0, "epoch": range(1, 10_001), "train_loss": 0.5})
    frame.to_csv(tmp_path / "histories.csv", index=False)
    epochs = page_of(tmp_path).data("curves")[0]["epochs"]
    assert len(epochs) == 400 and epochs[0] == 1 and epochs[-1] == 10_000


def test__short_or_seldom_measured_curve_beside_a_long_one__keeps_its_points(tmp_path):
    write_comparison(tmp_path, models=["short", "long"])
    epochs = [("short", epoch, 1.0, "") for epoch in range(1, 5)]
    epochs += [("long", e, 2.0, "" if e % 7 else 3.0) for e in range(1, 2001)]
    frame = pd.DataFrame(epochs, columns=["model", "epoch", "train_loss", "valid_loss"])
    frame.to_csv(tmp_path / "histories.csv", index=False)
    (data,) = page_of(tmp_path).data("curves")
    curves = {(c["label"], c["part"]): c["mean"] for c in data["quantities"][0]["curves"]}
    counts = {key: sum(value is not None for value in mean) for key, mean in curves.items()}
    assert counts[0, "train"] == 4 and counts[1, "valid"] == 2000 // 7
    assert 400 <= counts[1, "train"] <= 404 + 2000 // 7
    assert data["epochs"][:4] == [1, 2, 3, 4] and data["epochs"][-1] == 2000


def test__model_without_probabilities__has_its_images_too(tmp_path):
    write_comparison(tmp_path, models=["m"])
    predictions = pd.read_csv(tmp_path / "predictions.csv").assign(confidence="")
    predictions.to_csv(tmp_path / "predictions.csv", index=False)
    page = page_of(tmp_path)
    wrong = predictions[predictions["actual"] != predictions["predicted"]]
    expected = [f"row {row}, a {name}" for row, name in wrong[["row", "actual"]].to_numpy()][:12]
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alts[: len(expected)] == expected and len(expected) == 12
    assert "nan%" not in page.source


def test__many_predictions__make_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    models = [f"model {i}" for i in range(10)]
    write_comparison(tmp_path, models=models)
    actual, predicted = rng.choice(CLASSES, (2, 100_000))
    frame = pd.DataFrame({"model": np.repeat(models, 10_000), "part": "test"})
    frame = frame.assign(row=[*range(10_000)] * 10, actual=actual, predicted=predicted)
    frame.assign(confidence=rng.random(100_000)).to_csv(tmp_path / "predictions.csv", index=False)
    (tmp_path / "gallery.npz").unlink()
    page = page_of(tmp_path)
    (data,) = page.data("confusion")
    assert [np.sum(option["counts"]) for option in data] == [10_000] * 10
    assert len(page.source) < 100_000


def test__reproduction__shows_the_reports_figure_beside_ours(tmp_path):
    write_reproduction(tmp_path)
    page = page_of(tmp_path)
    shown = page.table("Systems")
    assert [row["system"] for row in shown.texts] == ["002-cnn A <small> network"] * 3
    assert shown.titles[:6] == ["system", "row", "figure", "report", "ours", "difference"]
    first, second, third = shown.texts
    assert first["figure"] == "test accuracy" and second["figure"] == "train accuracy"
    assert (first["report"], first["ours"], first["difference"]) == ("0.6030", "0.5830", "−0.0200")
    assert (second["report"], second["difference"]) == ("–", "–")
    assert (first["report, min"], first["ours, s"]) == ("15", "61.2")
    assert (first["run"], third["run"]) == ("scaled down", "full")
    assert "CNNClassifier(); 45,000/5,000/10,000; 20 of 300 epochs" in page.text
    assert first["data"] == "cifar10, recoded as JPEG"
    assert "300 epochs 60.3%" in page.text and "a <note>" in page.text
    assert page.data("curves")[0]["labels"] == ["as in the report", "as skcifar would do it"]
    assert page.data("confusion")[0][0]["counts"] == [[3, 1], [0, 4]]
    assert page.table("Class by class").keys[0]["as in the report"] == "0.75"


def test__models_of_a_row__have_a_curve_each(tmp_path):
    names = ["learning rate 0.1", "learning rate 0.01"]
    losses = [[4.0, 2.0], [1.0, 0.5, 0.25]]
    curve = [
        {"model": name, "epoch": epoch, "train_loss": loss}
        for name, values in zip(names, losses, strict=True)
        for epoch, loss in enumerate(values, 1)
    ]
    plain = {"name": "plain", "figures": {}, "curve": [{"epoch": 1, "train_loss": 9.0}]}
    write_reproduction(tmp_path, rows=[{"name": "grid", "figures": {}, "curve": curve}, plain])
    (data,) = page_of(tmp_path).data("curves")
    assert data["labels"] == [*(f"grid: {name}" for name in names), "plain"]
    (loss,) = data["quantities"]
    means = [[value for value in each["mean"] if value is not None] for each in loss["curves"]]
    assert means == [*losses, [9.0]]


def test__scaled_down_and_full_record__are_one_system(tmp_path):
    write_reproduction(tmp_path)
    record = json.loads((tmp_path / "002-cnn.json").read_text())
    (tmp_path / "002-cnn.quick.json").write_text(json.dumps(record))
    page = page_of(tmp_path)
    assert "1 system of the reports" in page.text and len(page.table("Systems").texts) == 6


def test__figures__are_written_by_what_they_count(tmp_path):
    figures = {"test accuracy": 0.5, "loss": 6e-16, "images": 12000, "ratio": 1.23456, "gone": None}
    reported = {"images": 10000, "loss": 0.0, "not measured": 0.25, "test accuracy": 0.625}
    row = {"name": "r", "figures": figures, "reported_figures": reported, "note": "a remark"}
    write_reproduction(tmp_path, rows=[row])
    page = page_of(tmp_path)
    shown = page.table("Systems").texts
    assert [(row["figure"], row["report"], row["ours"], row["difference"]) for row in shown] == [
        ("test accuracy", "0.6250", "0.5000", "−0.1250"),
        ("loss", "0", "6e−16", "+6e−16"),
        ("images", "10,000", "12,000", "+2,000"),
        ("ratio", "–", "1.235", "–"),
        ("gone", "–", "–", "–"),
        ("not measured", "0.25", "–", "–"),
    ]
    assert "a remark" in page.text
    assert "run" not in page.table("Systems").titles  # all are full


def test__rows_of_several_runs__say_where_each_was_run(tmp_path):
    run = {"figures": {}, "seed": 0, "device": "cpu", "versions": {"torch": "2.13.0"}}
    machine = {"cpu": "a slow one", "gpu": None}
    rows = [
        {**run, "name": "a", "date": "2026-01-01", "machine": machine},
        {**run, "name": "b", "date": "2026-02-02", "machine": {**machine, "gpu": "H200"}},
    ]
    provenance = {**PROVENANCE, "date": "2026-03-03"}
    write_reproduction(tmp_path, rows=rows, provenance=provenance)
    page = page_of(tmp_path)
    for fact in [
        *["a: date 2026-01-01", "b: date 2026-02-02", "a: machine: gpu –", "b: machine: gpu H200"],
        *["seed 0", "device cpu", "machine: cpu a slow one", "versions: torch 2.13.0", "ab12"],
    ]:
        assert fact in page.text
    assert page.text.count("a slow one") == 1
    assert "a fast one" not in page.text and "2026-03-03" not in page.text


def test__confusion_matrices_of_different_classes__keep_their_names(tmp_path):
    def row(name, n, classes=()):
        return {
            "name": name,
            "figures": {},
            "confusion": np.eye(n, dtype=int).tolist(),
            "classes": dict.fromkeys(classes, 1.0),
        }

    rows = [row("known", 2), row("own", 3, ["x", "y", "z"]), row("none", 4)]
    write_reproduction(tmp_path, rows=rows)
    (data,) = page_of(tmp_path).data("confusion")
    assert [option["classes"] for option in data] == [CLASSES[:2], ["x", "y", "z"], [*"0123"]]


def test__pictures__are_embedded_from_beside_the_record_only(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "linked.png").symlink_to(tmp_path / "secret.png")
    pictures = ["002-cnn.png", "gone.png", "../secret.png", "linked.png", "x" * 5000]
    write_reproduction(folder, pictures=pictures)
    page = page_of(folder)
    sources = [tag[1]["src"] for tag in page.tags if tag[0] == "img"]
    content = base64.b64encode((folder / "002-cnn.png").read_bytes()).decode()
    assert sources == [f"data:image/png;base64,{content}"]
    assert "linked.png (a link out of the folder)" in page.text
    assert f"{'x' * 60} (" in page.text and "x" * 300 not in page.text


def test__picture__is_captioned_by_its_row(tmp_path):
    rows = [{"name": "as in the <report>", "figures": {}, "pictures": ["002-cnn.png"]}]
    write_reproduction(tmp_path, rows=rows)
    source = page_of(tmp_path).source
    assert "<figcaption>as in the &lt;report&gt;</figcaption>" in source


def test__picture_that_cannot_be_shown__is_named(tmp_path):
    write_reproduction(tmp_path, pictures=["cut.png", "vast.png", "heavy.png", "text.png"])
    (tmp_path / "cut.png").write_bytes(png()[:20])
    Image.new("1", (12_000, 12_000)).save(tmp_path / "vast.png")
    (tmp_path / "heavy.png").write_bytes(png() + bytes(10_000_000))
    (tmp_path / "text.png").write_text("no picture")
    page = page_of(tmp_path)
    assert not [tag for tag in page.tags if tag[0] == "img"]
    for told in ["cut.png (", "vast.png (more than 40,000,000 pixels)", "text.png (cannot ident"]:
        assert told in page.text
    assert "heavy.png (more than 10,000,000 bytes)" in page.text


def test__folders_below__get_a_section_each(tmp_path):
    write_comparison(tmp_path / "a")
    write_sweep(tmp_path / "b" / "deep")
    write_reproduction(tmp_path / "c")
    write_sweep(tmp_path / ".hidden")
    (tmp_path / "settings.json").write_text("{}")
    for name, content in {
        "table.csv": b"a,b\n1\n",
        "000-old.json": b"\xff",
        "x.json": b"[",
    }.items():
        (tmp_path / "a" / "theirs").mkdir(exist_ok=True)
        (tmp_path / "a" / "theirs" / name).write_bytes(content)
    page = page_of(tmp_path)
    sections = [tag[1] for tag in page.tags if tag[0] == "section" and tag[1].get("id")]
    assert [each["id"] for each in sections] == ["section-1", "section-2", "section-3"]
    assert all(text in page.text for text in ["Comparison a", "Sweep b/deep", "Reproduction c"])


def test__name_that_is_no_text__is_replaced(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_reproduction(folder, title="lone \ud800 half")
    page = page_of(folder)
    assert "caf?" in page.text and "lone ? half" in page.text


# -- safety ----------------------------------------------------------------------------------------


def test__markup_in_names__is_inert(tmp_path):
    write_comparison(tmp_path / "a")
    write_sweep(tmp_path / "b")
    write_reproduction(tmp_path / "c")
    page = page_of(tmp_path)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [each for each in scripts if each != {"type": "application/json"}] == [{}]
    assert not {"b", "note", "luck"} & {tag for tag, _ in page.tags} - {"b"}
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert HOSTILE in page.text and CLASSES[2] in page.text
    assert page.data("confusion")[0][0]["classes"] == CLASSES


def test__page__runs_its_own_script_only_and_asks_for_nothing(tmp_path):
    write_comparison(tmp_path)
    page = page_of(tmp_path)
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert "default-src 'none'; img-src data:;" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    sources = [a[k] for _, a in page.tags for k in ["src", "href", "srcset", "action"] if k in a]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import|innerHTML|fetch\(|XMLHttp", page.source)


# -- what is wrong ---------------------------------------------------------------------------------


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


DAMAGE = {
    "cut table": (lambda f: cut(f / "table.csv", -60), "table.csv: expected 16 cells in each row"),
    "empty table": (lambda f: cut(f / "table.csv", 0), "table.csv: expected a CSV file with a h"),
    "other table": (
        lambda f: (f / "table.csv").write_text("a,b\n1,2\n"),
        "the column cv_mean, which compare writes, or score_mean, which sweep writes, found the "
        "columns a, b",
    ),
    "no spread": (
        lambda f: (f / "table.csv").write_text("model,cv_mean\nm,1\n"),
        "table.csv: expected the columns cv_std, found the columns model, cv_mean",
    ),
    "no number": (
        lambda f: (f / "table.csv").write_text("model,cv_mean,cv_std\nm,1,good\n"),
        "table.csv: expected numbers in the column cv_std, found 'good'",
    ),
    "histories": (
        lambda f: (f / "histories.csv").write_text("model,fold\nm,0\n"),
        "histories.csv: expected the columns epoch, found the columns model, fold",
    ),
    "predictions": (
        lambda f: (f / "predictions.csv").write_text("model,part,row\nm,test,0\n"),
        "predictions.csv: expected the columns actual, predicted, confidence, found the columns",
    ),
    "provenance": (
        lambda f: cut(f / "provenance.json", 20),
        "provenance.json: expected a JSON file, found one that cannot be read",
    ),
    "columns": (
        lambda f: (f / "table.csv").write_text("model,cv_mean,model\nm,1,m\n"),
        "table.csv: expected columns of different names, found model, cv_mean, model",
    ),
    "list": (
        lambda f: (f / "provenance.json").write_text("[]"),
        "provenance.json: expected a JSON object, found list",
    ),
    "gallery": (
        lambda f: cut(f / "gallery.npz", 100),
        "gallery.npz: expected arrays part (text), rows (k,) and images",
    ),
    "pixels": (
        lambda f: np.savez(f / "gallery.npz", part="test", rows=[0], images=np.zeros((1, 2, 2))),
        "found part () of <U4, rows (1,) of int64, images (1, 2, 2) of float64",
    ),
    "no height": (
        lambda f: np.savez(
            f / "gallery.npz", part="test", rows=[0], images=np.zeros((1, 0, 2), np.uint8)
        ),
        "found part () of <U4, rows (1,) of int64, images (1, 0, 2) of uint8",
    ),
    "no rows": (
        lambda f: np.savez(f / "gallery.npz", part="test", images=np.zeros((1, 2, 2), np.uint8)),
        "gallery.npz: expected arrays part (text), rows (k,) and images",
    ),
    "vast images": (
        lambda f: write_header_only(f / "gallery.npz", (2**20, 1000, 1000, 3)),
        "of at most 536,870,912 bytes, found part () of <U4, rows (1048576,) of int64, images",
    ),
    "deep": (
        lambda f: (f / "provenance.json").write_text('{"a":' * 30 + "1" + "}" * 30),
        "provenance.json: expected objects nested at most 20 deep, found 30",
    ),
    "deeper": (
        lambda f: (f / "provenance.json").write_text('{"a":' + "[" * 10**5 + "]" * 10**5 + "}"),
        "provenance.json: expected a JSON file, found one that cannot be read",
    ),
    "link": (
        lambda f: link_out(f / "table.csv"),
        "table.csv: expected a file of the folder itself, found a link to",
    ),
    "linked images": (
        lambda f: link_out(f / "gallery.npz"),
        "gallery.npz: expected a file of the folder itself, found a link to",
    ),
    "linked provenance": (
        lambda f: link_out(f / "provenance.json"),
        "provenance.json: expected a file of the folder itself, found a link to",
    ),
}


def write_header_only(path, shape):
    """Images of which no pixel is there: what is too large is known before it is read."""
    np.savez(path, part="test", rows=np.arange(shape[0]))
    with zipfile.ZipFile(path, "a") as file, file.open("images.npy", "w") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)


def link_out(path):
    other = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize("damage", DAMAGE)
def test__damaged_file__error_names_file_expected_and_found(tmp_path, damage):
    folder = tmp_path / "results"
    write_comparison(folder)
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("parameters", [3, [1], [{}], "step__alpha"])
def test__parameters_that_name_no_columns__are_refused(tmp_path, parameters):
    write_sweep(tmp_path)
    (tmp_path / "provenance.json").write_text(json.dumps({"parameters": parameters}))
    message = r"provenance\.json: expected parameters to be a list of columns of table\.csv, found"
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test__long_traceback_and_byte_order_mark__are_read(tmp_path):
    write_comparison(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv")
    table["traceback"] = table["traceback"].str.replace("…", "." * 200_000)
    table.to_csv(tmp_path / "table.csv", index=False)
    text = (tmp_path / "provenance.json").read_text()
    (tmp_path / "provenance.json").write_text(text, encoding="utf-8-sig")
    limit = csv.field_size_limit()
    assert "." * 200_000 in page_of(tmp_path).text
    assert csv.field_size_limit() == limit


def test__class_named_twice__is_one_class(tmp_path):
    write_comparison(tmp_path)
    names = [*CLASSES, CLASSES[0]]
    (tmp_path / "provenance.json").write_text(json.dumps({"data": {"class_names": names}}))
    assert page_of(tmp_path).data("confusion")[0][0]["classes"] == CLASSES


def test__infinite_rank_or_epoch__is_left_out(tmp_path):
    write_sweep(tmp_path)
    for name, column in [("table.csv", "rank"), ("epochs.csv", "epoch")]:
        table = pd.read_csv(tmp_path / name, dtype=str, keep_default_na=False)
        table[column] = table[column].replace("2", "inf")
        table.to_csv(tmp_path / name, index=False)
    page = page_of(tmp_path)
    assert page.data("parallel")[0]["ranks"] == [1, 3]
    assert page.data("curves")[0]["epochs"] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": "skcifar reproduction 2"},
            "expected the schema 'skcifar reproduction 1', found",
        ),
        ({"rows": "none"}, "expected rows to be of type list, found 'none'"),
        ({"rows": [{"name": "x"}]}, "expected figures to be of type dict, found None"),
        ({"rows": [{"name": "x", "figures": {"a": "b"}}]}, "expected a to be a number, found 'b'"),
        ({"provenance": [1]}, "expected provenance to be of type dict, found [1]"),
        (
            {"rows": [{"name": "x", "figures": {}, "confusion": [[1], [2, 3]]}]},
            "expected confusion to be square, of whole numbers, found [[1], [2, 3]]",
        ),
        (
            {"rows": [{"name": "x", "figures": {}, "curve": [{"train_loss": 1}]}]},
            "expected the columns epoch, found the columns train_loss, row",
        ),
        (
            {"rows": [{"name": "x", "figures": {}}, {"name": "x", "figures": {}}]},
            "expected rows of different names, found ['x', 'x']",
        ),
        (
            {"rows": [{"name": "x", "figures": {"a": 10**400}}]},
            "expected a to be a number, found '10000",
        ),
        (
            {"rows": [{"name": "x", "figures": {}, "seconds": 10**400}]},
            "expected seconds to be a number, found '10000",
        ),
        (
            {"rows": [{"name": "x", "figures": {}, "curve": [{"epoch": 10**400}]}]},
            "expected epoch to be a number, found '10000",
        ),
        (
            {"rows": [{"name": "x", "figures": {}, "curve": [1]}]},
            "expected curve to be of objects, found 1",
        ),
        (
            {"rows": [{"name": "x", "figures": {}, "confusion": [[10**30]]}]},
            "expected confusion to be square, of whole numbers, found [[10000",
        ),
        (
            {"rows": [{"name": "x", "figures": {}, "pictures": "x.png"}]},
            "expected pictures to be of type list, found 'x.png'",
        ),
        ({"reported_minutes": "few"}, "expected reported_minutes to be a number, found 'few'"),
    ],
)
def test__wrong_record__error_names_file_expected_and_found(tmp_path, change, message):
    write_reproduction(tmp_path, **change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        write_report(tmp_path)
    assert "002-cnn.json: " in str(error.value)


def test__cut_record__is_named(tmp_path):
    write_reproduction(tmp_path)
    cut(tmp_path / "002-cnn.json", 90)
    with pytest.raises(ValueError, match=r"002-cnn\.json: expected a JSON file, found one that"):
        write_report(tmp_path)


def test__folder_without_results__error_names_what_was_looked_for(tmp_path):
    (tmp_path / "notes.json").write_text("[1]")
    with pytest.raises(FileNotFoundError, match=r"looked for table\.csv.* records of reproduce"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_report(tmp_path / "gone")


@pytest.mark.parametrize(("module", "name"), [("jinja2", "jinja2"), ("PIL", "Pillow")])
def test__missing_package__hint_says_how_to_install(tmp_path, monkeypatch, module, name):
    write_comparison(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install 'skcifar\[report\]'"):
        write_report(tmp_path)


# -- the command -----------------------------------------------------------------------------------


def test__command__writes_the_page_and_says_where(tmp_path, capsys):
    write_comparison(tmp_path / "results")
    assert command(tmp_path / "results") == 0
    page = tmp_path / "results" / "report.html"
    assert page.is_file() and capsys.readouterr().err == f"skcifar: wrote {page}\n"
    other = tmp_path / "new" / "page.html"
    assert command(tmp_path / "results", "-o", other, "--quiet") == 0
    assert other.read_text() == page.read_text() and capsys.readouterr().err == ""
    assert command(tmp_path / "results") == 0  # its own page is no hindrance


def test__command_that_fails__leaves_the_old_page(tmp_path):
    write_comparison(tmp_path)
    (tmp_path / "report.html").write_text("old")
    cut(tmp_path / "table.csv", -60)
    with pytest.raises(UsageError, match="expected 16 cells"):
        command(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test__command__turns_down_what_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="argument DIR: there is no folder"):
        command(tmp_path / "gone")
    with pytest.raises(UsageError, match="no results in"):
        command(tmp_path)
    write_comparison(tmp_path)
    with pytest.raises(UsageError, match="is a folder; name the page"):
        command(tmp_path, "-o", tmp_path)


def command(*words):
    parser = argparse.ArgumentParser()
    _report_command.add_arguments(parser)
    return _report_command.run(parser.parse_args([str(word) for word in words]))


# -- results made by hand --------------------------------------------------------------------------


def write_comparison(folder, models=("mlp", HOSTILE)):
    """Everything that compare writes, about 3 classes: two models and one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    nothing = float("nan")
    table = pd.DataFrame(
        [
            ("failing", "Bad()", *[nothing] * 9, nothing, "ValueError: no <luck>"),
            *(
                (
                    *(name, "Model(kind='<b>')", 0.9 - 0.1 * i, 0.02, -0.1 * i, -0.15 * i),
                    *(-0.05 * i, 0.99, 0.85 - 0.1 * i, 1.5 + i, 0.0123, 2.5, nothing),
                )
                for i, name in reversed([*enumerate(models)])
            ),
        ],
        columns=[
            *["model", "parameters", "cv_mean", "cv_std", "difference", "difference_low"],
            *["difference_high", "train_score", "test_score", "fit_seconds", "predict_seconds"],
            *["epochs", "error"],
        ],
    )
    table["split0_score"], table["split1_score"] = table["cv_mean"] - 0.02, table["cv_mean"] + 0.02
    table["traceback"] = table["error"].map(lambda e: "Traceback (most recent …" if e == e else e)
    table.to_csv(folder / "table.csv", index=False)
    pd.DataFrame(
        [
            (
                *(name, fold, epoch, (0.5 + 0.1 * fold) / epoch),
                np.inf if (i, fold, epoch) == (1, 1, 2) else 0.1 + 0.1 * fold + i,
            )
            for i, name in enumerate(models[:2])
            for fold in range(2)
            for epoch in range(1, 4 - i)
        ],
        columns=["model", "fold", "epoch", "train_accuracy", "valid_loss"],
    ).to_csv(folder / "histories.csv", index=False)
    rng = np.random.default_rng(0)
    predictions = pd.DataFrame(
        [
            (model, "test", row, CLASSES[row % 3], rng.choice(CLASSES), rng.uniform(0.34, 1))
            for model in models
            for row in range(40)
        ],
        columns=["model", "part", "row", "actual", "predicted", "confidence"],
    )
    predictions.to_csv(folder / "predictions.csv", index=False)
    images = rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "gallery.npz", part=np.array("test"), rows=np.arange(40), images=images)
    provenance = {**PROVENANCE, "kind": "comparison"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return table


def write_sweep(folder):
    """A sweep of two parameters: three candidates, one that failed, one given up in round 0."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(
        [
            (3, 1, 0.1, "<b>", 1, 0.9, 0.01, 0.0, True, 0.2, 2, 1.25, ""),
            (1, 2, 10, "<b>", 1, 0.8, 0.01, -0.1, True, 0.4, 2, 1.5, ""),
            (2, 3, 0.1, "(5,)", 1, 0.7, 0.01, -0.2, False, 0.6, 2, 1.75, ""),
            (4, 4, 10, "(5,)", 1, None, None, None, False, None, None, 0.5, "ValueError: burst"),
            (0, None, 10, "<b>", 0, 0.3, 0.01, None, False, 0.9, 1, 0.25, ""),
        ],
        columns=[
            *["candidate", "rank", "step__alpha", "step__layers", "round", "score_mean"],
            *["score_std", "difference", "like_best", "train_loss", "epochs", "fit_seconds"],
            "error",
        ],
    )
    table["rank"] = table["rank"].astype("Int64")
    table["step__alpha"] = [f"{value:g}" for value in table["step__alpha"]]
    table.to_csv(folder / "table.csv", index=False)
    epochs = [
        (candidate, fold, 0, fit, epoch, 100.0 if fit == 0 else loss / epoch)
        for candidate, loss in [(3, 0.4), (1, 0.8)]
        for fold in range(2)
        for fit in range(2)
        for epoch in (1, 2)
    ]
    columns = ["candidate", "fold", "repeat", "fit", "epoch", "train_loss"]
    pd.DataFrame(epochs, columns=columns).to_csv(folder / "epochs.csv", index=False)
    provenance = {**PROVENANCE, "kind": "sweep", "parameters": ["step__alpha", "step__layers"]}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return table


def write_reproduction(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    data = {"name": "cifar10", "variant": "recoded as JPEG", "class_names": CLASSES[:2]}
    rows = [
        {
            "name": "as in the report",
            "estimator": "CNNClassifier()",
            "protocol": "45,000/5,000/10,000",
            "scaled": "20 of 300 epochs",
            "figures": {"test accuracy": 0.583, "train accuracy": 0.7},
            "reported_figures": {"test accuracy": 0.603},
            "seconds": 61.2,
            "curve": [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}],
            "classes": {CLASSES[0]: 0.75, CLASSES[1]: 1.0},
            "confusion": [[3, 1], [0, 4]],
        },
        {
            "name": "as skcifar would do it",
            "scaled": None,
            "figures": {"test accuracy": 0.7},
            "seconds": 30,
            "curve": [{"epoch": 1, "train_loss": 1.5}],
            "confusion": None,
        },
    ]
    record = {
        "schema": "skcifar reproduction 1",
        "id": "002-cnn",
        "title": "A <small> network",
        "quick": True,
        "reported": "300 epochs 60.3%",
        "reported_minutes": 15,
        "rows": rows,
        "pictures": ["002-cnn.png"],
        "note": "a <note>",
        "provenance": {**PROVENANCE, "data": data},
    }
    (folder / "002-cnn.png").write_bytes(png())
    (folder / "002-cnn.json").write_text(json.dumps({**record, **changes}))


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    return file.getvalue()


def decoded(source):
    kind, content = source.split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image)


# -- the page, parsed ------------------------------------------------------------------------------


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a browser makes of the page: tags, text, tables, JSON blocks and the script."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.tags, self.json_blocks, self.tables, self.words = [], [], [], []
        self.script, self._within, self._chart, self._cell = "", None, None, None
        self.feed(source)
        self.close()
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self._within = (tag, attributes.get("type"))
        self._chart = attributes.get("data-chart", self._chart)
        if tag == "div" and "aria-label" in attributes:
            self.tables.append(Table(attributes["aria-label"].removesuffix(", table")))
        elif tag in ("td", "th"):
            self._cell = [attributes.get("data-key"), ""]
            self.tables[-1].cells[-1].append(self._cell)
        elif tag == "tr":
            self.tables[-1].cells.append([])

    def handle_endtag(self, tag):
        self._within = None
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._within == ("script", "application/json"):
            self.json_blocks.append((self._chart, json.loads(data)))
        elif self._within == ("script", None):
            self.script += data
        elif self._within != ("style", None):
            self.words.append(data)
            if self._cell is not None:
                self._cell[1] += data

    def table(self, heading):
        return next(table for table in self.tables if table.heading == heading)

    def data(self, chart):
        return [block for name, block in self.json_blocks if name == chart]


class Table:
    """Rows as dicts by column: what is read and what is sorted by."""

    def __init__(self, heading):
        self.heading, self.cells = heading, []

    @property
    def titles(self):
        return [text.strip() for _, text in self.cells[0]]

    @property
    def texts(self):
        rows = ([text.strip() for _, text in row] for row in self.cells[1:])
        return [dict(zip(self.titles, row, strict=True)) for row in rows]

    @property
    def keys(self):
        rows = ([key for key, _ in row] for row in self.cells[1:])
        return [dict(zip(self.titles, row, strict=True)) for row in rows]
