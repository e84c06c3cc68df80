"""Every Display draws what it was given, where it was told to, compared with slow loops."""

import inspect
import sys
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV
from sklearn.neural_network import MLPClassifier as SklearnMLPClassifier
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression, plotting  # noqa: E402
from skcifar.plotting import (  # noqa: E402
    ClassAccuracyDisplay,
    ClassCountsDisplay,
    EmbeddingDisplay,
    ImageGridDisplay,
    LearningCurvesDisplay,
    ParallelCoordinatesDisplay,
    SweepHeatMapDisplay,
    WeightImagesDisplay,
)

X, Y = load_digits(return_X_y=True)  # (1797, 64), values 0 to 16
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8)  # 6 images, 5 high, 4 wide
TRUE = RNG.integers(0, 3, 40)
PREDICTED = np.where(RNG.random(40) < 0.5, TRUE, (TRUE + 1) % 3)
CONFIDENCE = RNG.random(40)
HISTORY = [
    {"epoch": i, "train_loss": 1 / i, "valid_loss": 2 / i, "train_accuracy": i / 4, "seconds": i}
    for i in (1, 2, 3)
]
FOLDS = pd.DataFrame(
    {
        "fold": [0, 0, 0, 1, 1],
        "epoch": [1, 2, 3, 1, 2],
        "train_loss": [3.0, 2.0, 1.0, 5.0, 3.0],
        "seconds": [1.0, 1.0, 1.0, 2.0, 4.0],
    }
)
TABLE = pd.DataFrame(
    {
        "rank": range(1, 9),
        "step__rate": [0.1, 0.01, 0.1, 0.01, 0.1, 0.01, 0.1, 0.01],
        "step__width": [8, 8, 100, 100, 8, 8, 100, 100],
        "kind": ["a", "a", "a", "a", "b", "b", "b", "b"],
        "round": 0,
        "score_mean": [0.9, 0.7, 0.6, 0.8, 0.5, 0.75, 0.4, np.nan],
    }
)


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def fitted():
    """Estimators of ours and of scikit-learn's, fitted to the same 300 digits."""
    models = {
        "softmax": SoftmaxRegression(),
        "mlp": MLPClassifier((16, 8), max_iter=3, random_state=0),
        "cnn": CNNClassifier((6,), max_iter=2, random_state=0),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        "pca": PCA(5, random_state=0),
    }
    return {name: model.fit(X[:300], Y[:300]) for name, model in models.items()}


def heat_map(**arguments):
    return SweepHeatMapDisplay.from_results(
        TABLE, parameters=("step__rate", "step__width"), **arguments
    )


DRAWN = {
    LearningCurvesDisplay: lambda: LearningCurvesDisplay.from_histories({"a": HISTORY, "b": FOLDS}),
    WeightImagesDisplay: lambda: WeightImagesDisplay(weights=RNG.normal(size=(3, 5, 5))).plot(),
    EmbeddingDisplay: lambda: EmbeddingDisplay.from_features(X, Y, method="pca", n_samples=99),
    ImageGridDisplay: lambda: ImageGridDisplay.from_images(COLOURS, list("abcdef")),
    ClassAccuracyDisplay: lambda: ClassAccuracyDisplay.from_predictions(TRUE, PREDICTED),
    ClassCountsDisplay: lambda: ClassCountsDisplay.from_labels(Y),
    SweepHeatMapDisplay: heat_map,
    ParallelCoordinatesDisplay: lambda: ParallelCoordinatesDisplay.from_results(TABLE),
}


def texts(artists):
    return [artist.get_text() for artist in artists]


# Every Display


def test__every_display__is_in_the_contract():
    assert sorted(display.__name__ for display in DRAWN) == plotting.__all__


@pytest.mark.parametrize("display_class", DRAWN)
def test__plot__draws_again_into_given_axes_and_returns_self(display_class):
    display = DRAWN[display_class]()
    assert type(display) is display_class
    stored = deepcopy(
        {name: value for name, value in vars(display).items() if not name.endswith("_")}
    )
    n_artists = len(display.ax_.get_children())

    figure, others = plt.subplots(1, 2)
    place, n_figures = others[0].get_subplotspec(), len(plt.get_fignums())
    assert display.plot(ax=others[0]) is display
    assert len(plt.get_fignums()) == n_figures
    assert display.figure_ is figure
    assert display.ax_.get_subplotspec().get_topmost_subplotspec() == place
    assert abs(len(display.ax_.get_children()) - n_artists) <= 1  # a legend elsewhere
    assert not others[1].has_data()
    figure.draw_without_rendering()

    for name, value in stored.items():
        np.testing.assert_equal(to_arrays(getattr(display, name)), to_arrays(value))


def to_arrays(value):
    if isinstance(value, dict):
        return {name: to_arrays(each) for name, each in value.items()}
    return value.to_numpy() if isinstance(value, pd.DataFrame) else value


@pytest.mark.parametrize("display_class", DRAWN)
def test__constructor__stores_keywords_and_draws_nothing(display_class):
    parameters = inspect.signature(display_class).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    values = {p.name: object() for p in parameters}
    assert vars(display_class(**values)) == values
    assert not plt.get_fignums()


@pytest.mark.parametrize("display_class", DRAWN)
def test__drawn_display__has_a_title_and_is_as_wide_as_a_readme_at_most(display_class):
    display = DRAWN[display_class]()
    display.figure_.draw_without_rendering()
    assert display.ax_.get_title() or display_class in (ImageGridDisplay, WeightImagesDisplay)
    assert display.figure_.get_size_inches()[0] <= 8


@pytest.mark.parametrize("display_class", DRAWN)
def test__no_matplotlib__says_how_to_install_it(display_class, monkeypatch):
    display = DRAWN[display_class]()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in DRAWN[display_class], display.plot:
        with pytest.raises(ImportError, match=r"Display draws.*pip install 'skcifar\[plot\]'"):
            draw()


