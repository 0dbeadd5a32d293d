"""What a prompt leads to with an adapter and without it, so that a person sees what was learnt."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from adept_ds.backbone.hub import hub_adapter
from adept_ds.config.run import DataConfig, GenerationConfig, ModelConfig, RunConfig
from adept_ds.data.encode import encode_prompts
from adept_ds.data.own import own_columns
from adept_ds.data.tasks import longest_lengths
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.tuned import load_tuned
from adept_ds.export.token_table import task_number
from adept_ds.files import read_json
from adept_ds.formats import FORMATS, Example
from adept_ds.formats.records import TokenLimits
from adept_ds.storage.adapter_folder import load_adapter
from adept_ds.storage.model_folder import is_model_folder
from adept_ds.storage.run_folder import CONFIG_NAME


@dataclass(frozen=True)
class Origin:
    """How a result was trained, as far as that can be known from where it lies."""

    model: ModelConfig
    """Its backbone."""
    data: DataConfig
    """The form of its prompts."""

    def asked(self, text: str) -> Example | None:
        """A prompt that somebody types, in the form of those that were trained on; None where the data are not here."""
        declared = FORMATS[self.data.format]
        try:
            if declared.rows:
                return own_columns(self.data).asked(text)
            if declared.has_tasks:
                return Example("prompt", text, "", limits=TokenLimits(longest_lengths(self.data)[0], None))
        except UserError:
            return None
        return Example("prompt", text, "", chat=declared.problems is not None and declared.problems.form.chat)


def origin_of(result: Path, base: str | None) -> Origin:
    """Find the backbone of an adapter or a fully tuned model, and the run that trained it.

    Args:
        result: An adapter or a model folder, such as a run's `best` or one of its checkpoints; or an adapter's hub id.
        base: Hub id or folder of the backbone, in place of the one that is on record.

    Raises:
        UserError: The folder is no result, its run's config cannot be read, or no backbone is on record.
    """
    run = _run_of(result)
    if run is not None:
        model = run.model.model_copy(update={"name_or_path": base, "revision": None}) if base else run.model
        return Origin(model, run.data)
    if is_model_folder(result):
        if base is None:
            raise UserError(f"{result} is a whole model outside its run's folder; name its backbone by --base")
        return Origin(ModelConfig(name_or_path=base), DataConfig())
    name = base or load_adapter(result).backbone.get("name_or_path")
    if not name:
        raise UserError(f"{result} does not say which backbone it belongs to; name it by --base")
    return Origin(ModelConfig(name_or_path=name), DataConfig())


def _run_of(result: Path) -> RunConfig | None:
    """The run whose `best` or checkpoint this is; None for an adapter of the hub."""
    for folder in () if hub_adapter(result) else list(result.absolute().parents)[:2]:
        path = folder / CONFIG_NAME
        if path.is_file() and "train" in (values := read_json(path)):
            try:
                return RunConfig.model_validate(values)
            except ValidationError as error:
                raise UserError(f"{path} is not the config of a run: {error}") from error
    return None


class SideBySide:
    """A result and its backbone, loaded once for any number of prompts. Every method is collective.

    Args:
        result: As `origin_of`.
        origin: What that returned.
        world: This rank.
        task: The task whose parameters the result is read with, if it has some of each of several.

    Raises:
        UserError: As `load_tuned`; or the result has no such task, or several and none is given.
    """

    def __init__(self, result: Path, origin: Origin, world: World, task: str | None = None) -> None:
        self._world, self._data, self._task = world, origin.data, None
        if not is_model_folder(result):
            self._task = task_number(load_adapter(result), task)
        elif task is not None:
            raise UserError(f"--task is {task!r}; {result} is a whole model, which reads all tasks alike")
        self._tuned, self.tokenizer = load_tuned(origin.model, result, world)
        # An adapter is put aside; whole models are two.
        self._alone = load_tuned(origin.model, None, world)[0] if is_model_folder(result) else None

    def write(self, example: Example, is_tuned: bool, generation: GenerationConfig) -> str:
        """Return what is written to a prompt, or to a chat that waits for its next answer.

        Args:
            example: The prompt, or a `Conversation`.
            is_tuned: By the result, or by the backbone alone.
            generation: Decoding, with `stop` given.
        """
        model = self._alone if self._alone and not is_tuned else self._tuned
        prompts = encode_prompts(
            [example], self.tokenizer, self._data, model.num_virtual_tokens, model.is_encoder_decoder
        )
        if is_tuned and (note := prompts.note(self._data)) and self._world.is_main:
            print(note, file=sys.stderr)
        with nullcontext() if is_tuned or self._alone else model.disable_adapter():
            samples = generate_samples(
                model, self.tokenizer, [example], generation, self._data, self._world, task=self._task
            )
        return samples[0].completion
