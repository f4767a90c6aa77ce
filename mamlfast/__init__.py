"""mamlfast: exact second-order meta-gradients for language models, at first-order memory.

The engine computes ``d L(params_K; query) / d params_0`` through K inner updates, for the user's own unmodified
models; see ``meta_grad``, ``MetaLearner`` and ``hvp``, and ``docs/design.md`` for how.
"""

from mamlfast import ops as ops
from mamlfast.adjoint import FirstOrder as FirstOrder
from mamlfast.adjoint import MetaResult as MetaResult
from mamlfast.adjoint import Replay as Replay
from mamlfast.adjoint import Reptile as Reptile
from mamlfast.adjoint import Unrolled as Unrolled
from mamlfast.checking import CheckResult as CheckResult
from mamlfast.checking import check as check
from mamlfast.dual import Dual as Dual
from mamlfast.episode import Episode as Episode
from mamlfast.fuse import fuse as fuse
from mamlfast.fuse import fused as fused
from mamlfast.fuse import fusion_report as fusion_report
from mamlfast.fuse import unfuse as unfuse
from mamlfast.hvp import hvp as hvp
from mamlfast.hvp import value_and_grad as value_and_grad
from mamlfast.inner import SGD as SGD
from mamlfast.inner import Adam as Adam
from mamlfast.inner import AdamW as AdamW
from mamlfast.meta import MetaLearner as MetaLearner
from mamlfast.meta import MetaLosses as MetaLosses
from mamlfast.meta import adapt as adapt
from mamlfast.meta import meta_grad as meta_grad
from mamlfast.meta import optimizer_state as optimizer_state
from mamlfast.model import causal_lm as causal_lm
from mamlfast.model import functional as functional

__version__ = "0.1.0"
