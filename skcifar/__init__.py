"""Small-image classification with scikit-learn's interface and torch's speed."""

import joblib

from skcifar._backend import Backend as _Backend
from skcifar.cnn import CNNClassifier
from skcifar.finetune import FineTunedClassifier
from skcifar.mlp import MLPClassifier
from skcifar.pretrained import PretrainedFeatures
from skcifar.softmax import SoftmaxRegression
from skcifar.triplet import TripletEmbedder

__all__ = [
    "CNNClassifier",
    "FineTunedClassifier",
    "MLPClassifier",
    "PretrainedFeatures",
    "SoftmaxRegression",
    "TripletEmbedder",
]
__version__ = "0.1.0"

joblib.register_parallel_backend("skcifar", _Backend)
