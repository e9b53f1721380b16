"""How good are an encoder's frozen features? k-NN and linear probe, on whatever labelled images there are."""

from fastmim.evaluation.encoders import RunMeta, load_encoder
from fastmim.evaluation.features import extract_features
from fastmim.evaluation.knn import knn_accuracy, knn_predict
from fastmim.evaluation.linear import fit_linear, linear_accuracy
from fastmim.evaluation.probe import Score, probe

__all__ = [
    "RunMeta",
    "Score",
    "extract_features",
    "fit_linear",
    "knn_accuracy",
    "knn_predict",
    "linear_accuracy",
    "load_encoder",
    "probe",
]
