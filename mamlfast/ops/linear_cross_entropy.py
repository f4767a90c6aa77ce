"""The head of a language model and its loss, a product and a cross-entropy, without ever holding the logits.

With rows x [R, d], w [V, d] and b [V], a soft-cap c, smoothing alpha, the one-hot label e, the targets
q = (1 - alpha) e + alpha / V, the weight zeta of the z-loss, and row weights om::

    z = x w' + b           u = 1 - tanh^2(z / c)       s = c tanh(z / c)             (no cap: s = z, u = 1)
    z_dot = x_dot w' + x w_dot' + b_dot                s_dot = u z_dot
    lse = logsumexp(s)     p = exp(s - lse)            mu = <p, s_dot>               the tangent of lse
    l = lse - <q, s> + zeta lse^2                      l_dot = mu - <q, s_dot> + 2 zeta lse mu
    loss = sum om l                                    loss_dot = sum (om_dot l + om l_dot)

    a = 1 + 2 zeta lse                                 a_dot = 2 zeta mu
    s_bar = g (a p - q)                                s_bar_dot = g_dot (a p - q) + g p (a (s_dot - mu) + a_dot)
    z_bar = u s_bar                                    z_bar_dot = u s_bar_dot - 2 / c^2 s s_dot s_bar
    x_bar = z_bar w                                    x_bar_dot = z_bar_dot w + z_bar w_dot
    w_bar = z_bar' x                                   w_bar_dot = z_bar_dot' x + z_bar' x_dot
    b_bar = sum_rows z_bar                             b_bar_dot = sum_rows z_bar_dot

with g, g_dot [R] the cotangent of l and its tangent: ``om y_bar`` and ``om_dot y_bar + om y_bar_dot`` where the loss is
a scalar, whose om has om_bar = y_bar l and om_bar_dot = y_bar_dot l + y_bar l_dot. Rows are visited a chunk at a time
(``linear_cross_entropy_chunks``), so no logits, tangents or cotangents of them are ever whole. Rows whose label is
ignored are left out before any product.

*Where the gradients are formed.* A backward that meets nothing but lse and mu makes the logits of each chunk again: 4
products of R x d x V for a gradient and 11 for a Hessian-vector product. Since y_bar of a scalar loss is one number,
the forward can do the backward's work for y_bar = 1, y_bar_dot = 0, while it has the logits ::

    x_bar = y_bar X1       x_bar_dot = y_bar X2 + y_bar_dot X1       and so for w, b

which takes the 3 and 8 products of a head that keeps its logits, at the cost of holding w_bar (w_bar_dot) from the
forward to the backward. Both are exact. A first-order loss that stores X1 alone is wrong, in silence, from there on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlfast.ops.linear_cross_entropy_chunks import Constants, Statistics, Wanted, sweep, wide_dtype
from mamlfast.ops.rule import Rule

REDUCTIONS = ("mean", "sum", "none")
GRADIENTS = ("auto", "forward", "backward")


def linear_cross_entropy_reference(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    target: Tensor,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Return what ``linear_cross_entropy`` does, from whole logits and PyTorch's own derivatives."""
    z = (x @ w.mT if bias is None else x @ w.mT + bias).to(wide_dtype(x))
    counted = target != ignore_index
    losses = _losses_of(z, target.masked_fill(~counted, 0), label_smoothing, z_loss, softcap).masked_fill(~counted, 0)
    om = counted.to(losses.dtype) if weights is None else weights.masked_fill(~counted, 0)
    if reduction == "none":
        return om * losses
    total = (om * losses).sum()
    if reduction == "sum":
        return total
    return total / (om.sum() if normalizer is None else normalizer)