def test__broken_matplotlib__says_how_to_install_it(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "matplotlib.pyplot":
                raise RuntimeError("compiled against another NumPy")

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot")
    monkeypatch.delattr(matplotlib, "pyplot")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"another NumPy\): pip install 'skcifar\[plot\]'"):
        ClassCountsDisplay.from_labels(Y)


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize(
    "display_class", [SweepHeatMapDisplay, ParallelCoordinatesDisplay, WeightImagesDisplay]
)
def test__plot_twice_in_the_same_axes__leaves_one_scale(display_class, layout):
    figure, ax = plt.subplots(layout=layout)
    display = DRAWN[display_class]().plot(ax=ax)
    first = display.colorbar_
    display.plot(ax=ax)
    assert display.colorbar_ is not first
    assert figure.axes == [ax, display.colorbar_.ax]
    display.plot(ax=plt.subplots()[1])
    assert len(figure.axes) == 2  # the picture drawn before keeps its scale


def test__class_methods__leave_what_they_are_given():
    given = {"a": deepcopy(HISTORY), "b": FOLDS.copy()}
    LearningCurvesDisplay.from_histories(given, x="seconds")
    assert given["a"] == HISTORY
    pd.testing.assert_frame_equal(given["b"], FOLDS)
    table = TABLE.copy()
    SweepHeatMapDisplay.from_results(table, parameters=["kind", "step__rate"])
    ParallelCoordinatesDisplay.from_results(table)
    pd.testing.assert_frame_equal(table, TABLE)
    for rows in X[:40].copy(), COLOURS[RNG.integers(0, 6, 40)]:
        before = rows.copy(), TRUE.copy(), PREDICTED.copy(), CONFIDENCE.copy()
        ImageGridDisplay.from_predictions(rows, *before[1:])
        for now, then in zip((rows, TRUE, PREDICTED, CONFIDENCE), before, strict=True):
            np.testing.assert_array_equal(now, then)


def test__any_name__is_written_as_it_is():
    names = ["_hidden", "a $x_$ b", r"$\nonsense$"]
    drawn = [
        LearningCurvesDisplay.from_histories(dict.fromkeys(names, HISTORY)),
        EmbeddingDisplay.from_features(X[:40], TRUE, method="pca", class_names=names),
        ClassCountsDisplay.from_labels(TRUE, class_names=names),
        ImageGridDisplay.from_images(X[:3], names),
        SweepHeatMapDisplay.from_results(
            {"param_a": names, "param_b": names, "mean_test_score": np.arange(3.0)}
        ),
    ]
    drawn.append(ParallelCoordinatesDisplay.from_results(TABLE.assign(kind=np.resize(names, 8))))
    for display in drawn:
        display.figure_.draw_without_rendering()  # fails on mathematics that is none
        legend = getattr(display, "legend_", None)
        found = texts(
            legend.get_texts() if legend else display.figure_.findobj(matplotlib.text.Text)
        )
        assert set(names) <= set(found)


def test__two_labels_of_one_name__both_stand_in_the_legend():
    names = {0: "animal", 1: "animal", 2: "ship"}
    display = EmbeddingDisplay.from_features(X[:40], TRUE, method="pca", class_names=names)
    assert texts(display.legend_.get_texts()) == ["animal", "animal", "ship"]
    colours = [to_hex(scatter.get_facecolor()[0]) for scatter in display.scatters_]
    handles = [to_hex(each.get_facecolor()[0]) for each in display.legend_.legend_handles]
    assert handles == colours and len(set(colours)) == 3


@pytest.mark.parametrize("names", [["no", "yes"], {False: "no", True: "yes"}])
def test__boolean_labels__have_the_names_given(names):
    display = ClassCountsDisplay.from_labels([True, False, True], class_names=names)
    assert texts(display.ax_.get_yticklabels()) == ["no", "yes"]
    assert texts(display.texts_) == ["1", "2"]


# Learning curves


def test__learning_curves__are_the_histories():
    display = LearningCurvesDisplay.from_histories({"a": HISTORY, "b": pd.DataFrame(HISTORY[:2])})
    for name, n in ("a", 3), ("b", 2):
        for column, factor in ("train_loss", 1), ("valid_loss", 1), ("train_accuracy", 100):
            line = display.lines_[name, column]
            assert list(line.get_xdata()) == [1, 2, 3][:n]
            assert list(line.get_ydata()) == [factor * row[column] for row in HISTORY[:n]]
    assert len(display.lines_) == 6 and not display.ranges_
    colours = {key: to_hex(line.get_color()) for key, line in display.lines_.items()}
    assert len({colour for (name, _), colour in colours.items() if name == "a"}) == 1
    assert colours["a", "train_loss"] != colours["b", "train_loss"]
    styles = [display.lines_["a", f"{part}_loss"].get_linestyle() for part in ("train", "valid")]
    assert styles == ["-", "--"]
    loss, accuracy = display.axes_
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy (%)")
    assert loss.get_xlabel() == accuracy.get_xlabel() == "epoch"
    assert texts(display.legend_.get_texts()) == ["a", "b", "training", "validation"]


@pytest.mark.parametrize(
    ("x", "places"), [("epoch", [1, 2, 3]), ("seconds", [1.5, 1.5 + 2.5, 1.5 + 2.5 + 1])]
)
def test__folds__are_a_mean_and_its_range(x, places):
    display = LearningCurvesDisplay.from_histories({"a": FOLDS.sample(frac=1, random_state=0)}, x=x)
    line = display.lines_["a", "train_loss"]
    assert list(line.get_xdata()) == places
    assert list(line.get_ydata()) == [(3 + 5) / 2, (2 + 3) / 2, 1]
    corners = display.ranges_["a", "train_loss"].get_paths()[0].vertices
    for place, low, high in zip(places, [3, 2, 1], [5, 3, 1], strict=True):
        heights = {y for at, y in corners if at == place}
        assert heights == {low, high}
    assert len(display.axes_) == 1  # there are no accuracies


