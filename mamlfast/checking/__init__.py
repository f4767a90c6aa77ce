"""Proves the second order of a given model, and names what breaks it.

From the bottom: ``precision`` and ``differences`` (float64 and central differences, the oracle), ``functions`` (what a
graph was made by), ``costs``, ``pieces`` (the model's modules on their real inputs), ``whole`` (the loss of the
model), ``result`` (the findings and their table), ``proof`` (all of it).
"""

from mamlfast.checking.proof import check as check
from mamlfast.checking.result import CheckResult as CheckResult
from mamlfast.checking.result import Claim as Claim
from mamlfast.checking.result import ModuleResult as ModuleResult
