"""What an inner step is: an optimizer as a function of parameters, state and gradient, and its transpose.

An optimizer of the inner loop maps ``(params_k, state_k, g_k)`` to ``(params_{k+1}, state_{k+1})``. Going back through
the step needs the transpose of that map, in closed form and a parameter at a time: from the cotangents of what came
out, those of the parameter, of its state, of its gradient (the direction of the Hessian-vector product) and of the
learning rate.
"""

from mamlfast.inner.adam import Adam as Adam
from mamlfast.inner.adam import AdamW as AdamW
from mamlfast.inner.loop import InnerLoop as InnerLoop
from mamlfast.inner.optimizer import Optimizer as Optimizer
from mamlfast.inner.sgd import SGD as SGD
from mamlfast.inner.state import State as State