def test__slow_fold_that_ends_early__leaves_the_seconds_rising():
    slow = [{"fold": 0, "epoch": i, "train_loss": 1.0, "seconds": 10} for i in (1, 2, 3)]
    fast = [{"fold": 1, "epoch": i, "train_loss": 2.0, "seconds": 1} for i in (1, 2, 3, 4, 5)]
    display = LearningCurvesDisplay.from_histories({"a": slow + fast}, x="seconds")
    assert list(display.lines_["a", "train_loss"].get_xdata()) == [5.5, 11, 16.5, 17.5, 18.5]


def test__point_that_no_stroke_reaches__is_a_dot():
    losses = [4.0, np.inf, 3.0, 2.0, np.inf, 1.0]
    history = [{"epoch": i, "train_loss": loss} for i, loss in enumerate(losses, start=1)]
    display = LearningCurvesDisplay.from_histories({"a": history, "b": HISTORY[:1], "c": HISTORY})
    line = display.lines_["a", "train_loss"]
    assert (line.get_marker(), list(line.get_markevery())) == ("o", [0, 5])
    for column in "train_loss", "valid_loss", "train_accuracy":
        line = display.lines_["b", column]
        assert (line.get_marker(), list(line.get_markevery())) == ("o", [0])
        assert display.lines_["c", column].get_marker() == "None"


def test__curve_of_one_epoch__is_seen():
    figure, ax = plt.subplots()
    history = [{"epoch": 1, "train_loss": 0.5}]
    line = LearningCurvesDisplay.from_histories({"a": history}, ax=ax).lines_["a", "train_loss"]
    figure.canvas.draw()
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]
    drawn = np.asarray(figure.canvas.buffer_rgba()).copy()
    line.remove()
    figure.canvas.draw()
    assert (drawn != np.asarray(figure.canvas.buffer_rgba())).any()


def test__model_called_training__stands_in_the_legend_beside_the_part():
    display = LearningCurvesDisplay.from_histories({"training": HISTORY, "b": HISTORY})
    found = texts(display.legend_.get_texts())
    assert found == ["training", "b", "training", "validation"]
    styles = [line.get_linestyle() for line in display.legend_.legend_handles]
    assert styles == ["-", "-", "-", "--"]
    colours = [to_hex(line.get_color()) for line in display.legend_.legend_handles]
    assert colours[0] == to_hex(display.lines_["training", "train_loss"].get_color())
    assert colours[0] != colours[2]


def test__seconds_without_folds__are_summed():
    display = LearningCurvesDisplay.from_histories({"a": HISTORY}, x="seconds")
    assert list(display.lines_["a", "train_loss"].get_xdata()) == [1, 3, 6]
    assert display.ax_.get_xlabel() == "training time (s)"


def test__estimators__give_their_histories(fitted):
    theirs = SklearnMLPClassifier(4, max_iter=200, early_stopping=True, random_state=0, tol=0.05)
    theirs.fit(X[:300], Y[:300])
    search = SimpleNamespace(best_estimator_=Pipeline([("last", fitted["mlp"])]))
    display = LearningCurvesDisplay.from_estimators({"ours": search, "theirs": theirs})
    ours = [row["train_loss"] for row in fitted["mlp"].history_]
    assert list(display.lines_["ours", "train_loss"].get_ydata()) == ours
    assert list(display.lines_["theirs", "train_loss"].get_ydata()) == theirs.loss_curve_
    np.testing.assert_allclose(
        display.lines_["theirs", "valid_accuracy"].get_ydata(),
        100 * np.array(theirs.validation_scores_),
    )


def test__validation_scores_of_a_regressor__are_no_accuracies():
    regressor = MLPRegressor(max_iter=200, early_stopping=True, random_state=0, tol=1e9)
    regressor.fit(X[:99], Y[:99])
    display = LearningCurvesDisplay.from_estimators({"a": regressor})
    assert regressor.validation_scores_ and list(display.lines_) == [("a", "train_loss")]


def test__embedding_before_a_classifier__gives_its_history(fitted):
    embedded = Pipeline([("embedder", fitted["mlp"]), ("tree", DecisionTreeClassifier())])
    display = LearningCurvesDisplay.from_estimators({"a": embedded})
    losses = [row["train_loss"] for row in fitted["mlp"].history_]
    assert list(display.lines_["a", "train_loss"].get_ydata()) == losses


def test__early_stopping__draws_its_validation_rows():
    model = MLPClassifier(8, max_iter=4, early_stopping=True, random_state=0).fit(X[:300], Y[:300])
    display = LearningCurvesDisplay.from_estimators({"a": model})
    for column, factor in ("valid_loss", 1), ("valid_accuracy", 100):
        expected = [factor * row[column] for row in model.history_]
        assert list(display.lines_["a", column].get_ydata()) == expected


def test__loss_name_and_scale__are_those_of_the_losses_only():
    arguments = {"loss_name": "triplet loss", "loss_scale": "log"}
    display = LearningCurvesDisplay.from_histories({"a": HISTORY}, **arguments)
    for loss, accuracy in display.axes_, display.plot(ax=plt.subplots(1, 2)[1]).axes_:
        assert (loss.get_ylabel(), loss.get_yscale()) == ("triplet loss", "log")
        assert (accuracy.get_ylabel(), accuracy.get_yscale()) == ("accuracy (%)", "linear")


@pytest.mark.parametrize("history", [HISTORY, FOLDS], ids=["two panels", "one panel"])
@pytest.mark.parametrize("length", [1, 30, 80, 160])
def test__legend_of_many_names__lies_inside_the_figure_below_the_axes(length, history):
    setting = ", hidden_layer_sizes=64, batch_size=32, learning_rate_init=0.001, momentum=0.9"
    names = [f"{i:x}{setting}\nalpha=1{setting}"[:length] for i in range(12)]
    display = LearningCurvesDisplay.from_histories(dict.fromkeys(names, history))
    figure = display.figure_
    assert figure.get_size_inches()[0] <= 8
    figure.draw_without_rendering()
    box = display.legend_.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width and box.y0 >= 0
    for axes in display.axes_:
        height = axes.get_window_extent().height / figure.dpi
        assert height > 2 and axes.get_tightbbox().y0 >= box.y1


