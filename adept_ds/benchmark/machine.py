"""What figures of speed depend on beside the code."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from adept_ds.evaluation.receipts import cpu_model


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    facts: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(device)}
    return facts | {
        "device": cpu_model() or platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }
