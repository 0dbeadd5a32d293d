"""ADePT fine-tuning of billion-scale language models under DeepSpeed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adept_ds.config.method import AdeptConfig
    from adept_ds.model.adapted_model import AdaptedModel, get_adept_model

    __version__: str

__all__ = ["AdaptedModel", "AdeptConfig", "get_adept_model"]

# On CPUs with AVX512-BF16 bitsandbytes recommends, on every rank, to install a kernel that only its own layers take.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: a config or the sandbox needs no torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("adept-ds")
    if name == "AdeptConfig":
        from adept_ds.config.method import AdeptConfig

        return AdeptConfig
    if name in __all__:
        from adept_ds.model import adapted_model

        return getattr(adapted_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