@pytest.mark.parametrize(
    ("histories", "arguments", "message"),
    [
        ({"a": HISTORY}, {"x": "hours"}, "x='hours' was given, expected one of epoch, seconds"),
        ({"a": [{"train_loss": 1.0}]}, {}, "history of 'a' has the columns .*expected 'epoch'"),
        ({"a": FOLDS.drop(columns="seconds")}, {"x": "seconds"}, "expected 'seconds' among them"),
        ({"a": FOLDS.drop(columns="fold")}, {}, "'a' has an epoch twice in one run; .* fold"),
        ({"a": [{"epoch": 1, "train_loss": "low"}]}, {}, "'a' has in .* 'train_loss' .* 'low'"),
        ({"a": FOLDS.assign(seconds="1 s")}, {"x": "seconds"}, "'seconds' what is no number"),
        ({"a": [{"epoch": 1, "lr": 1.0}]}, {}, r"of \['a'\] have no losses and no accuracies"),
    ],
)
def test__history_that_cannot_be_drawn__error_names_it(histories, arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningCurvesDisplay.from_histories(histories, **arguments)


def test__estimator_without_epochs__error_names_it(fitted):
    with pytest.raises(TypeError, match=r"'tree' is DecisionTree.*expected .*history_"):
        LearningCurvesDisplay.from_estimators({"tree": DecisionTreeClassifier().fit(X, Y)})


def test__one_axes_without_a_grid__error_asks_for_two():
    ax = plt.figure().add_axes((0, 0, 1, 1))
    with pytest.raises(ValueError, match="One axes was given for 2 pictures"):
        LearningCurvesDisplay.from_histories({"a": HISTORY}, ax=ax)
    with pytest.raises(ValueError, match="3 axes were given, expected 2"):
        LearningCurvesDisplay.from_histories({"a": HISTORY}, ax=plt.subplots(1, 3)[1])


# Weights


@pytest.mark.parametrize("name", ["softmax", "logistic"])
def test__linear_weights__are_an_image_a_class_on_one_scale(fitted, name):
    coef = fitted[name][-1].coef_ if name == "logistic" else fitted[name].coef_
    display = WeightImagesDisplay.from_estimator(fitted[name])
    assert texts(display.texts_) == [str(label) for label in range(10)]
    assert display.ax_.get_title() == "Weights per class"
    largest = max(abs(value) for row in coef for value in row)
    for row, image in zip(coef, display.images_, strict=True):
        for i, value in enumerate(row):
            assert image.get_array()[i // 8, i % 8] == value
        assert image.get_clim() == (-largest, largest)
    assert display.colorbar_.ax.get_ylabel() == "weight"


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test__colour_weights__lie_around_mid_grey(layout):
    coef = RNG.normal(size=(3, 5 * 4 * 3))
    model = SimpleNamespace(coef_=coef, image_shape_=(5, 4, 3), layout=layout)
    display = WeightImagesDisplay.from_estimator(model, n_images=2)
    assert display.colorbar_ is None and not display.texts_
    assert display.ax_.get_title() == "Weights, 2 of 3"
    largest = np.abs(coef[:2]).max()
    for row, image in zip(coef, display.images_, strict=False):
        assert image.get_array().shape == (5, 4, 3)
        for i, j, channel in np.ndindex(5, 4, 3):
            at = (i * 4 + j) * 3 + channel if layout == "HWC" else (channel * 5 + i) * 4 + j
            expected = 0.5 + row[at] / largest / 2
            assert image.get_array()[i, j, channel] == pytest.approx(expected, abs=1e-12)


def test__two_classes__have_one_image_that_names_both():
    two = Y < 2
    for model in SoftmaxRegression(), RidgeClassifier():
        model.fit(X[two], Y[two])
        display = WeightImagesDisplay.from_estimator(model, class_names=["zero", "one"])
        assert display.weights.shape == (1, 8, 8)
        assert texts(display.texts_) == ["positive: one\nnegative: zero"]


@pytest.mark.parametrize("n_classes", [3, 10])
def test__weights_of_pairs_of_classes__are_not_called_those_of_classes(n_classes):
    rows = Y[:300] < n_classes
    model = SVC(kernel="linear").fit(X[:300][rows], Y[:300][rows])
    display = WeightImagesDisplay.from_estimator(model)
    title = {3: "Weights", 10: "Weights, 20 of 45"}[n_classes]
    assert display.ax_.get_title() == title and not display.texts_


def test__sparse_weights__are_drawn_as_dense_ones(fitted):
    dense = WeightImagesDisplay.from_estimator(fitted["logistic"])
    sparse = deepcopy(fitted["logistic"])
    sparse[-1].sparsify()
    display = WeightImagesDisplay.from_estimator(sparse)
    np.testing.assert_array_equal(display.weights, dense.weights)


def test__weights_behind_other_features__are_images_only_of_a_shape_given():
    model = make_pipeline(PCA(16, random_state=0), SoftmaxRegression()).fit(X[:300], Y[:300])
    with pytest.raises(ValueError, match=r"make 16 features of 64, .* say image_shape="):
        WeightImagesDisplay.from_estimator(model)
    display = WeightImagesDisplay.from_estimator(model, image_shape=(2, 8))
    np.testing.assert_array_equal(display.weights, model[-1].coef_.reshape(-1, 2, 8))


def test__first_layer__is_an_image_a_unit(fitted):
    display = WeightImagesDisplay.from_estimator(fitted["mlp"], n_images=9)
    assert display.ax_.get_title() == "Weights of the first layer, 9 of 16"
    for unit, image in enumerate(display.weights):
        column = fitted["mlp"].coefs_[0][:, unit]
        np.testing.assert_array_equal(image, column.reshape(8, 8))


def test__first_convolution__is_an_image_a_filter(fitted):
    display = WeightImagesDisplay.from_estimator(fitted["cnn"])
    filters = fitted["cnn"].module_.features[0].weight.detach().numpy()
    np.testing.assert_array_equal(display.weights, filters[:, 0])
    colours = CNNClassifier((4,), max_iter=1, image_shape=(8, 8, 3), random_state=0)
    colours.fit(np.tile(X[:40], 3), Y[:40])
    weights = WeightImagesDisplay.from_estimator(colours).weights
    assert weights.shape == (4, 3, 3, 3)
    filters = colours.module_.features[0].weight.detach().numpy()  # (n, channels, 3, 3)
    for n, i, j, channel in np.ndindex(weights.shape):
        assert weights[n, i, j, channel] == filters[n, channel, i, j]


def test__no_weights__error_says_what_is_looked_for(fitted):
    with pytest.raises(TypeError, match=r"PCA.* has no weights to draw: .*coef_, coefs_ or a conv"):
        WeightImagesDisplay.from_estimator(fitted["pca"])
    with pytest.raises(ValueError, match=r"Rows of 7 features .* say image_shape"):
        WeightImagesDisplay.from_estimator(SimpleNamespace(coef_=np.ones((1, 7))))


# Embeddings


def test__pca_points__are_those_of_scikit_learn():
    display = EmbeddingDisplay.from_features(X, Y, method="pca", n_samples=None)
    pca = PCA(2).fit(X)
    np.testing.assert_allclose(display.points, pca.transform(X), atol=1e-8)
    assert display.ax_.get_title() == "PCA of the features, all 1,797 rows"
    assert display.ax_.get_ylabel() == "component 2 (14% of the variance)"
    assert f"{pca.explained_variance_ratio_[1]:.0%}" == "14%"
    for label, scatter in enumerate(display.scatters_):
        np.testing.assert_array_equal(scatter.get_offsets(), display.points[Y == label])


def test__subsample__is_stated_stratified_and_repeatable():
    y = np.repeat(["rare", "often"], [20, 180])
    draw = {"method": "pca", "n_samples": 50, "random_state": 3}
    display = EmbeddingDisplay.from_features(X[:200], y, **draw)
    assert display.ax_.get_title() == "PCA of the features, 50 of 200 rows"
    assert list(display.labels).count("rare") == 5 and len(display.labels) == 50
    again = EmbeddingDisplay.from_features(X[:200], y, **draw)
    np.testing.assert_array_equal(again.points, display.points)


def test__ten_classes__differ_in_colour_and_in_marker():
    display = EmbeddingDisplay.from_features(X[:300], Y[:300], method="pca")
    colours = {to_hex(scatter.get_facecolor()[0]) for scatter in display.scatters_}
    markers = {scatter.get_paths()[0].vertices.tobytes() for scatter in display.scatters_}
    assert len(colours) == len(markers) == 10
    many = EmbeddingDisplay.from_features(X[:300], np.arange(300) % 25, method="pca")
    assert len({to_hex(scatter.get_facecolor()[0]) for scatter in many.scatters_}) == 25


def test__tsne__brings_classes_together():
    rows = Y[:300] < 3
    display = EmbeddingDisplay.from_features(
        X[:300][rows], Y[:300][rows], random_state=0, class_names=["zero", "one", "two"]
    )
    assert texts(display.legend_.get_texts()) == ["zero", "one", "two"]
    assert display.ax_.get_xlabel() == "t-SNE 1 (no unit)"
    right = 0
    for i, point in enumerate(display.points):
        distances = [np.hypot(*(point - other)) for other in display.points]
        distances[i] = np.inf
        right += display.labels[np.argmin(distances)] == display.labels[i]
    assert right / len(display.points) > 0.9


def test__estimator_embedding__is_its_transform_of_the_subsample_only(fitted):
    seen = []

    class Watched:
        def transform(self, rows):
            seen.append(len(rows))
            return fitted["pca"].transform(rows)

    arguments = {"method": "pca", "n_samples": 60, "random_state": 0}
    display = EmbeddingDisplay.from_estimator(Watched(), X, Y, **arguments)
    assert seen == [60]
    assert display.ax_.get_title() == "PCA of the embedding, 60 of 1,797 rows"
    features = fitted["pca"].transform(X)
    expected = EmbeddingDisplay.from_features(features, Y, **arguments)
    np.testing.assert_allclose(np.abs(display.points), np.abs(expected.points), atol=1e-6)


def test__hidden_layer__is_asked_for_behind_the_steps_before():
    class Network:
        def hidden_layer_output(self, rows, layer):
            return rows[:, 10 * layer : 10 * layer + 10]

    scaler = MinMaxScaler().fit(X)
    pipeline = make_pipeline(scaler, PCA(2))
    pipeline.steps[-1] = ("network", Network())
    search = SimpleNamespace(best_estimator_=pipeline)
    arguments = {"method": "pca", "n_samples": None}
    expected = EmbeddingDisplay.from_features(scaler.transform(X)[:, 20:30], Y, **arguments)
    for estimator in pipeline, search:
        display = EmbeddingDisplay.from_estimator(estimator, X, Y, layer=2, **arguments)
        np.testing.assert_allclose(display.points, expected.points, atol=1e-9)
    assert display.ax_.get_title() == "PCA of hidden layer 2, all 1,797 rows"


def test__embedding_errors__say_what_is_missing(fitted, monkeypatch):
    with pytest.raises(TypeError, match=r"layer=None.* no transform: .*layer=-1"):
        EmbeddingDisplay.from_estimator(fitted["logistic"], X, Y)
    with pytest.raises(TypeError, match=r"layer=0, which has no hidden_layer_output"):
        EmbeddingDisplay.from_estimator(fitted["pca"], X, Y, layer=0)
    with pytest.raises(ValueError, match="method='lda' was given, expected one of tsne, pca, umap"):
        EmbeddingDisplay.from_features(X, Y, method="lda")
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        EmbeddingDisplay.from_features(X, Y[1:], method="pca")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"method='umap' .*pip install umap-learn"):
        EmbeddingDisplay.from_features(X, Y, method="umap")


def test__umap__is_asked_where_it_is_installed(monkeypatch):
    class UMAP:
        def __init__(self, random_state):
            self.random_state = random_state

        def fit_transform(self, features):
            return features[:, :2] + self.random_state

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    display = EmbeddingDisplay.from_features(X[:50], Y[:50], method="umap", random_state=7)
    np.testing.assert_array_equal(display.points, X[:50, :2] + 7)


# Images


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("flat", [True, False])
def test__colour_images__keep_every_pixel(layout, flat):
    given = COLOURS if layout == "HWC" else COLOURS.transpose(0, 3, 1, 2)
    given = given.reshape(6, -1) if flat else given
    shape = {"image_shape": (5, 4, 3)} if flat else {}
    display = ImageGridDisplay.from_images(given, layout=layout, n_columns=4, **shape)
    for image, expected in zip(display.images_, COLOURS, strict=True):
        np.testing.assert_allclose(image.get_array(), expected / 255)
    corners = [tuple(image.get_extent()) for image in display.images_]
    assert len({(left, right) for left, right, _, _ in corners}) == 4
    assert len({(bottom, top) for _, _, bottom, top in corners}) == 2


def test__grey_images__share_their_limits():
    for images in X[:5], X[:5].reshape(5, 8, 8), X[:5].reshape(5, 8, 8, 1), X[:5].tolist():
        display = ImageGridDisplay.from_images(images, Y[:5])
        for row, image in zip(X[:5], display.images_, strict=True):
            np.testing.assert_array_equal(image.get_array(), row.reshape(8, 8))
            assert image.get_clim() == (0, 16)
    assert texts(display.texts_) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("kind", ["wrong", "right"])
def test__predictions__are_the_most_confident_of_a_loop(kind):
    images = RNG.integers(0, 9, (40, 6, 6))
    found = [i for i in range(40) if (TRUE[i] == PREDICTED[i]) == (kind == "right")]
    best = sorted(found, key=lambda i: -CONFIDENCE[i])[:7]
    display = ImageGridDisplay.from_predictions(
        images, TRUE, PREDICTED, CONFIDENCE, kind=kind, n_images=7, class_names=["a", "b", "c"]
    )
    assert display.ax_.get_title() == f"The 7 most confident of {len(found)} {kind} predictions"
    for row, image, text in zip(best, display.images_, texts(display.texts_), strict=True):
        np.testing.assert_array_equal(image.get_array(), images[row])
        expected = f"{'abc'[PREDICTED[row]]}, {100 * CONFIDENCE[row]:.1f}%"
        if kind == "wrong":
            expected += f"\nactually {'abc'[TRUE[row]]}"
        assert text == expected


def test__no_confidence__takes_the_first_rows():
    images = RNG.integers(0, 9, (40, 6, 6))
    display = ImageGridDisplay.from_predictions(images, TRUE, PREDICTED, n_images=3)
    rows = [i for i in range(40) if TRUE[i] != PREDICTED[i]][:3]
    np.testing.assert_array_equal(display.images, images[rows])
    assert texts(display.texts_) == [f"{PREDICTED[i]}\nactually {TRUE[i]}" for i in rows]


def test__estimator_predictions__have_its_own_probabilities(fitted):
    rows, labels = X[300:600], Y[300:600]
    for name in "softmax", "logistic":
        display = ImageGridDisplay.from_estimator(fitted[name], rows, labels, n_images=4)
        predicted = fitted[name].predict(rows)
        confidence = fitted[name].predict_proba(rows).max(axis=1)
        expected = ImageGridDisplay.from_predictions(
            rows, labels, predicted, confidence, n_images=4
        )
        assert texts(display.texts_) == texts(expected.texts_)
        np.testing.assert_array_equal(display.images, expected.images)
        assert "%" in display.texts_[0].get_text()
    ridge = RidgeClassifier().fit(X[:300], Y[:300])
    display = ImageGridDisplay.from_estimator(ridge, rows, labels, kind="right", n_images=2)
    assert texts(display.texts_) == [str(label) for label in labels[:2]]


def test__label_that_is_not_the_most_probable__has_its_own_probability():
    two = Y < 2
    model = FixedThresholdClassifier(
        LogisticRegression(C=1e-6), threshold=0.9, response_method="predict_proba"
    ).fit(X[two], Y[two])
    rows, labels = X[two][:30], Y[two][:30]
    display = ImageGridDisplay.from_estimator(model, rows, labels, n_images=30)
    probabilities = model.predict_proba(rows)  # (30, 2)
    predicted = model.predict(rows)
    own = [probabilities[i, predicted[i]] for i in range(30) if predicted[i] != labels[i]]
    assert min(own) < 0.5
    expected = [f", {100 * value:.1f}%" for value in sorted(own, reverse=True)]
    assert [text.split("\n")[0][1:] for text in texts(display.texts_)] == expected


def test__labels_in_a_column__are_those_of_a_row():
    rows, column = X[:40], PREDICTED[:, None]
    for first, second in (TRUE, column), (TRUE[:, None], PREDICTED), (TRUE[:, None], column):
        display = ClassAccuracyDisplay.from_predictions(first, second)
        expected = ClassAccuracyDisplay.from_predictions(TRUE, PREDICTED)
        assert texts(display.texts_) == texts(expected.texts_)
        assert display.overall == expected.overall
        display = ImageGridDisplay.from_predictions(rows, first, second)
        expected = ImageGridDisplay.from_predictions(rows, TRUE, PREDICTED)
        assert texts(display.texts_) == texts(expected.texts_)
    for draw in (
        ClassAccuracyDisplay.from_predictions,
        partial(ImageGridDisplay.from_predictions, rows),
    ):
        with pytest.raises(ValueError, match="should be a 1d array"):
            draw(TRUE, np.column_stack([PREDICTED, PREDICTED]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "best"}, "kind='best' was given, expected 'wrong' or 'right'"),
        ({"confidence": CONFIDENCE * 100}, r"from .* was given, expected a probability"),
        ({"confidence": CONFIDENCE[1:]}, "inconsistent numbers of samples"),
        ({"y_pred": TRUE}, "None of the 40 predictions is wrong"),
        ({"images": X[:40, :60]}, "Rows of 60 features .* no square images"),
        ({"image_shape": (8, 9)}, r"image_shape=\(8, 9\) has 72 values, but the rows have 64"),
        ({"images": np.zeros((40, 8, 8, 2))}, r"shape \(40, 8, 8, 2\) .* 1 or 3 channels"),
        ({"layout": "NCHW"}, "layout='NCHW' was given, expected 'HWC' or 'CHW'"),
        ({"class_names": ["a", "b"]}, r"class_names has 2 names for the labels .*0, 1, 2"),
        ({"class_names": {0: "a", 1: "b"}}, r"class_names has no name for \[.*2"),
    ],
)
def test__predictions_that_cannot_be_drawn__error_says_why(arguments, message):
    whole = {"images": X[:40], "y_true": TRUE, "y_pred": PREDICTED, "confidence": CONFIDENCE}
    with pytest.raises(ValueError, match=message):
        ImageGridDisplay.from_predictions(**{**whole, **arguments})


