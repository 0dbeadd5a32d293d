"""What figures of speed depend on beside the code."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    facts: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(device)}
    # Linux alone has this file; elsewhere the platform module knows the name.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return facts | {
        "device": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }
