"""Steps that are recorded and played, on the CPU with a stand-in for the CUDA graph."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.base import clone

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression, _training
from skcifar._recorded import RecordedSteps, records_steps

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ESTIMATORS = {
    "softmax, momentum": SoftmaxRegression(solver="sgd", max_iter=2, batch_size=100),
    "mlp, adam, dropout": MLPClassifier((16,), dropout=0.3, max_iter=2, batch_size=100),
    "mlp, adamw, clipped": MLPClassifier(
        (16,),
        solver="adamw",
        weight_decay=0.1,
        alpha=0.1,
        clip_grad_norm=0.5,
        clip_grad_value=0.1,
        max_iter=2,
        batch_size=100,
    ),
    "mlp, adaptive rate": MLPClassifier(
        (16,), learning_rate="adaptive", tol=10.0, n_iter_no_change=1, max_iter=6, batch_size=100
    ),
    "cnn, moved and flipped": CNNClassifier(
        (8,), horizontal_flip="alternating", cutout=2, max_iter=3, batch_size=100
    ),
    "airbench94": CNNClassifier(architecture="airbench94", max_iter=4, batch_size=100),
    "airbench94, sgd": CNNClassifier(
        architecture="airbench94", solver="sgd", max_iter=3, batch_size=100
    ),
}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 690)  # seven batches of 98 or 99 rows
    X = rng.integers(0, 100, (690, 10, 10)) + 60 * (y[:, None, None] == np.arange(10)[:, None])
    return X.astype(np.uint8), y


@pytest.fixture
def played(monkeypatch):
    """Let steps be "recorded" on the CPU; gives the number of rows of each that is played."""
    numbers = []

    def record(self, step, positions):
        def play():
            numbers.append(len(positions))
            step(positions)

        return play

    monkeypatch.setattr(_training, "records_steps", lambda device: True)
    monkeypatch.setattr(RecordedSteps, "_record", record)
    return numbers


def fitted(estimator, images):
    estimator = clone(estimator).set_params(random_state=0, precision="float32")
    return estimator.fit(*images)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
def test__played_steps__come_to_the_same_as_steps_that_are_taken(name, images, request):
    alone = fitted(ESTIMATORS[name], images)
    expected = [p.detach().clone() for p in alone.module_.state_dict().values()]
    played = request.getfixturevalue("played")
    together = fitted(ESTIMATORS[name], images)
    assert set(played) == {98, 99}
    if "airbench94" in name:  # whose steps make much of the last digits
        assert together.loss_curve_ == pytest.approx(alone.loss_curve_, rel=0.03)
        return
    for own, its in zip(together.module_.state_dict().values(), expected, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-5)
    for own, its in zip(together.history_, alone.history_, strict=True):
        assert own.keys() == its.keys()
        for key in own.keys() - {"seconds"}:
            assert own[key] == pytest.approx(its[key], rel=1e-4, abs=1e-5), key
    assert together.t_ == alone.t_


def test__first_three_steps_of_a_size__are_taken_then_all_are_played(images, played):
    fitted(SoftmaxRegression(solver="sgd", max_iter=2, batch_size=100), images)
    sizes = [690 * (i + 1) // 7 - 690 * i // 7 for i in range(7)] * 2
    expected = [size for i, size in enumerate(sizes) if sizes[:i].count(size) >= 3]
    assert played == expected


def test__parameters_that_come_to_rest__are_no_longer_updated_by_what_is_played(images, played):
    estimator = CNNClassifier(architecture="airbench94", max_iter=8, batch_size=100)

    biases = []
    original = _training._Net._run_recorded_epoch

    def watched(self, iterator):
        figures = original(self, iterator)
        biases.append(self.module_.whitening.bias.detach().clone())
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training._Net, "_run_recorded_epoch", watched)
        fitted(estimator, images)
    moves = [not torch.equal(a, b) for a, b in pairwise(biases)]
    assert moves == [True, True, False, False, False, False, False]


def test__step_that_cannot_be_recorded__is_taken_and_a_warning_says_so(images, monkeypatch):
    expected = fitted(SoftmaxRegression(solver="sgd", max_iter=2, batch_size=100), images)

    def fail(self, step, positions):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_training, "records_steps", lambda device: True)
    monkeypatch.setattr(RecordedSteps, "_record", fail)
    with pytest.warns(UserWarning, match=r"could not be recorded.*SKCIFAR_CUDA_GRAPHS=0") as caught:
        estimator = fitted(SoftmaxRegression(solver="sgd", max_iter=2, batch_size=100), images)
    assert len(caught) == 1
    np.testing.assert_allclose(estimator.coef_, expected.coef_, rtol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ({"precision": "float64"}, {}),
        ({"learning_rate": torch.optim.lr_scheduler.ConstantLR}, {}),
        ({}, {"sample_weight": np.linspace(1, 2, 690)}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__steps_that_are_not_alike__are_not_recorded(images, played, parameters, arguments):
    model = SoftmaxRegression(solver="sgd", max_iter=2, batch_size=100, random_state=0)
    model.set_params(**parameters).fit(*images, **arguments)
    assert played == []


def test__recording__is_for_cuda_and_can_be_declined(monkeypatch):
    assert not records_steps(torch.device("cpu"))
    assert records_steps(torch.device("cuda"))
    monkeypatch.setenv("SKCIFAR_CUDA_GRAPHS", "0")
    assert not records_steps(torch.device("cuda"))


@CUDA
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__epoch_on_a_gpu__waits_for_it_once_and_equals_steps_that_are_taken(
    name, images, monkeypatch
):
    run = RecordedSteps.run

    def without_waiting(self, *arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(RecordedSteps, "run", without_waiting)
    estimator = clone(ESTIMATORS[name]).set_params(device="cuda")
    recorded = fitted(estimator, images)
    monkeypatch.setenv("SKCIFAR_CUDA_GRAPHS", "0")
    taken = fitted(estimator, images)
    assert recorded.loss_curve_ == pytest.approx(taken.loss_curve_, rel=1e-2)
