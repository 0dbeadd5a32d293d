"""An adapter as a LoRA on the input table of a serving base: the form that hundreds share one backbone in.

A serving base is the backbone with L more tokens, whose rows are of no consequence. With r' columns of factors of the
offset, f(E) = a(E) C, and the prompt P [l, d] of l <= L vectors, the tuned table is E + A B with

    A[v] = [a(E[v]), 0]            for a token v          B = [C; P - E[p]]
    A[p_i] = one-hot(r' + i)       for prompt token i

where E[p] are the serving base's rows of the prompt's tokens. ADePT has a = [ReLU(E W_down + b1), 1] and
C = [W_up; b2]; a prompt alone has neither. In PEFT's words the rank is r' + l, and alpha is equal to it, for a factor
of 1. Where the backbone's layer multiplies its rows by s, readers multiply a LoRA's too, so B is divided by s.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adept_ds.export.checkpoint import Made, write_tensors
from adept_ds.export.token_table import CHUNK, TokenTable
from adept_ds.files import write_json
from adept_ds.methods.adept import AdeptEmbedding
from adept_ds.storage.adapter_folder import CONFIG_NAME, TENSORS_NAME


class EmbeddingLora:
    """The factors A and B of a token table.

    Args:
        table: The tuned vectors, with the serving base's ids of the prompt's tokens.
        rows: Rows of the serving base's table.
        base_rows: Its rows of the prompt's tokens [l, d].
    """

    def __init__(self, table: TokenTable, rows: int, base_rows: Tensor) -> None:
        self._table, self.rows = table, rows
        embedding = table.embedding
        offset = torch.zeros(0, embedding.embedding_dim)
        self._network = None
        if isinstance(embedding, AdeptEmbedding) and embedding.offset_in_evaluation:
            self._network = embedding.network
            offset = torch.cat([self._network.w_up.detach().float(), self._network.b2.detach().float()[None]])
        difference = table.vectors(torch.tensor(table.prompt_ids, dtype=torch.long)) - base_rows.float()
        self._offset_rank = len(offset)
        self.rank = len(offset) + len(difference)
        self.b = torch.cat([offset / table.scale, difference])
        """[rank, d]."""

    @torch.no_grad()
    def a_rows(self, ids: Tensor) -> Tensor:
        """Rows of A for tokens [n]: fp32 [n, rank]."""
        embedding, table = self._table.embedding, self._table
        rows = torch.zeros(len(ids), self.rank)
        is_token = ids < embedding.num_embeddings
        if self._network is not None:
            tokens = embedding.table(ids.masked_fill(~is_token, 0)).float()
            rows[:, : self._offset_rank - 1] = self._network.hidden(tokens)
            rows[:, self._offset_rank - 1] = 1
            rows[~is_token] = 0
        for number, prompt_id in enumerate(table.prompt_ids):
            rows[ids == prompt_id] = F.one_hot(torch.tensor(self._offset_rank + number), self.rank).float()
        return rows

    def a(self) -> Tensor:
        """A [rank, rows], as PEFT has it."""
        return torch.cat([self.a_rows(ids).T for ids in torch.arange(self.rows).split(CHUNK)], 1)


def write_embedding_lora(
    folder: Path, lora: EmbeddingLora, module: str, is_encoder_decoder: bool, serving_base: str
) -> dict[str, str | None]:
    """Write PEFT's two files; return the name and sha256 of that with the weights.

    Args:
        folder: An existing folder.
        lora: The factors.
        module: Name of the embedding layer in the backbone.
        is_encoder_decoder: Of the backbone.
        serving_base: Folder or hub id of the serving base.
    """
    # An encoder's table has the decoder's name too, and is told apart by the path.
    target = module if is_encoder_decoder else module.rpartition(".")[2]
    prefix = f"base_model.model.{module}"
    a, b = lora.a(), lora.b.T.contiguous()
    tensors = {
        f"{prefix}.lora_embedding_A": Made("F32", a.shape, lambda: [a]),
        f"{prefix}.lora_embedding_B": Made("F32", b.shape, lambda: [b]),
    }
    digest = write_tensors(folder / TENSORS_NAME, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": serving_base,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "lora_dropout": 0.0,
        "target_modules": [target],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    write_json(folder / CONFIG_NAME, config)
    return {TENSORS_NAME: digest}
