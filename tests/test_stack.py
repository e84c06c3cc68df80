"""Many networks trained as one: each comes out as if it had been trained alone."""

import threading

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import ParameterGrid

from skcifar import (
    CNNClassifier,
    MLPClassifier,
    SoftmaxRegression,
    _stack,
    _stacked_loss,
    _stacked_networks,
    _stacked_parameters,
    _tape,
)
from skcifar._jobs import MEETING
from skcifar._stack import groups_of, train_group, why_alone
from skcifar._training import train_alone

MLP = MLPClassifier((16,), max_iter=10, random_state=0)
SOFTMAX = SoftmaxRegression(solver="sgd", learning_rate_init=0.01, max_iter=10, random_state=0)
RATES = {"learning_rate_init": [0.01, 0.001], "alpha": [0.0, 1e-2]}

# Settings of a grid, each crossed with two rates and two penalties.
GRIDS = {
    "adam": (MLP, {}),
    "sgd": (MLP, {"solver": ["sgd"], "momentum": [0.0, 0.5, 0.9]}),
    "sgd without momentum": (MLP, {"solver": ["sgd"], "momentum": [0.0]}),
    "sgd without Nesterov": (MLP, {"solver": ["sgd"], "nesterovs_momentum": [False]}),
    "adamw": (MLP, {"solver": ["adamw"], "weight_decay": [0.0, 0.1]}),
    "adam's constants": (MLP, {"beta_1": [0.9, 0.8], "beta_2": [0.99], "epsilon": [1e-8, 1e-3]}),
    "weight decay": (MLP, {"weight_decay": [0.1]}),
    "activations": (
        MLP,
        {"activation": ["identity", "logistic", "tanh", "relu", "gelu", "silu"]},
    ),
    "hidden layers": (MLP, {"hidden_layer_sizes": [(8,), (8, 4), (5,), (), (6, 5, 4)]}),
    "dropout": (MLP, {"dropout": [0.0, 0.2, 0.5], "hidden_layer_sizes": [(16, 8)]}),
    "losses": (MLP, {"loss": ["cross_entropy", "squared_error"], "label_smoothing": [0, 0.1]}),
    "schedules": (
        MLP,
        {
            "learning_rate": ["auto", "cosine", "constant", "invscaling", "exponential", "step"],
            "max_iter": [4, 7],
        },
    ),
    "adaptive rate": (
        MLP,
        {"learning_rate": ["adaptive"], "tol": [0.1], "n_iter_no_change": [1], "max_iter": [20]},
    ),
    "convergence": (
        MLP,
        {"learning_rate": ["constant"], "tol": [0.05], "n_iter_no_change": [1, 2]},
    ),
    "early stopping": (
        MLP,
        {"early_stopping": [True], "max_iter": [25], "n_iter_no_change": [1, 3]},
    ),
    "early stopping by other scores": (
        MLP,
        {"early_stopping": [True], "scoring": ["loss", "neg_log_loss"], "n_iter_no_change": [2]},
    ),
    "dropout, early stopping by another score": (
        MLP,
        {
            "dropout": [0.3],
            "early_stopping": [True],
            "scoring": ["balanced_accuracy"],
            "n_iter_no_change": [2],
        },
    ),
    "class weights": (MLP, {"class_weight": [None, "balanced", {0: 2.0, 1: 0.0}]}),
    "clipped norms": (MLP, {"clip_grad_norm": [0.1, 1.0], "solver": ["sgd", "adamw"]}),
    "clipped values": (MLP, {"clip_grad_value": [0.01, 0.001], "weight_decay": [0.01]}),
    "batches": (MLP, {"batch_size": [32, 100, "full"], "shuffle": [True, False]}),
    "seeds": (MLP, {"random_state": [0, 1]}),
    "softmax": (SOFTMAX, {"solver": ["sgd", "adam"], "batch_size": [32, 64]}),
    "softmax, early stopping": (SOFTMAX, {"early_stopping": [True], "class_weight": ["balanced"]}),
}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:500] / 16.0, y[:500]


def jobs_of(base, grid, X, y, **fit):
    candidates = [clone(base).set_params(**point) for point in ParameterGrid(grid)]
    return [candidate._prepare(X, y, **fit, going_on=False)[0] for candidate in candidates]


def outcome_alone(job):
    try:
        return train_alone(job)
    except ValueError as error:
        return error


def outcomes_together(jobs):
    outcomes = [None] * len(jobs)
    for group in groups_of(jobs):
        for i, outcome in zip(group, train_group([jobs[i] for i in group]), strict=True):
            outcomes[i] = outcome
    return outcomes


