import math

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skcifar import FineTunedClassifier, MLPClassifier, TripletEmbedder
from skcifar._command_line import UsageError
from skcifar._grid_argument import check_values, parse_grid, with_full_names

PIPELINE = make_pipeline(StandardScaler(), TripletEmbedder(), LogisticRegression())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha=0.1,1e-3,0", {"alpha": [0.1, 1e-3, 0]}),
        ("a=1  b=2\n c=3", {"a": [1], "b": [2], "c": [3]}),
        ("sizes=5,(256,128),(7, 8),[1,2]", {"sizes": [5, (256, 128), (7, 8), [1, 2]]}),
        (
            "solver=sgd,adam shuffle=True,False",
            {"solver": ["sgd", "adam"], "shuffle": [True, False]},
        ),
        ("x=None,1,True", {"x": [None, 1, True]}),
        ("n_iter_no_change=inf", {"n_iter_no_change": [math.inf]}),
        ("weights={0: 1, 1: 2},balanced", {"weights": [{0: 1, 1: 2}, "balanced"]}),
        ("name='a, b',\"c d\"", {"name": ["a, b", "c d"]}),
        ("step__a=x=y", {"step__a": ["x=y"]}),
        ("alpha=-1", {"alpha": [-1]}),
    ],
)
def test__grid__is_read_as_python_reads_it_and_else_as_text(text, expected):
    found = parse_grid(text)
    assert found == expected and list(found) == list(expected)
    types = {name: [type(value) for value in values] for name, values in found.items()}
    assert types == {name: [type(value) for value in expected[name]] for name in expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no parameter is given"),
        ("alpha", "'alpha' is not of the form name=value"),
        ("=1", "'=1' is not of the form"),
        ("alpha = 1", "'alpha' is not of the form"),
        ("alpha=", "'alpha=' lacks a value"),
        ("alpha=1,,2", "lacks a value"),
        ("alpha=1,1", "alpha has the value 1 more than once"),
        ("alpha=1,1.0", "alpha has the value 1.0 more than once"),
        ("alpha=1 alpha=2", "alpha is given more than once"),
        ("sizes=(5", "without its other half"),
        ("sizes=5)", "without its other half"),
        ("name='a", "without its other half"),
    ],
)
def test__text_that_is_no_grid__error_says_what_is_wrong(text, message):
    with pytest.raises(UsageError) as caught:
        parse_grid(text)
    assert message in str(caught.value)


def test__parameters_of_steps__are_named_in_full_or_by_what_only_one_step_has():
    named = with_full_names({"C": [1], "standardscaler__with_std": [True]}, PIPELINE, "m")
    assert named == {"logisticregression__C": [1], "standardscaler__with_std": [True]}
    own = with_full_names({"alpha": [1]}, FineTunedClassifier(TripletEmbedder()), "m")
    assert own == {"alpha": [1]}  # the encoder has one, too


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpah", "m has no parameter 'alpah'; did you mean alpha"),
        ("tripletembedder__alpa", "did you mean tripletembedder__alpha"),
        ("zzzzzz", "it has "),
        ("max_iter", "may be any of tripletembedder__max_iter, logisticregression__max_iter"),
    ],
)
def test__unknown_parameter__error_names_it_and_what_there_is(name, message):
    with pytest.raises(UsageError) as caught:
        with_full_names({name: [1]}, PIPELINE, "m")
    assert name in str(caught.value) and message in str(caught.value)
    assert "logisticregression__C" in str(caught.value) or name != "zzzzzz"


def test__parameter_by_both_its_names__is_given_twice():
    with pytest.raises(UsageError, match="logisticregression__C is given more than once"):
        with_full_names({"C": [1], "logisticregression__C": [2]}, PIPELINE, "m")


@pytest.mark.parametrize(
    ("estimator", "grid", "messages"),
    [
        (MLPClassifier(), {"alpha": [1, -1]}, ["'alpha' parameter", "Got -1", "[0.0, inf)"]),
        (MLPClassifier(), {"solver": ["sgd", "adm"]}, ["'solver'", "'adm'", "'lbfgs'"]),
        (MLPClassifier("a"), {"alpha": [1]}, ["'hidden_layer_sizes'", "'a'"]),
        (MLPClassifier(), {"hidden_layer_sizes": [(0,)]}, ["hidden_layer_sizes", "(0,)"]),
        (
            MLPClassifier(),
            {"solver": ["adam", "lbfgs"], "dropout": [0, 0.5]},
            ["dropout=0.5", "solver='lbfgs'"],
        ),
        (PIPELINE, {"logisticregression__C": [-1]}, ["'C' parameter of LogisticReg", "Got -1"]),
        (PIPELINE, {"tripletembedder__alpha": ["a"]}, ["'alpha'", "Got 'a'"]),
    ],
)
def test__value_that_is_refused__error_names_parameter_value_and_what_it_takes(
    estimator, grid, messages
):
    with pytest.raises(UsageError) as caught:
        check_values(estimator, ParameterGrid(grid))
    assert all(message in str(caught.value) for message in messages)


def test__values_that_are_taken__leave_the_estimator_as_it_is():
    model = MLPClassifier(alpha=3.0)
    check_values(model, ParameterGrid({"alpha": [0, 1], "hidden_layer_sizes": [5, (), (3, 2)]}))
    assert model.alpha == 3.0
