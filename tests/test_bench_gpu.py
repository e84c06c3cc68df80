"""The benchmark for a GPU works without one, and its peers do what they are said to do."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from skcifar._muon import orthogonalised

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_gpu

    return bench_gpu


@pytest.fixture
def peers(bench):
    import _gpu_peers

    return _gpu_peers


@pytest.fixture
def images(bench):
    """Dark and bright ones."""
    rng = np.random.default_rng(0)
    y = np.arange(128) % 2
    X = rng.integers(0, 150, (128, 32, 32, 3)) + 100 * y[:, None, None, None]
    return bench.Images(X.reshape(128, -1).astype(np.uint8), y, "synthetic")


@pytest.fixture
def run(bench, monkeypatch, tmp_path):
    """Runs the script with arguments; gives its exit status and its rows by their names."""

    def run(*arguments):
        command = ["bench_gpu.py", "--output", str(tmp_path), "--data-home", str(tmp_path / "no")]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        status = bench.main()
        return status, pd.read_csv(tmp_path / "gpu.csv", index_col="name")

    return run


# -- the script ------------------------------------------------------------------------------------


def test__no_gpu__every_row_says_that_it_was_not_measured(run, bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, rows = run("--n-train", "10", "--check")
    assert status == 0
    assert list(rows.index) == list(bench.ROWS)
    assert rows["figure"].isna().all()
    assert set(rows["note"]) == {"not measured on a GPU"}
    assert rows["bound"]["airbench94_seconds"] == "at least 1"
    assert {"gpu", "driver", "cuda", "cudnn"} <= set(rows)


def test__no_gpu__a_row_that_was_measured_on_one_stays(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pd.DataFrame({"name": ["vgg16_epoch"], "figure": [0.95]}).to_csv(tmp_path / "gpu.csv")
    for only in ("vgg16_epoch", "vgg16_epoch,resnet18_epoch"):
        _, rows = run("--n-train", "10", "--only", only)
        assert rows["figure"].dropna().to_dict() == {"vgg16_epoch": 0.95}
    assert rows["note"]["resnet18_epoch"] == "not measured on a GPU"


def test__group_that_fails__leaves_its_rows_without_a_figure_and_the_others_go_on(
    run, bench, monkeypatch, capsys
):
    def fail(setting):
        raise RuntimeError("CUDA error: no kernel image\nfor this device")

    def work(setting):
        return [setting.result("resnet18_epoch", 1.5)]

    groups = [(("vgg16_epoch",), fail), (("resnet18_epoch",), work)]
    monkeypatch.setattr(bench, "GROUPS", groups)
    status, rows = run("--device", "cpu", "--n-train", "10")
    assert status == 1
    assert rows["figure"].dropna().to_dict() == {"resnet18_epoch": 1.5}
    assert rows["note"]["vgg16_epoch"].endswith("failed: RuntimeError: CUDA error: no kernel image")
    assert "no kernel image" in capsys.readouterr().err


def test__trial_on_a_cpu__measures_what_is_asked_without_a_bound(run):
    asked = ["mlp_128_epoch_skorch", "mlp_128_epoch_eager", "mlp_128_epoch_graphs"]
    arguments = ["--device", "cpu", "--quick", "--n-train", "300", "--check", "--only"]
    status, rows = run(*arguments, ",".join(asked))
    assert status == 0
    assert sorted(rows.index) == sorted(asked)
    assert (rows["figure"] > 0).all()
    assert rows["bound"].isna().all()
    assert rows["note"].str.startswith("a trial on the cpu; a fit of 2 epochs").all()


def test__trial_on_a_cpu__convolutional_contestants_run(run):
    asked = ["airbench94_seconds", "airbench94_script", "resnet18_epoch", "features_resnet18"]
    arguments = ["--device", "cpu", "--quick", "--n-train", "8", "--only", ",".join(asked)]
    _, rows = run(*arguments)
    assert rows["figure"].notna().to_dict() == {name: name != "airbench94_script" for name in asked}
    assert "--script" in rows["note"]["airbench94_script"]


@pytest.mark.parametrize("trial", [["--device", "cpu"], ["--quick"]])
def test__trial__its_figures_do_not_get_among_the_results(bench, trial, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *trial])
    assert bench.main() == 2
    assert "give --output another folder" in capsys.readouterr().err


# -- peers -----------------------------------------------------------------------------------------


def test__bare_loop__learns_what_is_easy(peers, images):
    device = torch.device("cpu")
    model = peers.bare_fit(images, 0, device, epochs=4)
    assert peers.bare_accuracy(model, images, device) > 0.9


def test__bare_loop__every_image_is_some_part_of_its_padded_one(peers):
    torch.manual_seed(0)
    padded = torch.rand(40, 3, 9, 9)
    moved = peers.translated(padded, 2)
    places = set()
    for image, source in zip(moved, padded, strict=True):
        found = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, source[:, down : down + 5, right : right + 5])
        ]
        assert len(found) == 1
        places.update(found)
    assert {down for down, _ in places} == {right for _, right in places} == set(range(5))


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test__bare_loop__filters_move_as_ours(peers, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = orthogonalised(matrix[None])[0]
    torch.testing.assert_close(peers.newton_schulz(matrix), expected, atol=0.03, rtol=0)


def test__published_script__reads_our_images_and_what_it_prints_is_understood(
    peers, images, tmp_path
):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "assert os.path.exists('cifar10/train.pt') and os.path.exists('cifar10/test.pt')\n"
        "print('|  run     |  epoch  |  tta_val_acc  |  time_seconds  |')\n"
        "print('|  warmup  |      0  |               |        9.0000  |')\n"
        "for seconds in (9.5, 2.5, 2.75, 2.625):\n"
        "    print(f'|          |   eval  |       0.9400  |        {seconds:.4f}  |')\n"
        "print('Mean: 0.9401    Std: 0.0012')\n"
    )
    printed = peers.run_script(script, images, images)
    assert printed == peers.Printed(pytest.approx(94.01), 2.625, "Mean: 0.9401    Std: 0.0012")


def test__published_script_that_fails__says_so_in_the_note(peers, images, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no GPU here')")
    printed = peers.run_script(script, images, images)
    assert (printed.accuracy, printed.seconds) == (None, None)
    assert printed.end == "the script ended with status 1: no GPU here"


# -- the recipe on a CPU ---------------------------------------------------------------------------


def test__recipe_on_a_cpu__is_measured_with_and_without_averaging_when_asked(bench, images):
    import bench_airbench

    part = images.first(16)
    results = bench_airbench.accuracies(list(bench_airbench.ROWS), part, images)
    assert [(one.name, one.bound) for one in results] == [
        ("airbench94_cpu", "at least 0.905"),
        ("airbench94_cpu_plain", ""),
    ]
    assert all(0 <= one.figure <= 1 and one.ours_s > 0 for one in results)


def test__recipe_on_a_cpu__is_not_measured_unasked(bench, monkeypatch, capsys, tmp_path):
    import bench_airbench

    monkeypatch.setattr(sys, "argv", ["bench_airbench.py", "--output", str(tmp_path)])
    assert bench_airbench.main() == 0
    assert "--only airbench94_cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