def test__captions__are_one_an_image():
    with pytest.raises(ValueError, match="2 captions were given for 6 images"):
        ImageGridDisplay.from_images(COLOURS, ["a", "b"])
    with pytest.raises(ValueError, match="No image was given"):
        ImageGridDisplay.from_images(COLOURS[:0])


# Classes


@pytest.mark.parametrize("sort", [False, True])
def test__class_accuracies__equal_a_loop(sort):
    names = {0: "cat", 1: "dog", 2: "<b>"}
    display = ClassAccuracyDisplay.from_predictions(TRUE, PREDICTED, class_names=names, sort=sort)
    percent = {}
    for label in names:
        right = [p == t for t, p in zip(TRUE, PREDICTED, strict=True) if t == label]
        percent[label] = 100 * sum(right) / len(right)
    order = sorted(names, key=lambda label: -percent[label]) if sort else [0, 1, 2]
    widths = [bar.get_width() for bar in display.bars_]
    assert widths == pytest.approx([percent[label] for label in order])
    assert texts(display.texts_) == [f"{percent[label]:.1f}" for label in order]
    assert texts(display.ax_.get_yticklabels()) == [names[label] for label in order]
    overall = 100 * sum(TRUE == PREDICTED) / 40
    assert list(display.line_.get_xdata()) == pytest.approx([overall, overall])
    assert f"all 40 rows, {overall:.1f}%" in display.ax_.get_title()
    assert display.ax_.get_xlabel() == "accuracy (%)"


