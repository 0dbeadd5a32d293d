"""MPT, multitask prompt tuning (Wang et al. 2023, https://arxiv.org/abs/2303.02861) with HF PEFT's module.

    P_k = P * (u_k v_k^T)       P [l, d]   u_k [l, r]   v_k [r, d]      * is elementwise, the published r is 1
    in  = concat(P_k, E)

Source training learns P and the factors of several tasks together; a row's prompt ids say which task it is of. There
may be teachers: prompts that prompt tuning has learned on each task alone. The loss is then that of
`adept_ds.model.distillation`.
Target training starts from that adapter with one pair of factors: the mean over the source tasks, or the pair of one.

Three things differ from the paper. The terms of the loss are means over the global batch's label tokens, not sums; the
hidden states compared are those of label tokens, not of the whole sequence; and the mixture of `data` says how many
examples of which task come, where the paper draws a number of tasks for each batch. The weight and the temperature of
the distillation are settings.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from peft import MultitaskPromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.backbone.sharding import gathered
from adept_ds.config.method import MptConfig
from adept_ds.methods.base import Distillation
from adept_ds.methods.layers import embedding_table, seeded
from adept_ds.methods.prompted import PromptedMethod, initial_prompt
from adept_ds.methods.source_prompts import load_source_prompts
from adept_ds.methods.source_tasks import source_number
from adept_ds.storage.adapter_folder import Adapter, backbone_facts

FACTORS = ("prefix_task_cols", "prefix_task_rows")
"""PEFT's names of all tasks' u [n, l, r] and v [n, r, d]."""


class MultitaskPrompt(nn.Module):
    """The soft prompts of n tasks, one after another, and behind them those of their teachers, if there are any."""

    teachers: Tensor | None

    def __init__(self, encoder: MultitaskPromptEmbedding, teachers: Tensor | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("teachers", teachers, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Return the prompts' rows in fp32: integer [...] to [..., d], where token i of prompt k is k l + i."""
        tasks, length = self.encoder.num_tasks, self.encoder.num_virtual_tokens
        positions = torch.arange(length, device=index.device).expand(tasks, -1)
        prompts = self.encoder(positions, torch.arange(tasks, device=index.device)).float()
        if self.teachers is not None:
            prompts = torch.cat([prompts, self.teachers.float()])
        return F.embedding(index, prompts.flatten(0, 1))


class MultitaskPromptTuning(PromptedMethod):
    """Shared prompt and task factors: l d + n r (l + d) parameters for n tasks; made from an `MptConfig`.

    For one task of T5-base at l = 100, 76,800 + 868 = 77,668.
    """

    config: MptConfig

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """Read the teachers too, where values are initialised: an adapter that is loaded needs none.

        Raises:
            UserError: As `load_source_prompts`.
        """
        config, self._teachers = self.config, None
        table = embedding_table(backbone)
        if config.teachers:
            if table.weight.is_meta:
                self._teachers = torch.zeros(len(config.tasks), config.num_virtual_tokens, table.embedding_dim)
            elif generator is not None:
                length, facts = config.num_virtual_tokens, backbone_facts(backbone)
                self._teachers = load_source_prompts(config.source_prompts, length, facts)
        if self._teachers is not None:
            self.distillation = Distillation(
                first_teacher=len(config.tasks),
                weight=config.distillation_weight,
                temperature=config.distillation_temperature,
            )
        super().inject(backbone, tokenizer, generator)

    @override
    def make_prompt(
        self, table: nn.Embedding, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> MultitaskPrompt:
        config = self.config
        settings = MultitaskPromptTuningConfig(
            num_virtual_tokens=config.num_virtual_tokens,
            num_transformer_submodules=1,
            token_dim=table.embedding_dim,
            num_tasks=max(1, len(config.tasks)),
            num_ranks=config.rank,
        )
        with seeded(generator), torch.no_grad():
            encoder = MultitaskPromptEmbedding(settings, table)
            if config.factor_init == "ones":
                encoder.prefix_task_cols.fill_(1)
                encoder.prefix_task_rows.fill_(1 / config.rank)
            with gathered([table.weight]):
                encoder.embedding.weight.copy_(initial_prompt(config, table, tokenizer, generator))
        return MultitaskPrompt(encoder, self._teachers)

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        encoder = cast(MultitaskPrompt, self.embedding.soft_prompt).encoder
        return {"soft_prompt": encoder.embedding.weight, **{name: getattr(encoder, name) for name in FACTORS}}

    @override
    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """A task starts at `factors_from`, or at its own factors, or at the mean of all where it has none.

        Raises:
            UserError: The source has no task `factors_from`.
        """
        theirs, config = source.method.prompt_tasks, self.config
        if config.factors_from is not None:
            number: int | None = source_number("method.factors_from", config.factors_from, source)
            numbers = [number] * max(1, len(config.tasks))
        else:
            numbers = [theirs.index(task) if task in theirs else None for task in config.tasks] or [None]

        def started(factors: Tensor) -> Tensor:
            mean = factors.mean(0)
            return torch.stack([mean if number is None else factors[number] for number in numbers])

        return source.tensors | {name: started(source.tensors[name]) for name in FACTORS}
