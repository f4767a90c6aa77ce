"""What the tests of an op with several rooms share: the specification's answers, and ours."""

from functools import partial
from typing import Any

import torch
from torch.func import jvp, vjp

# Both sides compute in float64 and add at most a few thousand terms.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def mapped(f, tree) -> Any:
    """Apply ``f`` to the tensors of nested tuples."""
    return tuple(mapped(f, t) for t in tree) if isinstance(tree, tuple) else f(tree)


def draw(rule, shapes, options, dtype=torch.float64):
    """Return xs, xs_dot, y_bar, y_bar_dot of order one, the same at every call."""
    torch.manual_seed(0)
    xs, xs_dot = (tuple(torch.randn(s, dtype=torch.float64) for s in shapes) for _ in range(2))
    y = rule.reference(*xs, **options)
    drawn = xs, xs_dot, torch.randn_like(y), torch.randn_like(y)
    return mapped(lambda t: t.to(dtype), drawn)


def oracle(rule, xs, xs_dot, y_bar, y_bar_dot, options):
    """Return y, y_dot, xs_bar, xs_bar_dot from forward and reverse mode of the reference."""
    f = partial(rule.reference, **options)

    def pullback(xs, y_bar):
        return vjp(f, *xs)[1](y_bar)

    return *jvp(f, xs, xs_dot), *jvp(pullback, (xs, y_bar), (xs_dot, y_bar_dot))


def ours(rule, xs, xs_dot, y_bar, y_bar_dot, options):
    """Return the same four from the two functions with tangents."""
    all_ = (True,) * len(xs)
    y, y_dot, saved = rule.fwd_jvp(xs, xs_dot, **options)
    return y, y_dot, *mapped(lambda t: t, rule.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, all_, all_, **options))


def first_order(rule, xs, y_bar, options):
    """Return y and xs_bar from the two functions without tangents."""
    y, saved = rule.fwd(xs, **options)
    return y, tuple(rule.bwd(xs, saved, y_bar, (True,) * len(xs), **options))


def same_bits(a, b):
    """Whether nested tuples hold equal tensors, NaN and the sign of zero aside."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return torch.equal(a, b)