def figures(history):
    return [{name: row[name] for name in row if name != "seconds"} for row in history]


def largest_difference(alone, together):
    """Of parameters, histories and optimizer states; what is not a number must be equal."""
    worst = 0.0
    for (job, result), (other, outcome) in zip(alone, together, strict=True):
        if isinstance(result, ValueError):
            assert str(outcome.error) == str(result)
            continue
        assert outcome.error is None
        trained = outcome.result
        assert trained.ran_out == result.ran_out
        assert trained.n_rows_seen == result.n_rows_seen
        assert (trained.best_score is None) == (result.best_score is None)
        for own, its in zip(job.module.parameters(), other.module.parameters(), strict=True):
            worst = max(worst, float((own - its).detach().abs().max()))
        assert len(trained.history) == len(result.history)
        for row, its in zip(figures(result.history), figures(trained.history), strict=True):
            assert list(row) == list(its)
            worst = max(worst, *(abs(row[name] - its[name]) for name in row))
        assert trained.state["rates"] == result.state["rates"]
        for name, state in result.state["generators"].items():
            assert torch.equal(state, trained.state["generators"][name])
        moments = result.state["optimizer"]
        assert moments.keys() == trained.state["optimizer"].keys()
        for i, values in moments.items():
            for name, value in values.items():
                its = trained.state["optimizer"][i][name]
                assert its.shape == value.shape
                worst = max(worst, float((value - its).abs().max()))
    return worst


def difference(base, grid, X, y, **fit):
    jobs = jobs_of(base, grid, X, y, **fit)
    alone = [(job, outcome_alone(job)) for job in jobs]
    others = jobs_of(base, grid, X, y, **fit)
    return largest_difference(alone, zip(others, outcomes_together(others), strict=True))


@pytest.mark.parametrize("name", GRIDS)
def test__stack__equals_networks_trained_alone(name, digits):
    base, grid = GRIDS[name]
    assert difference(base, RATES | grid, *digits) < 1e-9