def _losses_of(z, target, label_smoothing, z_loss, softcap):
    s = softcap * torch.tanh(z / softcap) if softcap else z
    lse = torch.logsumexp(s, -1)
    picked = s.gather(-1, target[..., None])[..., 0]
    expected = (1 - label_smoothing) * picked + label_smoothing * s.mean(-1)
    return lse - expected + z_loss * lse**2


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    target: Tensor,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    gradients: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits ``x w' + bias`` against ``target``, differentiable twice, without the logits.

    A language model's labels are to be shifted by the caller: row i of ``x`` is scored against ``target[i]``.

    Args:
        x: [..., d], the last hidden states; w: [V, d], the output embedding; bias: [V] or None. One floating dtype.
        target: [...] int64, labels from 0 to V - 1 or ``ignore_index``, whose rows are never computed.
        weights: [...], factors of the tokens' losses; a constant or learned.
        reduction: "mean" (over the tokens that count, or divided by the sum of their weights), "sum" or "none".
        normalizer: what "mean" divides by instead, for example the number of items in an accumulated batch.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        z_loss: the weight of ``logsumexp(z)^2``, added to each token's loss.
        softcap: logits are ``softcap tanh(z / softcap)``, as in Gemma 2.
        gradients: where those of a scalar loss are formed. "forward" makes no logits twice and holds one more tensor
            of the size of ``w`` until the backward; "backward" holds two numbers a row; "auto" is "forward" where
            that tensor is no larger than the logits would be (d at most the number of rows that count) and the dtype
            is not float16, whose gradients before a loss scale may underflow.

    Returns the loss, float32 or, for float64 operands, float64: a scalar, or the shape of ``target`` with zeros where
    labels are ignored. The mean of no tokens is NaN and its gradients are zero, as those of
    ``torch.nn.functional.cross_entropy``.

    Cost: 3 products of R x d x V for a gradient and 8 for a Hessian-vector product, or 4 and 11 with
    ``gradients="backward"``; beside the results, memory for two chunks of logits. On a GPU, counting the labels that
    are not ignored waits for the device.

    Raises ValueError for shapes, dtypes and options that do not fit together, and IndexError or RuntimeError for a
    label outside the vocabulary. Source: derivatives as above; the soft-cap from Gemma 2 (arXiv:2408.00118), the
    z-loss from PaLM (arXiv:2204.02311).
    """
    _check(x, w, bias, target, weights, reduction, normalizer, softcap, gradients)
    x, w, bias = _autocast(x, w, bias)
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    om = None if weights is None else weights.reshape(-1).to(wide_dtype(x))
    counted = (labels != ignore_index).nonzero()[:, 0]
    some = len(counted) < len(labels)
    if some:
        rows, labels = rows.index_select(0, counted), labels[counted]
        om = None if om is None else om.index_select(0, counted)
    xs = (rows, w) if bias is None else (rows, w, bias)
    options = {"target": labels, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap or 0.0}
    if reduction == "none":
        losses = token_losses(*xs, **options)
        losses = losses if om is None else om * losses
        return (_spread(losses, counted, target.numel()) if some else losses).reshape(target.shape)
    om = _row_weights(om, rows, reduction, normalizer)
    loss = summed_losses(*xs, om, **options, gradients=gradients)
    return loss + torch.nan if reduction == "mean" and normalizer is None and len(counted) == 0 else loss


def _check(x, w, bias, target, weights, reduction, normalizer, softcap, gradients):
    shapes = [list(w.shape), list(x.shape), list(target.shape)]
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1] or x.shape[:-1] != target.shape:
        raise ValueError(
            f"linear_cross_entropy expects w [V, d], x [..., d] and target [...]; got {', '.join(map(str, shapes))}: "
            f"w has the layout of torch.nn.Linear, and each row of x needs a label"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy expects int64 labels, got {target.dtype}: convert target with .long()")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"linear_cross_entropy expects a bias [{w.shape[0]}], one for each row of w; got {bias.shape}")
    if weights is not None and weights.shape != target.shape:
        raise ValueError(f"linear_cross_entropy expects weights {list(target.shape)}, got {list(weights.shape)}")
    if reduction not in REDUCTIONS or gradients not in GRADIENTS:
        raise ValueError(
            f"linear_cross_entropy expects a reduction of {REDUCTIONS} and gradients of {GRADIENTS}; "
            f"got {reduction!r} and {gradients!r}"
        )
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer replaces the divisor of reduction='mean'; with {reduction!r} there is none")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap; got {softcap}")


def _autocast(x, w, bias):
    """The operands as a linear layer takes them; autocast does not look into a Rule."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    if w.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"linear_cross_entropy expects x, w and bias of one dtype; got {x.dtype} and {w.dtype}")
    return x, w, bias


def _row_weights(om, rows, reduction, normalizer):
    """The factor of each loss in the scalar."""
    if om is None:
        om = torch.ones(rows.shape[0], dtype=wide_dtype(rows), device=rows.device)
    if reduction == "sum":
        return om
    return om / (om.sum() if normalizer is None else normalizer)