def test__class_accuracies_of_an_estimator__are_those_of_its_predictions(fitted):
    display = ClassAccuracyDisplay.from_estimator(fitted["softmax"], X, Y, sort=True)
    predicted = fitted["softmax"].predict(X)
    expected = ClassAccuracyDisplay.from_predictions(Y, predicted, sort=True)
    assert texts(display.texts_) == texts(expected.texts_)
    assert display.overall == fitted["softmax"].score(X, Y)


def test__class_counts__equal_a_loop():
    display = ClassCountsDisplay.from_labels(["b"] * 1200 + ["a"] * 7)
    assert texts(display.ax_.get_yticklabels()) == ["a", "b"]
    assert texts(display.texts_) == ["7", "1,200"]
    assert [bar.get_width() for bar in display.bars_] == [7, 1200]


# Sweeps


@pytest.mark.parametrize("others", ["best", "mean"])
def test__heat_map__equals_a_loop_over_the_other_parameters(others):
    display = heat_map(others=others)
    for i, rate in enumerate([0.01, 0.1]):
        for j, width in enumerate([8, 100]):
            found = [
                row.score_mean
                for row in TABLE.itertuples()
                if row.step__rate == rate
                and row.step__width == width
                and not np.isnan(row.score_mean)
            ]
            expected = max(found) if others == "best" else sum(found) / len(found)
            assert display.images_[0].get_array()[i, j] == pytest.approx(expected)
            assert display.texts_[i, j].get_text() == f"{expected:.3f}"
    assert texts(display.ax_.get_yticklabels()) == ["0.01", "0.1"]
    assert texts(display.ax_.get_xticklabels()) == ["8", "100"]  # as numbers, not as text
    assert (display.ax_.get_ylabel(), display.ax_.get_xlabel()) == ("rate", "width")
    assert display.ax_.get_title() == f"mean score, {others} over kind"


