"""Adam and AdamW."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mamlfast.inner.optimizer import Optimizer
from mamlfast.inner.rate import Rate, check_number
from mamlfast.inner.state import Slots, zeros


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """``torch.optim.Adam`` (Kingma and Ba, 2015, arXiv:1412.6980)::

        h = g + weight_decay p
        m' = beta1 m + (1 - beta1) h,   s' = beta2 s + (1 - beta2) h^2,   t' = t + 1
        p' = p - lr / (1 - beta1^t') m' / d,      d = sqrt(s') / sqrt(1 - beta2^t') + eps

    State: ``step`` t, ``exp_avg`` m, ``exp_avg_sq`` s.

    Where s' = 0 (a parameter that has had no gradient yet, as the rows of an embedding for absent tokens) autograd
    through the square root gives NaN. The root reaches p' only times m', which is 0 there too, so its share in the
    derivative tends to 0 and p' depends on g with the slope ``-lr / (1 - beta1^t') (1 - beta1) / eps``; that limit is
    what ``update`` and ``pull_back`` give. With eps = 0 the update itself is 0 / 0 there, in torch.optim as here.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    slots: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    decoupled: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_number(self.eps, "eps")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers; got {self.betas}")
        for i, beta in enumerate(self.betas):
            check_number(beta, f"betas[{i}]")
            if beta >= 1:
                raise ValueError(f"betas[{i}] must be below 1; got {beta}")

    @property
    def needs_gradient(self) -> bool:
        """Always: the transpose depends on where it is taken."""
        return True

    def init_one(self, p: Tensor) -> Slots:
        """Return step 0 and zeros that take no memory."""
        return {"step": 0, "exp_avg": zeros(p), "exp_avg_sq": zeros(p)}

    def update_one(
        self, p: Tensor, slots: Slots, g: Tensor, lr: Rate, *, out: Tensor | None = None
    ) -> tuple[Tensor, Slots]:
        """See ``Optimizer``."""
        _, m, s = self._moments(p, slots, g)
        step = slots["step"] + 1
        c1, c2 = self._corrections(step)
        d = _root(s).div_(c2).add_(self.eps)
        if self.decoupled and self.weight_decay:
            p = p.mul(1 - lr * self.weight_decay).to(p.dtype)
        if isinstance(lr, Tensor):
            p = torch.sub(p, (lr / c1 * (m / d)).to(p.dtype), out=out)
        else:
            p = torch.addcdiv(p, m, d, value=-lr / c1, out=out)
        return p, {"step": step, "exp_avg": m, "exp_avg_sq": s}

    def _moments(self, p, slots, g):
        """The gradient with its weight decay, and both moments after the step."""
        h = g.add(p, alpha=self.weight_decay) if self.weight_decay and not self.decoupled else g
        m = torch.lerp(slots["exp_avg"], h, 1 - self.betas[0])
        s = slots["exp_avg_sq"].mul(self.betas[1]).addcmul_(h, h, value=1 - self.betas[1])
        return h, m, s

    def _corrections(self, step):
        return 1 - self.betas[0] ** step, math.sqrt(1 - self.betas[1] ** step)

    def pull_back(
        self, p: Any, slots: Slots, g: Any, lr: Rate, p_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Optimizer``."""
        (beta1, beta2), (c1, c2) = self.betas, self._corrections(slots["step"] + 1)
        h, m, s = self._moments(p, slots, g)
        root = s.sqrt()
        d = root.div(c2).add_(self.eps)
        by_rate = m.div(d).div_(c1)
        lr_bar = -(p_bar * by_rate) if isinstance(lr, Tensor) else None
        pull = p_bar.mul(lr / c1).div_(d)  # minus the cotangent of m', plus that of d times d / m'
        m_bar = slots_bar["exp_avg"].sub(pull)
        s_bar = pull.mul_(_quotient(m, root)).div_(d).div_(2 * c2).add_(slots_bar["exp_avg_sq"])
        g_bar = m_bar.mul(1 - beta1).addcmul_(h, s_bar, value=2 * (1 - beta2))
        slots_bar["exp_avg"], slots_bar["exp_avg_sq"] = m_bar.mul_(beta1), s_bar.mul_(beta2)
        if not self.weight_decay:
            return g_bar, lr_bar
        if not self.decoupled:
            p_bar.add_(g_bar, alpha=self.weight_decay)
            return g_bar, lr_bar
        if lr_bar is not None:
            lr_bar.sub_(p_bar * p, alpha=self.weight_decay)
        p_bar.mul_(1 - lr * self.weight_decay)
        return g_bar, lr_bar


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """``torch.optim.AdamW``: Adam whose weight decay acts on the parameter, not through the gradient.

    ::

        p' = (1 - lr weight_decay) p - lr / (1 - beta1^t') m' / d             with h = g

    (Loshchilov and Hutter, 2019, arXiv:1711.05101.)
    """

    weight_decay: float = 1e-2

    decoupled: ClassVar[bool] = True


def _root(s):
    """The square root, with the slope 0 at 0: see ``Adam``; may be changed in place."""
    if not s.requires_grad:
        return s.sqrt()
    zero = s == 0
    return s.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _quotient(m, root):
    """``m / root``, 0 where the root is."""
    zero = root == 0
    return m.div(root.masked_fill(zero, 1)).masked_fill_(zero, 0)