def _spread(losses, counted, total):
    """Zeros everywhere but at ``counted``."""
    place = losses.new_full((total,), len(counted), dtype=torch.int64)
    place[counted] = torch.arange(len(counted), device=counted.device)
    return torch.cat([losses, losses.new_zeros(1)])[place]


def _constants(options) -> Constants:
    return Constants(**{name: options[name] for name in ("label_smoothing", "z_loss", "softcap") if name in options})


def _narrowed(bars, xs):
    return (None if x_bar is None else x_bar.to(x.dtype) for x_bar, x in zip(bars, xs, strict=True))


def _token_losses_reference(x, w, *b, target, label_smoothing=0.0, z_loss=0.0, softcap=0.0):
    bias = b[0] if b else None
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap or None}
    return linear_cross_entropy_reference(x, w, bias, target=target, reduction="none", **options)


def _token_fwd(xs, *, target, **options):
    stats, *_ = sweep(xs, None, target, _constants(options))
    return stats.loss.to(wide_dtype(xs[0])), (stats.lse,)


def _token_fwd_jvp(xs, xs_dot, *, target, **options):
    stats, *_ = sweep(xs, xs_dot, target, _constants(options))
    dtype = wide_dtype(xs[0])
    return stats.loss.to(dtype), stats.loss_dot.to(dtype), (stats.lse, stats.mu)


def _token_bwd(xs, saved, y_bar, need, *, target, **options):
    known = Statistics(lse=saved[0])
    _, bars, _ = sweep(xs, None, target, _constants(options), known=known, g=y_bar, wanted=(need, ()))
    return tuple(_narrowed(bars, xs))


def _token_bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, target, **options):
    known, wanted = Statistics(lse=saved[0], mu=saved[1]), (need, need_dot)
    cotangents = {"known": known, "g": y_bar, "g_dot": y_bar_dot, "wanted": wanted}
    _, bars, bars_dot = sweep(xs, xs_dot, target, _constants(options), **cotangents)
    return tuple(_narrowed(bars, xs)), tuple(_narrowed(bars_dot, xs))


# x [R, d], w [V, d], perhaps b [V] -> losses [R]; no label is ignored.
token_losses = Rule(
    name="linear_cross_entropy_tokens",
    reference=_token_losses_reference,
    fwd=_token_fwd,
    bwd=_token_bwd,
    fwd_jvp=_token_fwd_jvp,
    bwd_jvp=_token_bwd_jvp,
    none_tangents=True,
)


def _summed_reference(*xs, gradients="auto", formed=None, **options):
    *xs, om = xs
    return (om * _token_losses_reference(*xs, **options)).sum()


@dataclass(frozen=True, kw_only=True)
class _Summed(Rule):
    """The rule of a scalar loss, told which gradients to form in the forward: those that autograd will ask for.

    ``formed`` is ``need`` and ``need_dot`` of the backward to come. A backward that is asked for others is not wrong,
    it makes the logits again.
    """

    def __call__(self, *xs: Tensor, gradients: str = "auto", **options) -> Tensor:
        # A Dual among the operands ends in ``dual``, which knows better than this.
        need = _needed(xs, gradients)
        return super().__call__(*xs, formed=(need, need), gradients=gradients, **options)

    def dual(self, xs, xs_dot, *, gradients: str = "auto", formed: Wanted | None = None, **options):
        formed = _needed(xs_dot, gradients, xs), _needed(xs, gradients)
        return super().dual(xs, xs_dot, formed=formed, **options)


def _needed(xs, gradients, operands=None) -> Sequence[bool]:
    x, w, *_ = operands or xs
    if gradients == "auto":
        gradients = "forward" if x.shape[0] >= x.shape[1] and x.dtype != torch.float16 else "backward"
    recorded = torch.is_grad_enabled() and gradients == "forward"
    return tuple(recorded and t is not None and t.requires_grad for t in xs[:-1])


def _formed(formed: Wanted | None, xs) -> Wanted:
    nothing = (False,) * len(xs)
    return formed or (nothing, nothing)


def _summed_fwd(xs, *, target, formed=None, gradients="auto", **options):
    *xs, om = xs
    need, _ = _formed(formed, xs)
    g = om if any(need) else None
    stats, bars, _ = sweep(xs, None, target, _constants(options), g=g, wanted=(need, ()))
    return _weighted(om, stats.loss), (stats.loss, stats.lse, *_present(bars))


