"""Fitting a tuned lens' translator to stored residual rows (Belrose et al. 2023). Needs torch, not the model.

Minimised is the mean over rows of KL(p ‖ q): p is the model's own next-token distribution, q the lens'. A translator
begins at zero, where it is the logit lens, and the best one on held-out rows is kept: it is never worse there.

The bias is learned in units of the rows' root mean square and steps of the weight shrink with d_model, so that one
learning rate serves streams of any size: norm(c · x) = norm(x), and a step of Adam changes every number alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from actstore.errors import InvalidInput, explain
from actstore.models import Unembedding, logits
from actstore.models.transforms import NORMALIZED

from .tuned_files import Translator

__all__ = ["Fit", "FitOptions", "Rows", "fit_translator", "mean_kl"]

BIAS_RATE = 0.01  # of Adam, in units of the rows' root mean square
LOGITS_PER_BLOCK = 1 << 25  # a row block's logits, of which autograd keeps about five


@dataclass(frozen=True)
class Rows:
    """Aligned rows: a site's residual stream and the final one, (row, d_model) of any float dtype."""

    site: torch.Tensor
    final: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a translator is fitted; raises InvalidInput for numbers that cannot be."""

    n_steps: int = 1000
    learning_rate: float = 1.0  # of Adam, for the weight, divided by d_model; falls to 0 in a line
    evaluate_every: int = 50  # steps
    patience: int = 4  # evaluations without a better one, after which it stops

    def __post_init__(self) -> None:
        for name in ("n_steps", "learning_rate", "evaluate_every", "patience"):
            if not getattr(self, name) > 0:
                raise InvalidInput(explain(f"{name} is {getattr(self, name)}", accepted="above 0"))


@dataclass(frozen=True)
class Fit:
    """A fitted translator; KL in nats on held-out rows, of the logit lens and of this one."""

    translator: Translator
    kl_logit_lens: float
    kl: float
    n_steps: int


Told = Callable[[int, float], None]
"""Called at each evaluation with the steps that were made and the held-out KL."""


def fit_translator(
    batches: Callable[[], Iterable[Rows]],
    held_out: Rows,
    unembedding: Unembedding,
    options: FitOptions,
    told: Told = lambda _steps, _kl: None,
) -> Fit:
    """Return the translator of one site, fitted by Adam until it stops getting better on held-out rows.

    batches: an epoch of rows, in another order each time it is called; a batch may be empty. held_out: rows of other
    documents. All on the unembedding's device. Deterministic for given batches on one machine.
    Raises InvalidInput where an epoch has no rows.
    """
    learner = _Learner(held_out, unembedding, options)
    first = best_kl = learner.held_out_kl()
    best, n_worse, step = learner.translator(), 0, 0
    for step, rows in enumerate(_endless(batches, options.n_steps), start=1):
        learner.learn(rows)
        if step % options.evaluate_every and step < options.n_steps:
            continue
        kl = learner.held_out_kl()
        told(step, kl)
        n_worse = 0 if kl < best_kl else n_worse + 1
        if kl < best_kl:
            best, best_kl = learner.translator(), kl
        if n_worse == options.patience:
            break
    return Fit(best, first, best_kl, step)


class _Learner:
    """A translator that learns: weight, and bias in units of the rows' root mean square."""

    def __init__(self, held_out: Rows, unembedding: Unembedding, options: FitOptions) -> None:
        self.held_out, self.unembedding = held_out, unembedding
        self.scale = float(held_out.site.float().square().mean().sqrt())
        d_model, device = held_out.site.shape[1], held_out.site.device
        self.weight = torch.zeros(d_model, d_model, device=device, requires_grad=True)
        self.bias = torch.zeros(d_model, device=device, requires_grad=True)
        rates = ((self.weight, options.learning_rate / d_model), (self.bias, BIAS_RATE))
        self.optimizer = torch.optim.Adam([{"params": [one], "lr": rate} for one, rate in rates], betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / options.n_steps)

    def learn(self, rows: Rows) -> None:
        """Make one step on the mean KL of these rows."""
        self.optimizer.zero_grad()
        for block in _blocks(rows, self.unembedding):
            loss = _kl(self.unembedding, block, self.weight, self.scale * self.bias).sum() / len(rows.site)
            torch.autograd.backward(loss)
        self.optimizer.step()
        self.schedule.step()

    def held_out_kl(self) -> float:
        return mean_kl(self.unembedding, self.held_out, self.weight, self.scale * self.bias)

    def translator(self) -> Translator:
        """Return a copy of what was learned so far."""
        weight, bias = self.weight.detach().cpu().clone(), (self.scale * self.bias.detach()).cpu().clone()
        return Translator(weight.numpy(), bias.numpy())


def _endless(batches: Callable[[], Iterable[Rows]], n_steps: int) -> Iterator[Rows]:
    """Yield so many batches that are not empty, epoch after epoch."""
    n_given = 0
    while True:
        before = n_given
        for rows in filter(lambda one: len(one.site), batches()):
            yield rows
            n_given += 1
            if n_given == n_steps:
                return
        if n_given == before:
            raise InvalidInput(explain("There are no rows to fit to", next_step="extract more documents"))


def mean_kl(unembedding: Unembedding, rows: Rows, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Return the mean KL(model ‖ lens) of rows in nats, with this translator."""
    with torch.no_grad():
        sums = [float(_kl(unembedding, block, weight, bias).double().sum()) for block in _blocks(rows, unembedding)]
    return sum(sums) / len(rows.site)


def _blocks(rows: Rows, unembedding: Unembedding) -> Iterator[Rows]:
    size = max(1, LOGITS_PER_BLOCK // unembedding.weight.shape[0])
    for first in range(0, len(rows.site), size):
        yield Rows(rows.site[first : first + size], rows.final[first : first + size])


def _kl(unembedding: Unembedding, rows: Rows, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return KL(model ‖ lens) of each row: float32 (row)."""
    exact = rows.site.float()
    lens = torch.log_softmax(_logits(unembedding, exact + exact @ weight.T + bias), dim=-1)
    model = torch.log_softmax(logits(unembedding, rows.final), dim=-1)
    return (model.exp() * (model - lens)).sum(-1)


def _logits(unembedding: Unembedding, rows: torch.Tensor) -> torch.Tensor:
    """Return what `actstore.models.logits` returns, with a gradient."""
    normed = NORMALIZED[unembedding.norm](rows, unembedding.norm_eps) * unembedding.gain
    if unembedding.bias is not None:
        normed = normed + unembedding.bias
    raw: torch.Tensor = _Product.apply(normed, unembedding.weight)  # type: ignore[no-untyped-call]
    cap = unembedding.softcap
    return raw if cap is None else cap * torch.tanh(raw / cap)


class _Product(torch.autograd.Function):
    """rows @ weightᵀ in float32, rows rounded to the weight's dtype first; the weight is fixed.

    Autograd alone would multiply in the weight's dtype and round the logits to it.
    """

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        context.weight = weight
        return _product(rows, weight.T)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _product(gradient, context.weight), None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right in float32, left rounded to the type of right."""
    if right.dtype == torch.float32:
        return left @ right
    narrow = left.to(right.dtype)
    if right.is_cuda:
        return torch.mm(narrow, right, out_dtype=torch.float32)
    return narrow.float() @ right.float()