@pytest.mark.parametrize("base", [MLP, SOFTMAX], ids=["mlp", "softmax"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test__two_classes__equals_networks_trained_alone(base, loss, digits):
    X, y = digits
    grid = RATES | {"loss": [loss], "label_smoothing": [0.0, 0.2]}
    assert difference(base, grid, X, y % 2) < 1e-9


def test__weights_and_validation_rows__equals_networks_trained_alone(digits):
    X, y = digits
    rng = np.random.default_rng(0)
    fit = {
        "sample_weight": rng.uniform(size=len(y)) * (rng.uniform(size=len(y)) < 0.9),
        "X_val": X[:150],
        "y_val": y[:150],
        "sample_weight_val": rng.uniform(size=150),
    }
    for early_stopping in (False, True):
        grid = RATES | {"early_stopping": [early_stopping], "class_weight": [None, "balanced"]}
        assert difference(MLP, grid, X, y, **fit) < 1e-9


def test__float32__equals_networks_trained_alone_to_rounding(digits):
    X, y = digits
    assert difference(MLP, RATES | {"activation": ["tanh"]}, X.astype(np.float32), y) < 2e-5


@pytest.mark.parametrize("small", [0, 2**30], ids=["large weights", "small weights"])
def test__bfloat16__scores_as_networks_trained_alone(small, digits, monkeypatch):
    # its roundings fall differently; what comes out may not differ in what it can do
    monkeypatch.setattr(_stacked_parameters, "_SMALL", small)
    X, y = digits
    grid = RATES | {"precision": ["bfloat16"], "max_iter": [20]}
    alone = [train_alone(job).history[-1] for job in jobs_of(MLP, grid, X.astype(np.float32), y)]
    together = outcomes_together(jobs_of(MLP, grid, X.astype(np.float32), y))
    for row, outcome in zip(alone, together, strict=True):
        its = outcome.result.history[-1]
        assert abs(row["train_accuracy"] - its["train_accuracy"]) < 0.03
        assert abs(row["train_loss"] - its["train_loss"]) < 0.05


def test__bfloat16__only_products_of_large_weights_are_rounded(digits, monkeypatch):
    X, y = digits
    grid = RATES | {"precision": ["bfloat16"], "activation": ["tanh"]}

    def difference_to_float32(small):
        monkeypatch.setattr(_stacked_parameters, "_SMALL", small)
        narrow = jobs_of(MLP, grid, X.astype(np.float32), y)
        wide = jobs_of(MLP, grid | {"precision": ["float32"]}, X.astype(np.float32), y)
        alone = [(job, outcome_alone(job)) for job in wide]
        return largest_difference(alone, zip(narrow, outcomes_together(narrow), strict=True))

    assert difference_to_float32(small=2**30) < 2e-5
    assert 1e-3 < difference_to_float32(small=0) < 1


@pytest.mark.parametrize("name", ["adam", "sgd", "hidden layers", "clipped norms", "softmax"])
def test__large_parameters__equals_networks_trained_alone(name, digits, monkeypatch):
    monkeypatch.setattr(_stacked_parameters, "_SMALL", 100)  # large ones are updated by themselves
    monkeypatch.setattr(_stacked_networks, "PIECE_ROWS", 64)
    base, grid = GRIDS[name]
    assert difference(base, RATES | grid, *digits) < 1e-9


@pytest.fixture
def recorded(monkeypatch):
    """What was recorded of steps, and None for what could not be; the second of a kind is."""
    functions = []
    original = _tape._Recorder.function_of

    def function_of(*args):
        functions.append(original(*args))
        return functions[-1]

    monkeypatch.setattr(_tape, "_RECORDED_TIME", 2)
    monkeypatch.setattr(_tape._Recorder, "function_of", function_of)
    return functions


@pytest.mark.parametrize(
    ("small", "dtype"),
    [(100, np.float32), (2**30, np.uint8)],
    ids=["large weights", "small weights, pixels"],
)
@pytest.mark.parametrize("name", [name for name in GRIDS if "dropout" not in name])
def test__recorded_steps__train_to_the_bit_as_those_of_python(
    name, small, dtype, digits, recorded, monkeypatch
):
    monkeypatch.setattr(_stacked_parameters, "_SMALL", small)
    X, y = digits
    X = (16 * X).astype(dtype) if dtype == np.uint8 else X.astype(dtype)
    base, grid = GRIDS[name]
    grid = {"learning_rate_init": [0.05, 0.01], "alpha": [0.0, 1e-2], "max_iter": [4]} | grid
    grid |= {"solver": ["sgd"], "normalize": [dtype == np.uint8]}

    def trained(tapes):
        monkeypatch.setenv("SKCIFAR_TAPES", tapes)
        jobs = jobs_of(base, grid, X, y)
        return list(zip(jobs, outcomes_together(jobs), strict=True))

    expected = [(job, outcome.error or outcome.result) for job, outcome in trained("0")]
    assert not recorded
    assert largest_difference(expected, trained("1")) == 0
    assert recorded
    assert None not in recorded


def test__one_setting_off__difference_is_seen(digits):
    X, y = digits
    alone = [(job, outcome_alone(job)) for job in jobs_of(MLP, RATES, X, y)]
    jobs = jobs_of(MLP, RATES | {"alpha": [0.0, 1.1e-2]}, X, y)
    assert largest_difference(alone, zip(jobs, outcomes_together(jobs), strict=True)) > 1e-6


def test__large_batches__are_read_in_pieces_with_equal_result(digits, monkeypatch):
    monkeypatch.setattr(_stacked_networks, "PIECE_ROWS", 64)
    assert difference(MLP, RATES | {"batch_size": ["full", 200]}, *digits) < 1e-9


def test__equal_outputs__first_class_is_predicted():
    loss = _stacked_loss.Loss.__new__(_stacked_loss.Loss)
    loss.n_outputs = 3
    outputs = torch.randint(0, 2, (4, 3, 50), generator=torch.Generator().manual_seed(0)).double()
    codes = torch.arange(50)[None] % 3
    expected = outputs.argmax(1) == codes  # documented to be the first
    assert torch.equal(loss._right(outputs, codes), expected)


# -- groups ----------------------------------------------------------------------------------------


def test__same_rows_in_other_memory__train_together(digits):
    X, y = digits
    jobs = [jobs_of(MLP, {}, X.copy(), y.copy())[0] for _ in range(3)]
    assert groups_of(jobs) == [[0, 1, 2]]


def test__other_rows_seeds_or_batches__train_apart(digits):
    X, y = digits
    other = X.copy()
    other[-1, -1] += 1
    jobs = jobs_of(MLP, {"random_state": [0, 1], "batch_size": [32, 64]}, X, y)
    jobs += jobs_of(MLP, {"batch_size": [32]}, other, y)
    assert groups_of(jobs) == [[i] for i in range(5)]


def test__one_class_against_the_rest__is_one_group(digits):
    X, y = digits
    problems = [(y == label).astype(int) for label in range(4)]
    jobs = [job for labels in problems for job in jobs_of(MLP, {}, X, labels)]
    assert groups_of(jobs) == [[0, 1, 2, 3]]
    alone = [job for labels in problems for job in jobs_of(MLP, {}, X, labels)]
    alone = [(job, outcome_alone(job)) for job in alone]
    assert largest_difference(alone, zip(jobs, outcomes_together(jobs), strict=True)) < 1e-9


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (MLPClassifier(solver="lbfgs"), "lbfgs"),
        (CNNClassifier(image_shape=(8, 8)), "no stack of dense layers"),
        (MLPClassifier(learning_rate=lambda o: torch.optim.lr_scheduler.StepLR(o, 1)), "callable"),
    ],
    ids=["lbfgs", "cnn", "scheduler"],
)
def test__what_gains_nothing__is_alone_and_says_why(estimator, reason, digits):
    job = jobs_of(estimator, {}, *digits)[0]
    assert reason in why_alone(job)
    assert groups_of([job, *jobs_of(MLP, RATES, *digits), job]) == [[0], [1, 2, 3, 4], [5]]


