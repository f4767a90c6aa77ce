"""How many matrix products a meta-gradient takes, and so how much longer than first order it has to be.

The unit is one product of a linear layer's activations and weights, ``2 rows in out`` floating-point operations. For
y = x w'::

    gradient             forward 1, backward 2 (x_bar, w_bar)                                                   = 3
    Hessian product      forward 1, its tangent 2, backward: x_bar 1, x_bar_dot 2, w_bar_dot 2                  = 8
    double backward      of a gradient whose graph was kept; both halves of the first backward are there        = 6
    recomputing blocks   one forward more in a gradient; one forward and its tangent more in a Hessian product

Over K inner SGD steps and a query: first order K + 1 gradients, an exact one K Hessian products on top. Double
backward needs fewer products than Hessian products by duals do, and pays for it with the memory of every graph.
Attention's products and everything that is bound by bandwidth are left out.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """Units of one gradient, and of what is added for each inner step to be differentiated."""

    gradient: int
    pull_back: int

    def units(self, steps: int) -> int:
        """Units of a meta-gradient over ``steps`` inner steps."""
        return self.gradient * (steps + 1) + self.pull_back * steps


FIRST_ORDER = Work(gradient=3, pull_back=0)
KEPT = Work(gradient=3, pull_back=8)
RECOMPUTED = Work(gradient=4, pull_back=11)
DOUBLE_BACKWARD = Work(gradient=3, pull_back=6)


def limit(work: Work, steps: int) -> float:
    """The least time of ``work`` in units of first order's: their ratio if products were all that takes time."""
    return work.units(steps) / FIRST_ORDER.units(steps)
