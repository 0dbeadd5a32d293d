"""The training recipe, from a loaded config to a tuned adapter, read top to bottom.

    deepspeed launchers/train.py --config ds_configs/smollm2_135m.json

A run folder then holds:

    config.json      the resolved config             metrics.jsonl   one line a logging step or evaluation
    status.json      how the last try ended          checkpoints/    for exact resume
    best             the result to use (a link)      tensorboard/    and other trackers' files

The result is an adapter folder, or, where the method trains the backbone, a model folder.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from adept_ds.backbone.load import load_architecture, load_backbone, load_tokenizer
from adept_ds.config.batch import BatchArithmetic, count_steps
from adept_ds.config.deepspeed import complete
from adept_ds.config.loader import config_hash, flatten
from adept_ds.config.run import RunConfig
from adept_ds.data import (
    EncodedDataset,
    collate,
    global_batches,
    load_examples,
    load_problems,
    rank_micro_batches,
)
from adept_ds.data.tasks import load_task_examples
from adept_ds.distributed import init_world, on_main_rank, sum_over_ranks
from adept_ds.errors import UserError
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.scoring import score_samples
from adept_ds.evaluation.text2text import validation_metrics
from adept_ds.model.adapted_model import get_adept_model
from adept_ds.model.loss import IGNORE_INDEX
from adept_ds.planner.memory import decide_sharding
from adept_ds.rank_environment import is_main_rank
from adept_ds.storage import adapter_folder
from adept_ds.storage.checkpoint import (
    OPTIMIZER_NAME,
    SHARDED,
    Checkpoint,
    TrainerState,
    collect_rng,
    find_checkpoint,
    publish,
    restore_rng,
    save_checkpoint,
    write_tensors,
)
from adept_ds.storage.metrics_log import MetricsLog, check_trackers
from adept_ds.storage.run_folder import CHECKPOINTS_NAME, RunFolder
from adept_ds.training.engine import Engine, check_offload, prepare_deepspeed, shard_options
from adept_ds.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rates


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a flag that is read at the next step boundary.

    After the first signal further ones are ignored: Python puts the default handlers back while it exits, and a second
    signal would then kill a rank that has saved already.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_IGN)


def train(run: RunConfig, resume: str = "never") -> None:
    """Train one run, or go on with it.

    Args:
        run: The checked config.
        resume: `never`, `auto`, or a checkpoint folder; see `find_checkpoint`.

    Raises:
        UserError: Something in the config does not fit the model, the data, the ranks or the run folder; or the loss
            is not finite, and then the parameters are those of the step before.
    """
    stop = StopRequest()
    check_trackers(run.logging.trackers)

    # Data, before any weight is loaded.
    tokenizer = load_tokenizer(run.model)
    architecture = load_architecture(run.model)
    encode = partial(
        EncodedDataset,
        tokenizer=tokenizer,
        cfg=run.data,
        num_virtual_tokens=run.method.num_virtual_tokens,
        encoder_decoder=architecture.is_encoder_decoder,
        show_progress=is_main_rank(),
        prompt_tasks=run.method.prompt_tasks,
    )
    train_set = encode(load_examples(run.data, "train"))
    validation_examples = load_examples(run.data, "validation")[: run.eval.max_examples]
    validation_set = encode(validation_examples) if validation_examples else None

    # Ranks, batches, steps.
    world = init_world()
    say = print if world.is_main else (lambda *words: None)
    decided = decide_sharding(run, architecture, world)
    plan = complete(decided, world.world_size, architecture.hidden_size)
    batches = plan.batch
    epoch_steps = math.ceil(len(train_set) / batches.global_batch_size)
    total_steps = count_steps(run.train, len(train_set))
    say(f"train: {train_set.summary()}")
    say(f"validation: {validation_set.summary() if validation_set else 'none, so the last step counts as the best'}")

    # The run folder: a new run, or where to go on.
    folder: RunFolder | None = None
    resolved = run.model_dump(mode="json", by_alias=True)

    def open_folder() -> tuple[Checkpoint | None, dict[str, Any]]:
        nonlocal folder
        folder = RunFolder(Path(run.logging.run_dir))
        folder.open(resolved, resume)
        return find_checkpoint(folder.checkpoints, resume, warn=print), folder.status()

    checkpoint, status = on_main_rank(open_folder, world)
    if resume == "auto" and status.get("state") == "finished":
        say(f"{run.logging.run_dir} is finished ({status['step']} steps); nothing to do")
        return

    stage = plan.config["zero_optimization"]["stage"]
    if checkpoint:
        checkpoint.check_ranks(world.world_size, stage)

    # Model, optimizer, engine.
    prepare_deepspeed(world)
    check_offload(plan.config)
    shards = shard_options(plan.config, decided.train.sharding, world)
    backbone = load_backbone(run.model, world.device, show_progress=world.is_main, **shards)
    model = get_adept_model(backbone, run.method, tokenizer, run.train.seed)
    if run.train.activation_checkpointing:
        model.checkpoint_activations()
    if checkpoint and not run.method.saves_model:
        model.load_trained(checkpoint.values)
    if world.is_main:
        model.print_trainable_parameters()
    engine = Engine(model, build_optimizer(model, run.train), plan.config, world)

    trainer = Trainer(
        run, engine, tokenizer, train_set, validation_set, batches, epoch_steps, total_steps, folder, stop
    )
    try:
        trainer.run_from(checkpoint)
    except BaseException as error:
        if folder:
            folder.set_status("failed", trainer.state.step, total_steps, error=f"{type(error).__name__}: {error}")
        raise


class Trainer:
    """The loop over steps, with what happens between them. Every method is collective."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        train_set: EncodedDataset,
        validation_set: EncodedDataset | None,
        batches: BatchArithmetic,
        epoch_steps: int,
        total_steps: int,
        folder: RunFolder | None,
        stop: StopRequest,
    ) -> None:
        self.run = run
        self.engine = engine
        self.world = engine.world
        self.tokenizer = tokenizer
        self.train_set = train_set
        self.validation_set = validation_set
        self.batches = batches
        self.epoch_steps = epoch_steps
        self.total_steps = total_steps
        self.folder = folder
        self.stop = stop
        self.metrics: MetricsLog | None = None
        self.state = TrainerState(
            step=0,
            world_size=self.world.world_size,
            zero_stage=engine.zero_stage if run.method.saves_model else None,
        )

    def run_from(self, checkpoint: Checkpoint | None) -> None:
        """Take all steps after the checkpoint's, or all of them."""
        torch.manual_seed(self.run.train.seed + self.world.rank)
        self.engine.model.train()  # `transformers` loads models for inference: without dropout and checkpointing
        if checkpoint:
            if self.run.method.saves_model:
                self.engine.load_sharded(checkpoint.folder / SHARDED)
            else:
                dummy = self._collate([])
                self.engine.restore(checkpoint.values, checkpoint.optimizer_states, checkpoint.state.step, dummy)
            restore_rng(checkpoint, self.world, self.run.train.seed)
            self.state = replace(checkpoint.state, world_size=self.world.world_size)
            self._say(f"going on from {checkpoint.folder}")
        if self.folder:
            self.folder.set_status("running", self.state.step, self.total_steps)
            settings = flatten(self.run.model_dump(mode="json", by_alias=True))
            self.metrics = MetricsLog(self.folder.path, self.run.logging, self.state.step, settings)
        first = self.state.step
        progress = tqdm(
            total=self.total_steps, initial=first, desc="train", unit="step", disable=not self.world.is_main
        )
        window = ThroughputWindow()
        for step, global_batch in enumerate(self._global_batches(first), start=first):
            rates = set_learning_rates(
                self.engine.optimizer, learning_rate_factor(step, self.run.train, self.total_steps)
            )
            loss, tokens, stop_ranks = self._take_step(step, global_batch)
            self.state = replace(self.state, step=step + 1)
            window.add(len(global_batch), tokens)
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
            progress.update()
            is_last = self.state.step == self.total_steps
            if self.state.step % self.run.logging.every_steps == 0 or is_last:
                self._log_step(loss, rates, window.close())
            is_evaluated = is_last or self.state.step % (self.run.eval.every_steps or self.epoch_steps) == 0
            if is_evaluated:
                self._evaluate()
                window = ThroughputWindow()
            if is_evaluated or stop_ranks or self.state.step % (self.run.train.save_every or self.total_steps) == 0:
                self._save()
            if stop_ranks and not is_last:
                self._finish("interrupted")
                self._say(f"stopped by a signal after step {self.state.step}, saved; go on by --resume auto")
                return
        progress.close()
        self._finish("finished")

    def _global_batches(self, first_step: int) -> Iterator[list[int]]:
        """The examples of each step from `first_step` to the last, the same for any number of ranks."""
        train = self.run.train
        for step in range(first_step, self.total_steps):
            epoch, position = divmod(step, self.epoch_steps)
            if position == 0 or step == first_step:
                order = global_batches(
                    self.train_set.lengths, self.batches.global_batch_size, train.seed, epoch, train.group_by_length
                )
            yield order[position]

    def _take_step(self, step: int, global_batch: list[int]) -> tuple[float, float, float]:
        """One optimizer step. Returns (loss per label token, tokens read, ranks that want to stop), all global."""
        micro_batches = [
            self._collate(indices)
            for indices in rank_micro_batches(
                global_batch,
                self.world.rank,
                self.world.world_size,
                self.batches.micro_batch_size,
                self.batches.gradient_accumulation_steps,
            )
        ]
        counts = [(_count_labels(batch), int(batch["attention_mask"].sum())) for batch in micro_batches]
        labels, tokens = sum_over_ranks([sum(column) for column in zip(*counts, strict=True)], self.world)
        own_loss = self.engine.forward_backward(micro_batches, labels)
        loss, stop_ranks = sum_over_ranks([float(own_loss), float(self.stop.received is not None)], self.world)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {step + 1} is {loss}; the step was not taken. Lower train.learning_rate "
                f"({self.run.train.learning_rate.model_dump()}), set train.max_grad_norm, or try model.dtype fp32"
            )
        self.engine.step()
        return loss / labels, tokens, stop_ranks

    def _collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Pad the examples into one batch. None at all gives an example without labels, so that a rank with nothing
        to do makes the same calls as the others."""
        batch = collate([self.train_set[index] for index in indices or [0]], self.tokenizer.pad_token_id)
        if not indices:
            batch["labels"].fill_(IGNORE_INDEX)
        return batch

    def _log_step(self, loss: float, rates: dict[str, float], throughput: dict[str, float]) -> None:
        if not self.metrics:
            return
        values = {"loss": loss, "epoch": self.state.step / self.epoch_steps, **throughput}
        values |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
        norm = self.engine.gradient_norm()
        if norm is not None:
            values["grad_norm"] = norm
        self.metrics.write(self.state.step, values)

    def _evaluate(self) -> None:
        """Measure on the validation set, and keep the result if it is the best so far."""
        metric = self.run.eval.metric
        values = {}
        if self.validation_set:
            self.engine.model.eval()
            values["eval/loss"] = self._validation_loss(self.validation_set)
            if metric == "pass@1":
                values["eval/pass@1"] = self._validation_pass_at_1()
            if metric == "task":
                values |= self._validation_task_metrics()
            self.engine.model.train()
            if self.metrics:
                self.metrics.write(self.state.step, values)
        value, best = values.get(f"eval/{metric}"), self.state.best_value
        is_best = value is None or best is None or (value < best if metric == "loss" else value > best)
        if values:
            figures = ", ".join(f"{name} {figure:.4f}" for name, figure in values.items())
            self._say(f"{figures}{' (best)' if is_best else ''}")
        if is_best:
            self.state = replace(self.state, best_step=self.state.step, best_value=value)
            name = f"best-step-{self.state.step:08d}"
            publish(Path(self.run.logging.run_dir) / "best", name, self._write_result, self.world)

    def _validation_loss(self, examples: EncodedDataset) -> float:
        """Loss per label token."""
        size, world = self.run.eval.batch_size, self.world
        order = sorted(range(len(examples)), key=lambda index: examples.lengths[index])
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(groups), world.world_size):
            number = start + world.rank
            group = groups[min(number, len(groups) - 1)]
            batch = collate([examples[index] for index in group], self.tokenizer.pad_token_id)
            loss = float(self.engine.evaluation_loss(batch))
            if number < len(groups):
                total += torch.tensor([loss, _count_labels(batch)])
        loss, labels = sum_over_ranks(total.tolist(), world)
        return loss / labels

    def _validation_pass_at_1(self) -> float:
        """pass@1 on the validation problems, by running the generated programs in the sandbox on rank 0."""
        run = self.run
        problems = load_problems(run.data, "validation")[: run.eval.max_examples]
        samples = generate_samples(
            self.engine.model, self.tokenizer, problems, run.eval.generation, run.data, self.world
        )
        return on_main_rank(lambda: score_samples(problems, samples, run.eval.sandbox).pass_at_k[1].mean, self.world)

    def _validation_task_metrics(self) -> dict[str, float]:
        """The tasks' own metrics on the examples of the validation loss, by greedy decoding."""
        examples = load_task_examples(self.run.data, "validation")[: self.run.eval.max_examples]
        metrics = validation_metrics(self.engine.model, self.tokenizer, examples, self.run, self.world)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _write_result(self, folder: Path) -> None:
        """Write what evaluations take: an adapter folder, or the whole model."""
        facts = {"step": self.state.step, "config_sha256": config_hash(self.run)}
        model, method = self.engine.model, self.run.method
        if method.saves_model:
            model.save_backbone(folder, self.tokenizer, facts, self.world)
        else:
            values = self.engine.trained_values() | model.method.constants()
            on_main_rank(
                lambda: adapter_folder.save_adapter(folder, method, values, model.backbone_facts, facts), self.world
            )

    def _write_states(self, folder: Path) -> None:
        """Write parameters and optimizer states for exact resume."""
        if self.run.method.saves_model:
            self.engine.save_sharded(folder / SHARDED)
        else:
            self._write_result(folder)
            states = self.engine.optimizer_states()
            on_main_rank(lambda: write_tensors(folder / OPTIMIZER_NAME, states), self.world)

    def _save(self) -> None:
        root = Path(self.run.logging.run_dir) / CHECKPOINTS_NAME
        rng = collect_rng(self.world)
        save_checkpoint(root, self.state, self._write_states, rng, self.run.train.keep_checkpoints, self.world)

    def _finish(self, status: str) -> None:
        if self.folder and self.metrics:
            self.metrics.close()
            self.folder.set_status(
                status,
                self.state.step,
                self.total_steps,
                best_step=self.state.best_step,
                best_value=self.state.best_value,
                signal=self.stop.received,
            )
        torch.distributed.barrier()

    def _say(self, text: str) -> None:
        if self.world.is_main:
            tqdm.write(f"step {self.state.step}: {text}")


class ThroughputWindow:
    """Examples and tokens per second since the window was opened or last closed."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._start, self._examples, self._tokens = time.perf_counter(), 0, 0.0

    def add(self, examples: int, tokens: float) -> None:
        """Count one step's work."""
        self._examples += examples
        self._tokens += tokens

    def close(self) -> dict[str, float]:
        """Return the rates and start over."""
        seconds = time.perf_counter() - self._start
        rates = {"examples_per_second": self._examples / seconds, "tokens_per_second": self._tokens / seconds}
        self._open()
        return rates


def _count_labels(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"] != IGNORE_INDEX).sum())