@pytest.mark.parametrize("name", ["_CACHE_BYTES", "_MEMORY_SHARE"])
def test__little_memory__cuts_groups_with_equal_result(name, digits, monkeypatch):
    jobs = jobs_of(MLP, RATES, *digits)
    monkeypatch.setattr(_stack, name, getattr(_stack, name) * 1e-12)
    assert groups_of(jobs) == [[0], [1], [2], [3]]
    assert difference(MLP, RATES, *digits) < 1e-9


def test__out_of_memory__halves_the_group(digits, monkeypatch):
    stack, sizes = _stack.Stack, []

    class _Small(stack):
        def run_epoch(self, is_cancelled):
            rows = super().run_epoch(is_cancelled)
            if not self.models[0].conductor.history:
                sizes.append(len(self.models))
                if len(self.models) > 1:  # when much is done already
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return rows

    monkeypatch.setattr(_stack, "Stack", _Small)
    assert difference(MLP, RATES | {"dropout": [0.1]}, *digits) < 1e-9
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


@pytest.fixture
def two_threads():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)


def test__several_stacks_at_once__equal_networks_trained_alone(digits, two_threads):
    grid = RATES | {"batch_size": [50, 100, 200], "early_stopping": [True], "max_iter": [5, 20]}
    jobs = jobs_of(MLP, grid, *digits)
    assert [len(group) for group in groups_of(jobs)] == [24]
    assert difference(MLP, grid | {"n_iter_no_change": [2]}, *digits) < 1e-9


def test__many_stacks__are_cut_into_groups(digits, two_threads):
    jobs = jobs_of(MLP, {"random_state": list(range(7))}, *digits)
    assert [len(group) for group in groups_of(jobs)] == [2, 2, 3]