def test__pair_without_a_candidate__is_left_empty():
    display = SweepHeatMapDisplay.from_results(
        TABLE[:3], parameters=("step__rate", "step__width"), score="score_mean"
    )
    assert display.texts_[0, 1] is None and np.isnan(display.scores[0, 1])
    assert display.ax_.get_title() == "mean score"


@pytest.fixture(scope="module")
def search():
    grid = {"max_depth": [1, None, 4], "criterion": ["gini", "entropy"], "random_state": [0]}
    return GridSearchCV(DecisionTreeClassifier(), grid, cv=2).fit(X[:200], Y[:200])


def test__search__is_drawn_from_cv_results(search):
    display = SweepHeatMapDisplay.from_search(search)
    assert (display.row_name, display.column_name) == ("criterion", "max_depth")
    assert (display.row_values, display.column_values) == (["entropy", "gini"], ["1", "4", "None"])
    results = search.cv_results_
    for parameters, score in zip(results["params"], results["mean_test_score"], strict=True):
        row = ["entropy", "gini"].index(parameters["criterion"])
        column = [1, 4, None].index(parameters["max_depth"])
        assert display.scores[row, column] == score
    for given in results, pd.DataFrame(results):
        again = SweepHeatMapDisplay.from_results(given)
        np.testing.assert_array_equal(again.scores, display.scores)
    lines = ParallelCoordinatesDisplay.from_search(search)
    assert list(lines.values) == ["criterion", "max_depth"]  # the seed does not vary


