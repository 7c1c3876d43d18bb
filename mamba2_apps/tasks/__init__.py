"""LightningModules: a model, a loss, metrics and an optimizer, for each kind of answer."""

from mamba2_apps.tasks.base import OptimizerConfig, SequenceModel, Task
from mamba2_apps.tasks.classification import Classification, LabelMean, MultiLabel
from mamba2_apps.tasks.ctc import CTC
from mamba2_apps.tasks.pretraining import MaskedReconstruction, NextToken
from mamba2_apps.tasks.regression import Regression, TrackRegression
from mamba2_apps.tasks.tokens import TokenClassification, TokenMultiLabel

__all__ = [
    "CTC",
    "Classification",
    "LabelMean",
    "MaskedReconstruction",
    "MultiLabel",
    "NextToken",
    "OptimizerConfig",
    "Regression",
    "SequenceModel",
    "Task",
    "TokenClassification",
    "TokenMultiLabel",
    "TrackRegression",
]