def test__interrupt_while_several_stacks_train__ends_their_threads(digits, two_threads):
    jobs = jobs_of(MLP, RATES | {"batch_size": [50, 100], "max_iter": [10_000]}, *digits)

    def interrupt(row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    jobs[0].on_epoch_end = interrupt
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train_group(jobs)
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2
    assert all(torch.isfinite(p).all() for job in jobs for p in job.module.parameters())


# -- what becomes of single networks ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__diverged_network__costs_only_itself(digits):
    X, y = digits
    sgd = MLPClassifier((8,), solver="sgd", max_iter=5, normalize=False, random_state=0)
    grid = {"learning_rate_init": [1e-5, 1e12]}
    assert difference(sgd, grid, X * 100, y) < 1e-9
    outcomes = outcomes_together(jobs_of(sgd, grid, X * 100, y))
    assert [outcome.error is None for outcome in outcomes] == [True, False]
    assert "diverged" in str(outcomes[1].error)


def test__failing_callback__costs_only_its_own_network(digits):
    jobs = jobs_of(MLP, RATES, *digits)

    def fail(row):
        raise OSError("disk full")

    jobs[1].on_epoch_end = fail
    outcomes = outcomes_together(jobs)
    assert [type(outcome.error) for outcome in outcomes] == [type(None), OSError] + 2 * [type(None)]


def test__callbacks__see_the_network_of_that_epoch(digits):
    jobs = jobs_of(MLP, RATES, *digits)
    alone = jobs_of(MLP, RATES, *digits)
    seen = {}
    for kind, some in (("together", jobs), ("alone", alone)):
        for i, job in enumerate(some):
            trail = seen[kind, i] = []

            def look(row, job=job, trail=trail):
                trail.append([p.detach().clone() for p in job.module.parameters()])
                return len(trail) == 3

            job.on_epoch_end = look
    outcomes_together(jobs)
    for job in alone:
        train_alone(job)
    for i in range(len(jobs)):
        assert len(seen["together", i]) == len(seen["alone", i]) == 3
        for own, its in zip(seen["together", i], seen["alone", i], strict=True):
            for a, b in zip(own, its, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test__finished_networks__keep_nothing_of_the_stack(digits):
    jobs = jobs_of(MLP, RATES, *digits)
    outcomes_together(jobs)
    for job in jobs:
        for parameter in job.module.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test__seconds__add_up_and_follow_the_operations(digits):
    jobs = jobs_of(MLP, {"hidden_layer_sizes": [(8,), (80,)]}, *digits)
    outcomes = outcomes_together(jobs)
    small, large = (outcome.seconds for outcome in outcomes)
    weights = [sum(p.numel() for p in job.module.parameters() if p.ndim > 1) for job in jobs]
    assert large / small == pytest.approx(weights[1] / weights[0])
    rows = [row["seconds"] for outcome in outcomes for row in outcome.result.history]
    assert 0 < sum(rows) <= small + large


@pytest.mark.parametrize("train", [outcomes_together, None], ids=["together", "alone"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": [0.2]},
        {"early_stopping": [True]},
        {"early_stopping": [True], "scoring": ["neg_log_loss"]},
    ],
)
def test__pauses__leave_the_result_as_it_is(train, settings, digits):
    grid = RATES | settings

    def run(jobs):
        if train is not None:
            return [outcome.result for outcome in train(jobs)]
        return [train_alone(job) for job in jobs]

    whole = jobs_of(MLP, grid, *digits)
    expected = run(whole)
    paused = [None] * len(whole)
    for until in (2, 5, None):
        parts = jobs_of(MLP, grid, *digits)
        for job, before in zip(parts, paused, strict=True):
            job.pause_after, job.paused = until, before
        results = run(parts)
        paused = [result.paused for result in results]
    for job, part, wanted, result in zip(whole, parts, expected, results, strict=True):
        assert figures(result.history) == figures(wanted.history)
        for a, b in zip(job.module.parameters(), part.module.parameters(), strict=True):
            assert torch.equal(a, b)


def test__paused_network__is_not_touched_when_its_training_goes_on(digits):
    first = jobs_of(MLP, {}, *digits)[0]
    first.pause_after = 2
    result = outcomes_together([first])[0].result
    before = [p.detach().clone() for p in first.module.parameters()]
    second = jobs_of(MLP, {}, *digits)[0]
    second.paused = result.paused
    outcomes_together([second])
    for a, b in zip(before, first.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test__ran_out__is_told_where_fit_is_called(digits):
    X, y = digits

    class _Meeting:
        def train(self, job):
            return train_group([job])[0].result

        def seed(self, seed):
            return seed

        def compute(self, function, what=None):
            return function()

    token = MEETING.set(_Meeting())
    try:
        with pytest.warns(ConvergenceWarning, match="max_iter=10"):
            clone(MLP).set_params(learning_rate="constant", tol=0.0).fit(X, y)
    finally:
        MEETING.reset(token)


def test__paused_networks_with_and_without_momentum__go_on_together(digits, monkeypatch):
    grid = RATES | {"solver": ["sgd"], "momentum": [0.0, 0.9]}
    whole = jobs_of(MLP, grid, *digits)
    expected = [outcome.result.history for outcome in outcomes_together(whole)]
    first = jobs_of(MLP, grid, *digits)
    for job in first:
        job.pause_after = 3
    paused = [train_group([job])[0].result.paused for job in first]
    second = jobs_of(MLP, grid, *digits)
    for job, before in zip(second, paused, strict=True):
        job.paused = before
    assert groups_of(second) == [list(range(8))]
    for outcome, history in zip(outcomes_together(second), expected, strict=True):
        last, wanted = outcome.result.history[-1], history[-1]
        assert last["train_loss"] == pytest.approx(wanted["train_loss"], abs=1e-12)


def test__training_paused_alone__goes_on_alone(digits):
    first, second = (jobs_of(MLP, {}, *digits)[0] for _ in range(2))
    first.pause_after = 3
    second.paused = train_alone(first).paused
    assert why_alone(second) is not None
    assert len(train_group([second])[0].result.history) == 10


def test__order_that_is_not_drawn__leaves_each_network_its_own_generator(digits):
    grid = {"batch_size": ["full"], "random_state": [0, 1]}
    jobs = jobs_of(MLP, grid, *digits)
    assert groups_of(jobs) == [[0, 1]]
    before = [job.generators.order.get_state() for job in jobs]
    outcomes_together(jobs)
    for job, state in zip(jobs, before, strict=True):
        assert torch.equal(job.generators.order.get_state(), state)
