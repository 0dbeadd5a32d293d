"""Cross-entropy where a label exists, without the logits of any other position.

Full logits are [B, S, V] in the model's precision, again in fp32 for the softmax, and again as a gradient: for
Llama3-8B at 4 x 512 tokens 0.98 GiB in fp32 alone. Here the LM head sees only the positions with a label, a chunk of
rows at a time, and what stays for the backward pass is one [N, d] gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adept_ds.backbone.frozen_linear import matmul
from adept_ds.errors import UserError
from adept_ds.model.logits_tail import LogitsTail, shares_memory, untouched

IGNORE_INDEX = -100
"""Label of a position that has none."""

CHUNK_ELEMENTS = 2**25
"""Logits computed at a time (128 MiB in fp32)."""


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's predictions, to be followed beside the labels."""

    hidden: Tensor
    """What the LM head reads of the teacher at the positions with a label [N, d]."""
    weight: float
    """Factor w of the divergence."""
    temperature: float
    """Temperature T of both predictions."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(t(h W^T + b))[target] over the rows, with gradients computed along the forward pass.

    The tail t is what the backbone does to its logits, mostly nothing. With label smoothing e the target's term is

        (1 - e) (-log p[target]) + e mean(-log p),   p = softmax of the row's V logits, the mean over all V of them

    which is cross-entropy with (1 - e) onehot + e / V (Szegedy et al. 2016, section 7), as in `F.cross_entropy` and
    as HyperFormer is trained; fairseq's later form shares e among the V - 1 others. With soft targets each row has
    w KL(q || p) besides, where p = softmax(z / T) of its logits z, and q of the teacher's; these are not smoothed.

    d loss / d h = (softmax - (1 - e) onehot - e / V) W needs the logits, which are at hand in the forward pass only. A
    frozen head is therefore not needed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        smoothing: float,
        soft: SoftTargets | None,
        tail: LogitsTail | None,
    ) -> Tensor:
        """Take hidden [N, d], targets [N], weight [V, d], bias [V], e; return the summed loss, an fp32 scalar."""
        loss = hidden.new_zeros((), dtype=torch.float32)
        wants_hidden, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = _logits(part, weight, bias)
            if tail:
                with torch.enable_grad():
                    of_head = logits.requires_grad_()
                    of_backbone = tail(of_head)
                logits = of_backbone.detach().clone()
            if soft is not None:
                teacher = _logits(soft.hidden[start : start + rows], weight, bias)
                teacher = tail(teacher) if tail else teacher
                divergence, grad_divergence = _divergence(logits, teacher, soft.temperature)
                loss += soft.weight * divergence
            normaliser = logits.logsumexp(-1, keepdim=True)
            of_labels = logits.gather(-1, target)
            if smoothing:
                of_labels = of_labels.lerp(logits.mean(-1, keepdim=True), smoothing)
            loss += (normaliser - of_labels).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad_logits = logits.sub_(normaliser).exp_()
            grad_logits.scatter_add_(-1, target, grad_logits.new_full(target.shape, smoothing - 1.0))
            if smoothing:
                grad_logits.sub_(smoothing / grad_logits.shape[-1])
            if soft is not None:
                grad_logits.add_(grad_divergence, alpha=soft.weight)
            if tail:
                (grad_logits,) = torch.autograd.grad(of_backbone, of_head, grad_logits)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = matmul(grad_logits, weight)
            if grad_weight is not None:
                grad_weight += matmul(grad_logits.t(), part)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients."""
        (grad,) = grads
        hidden, weight, bias = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, None, weight, bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return h W^T + b in fp32 [N, V]."""
    logits = matmul(hidden, weight.t()).float()
    return logits if bias is None else logits.add_(bias)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL(softmax(teacher / T) || softmax(student / T)) of logits [N, V], summed over the rows, and its gradient
    by the student's logits."""
    log_p = (student / temperature).log_softmax(-1)
    log_q = (teacher / temperature).log_softmax(-1)
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(), (log_p.exp_() - q) / temperature


