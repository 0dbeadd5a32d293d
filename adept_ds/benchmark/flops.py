"""Floating-point operations that a step needs, and the share of the device's peak that it reaches (MFU).

Counted are the products of the frozen backbone's forward pass and of the gradient of its input, at the real tokens and
the soft prompt: no gradients of frozen weights, no padding, no recomputation, the LM head where there is a label. For a
decoder of N weights in its linear layers, width d, L layers and vocabulary V, an example of S tokens, T with labels:

    4 N S + 12 L d S^2 + 4 d V T

Attention is counted in full, masked or not, as is usual.
"""

from __future__ import annotations

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
    """Counts the operations of single examples on a backbone without weights; one count for each pair of lengths."""

    def __init__(self, architecture: PreTrainedConfig) -> None:
        self._encoder_decoder = architecture.is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if self._encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            # Eager attention is made of products that the counter knows on every device.
            self._backbone = auto.from_config(architecture, attn_implementation="eager").requires_grad_(False)
        head = self._backbone.get_output_embeddings()
        self._per_label = 4 * head.in_features * head.out_features
        self._width = head.in_features
        self._backbone.set_output_embeddings(nn.Identity())
        self._counted: dict[tuple[int, int], int] = {}

    def of_example(self, inputs: int, labels: int) -> int:
        """Operations for an input of so many positions, soft prompt included, and so many label tokens."""
        key = (inputs, labels if self._encoder_decoder else 0)
        if key not in self._counted:
            self._counted[key] = self._count(*key)
        return self._counted[key] + labels * self._per_label

    def _count(self, inputs: int, targets: int) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            embeddings = torch.empty(1, inputs, self._width, requires_grad=True)
            lengths = (
                {"decoder_input_ids": torch.empty(1, targets, dtype=torch.long)}
                if self._encoder_decoder
                else {"attention_mask": torch.empty(1, inputs, dtype=torch.long)}
            )
            hidden = self._backbone(inputs_embeds=embeddings, use_cache=False, **lengths).logits
            hidden.backward(torch.empty_like(hidden))
        return counter.get_total_flops()
