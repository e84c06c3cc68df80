"""Small-image classification with scikit-learn's interface and torch's speed."""

from skcifar.cnn import CNNClassifier
from skcifar.mlp import MLPClassifier
from skcifar.softmax import SoftmaxRegression

__all__ = ["CNNClassifier", "MLPClassifier", "SoftmaxRegression"]
__version__ = "0.1.0"