class LossHead(nn.Module):
    """An LM head that can return the summed loss in place of logits.

    It shares the replaced head's parameters. Inside `summing(targets)` its forward maps hidden states [B, S, d] to the
    loss summed over the positions with a target, as fp32 [1, 1, 1]; everywhere else to the logits [B, S, V]. The
    backbone passes on whatever its head returns, so its own scaling of the hidden states needs no repetition here, and
    ZeRO-3 gathers the head once, around this forward, however many chunks it takes. What it would do to logits behind
    the head, its `tail`, is done here to each chunk, and then not to the loss.

    `tail` is None where it is not known; see `trace_tail`.
    """

    def __init__(self, head: nn.Linear, tail: LogitsTail | None = None) -> None:
        super().__init__()
        self.tail = tail
        self.weight = head.weight
        self.bias = head.bias
        # Trained in fp32 beside the head's own by a method.
        self.added_bias: Tensor | None = getattr(head, "added_bias", None)
        self._targets: Tensor | None = None
        self._smoothing = 0.0
        self._soft: SoftTargets | None = None
        self._loss: Tensor | None = None
        self._recorded: list[Tensor] | None = None
        self._behind: ExitStack | None = None

    @contextmanager
    def summing(self, targets: Tensor, soft: SoftTargets | None = None, label_smoothing: float = 0.0) -> Iterator[None]:
        """Within the block return the loss at `targets` [B, S], `IGNORE_INDEX` where there is none, with the share
        `label_smoothing` of each target spread over the vocabulary."""
        self._targets, self._smoothing, self._soft, self._behind = targets, label_smoothing, soft, ExitStack()
        try:
            with self._behind:
                yield
        finally:
            self._targets = self._soft = self._loss = self._behind = None
            self._smoothing = 0.0

    @contextmanager
    def recording(self, targets: Tensor) -> Iterator[list[Tensor]]:
        """Within the block compute no loss: append the hidden states at `targets` [N, d] to the list that is yielded,
        and return [1, 1, 1]."""
        self._targets, self._recorded = targets, []
        try:
            yield self._recorded
        finally:
            self._targets = self._recorded = None

    def returned(self, logits: Tensor) -> bool:
        """Within `summing`: whether `logits` is what forward returned, untouched."""
        # By memory: hooks wrap outputs in new tensors of the same storage.
        return self._loss is not None and shares_memory(logits, self._loss)

    def _whole_bias(self) -> Tensor | None:
        if self.bias is None or self.added_bias is None:
            return self.bias if self.added_bias is None else self.added_bias
        return self.bias.float() + self.added_bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits or summed loss, see the class."""
        if self._targets is None:
            bias = self._whole_bias()
            if bias is None or self.added_bias is None:
                return matmul(hidden, self.weight.t(), bias)
            logits = matmul(hidden, self.weight.t())  # the trained term is not rounded before it is added
            return (logits.float() + bias).to(logits.dtype)
        if hidden.shape[:-1] != self._targets.shape:
            raise UserError(
                f"the backbone's LM head reads hidden states {list(hidden.shape)}, which are not one for each of the "
                f"{list(self._targets.shape)} tokens; such models cannot be trained here"
            )
        labelled = self._targets != IGNORE_INDEX
        rows = hidden[labelled]
        if self._recorded is not None:
            self._recorded.append(rows)
            return rows.new_zeros(1, 1, 1)
        targets = self._targets[labelled]
        bias = self._whole_bias()
        loss = _ChunkedCrossEntropy.apply(rows, targets, self.weight, bias, self._smoothing, self._soft, self.tail)
        loss = loss.view(1, 1, 1)
        self._loss = loss.detach()
        if self._behind is not None:
            # From here on: what looks at every function would slow the layers down, and stop a compiler.
            self._behind.enter_context(untouched(self.tail, lambda: self._loss))
        return loss


def shift_labels(labels: Tensor) -> Tensor:
    """Labels [B, S] of a causal model to targets: position t predicts token t + 1, the last one predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
