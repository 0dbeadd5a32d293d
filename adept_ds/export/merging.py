"""Methods whose effect is a change of single weights, merged into them.

    lora      W + alpha / r B A
    vera      W + diag(b) B diag(d) A, of A and B as much as the layer needs
    ia3       W diag(s) for a feed-forward layer's last projection, diag(s) W and diag(s) b elsewhere
    bitfit    b + its trained term, where the backbone has a bias

Each is computed in fp32 and rounded once to the precision that is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adept_ds.backbone.table import OpenTable
from adept_ds.config.method import BitFitConfig, LoraConfig, VeraConfig
from adept_ds.errors import UserError
from adept_ds.export.checkpoint import NAMES, Made
from adept_ds.export.vocabulary import Changes
from adept_ds.storage.adapter_folder import Adapter

_Edit = Callable[[Tensor], Tensor]
_LORA_A, _LORA_B, _IA3 = ".lora_A.weight", ".lora_B.weight", ".ia3_l"
_VERA_B, _VERA_D = ".vera_lambda_b", ".vera_lambda_d"


def merged(adapter: Adapter, opened: OpenTable, dtype: torch.dtype) -> Changes:
    """Return the weights that the adapter changes, each computed when it is written.

    Raises:
        UserError: One of them is not one tensor of the checkpoint, or serves for something else too.
    """
    edits = _edits(adapter, opened.backbone)
    changes = Changes()
    for name, edit in edits.items():
        stored = opened.tensor_of(name)
        places = opened.tied.get(name, [name])
        if stored is None or len(places) > 1:
            why = f"{' and '.join(places)} are one" if len(places) > 1 else "the checkpoint has no one tensor for it"
            raise UserError(
                f"--to folded: the adapter {adapter.folder} changes {name} of the backbone, which cannot be merged, as "
                f"{why}"
            )
        shape = opened.files.shape(stored)
        changes.changed[stored] = Made(NAMES[dtype], shape, _parts(opened, name, edit))
    return changes


def _parts(opened: OpenTable, name: str, edit: _Edit) -> Callable[[], Iterable[Tensor]]:
    return lambda: [edit(opened.read(name).float())]


def _edits(adapter: Adapter, backbone: nn.Module) -> dict[str, _Edit]:
    """Names of weights in the backbone to what becomes of their values."""
    values = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    edits: dict[str, _Edit] = {}
    if isinstance(adapter.method, LoraConfig):
        factor = adapter.method.alpha / adapter.method.rank
        for name in (name.removesuffix(_LORA_A) for name in values if name.endswith(_LORA_A)):
            delta = factor * (values[name + _LORA_B] @ values[name + _LORA_A])
            edits[f"{name}.weight"] = _adding(delta.T if _is_transposed(backbone, name) else delta)
    elif isinstance(adapter.method, VeraConfig):
        for name in (name.removesuffix(_VERA_B) for name in values if name.endswith(_VERA_B)):
            b, d = values[name + _VERA_B], values[name + _VERA_D]
            is_transposed = _is_transposed(backbone, name)
            inputs = backbone.get_parameter(f"{name}.weight").shape[0 if is_transposed else 1]
            delta = (b[:, None] * values["vera_B"][: len(b)]) @ (d[:, None] * values["vera_A"][:, :inputs])
            edits[f"{name}.weight"] = _adding(delta.T if is_transposed else delta)
    elif isinstance(adapter.method, BitFitConfig):
        for name, term in values.items():
            if getattr(backbone.get_submodule(name.rpartition(".")[0]), "bias", None) is None:
                raise UserError(
                    f"--to folded: {name} of the adapter {adapter.folder} stands where the backbone has no bias, so no "
                    "folder of its architecture has a place for it; use it here: `adept-ds eval`, `text2text`, `try`"
                )
            edits[name] = _adding(term)
    else:
        for name in (name.removesuffix(_IA3) for name in values):
            factors = values[name + _IA3]
            edits[f"{name}.weight"] = _scaling(factors.T if _is_transposed(backbone, name) else factors)
            layer: Any = backbone.get_submodule(name)
            if factors.shape[1] == 1 and layer.bias is not None:  # of the layer's output, and not of its input
                edits[f"{name}.bias"] = _scaling(factors[:, 0])
    return edits


def _adding(term: Tensor) -> _Edit:
    return lambda weight: weight + term


def _scaling(factors: Tensor) -> _Edit:
    return lambda weight: weight * factors


def _is_transposed(backbone: nn.Module, name: str) -> bool:
    """Whether a layer's weight is [in, out], as GPT-2's."""
    return isinstance(backbone.get_submodule(name), Conv1D)
