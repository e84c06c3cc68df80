"""Memory is flat: fifty fits in one process leave no more behind than one does."""

import gc

import pytest
import torch
from sklearn.datasets import load_digits

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression, TripletEmbedder

N_FITS = 50
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
)
ESTIMATORS = {
    "softmax": SoftmaxRegression(max_iter=2),
    "softmax-sgd": SoftmaxRegression(solver="sgd", max_iter=1),
    "mlp": MLPClassifier((16,), max_iter=1),
    "mlp-early-stopping": MLPClassifier((16,), max_iter=1, early_stopping=True),
    "cnn": CNNClassifier((4, 8), max_iter=1),
    "triplet": TripletEmbedder(4, channels=(4, 8), max_iter=1),
}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:100].astype("uint8"), y[:100]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__fifty_fits__leave_no_more_tensors_than_two(name, device, digits):
    estimator = ESTIMATORS[name].set_params(device=device, random_state=0)
    held = []
    # Nothing may wait for the garbage collector: what does keeps its memory until then.
    gc.disable()
    gc.freeze()  # what is there already is not looked at, which takes a tenth of a second each time
    try:
        for _ in range(N_FITS):
            estimator.fit(*digits)
            held.append(_tensors_held())
    finally:
        gc.unfreeze()
        gc.enable()
    assert held[1][0] > 0
    assert held[2:] == [held[1]] * (N_FITS - 2)


def _tensors_held():
    """Live tensors, the bytes of their memory, and those that CUDA has given out."""
    # not isinstance, which proxies that others left behind may answer to with an import
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
    n_bytes = sum(storage.nbytes() for storage in storages.values())
    on_cuda = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return len(tensors), n_bytes, on_cuda
