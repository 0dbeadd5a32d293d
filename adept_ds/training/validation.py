"""Evaluation during training: the figures by which the best step is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from adept_ds.config.run import RunConfig
from adept_ds.data.encode import EncodedDataset, collate
from adept_ds.data.problems import load_problems
from adept_ds.data.tasks import load_task_examples
from adept_ds.distributed import on_main_rank, sum_over_ranks
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.scoring import score_samples
from adept_ds.evaluation.text2text import validation_metrics
from adept_ds.model.loss import IGNORE_INDEX
from adept_ds.training.engine import Engine
from adept_ds.training.preparation import RunData


class Validation:
    """Measures a model on the validation split. Every method is collective."""

    def __init__(self, run: RunConfig, data: RunData, engine: Engine) -> None:
        self._run = run
        self._tokenizer = data.tokenizer
        self._examples = data.validation
        self._engine = engine

    def figures(self) -> dict[str, float]:
        """The loss, and what `eval.metric` asks for beside it, by name; nothing if there is no validation split."""
        if self._examples is None:
            return {}
        model = self._engine.model
        model.eval()
        values = {"eval/loss": self._loss(self._examples)}
        if self._run.eval.metric == "pass@1":
            values["eval/pass@1"] = self._pass_at_1()
        if self._run.eval.metric == "task":
            values |= self._task_metrics()
        model.train()
        return values

    def _loss(self, examples: EncodedDataset) -> float:
        """Loss per label token."""
        size, world = self._run.eval.batch_size, self._engine.world
        order = sorted(range(len(examples)), key=lambda index: examples.lengths[index])
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(groups), world.world_size):
            number = start + world.rank
            group = groups[min(number, len(groups) - 1)]
            batch = collate([examples[index] for index in group], self._tokenizer.pad_token_id)
            loss = float(self._engine.evaluation_loss(batch))
            if number < len(groups):
                total += torch.tensor([loss, count_labels(batch)])
        loss, labels = sum_over_ranks(total.tolist(), world)
        return loss / labels

    def _pass_at_1(self) -> float:
        """pass@1 on the validation problems, by running the generated programs in the sandbox on rank 0."""
        run, engine = self._run, self._engine
        problems = load_problems(run.data, "validation")[: run.eval.max_examples]
        samples = generate_samples(engine.model, self._tokenizer, problems, run.eval.generation, run.data, engine.world)
        return on_main_rank(lambda: score_samples(problems, samples, run.eval.sandbox).pass_at_k[1].mean, engine.world)

    def _task_metrics(self) -> dict[str, float]:
        """The tasks' own metrics on the examples of the validation loss, by greedy decoding."""
        run, engine = self._run, self._engine
        examples = load_task_examples(run.data, "validation")[: run.eval.max_examples]
        metrics = validation_metrics(engine.model, self._tokenizer, examples, run, engine.world)
        return {f"eval/{name}": value for name, value in metrics.items()}


def count_labels(batch: dict[str, Tensor]) -> int:
    """Label tokens of a batch."""
    return int((batch["labels"] != IGNORE_INDEX).sum())
