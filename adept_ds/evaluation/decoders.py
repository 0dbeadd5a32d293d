"""What decodes texts for an evaluation: the live model here, or vLLM on the adapter folded into a whole model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from adept_ds.backbone.inference import gather_in_forward
from adept_ds.backbone.table import open_table
from adept_ds.config.run import DataConfig, EvalConfig, GenerationConfig, RunConfig
from adept_ds.data.encode import task_number
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.evaluation.answers import Answers
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.sampling import sample_seed
from adept_ds.evaluation.tuned import Tuned
from adept_ds.export.cache import WholeModel, whole_model
from adept_ds.export.forms import FOLDED, check_form
from adept_ds.files import user_cache
from adept_ds.formats import Example, Sample
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.serving.vllm_decode import Prompts, decode, engine_arguments
from adept_ds.serving.vllm_environment import VllmEnvironment, find_vllm
from adept_ds.storage.adapter_folder import backbone_facts

TRANSFORMERS, VLLM = "transformers", "vllm"


class Decoder(Protocol):
    """Decodes examples with what a run left."""

    @property
    def engine(self) -> dict[str, str]:
        """Name and version of what decodes."""
        ...

    @property
    def backbone(self) -> dict[str, Any]:
        """What an adapter says about such a backbone, see `backbone_facts`."""
        ...

    def samples(self, examples: Sequence[Example], config: GenerationConfig, data: DataConfig) -> list[Sample]:
        """Return `num_samples` completions of each example, in their order, on every rank. Collective."""
        ...


@dataclass
class LiveDecoder:
    """The model in this process, on every rank."""

    model: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    world: World
    adapter: str | None = None
    """Of several adapters of the model, the one that decodes."""

    @property
    def engine(self) -> dict[str, str]:
        """See `Decoder`."""
        return {"name": TRANSFORMERS, "version": version("transformers")}

    @property
    def backbone(self) -> dict[str, Any]:
        """See `Decoder`."""
        return self.model.backbone_facts

    def samples(self, examples: Sequence[Example], config: GenerationConfig, data: DataConfig) -> list[Sample]:
        """See `Decoder`."""
        return generate_samples(self.model, self.tokenizer, examples, config, data, self.world, self.adapter)


@dataclass
class VllmDecoder:
    """vLLM, started for each call, on all GPUs of this machine."""

    environment: VllmEnvironment
    tuned: Tuned
    options: Mapping[str, Any]
    cache: Path
    facts: dict[str, Any]

    @property
    def backbone(self) -> dict[str, Any]:
        """See `Decoder`."""
        return self.facts

    @property
    def engine(self) -> dict[str, str]:
        """See `Decoder`."""
        return {"name": VLLM, "version": self.environment.version}

    def samples(self, examples: Sequence[Example], config: GenerationConfig, data: DataConfig) -> list[Sample]:
        """See `Decoder`. Equal seeds give equal samples with the same version of vLLM, and others than here."""
        tuned, adapter = self.tuned, self.tuned.adapter
        tasks = adapter.method.prompt_tasks if adapter else ()
        by_task: dict[int | None, list[Example]] = {}
        for example in examples:
            by_task.setdefault(task_number(example, tasks), []).append(example)
        texts: dict[tuple[str, int], str] = {}
        for number, of_task in by_task.items():
            model = whole_model(tuned.config, adapter, None if number is None else tasks[number], self.cache)
            texts |= self._texts(of_task, config, data, model)
        jobs = [(example.task_id, index) for example in examples for index in range(config.num_samples)]
        return [Sample(name, texts[name, index]) for name, index in jobs]

    def _texts(
        self, examples: Sequence[Example], config: GenerationConfig, data: DataConfig, model: WholeModel
    ) -> dict[tuple[str, int], str]:
        answers = Answers(self.tuned.tokenizer, examples, config, data, len(model.prompt_ids), self.tuned.generation)
        jobs = [(number, index) for number in range(len(examples)) for index in range(config.num_samples)]
        prompts = [[*model.prompt_ids, *answers.prompts[number]] for number, _ in jobs]
        seeds = [sample_seed(config.seed, examples[number].task_id, index) for number, index in jobs]
        longest = max(map(len, prompts)) + config.max_new_tokens
        engine = {
            **engine_arguments(self.environment, model.folder, self.tuned.config.dtype, longest),
            "tokenizer": str(model.folder if self.tuned.adapter else self.tuned.config.tokenizer or model.folder),
            **self.options,
        }
        sampling = {
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature if config.do_sample else 0.0,
            "top_p": config.top_p if config.do_sample else 1.0,
            "top_k": config.top_k if config.do_sample else 0,
            "stop": list(answers.stop),
            "stop_token_ids": answers.ends,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        drawn = seeds if config.do_sample else [None] * len(jobs)
        (decoded,) = decode(self.environment, engine, sampling, [Prompts(prompts, drawn)])
        texts, early = {}, 0
        for (number, index), one in zip(jobs, decoded.written, strict=True):
            text, is_stopped = answers.cut_text(number, one.ids)
            # It reads the text of a row by itself, where here it is read behind the prompt.
            early += one.ended_by is not None and not is_stopped
            texts[examples[number].task_id, index] = text
        if early:
            print(
                f"note: vLLM ended {early} of {len(jobs)} texts at a stop string that is not in them as read here",
                file=sys.stderr,
            )
        return texts


def check_engine(settings: EvalConfig, tuned: Tuned) -> None:
    """Refuse what an engine cannot decode, before weights are loaded.

    Raises:
        UserError: vLLM is not here, or cannot have the method or the backbone.
    """
    if settings.engine == TRANSFORMERS:
        return
    if tuned.architecture.is_encoder_decoder:
        raise UserError(
            f"eval.engine is 'vllm', which has no encoder-decoder models such as {tuned.config.name_or_path!r}; "
            "expected 'transformers'"
        )
    if tuned.adapter is not None:
        check_form(tuned.adapter.method, FOLDED)
    find_vllm()


def open_decoder(run: RunConfig, tuned: Tuned, world: World) -> Decoder:
    """Return what decodes, by `eval.engine`. Collective.

    Raises:
        UserError: As `check_engine` and `Tuned.load`.
    """
    check_engine(run.eval, tuned)
    if run.eval.engine == VLLM and world.world_size > 1:
        raise UserError("eval.engine is 'vllm', which has all GPUs of the machine from one process; leave out --ranks")
    if run.eval.engine == TRANSFORMERS:
        return LiveDecoder(tuned.load(world, run), tuned.tokenizer, world)
    with open_table(tuned.config) as opened:
        facts = backbone_facts(opened.backbone)
    cache = Path(run.eval.export_cache) if run.eval.export_cache else user_cache() / "exports"
    return VllmDecoder(find_vllm(), tuned, run.eval.engine_options, cache, facts)


def open_decoders(run: RunConfig, tuned: Mapping[str, Tuned], world: World) -> dict[str, Decoder]:
    """Return what decodes with each of several adapters, by their names; the live ones share one backbone. Collective.

    Raises:
        UserError: As `AdaptedModel.load_adapters` and `open_decoder`.
    """
    if run.eval.engine != TRANSFORMERS:
        return {name: open_decoder(run, one, world) for name, one in tuned.items()}
    first = next(iter(tuned.values()))
    model = AdaptedModel(first.load_backbone(world, run), Untuned()).eval()
    model.load_adapters({name: one.adapter.folder for name, one in tuned.items() if one.adapter})
    gather_in_forward(model.backbone)
    return {name: LiveDecoder(model, one.tokenizer, world, name) for name, one in tuned.items()}
