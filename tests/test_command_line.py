import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from skcifar import PretrainedFeatures, _compare_command
from skcifar.__main__ import main
from skcifar._command_line import FETCHERS, MODELS, replacing


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
