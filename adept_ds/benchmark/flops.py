"""Floating-point operations that a step needs, and the share of the device's peak that it reaches (MFU).

Counted are the products of the frozen backbone's forward pass and of the gradient of its input, at the real tokens and
the soft prompt: no gradients of frozen weights, no padding, no recomputation, the LM head where there is a label. For a
decoder of N weights in its linear layers, width d, L layers and vocabulary V, an example of S tokens, T with labels:

    4 N S + 12 L d S^2 + 4 d V T

Attention is counted in full, masked or not, as is usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Part of the device's name to its dense bf16 rate in TFLOP/s with fp32 accumulation, from the makers' data sheets.
The first that fits counts."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense rate of a device in FLOP/s; None if it is not known, or if `dtype` is none of the 16-bit ones."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    words = f"{device_name} "
    return next((rate * 1e12 for name, rate in PEAK_TFLOPS.items() if f"{name} " in words.replace("-", " ")), None)


class ModelFlops:
    """Counts the operations of single examples, on a backbone without weights.

    Every product is linear in each of the lengths S of the input and T of the target that it takes, so the count is a
    polynomial a S^2 + b S + c T^2 + d T + e S T, which a few short examples determine.
    """

    def __init__(self, architecture: PreTrainedConfig) -> None:
        is_encoder_decoder = architecture.is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            # Eager attention is made of products that the counter knows on every device.
            backbone = auto.from_config(
                architecture, attn_implementation="eager", trust_remote_code=False
            ).requires_grad_(False)
        head = backbone.get_output_embeddings()
        self._per_label = 4 * head.in_features * head.out_features
        backbone.set_output_embeddings(nn.Identity())
        self._monomials = _of_both_lengths if is_encoder_decoder else _of_input_length
        points = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)] if is_encoder_decoder else [(1, 0), (2, 0)]
        system = torch.tensor([self._monomials(*point) for point in points], dtype=torch.float64)
        counts = [_count(backbone, head.in_features, *point) for point in points]
        solution = torch.linalg.solve(system, torch.tensor(counts, dtype=torch.float64))
        self._coefficients = [round(value) for value in solution.tolist()]

    def of_example(self, inputs: int, labels: int) -> int:
        """Operations for an input of so many positions, soft prompt included, and so many label tokens."""
        terms = zip(self._coefficients, self._monomials(inputs, labels), strict=True)
        return sum(coefficient * monomial for coefficient, monomial in terms) + labels * self._per_label


def _of_input_length(inputs: int, targets: int) -> list[int]:
    return [inputs**2, inputs]


def _of_both_lengths(inputs: int, targets: int) -> list[int]:
    return [inputs**2, inputs, targets**2, targets, inputs * targets]


def _count(backbone: Any, width: int, inputs: int, targets: int) -> int:
    """Operations of one pass forward and back to the embedded input, without the LM head."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        embeddings = torch.empty(1, inputs, width, requires_grad=True)
        # Given so, neither kind of model looks at the values of a mask, which has none here.
        lengths = (
            {"decoder_input_ids": torch.empty(1, targets, dtype=torch.long)}
            if targets
            else {"attention_mask": torch.empty(1, inputs, dtype=torch.long)}
        )
        hidden = backbone(inputs_embeds=embeddings, use_cache=False, **lengths).logits
        hidden.backward(torch.empty_like(hidden))
    return counter.get_total_flops()
