"""Batch norm over the joint batch of all processes, on any device and without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchmine.models.processes import num_processes

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """Normalises, in training mode, with the statistics of all processes' rows."""

    # torch's own takes no CPU tensors, and waits for the device in every call.  Every process must
    # make the same calls in the same order; they may bring different numbers of rows.

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch calls it so
        """(N, C, ...) -> the same shape."""
        if not self.training or num_processes() == 1:
            return super().forward(input)
        channels = input.new_zeros(self.num_features, dtype=_wide(input))
        weight = channels + 1 if self.weight is None else self.weight
        bias = channels if self.bias is None else self.bias
        normalised, mean, var, count = _Normalise.apply(input, weight, bias, self.eps)
        if self.track_running_stats:
            self._follow(mean, var * (count / (count - 1)))
        return normalised

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards those of one batch; ``var`` is the unbiased one."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        average = 1 / self.num_batches_tracked.to(mean.dtype)
        share = average if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            running.lerp_(new.to(running.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch calls it so
        if input.ndim < 2:
            raise ValueError(f"a batch norm takes (N, C, ...), got {input.ndim} dimensions")


def synchronise_batch_norms(module: nn.Module) -> None:
    """Batch norms become `SyncBatchNorm`, in place; ValueError for kinds not known here."""
    for name, part in module.named_modules():
        if type(part) in _PLAIN:
            part.__class__ = SyncBatchNorm  # as torch's own lazy modules become what they stand for
        elif isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm):
            kind = type(part).__name__
            raise ValueError(f"{name} is a {kind}, which cannot be synchronised over processes")


class _Normalise(torch.autograd.Function):
    """This process's rows normalised; mean (C,), biased variance (C,) and count () of all rows."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        counts, means, variances = _gather_statistics(x)  # (P, 1), (P, C), (P, C)
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        # Chan, Golub, LeVeque 1979: no difference of large squares.
        var = (counts * (variances + (means - mean).square())).sum(dim=0) / count
        context.save_for_backward(x, weight, mean, var, count)
        context.eps = eps
        context.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var, count

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var, count = context.saved_tensors
        # As if mean and variance were constants; then what comes by way of them, from the rows of
        # all processes.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, var, None, None, False, context.eps, [True, True, True]
        )
        # (2C,): of the gradient, and of its product with the normalised x
        sums = torch.cat([grad_bias, grad_weight])
        torch.distributed.all_reduce(sums)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        inverse = (var + context.eps).rsqrt()
        by_mean, by_var = (sums / count * (inverse * weight).repeat(2)).chunk(2)
        deviation, by_deviation = x - mean.view(shape), (by_var * inverse).view(shape)
        by_statistics = by_mean.view(shape) + deviation * by_deviation
        return (grad_x - by_statistics).to(x.dtype), grad_weight, grad_bias, None


def _gather_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (P, 1), means (P, C) and biased variances (P, C) of each process's share of a batch."""
    wide = x.to(_wide(x))
    var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    own = torch.cat([mean.new_full((1,), x.numel() / x.shape[1]), mean, var])
    every = [torch.empty_like(own) for _ in range(num_processes())]
    torch.distributed.all_gather(every, own)
    gathered = torch.stack(every)  # (P, 1 + 2C)
    means, variances = gathered[:, 1:].chunk(2, dim=1)
    return gathered[:, :1], means, variances


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