def test__several_metrics__draw_the_one_that_decides():
    search = GridSearchCV(
        DecisionTreeClassifier(random_state=0),
        {"max_depth": [1, 4], "min_samples_leaf": [1, 9]},
        cv=2,
        scoring=["accuracy", "f1_macro"],
        refit="f1_macro",
    ).fit(X[:200], Y[:200])
    display = SweepHeatMapDisplay.from_search(search)
    assert sorted(display.scores.ravel()) == sorted(search.cv_results_["mean_test_f1_macro"])
    assert display.score_name == "mean test f1 macro"
    display = SweepHeatMapDisplay.from_search(search, score="mean_test_accuracy")
    assert sorted(display.scores.ravel()) == sorted(search.cv_results_["mean_test_accuracy"])


def test__one_metric_named_by_refit__is_the_score(search):
    named = GridSearchCV(search.estimator, search.param_grid, cv=2, refit="accuracy")
    named.fit(X[:200], Y[:200])
    assert "mean_test_accuracy" not in named.cv_results_
    display = SweepHeatMapDisplay.from_search(named)
    assert sorted(display.scores.ravel()) == sorted(named.cv_results_["mean_test_score"])


def test__value_that_a_candidate_lacks__comes_last():
    grid = [
        {"max_depth": [9, 1], "min_samples_leaf": [5]},
        {"min_samples_leaf": [40, 1]},
        {"max_depth": [4, 1], "min_samples_leaf": [5]},
    ]
    tree = DecisionTreeClassifier(random_state=0)
    search = GridSearchCV(tree, grid, cv=2).fit(X[:200], Y[:200])
    display = SweepHeatMapDisplay.from_search(search, parameters=["max_depth", "min_samples_leaf"])
    assert display.row_values == ["1", "4", "9", "–"]
    assert display.column_values == ["1", "5", "40"]
    lines = ParallelCoordinatesDisplay.from_search(search)
    assert texts(lines.texts_[0]) == ["1", "4", "9", "–"]
    table = pd.DataFrame({"a": [30.0, np.nan, 4.0, 200.0], "b": ["z", "x", np.nan, "y"]})
    lines = ParallelCoordinatesDisplay.from_results(
        table.assign(score_mean=[0.1, 0.2, 0.3, 0.4]), parameters=["a", "b"]
    )
    assert texts(lines.texts_[0]) == ["4", "30", "200", "–"]
    assert texts(lines.texts_[1]) == ["x", "y", "z", "–"]


def test__halving__counts_the_last_round_of_each_candidate():
    results = {
        "iter": [0, 0, 1],
        "param_a": np.ma.array([1, 2, 2], dtype=object),
        "param_b": np.ma.array(["x", "y", "y"], dtype=object),
        "mean_test_score": np.array([0.5, 0.9, 0.7]),
    }
    display = SweepHeatMapDisplay.from_results(results, parameters=["a", "b"])
    np.testing.assert_array_equal(display.scores, [[0.5, np.nan], [np.nan, 0.7]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"others": "worst"}, "others='worst' was given, expected 'best' or 'mean'"),
        ({}, r"shows two parameters, and here are 3: \['step__rate', 'step__width', 'kind'\]"),
        ({"parameters": ["rate", "kind"]}, r"columns .* and parameters \(rate\)"),
        ({"score": "auc"}, r"expected scores \(auc\)"),
    ],
)
def test__heat_map_that_is_not_clear__error_says_what_to_say(arguments, message):
    with pytest.raises(ValueError, match=message):
        SweepHeatMapDisplay.from_results(TABLE, **arguments)


def test__parallel_coordinates__go_through_the_values_of_each_candidate():
    display = ParallelCoordinatesDisplay.from_results(TABLE)
    table = TABLE.dropna().sort_values("score_mean")
    segments = display.lines_.get_segments()
    assert len(segments) == len(table) == 7
    np.testing.assert_array_equal(display.lines_.get_array(), table["score_mean"])
    for row, segment in zip(table.itertuples(), segments, strict=True):
        score = (row.score_mean - 0.4) / (0.9 - 0.4)
        heights = [row.step__rate == 0.1, row.step__width == 100, row.kind == "b", score]
        np.testing.assert_allclose(segment, list(enumerate(map(float, heights))))
    assert texts(display.ax_.get_xticklabels()) == ["rate", "width", "kind", "mean score"]
    assert [texts(each) for each in display.texts_[:3]] == [
        ["0.01", "0.1"],
        ["8", "100"],
        ["a", "b"],
    ]


@pytest.mark.parametrize("scale", ["log", "linear"])
def test__many_numbers__stand_on_a_scale(scale):
    values = np.logspace(-4, 0, 13) if scale == "log" else np.linspace(-1, 3, 13)
    table = pd.DataFrame({"a": values, "score_mean": np.arange(13) / 13})
    display = ParallelCoordinatesDisplay.from_results(table, parameters=["a"])
    heights = [segment[0][1] for segment in display.lines_.get_segments()]
    np.testing.assert_allclose(heights, np.arange(13) / 12, atol=1e-12)
    ticks = {"log": "0.0001 0.001 0.01 0.1 1", "linear": "-1 0 1 2 3"}[scale]
    assert texts(display.texts_[0]) == ticks.split()


def test__no_scores__is_an_error():
    with pytest.raises(ValueError, match="None of 8 candidates has a score"):
        SweepHeatMapDisplay.from_results(TABLE.assign(score_mean=np.nan))
    with pytest.raises(TypeError, match="expected a fitted search, with cv_results_"):
        ParallelCoordinatesDisplay.from_search(GridSearchCV(PCA(), {}))
