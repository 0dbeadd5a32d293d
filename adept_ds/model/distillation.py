"""Distillation from teachers that are other prompts of the same frozen backbone (Wang et al. 2023, eq. 3 to 5).

At every labelled position, with logits z of the student and z' of the teacher, the hidden states h and h' [d] of the
last layer, a temperature T and a weight w, the loss gains

    w (KL(softmax(z' / T) || softmax(z / T)) + |h - h'|^2 / d)

Label smoothing is in the labels' term, and these two are the same with it. The teacher reads the same batch without
gradients and without dropout; a prompt of its own stands in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adept_ds.methods.base import Distillation
from adept_ds.model.loss import IGNORE_INDEX, LossHead, SoftTargets


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher had at the N labelled positions of a batch."""

    distillation: Distillation
    """How it is followed."""
    hidden: Tensor
    """Last hidden states [N, d]."""
    head_inputs: Tensor
    """What the LM head read [N, d]: the hidden states, but where the backbone scales them."""

    def soft_targets(self) -> SoftTargets:
        """Return what the loss head needs for the first term."""
        return SoftTargets(self.head_inputs, self.distillation.weight, self.distillation.temperature)

    def hidden_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the second term for the student's states [B, S, d], summed over the positions with a target."""
        student = hidden[targets != IGNORE_INDEX].float()
        squares = F.mse_loss(student, self.hidden.float(), reduction="sum")
        return self.distillation.weight * squares / hidden.shape[-1]


@torch.no_grad()
def teacher_states(backbone: Any, distillation: Distillation, targets: Tensor, **inputs: Any) -> TeacherStates:
    """Run a backbone that is being trained on the teacher's input.

    Args:
        backbone: The backbone, whose LM head is a `LossHead`.
        distillation: What the result is for.
        targets: As `LossHead.summing` takes them.
        **inputs: Of the backbone.
    """
    head: LossHead = backbone.get_output_embeddings()
    backbone.eval()
    try:
        with head.recording(targets) as head_inputs, last_hidden_states(backbone) as hidden:
            backbone(use_cache=False, **inputs)
    finally:
        backbone.train()
    return TeacherStates(distillation, hidden[0][targets != IGNORE_INDEX], head_inputs[0])


@contextmanager
def last_hidden_states(backbone: Any) -> Iterator[list[Tensor]]:
    """Within the block, append the last layer's states [B, S, d] of each pass to the list that is yielded."""
    states: list[Tensor] = []

    def keep(decoder: nn.Module, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    handle = backbone.get_decoder().register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()