def _summed_fwd_jvp(xs, xs_dot, *, target, formed=None, gradients="auto", **options):
    (*xs, om), (*xs_dot, om_dot) = xs, xs_dot
    wanted = _formed(formed, xs)
    g, g_dot = (om, _or_zeros(om_dot, om)) if any(map(any, wanted)) else (None, None)
    stats, bars, bars_dot = sweep(xs, xs_dot, target, _constants(options), g=g, g_dot=g_dot, wanted=wanted)
    y_dot = _weighted(om, stats.loss_dot)
    if om_dot is not None:
        y_dot = y_dot + _weighted(om_dot, stats.loss)
    statistics = stats.loss, stats.loss_dot, stats.lse, stats.mu
    return _weighted(om, stats.loss), y_dot, (*statistics, *_present(bars), *_present(bars_dot))


def _summed_bwd(xs, saved, y_bar, need, *, target, formed=None, gradients="auto", **options):
    (*xs, om), (*need, need_om), (loss, lse, *ready) = xs, need, saved
    have, _ = _formed(formed, xs)
    if _covers(have, need):
        bars = [_times(y_bar, x_bar) for x_bar in _unpacked(ready, have)]
    else:
        known, g = Statistics(lse=lse), om * y_bar
        _, bars, _ = sweep(xs, None, target, _constants(options), known=known, g=g, wanted=(need, ()))
    return *_narrowed(bars, xs), _om_bar(y_bar, loss, om) if need_om else None


def _summed_bwd_jvp(
    xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, target, formed=None, gradients="auto", **options
):
    (*xs, om), (*xs_dot, om_dot), (loss, loss_dot, lse, mu, *ready) = xs, xs_dot, saved
    (*need, need_om), (*need_dot, need_om_dot) = need, need_dot
    have, have_dot = _formed(formed, xs)
    if _covers(have, need) and _covers(have_dot, need_dot) and (_covers(have, need_dot) or not y_bar_dot.any()):
        first, second = _unpacked(ready[: sum(have)], have), _unpacked(ready[sum(have) :], have_dot)
        bars = [_times(y_bar, one) if n else None for one, n in zip(first, need, strict=True)]
        bars_dot = [_combined(y_bar, two, y_bar_dot, one) for one, two in zip(first, second, strict=True)]
    else:
        known = Statistics(lse=lse, mu=mu)
        g, g_dot = om * y_bar, _or_zeros(om_dot, om) * y_bar + om * y_bar_dot
        cotangents = {"known": known, "g": g, "g_dot": g_dot, "wanted": (need, need_dot)}
        _, bars, bars_dot = sweep(xs, xs_dot, target, _constants(options), **cotangents)
    om_bar = _om_bar(y_bar, loss, om) if need_om else None
    om_bar_dot = _om_bar(y_bar_dot, loss, om) + _om_bar(y_bar, loss_dot, om) if need_om_dot else None
    return (*_narrowed(bars, xs), om_bar), (*_narrowed(bars_dot, xs), om_bar_dot)


def _weighted(om, losses):
    return (om.to(losses.dtype) * losses).sum().to(om.dtype)


def _om_bar(y_bar, losses, om):
    return (y_bar * losses).to(om.dtype)


def _or_zeros(t, like):
    return torch.zeros_like(like) if t is None else t


def _covers(have, need):
    return all(h or not n for h, n in zip(have, need, strict=True))


def _present(bars):
    return (x_bar for x_bar in bars if x_bar is not None)


def _unpacked(ready, have):
    rest = iter(ready)
    return [next(rest) if h else None for h in have]


def _times(y_bar, x_bar):
    return None if x_bar is None else y_bar * x_bar


def _combined(y_bar, x_bar_dot, y_bar_dot, x_bar):
    """``y_bar X2 + y_bar_dot X1``; X1 is missing only where y_bar_dot is zero."""
    if x_bar_dot is None or x_bar is None:
        return _times(y_bar, x_bar_dot)
    return torch.addcmul(y_bar * x_bar_dot, y_bar_dot, x_bar)


# x [R, d], w [V, d], perhaps b [V], then om [R] -> the scalar <om, losses>; no label is ignored.
summed_losses = _Summed(
    name="linear_cross_entropy",
    reference=_summed_reference,
    fwd=_summed_fwd,
    bwd=_summed_bwd,
    fwd_jvp=_summed_fwd_jvp,
    bwd_jvp=_summed_bwd_jvp,
    none_tangents=True,
)
