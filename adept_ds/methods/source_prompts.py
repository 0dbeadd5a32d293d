"""Soft prompts that prompt tuning has learned on source tasks, read from their adapter folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adept_ds.config.method import PromptTuningConfig
from adept_ds.errors import UserError
from adept_ds.storage.adapter_folder import check_backbone, check_tensors, load_adapter


def load_source_prompts(folders: Mapping[str, str], length: int, backbone: Mapping[str, Any]) -> Tensor:
    """Return the prompts [n, l, d], fp32 on the CPU, in the order given.

    Args:
        folders: Adapter folder by the setting that names it.
        length: The length l that they must have.
        backbone: What `adapter_folder.backbone_facts` says of the backbone that they are for.

    Raises:
        UserError: A folder holds no whole adapter, one of another method than `pt`, of another length, or for another
            backbone.
    """
    prompts = []
    for key, folder in folders.items():
        try:
            adapter = load_adapter(folder)
            check_backbone(adapter, backbone)
            if not isinstance(adapter.method, PromptTuningConfig):
                raise UserError(
                    f"{folder} is an adapter of method {adapter.method.name!r}; expected one of method 'pt'"
                )
            if adapter.method.num_virtual_tokens != length:
                raise UserError(
                    f"{folder} has a prompt of {adapter.method.num_virtual_tokens} tokens; expected {length}, which is "
                    "method.num_virtual_tokens"
                )
            check_tensors(adapter.tensors, {"soft_prompt": (length, backbone["hidden_size"])})
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        prompts.append(adapter.tensors["soft_prompt"])
    return torch.stack(prompts)
