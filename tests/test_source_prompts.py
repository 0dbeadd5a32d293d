"""MPT and ATTEMPT: prompts that depend on a row's task or input, and what they take from source tasks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, T5ForConditionalGeneration

from adept_ds.config.method import AdapterConfig, AdeptConfig, AttemptConfig, MptConfig, PromptTuningConfig
from adept_ds.config.run import DataConfig, GenerationConfig, ModelConfig
from adept_ds.data.encode import EncodedDataset, collate
from adept_ds.data.problems import load_examples
from adept_ds.errors import UserError
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.tuned import open_tuned
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.distillation import teacher_states
from adept_ds.model.loss import IGNORE_INDEX, LossHead, shift_labels
from adept_ds.planner.dry_run import make_plan
from adept_ds.planner.meta_step import meta_model, trace_step
from adept_ds.training.preparation import task_notes
from tests.models import EOS, PAD, VOCABULARY, WIDTH
from tests.test_meta_step import SHAPE, llama, run_of, t5
from tests.test_methods import far_from_start, random_ids
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[[str], PreTrainedModel]

LENGTH, BACKBONES = 4, ("llama", "t5-tied")
TASKS = ("easy", "hard", "odd")


@pytest.fixture
def make_sources(make_backbone: Make, tmp_path: Path) -> Callable[[str], list[str]]:
    """Train nothing, but leave three adapters of prompt tuning for a backbone."""

    def make(name: str) -> list[str]:
        folders = [str(tmp_path / f"{name}-{task}") for task in TASKS]
        for seed, folder in enumerate(folders):
            config = PromptTuningConfig(num_virtual_tokens=LENGTH, prompt_init="normal")
            get_adept_model(make_backbone(name), config, seed=seed + 10).save_pretrained(folder)
        return folders

    return make


def prompt_of(folder: str, backbone: PreTrainedModel) -> Tensor:
    return AdaptedModel.from_pretrained(backbone, folder).trainable_parameters()["soft_prompt"].detach()


def embedded(model: AdaptedModel) -> list[Tensor]:
    """What the input embedding returns from now on, call by call."""
    seen: list[Tensor] = []
    model.method.embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    return seen


def generated(model: AdaptedModel, ids: Tensor, mask: Tensor, tasks: Tensor, beams: int) -> Tensor:
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        task_ids=tasks,
        max_new_tokens=6,
        min_new_tokens=6,
        num_beams=beams,
        do_sample=False,
        suppress_tokens=[EOS, PAD],
        pad_token_id=PAD,
    )
    return out[:, 1:] if model.is_encoder_decoder else out[:, ids.shape[1] :]


def mpt(**changed: object) -> MptConfig:
    return MptConfig(num_virtual_tokens=LENGTH, tasks=TASKS, rank=2, factor_init="ones", **changed)


@pytest.fixture(params=["mpt", "attempt"])
def make_model(request, make_backbone: Make, make_sources) -> Callable[[str], AdaptedModel]:
    """Build an adapted model whose prompts differ between rows."""

    def make(name: str) -> AdaptedModel:
        attempt = AttemptConfig(num_virtual_tokens=LENGTH, sources=make_sources(name), bottleneck=5, temperature=0.5)
        return far_from_start(get_adept_model(make_backbone(name), mpt() if request.param == "mpt" else attempt))

    return make


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_row_generates_what_it_does_alone(make_model, name: str, beams: int) -> None:
    model, columns, tasks = make_model(name), 9, torch.tensor([2, 0, 1])
    lengths = [9, 4, 6] if name == "llama" else [9, 9, 9]  # T5's positions are relative to padding too.
    rows = [random_ids(1, length, seed=length + row) for row, length in enumerate(lengths)]
    ids = torch.cat([F.pad(row, (columns - row.shape[1], 0), value=PAD) for row in rows])
    mask = torch.stack([(torch.arange(columns) >= columns - length).long() for length in lengths])
    together = generated(model, ids, mask, tasks, beams)
    for number, row in enumerate(rows):
        alone = generated(model, row, torch.ones_like(row), tasks[number : number + 1], beams)
        assert torch.equal(together[number : number + 1], alone)
    assert len({tuple(row) for row in together.tolist()}) == 3


@pytest.mark.parametrize("name", BACKBONES)
def test_in_bf16_embeddings_are_those_of_fp32_rounded_once(make_model, name: str) -> None:
    model, tasks, ids = make_model(name), torch.tensor([0, 2]), random_ids(2, 7)
    seen = embedded(model)
    extra = {"decoder_input_ids": ids[:, :2]} if model.is_encoder_decoder else {}
    with torch.no_grad():
        model.backbone.bfloat16()
        for parameter in model.trainable_parameters().values():
            parameter.data = parameter.float()
        model(ids, task_ids=tasks, **extra)
        model.backbone.float()
        model(ids, task_ids=tasks, **extra)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1].bfloat16())


# MPT


@pytest.mark.parametrize("name", BACKBONES)
def test_mpt_prompt_is_that_of_the_rows_task(make_backbone: Make, name: str) -> None:
    model = far_from_start(get_adept_model(make_backbone(name), mpt()))
    values, seen, ids = model.trainable_parameters(), embedded(model), random_ids(3, 5)
    model(ids, labels=ids, task_ids=torch.tensor([2, 0, 2]))
    prompts = values["soft_prompt"] * (values["prefix_task_cols"] @ values["prefix_task_rows"])
    torch.testing.assert_close(seen[0][:, :LENGTH], prompts[[2, 0, 2]])
    assert torch.equal(seen[0][:, LENGTH:], model.method.embedding.table(ids))


def test_mpt_starts_near_zero_or_at_the_shared_prompt(make_backbone: Make) -> None:
    def prompt(**changed: object) -> tuple[Tensor, Tensor]:
        model = get_adept_model(make_backbone("llama"), MptConfig(num_virtual_tokens=LENGTH, **changed))
        seen = embedded(model)
        model(random_ids(1, 3))
        return seen[0][0, :LENGTH], model.trainable_parameters()["soft_prompt"]

    published, shared = prompt()
    assert 0 < float(published.abs().max()) < 0.05 * float(shared.abs().max())
    torch.testing.assert_close(*prompt(factor_init="ones", rank=3))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", BACKBONES)
def test_mpt_distills_from_the_teacher_of_the_rows_task(
    make_backbone: Make, make_sources, name: str, smoothing: float
) -> None:
    """The loss by whole logits: those of the student, and of one prompt-tuned model a task."""
    folders, weight, temperature = make_sources(name), 0.7, 2.0
    config = mpt(
        teachers=dict(zip(TASKS, folders, strict=True)),
        distillation_weight=weight,
        distillation_temperature=temperature,
    )
    model = far_from_start(get_adept_model(make_backbone(name), config))
    tasks, ids = torch.tensor([1, 0]), random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = random_ids(2, 4, seed=5) if model.is_encoder_decoder else ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, 0] = labels[:, 0] if model.is_encoder_decoder else IGNORE_INDEX

    def states(one: AdaptedModel, rows: slice) -> tuple[Tensor, Tensor]:
        extra = {"task_ids": tasks[rows]}
        if one.is_encoder_decoder:
            extra["decoder_input_ids"] = one.backbone.prepare_decoder_input_ids_from_labels(labels=labels[rows])
        found = []
        decoder = one.backbone.get_decoder()
        handle = decoder.register_forward_hook(lambda module, args, out: found.append(out.last_hidden_state))
        logits = one(ids[rows], mask[rows], **extra).logits
        handle.remove()
        columns = labels.shape[1]
        return logits[:, -columns:], found[0][:, -columns:]

    targets = labels if model.is_encoder_decoder else shift_labels(labels)
    chosen = targets != IGNORE_INDEX
    student, student_hidden = states(model, slice(None))
    with torch.no_grad():
        both = [
            states(AdaptedModel.from_pretrained(make_backbone(name), folders[task]).eval(), slice(row, row + 1))
            for row, task in enumerate(tasks.tolist())
        ]
    teacher, teacher_hidden = (torch.cat(parts)[chosen] for parts in zip(*both, strict=True))
    divergence = F.kl_div(
        (student[chosen] / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="sum"
    )
    apart = ((student_hidden[chosen] - teacher_hidden) ** 2).mean(-1).sum()
    plain = F.cross_entropy(student[chosen], targets[chosen], reduction="sum", label_smoothing=smoothing)
    expected = plain + weight * (divergence + apart)

    data = {"input_ids": ids, "attention_mask": mask, "labels": labels, "task_ids": tasks, "reduction": "sum"}
    data["label_smoothing"] = smoothing
    parameters = list(model.trainable_parameters().values())
    actual = model.train()(**data).loss
    assert_equal_up_to_rounding(actual, expected)
    gradients = (torch.autograd.grad(loss, parameters) for loss in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert_equal_up_to_rounding(ours, theirs)
    assert model.backbone.training
    assert_equal_up_to_rounding(model.eval()(**data).loss, plain)


def test_teachers_have_no_dropout(make_backbone: Make, make_sources) -> None:
    config = mpt(teachers=dict(zip(TASKS, make_sources("t5-tied"), strict=True)))
    model = get_adept_model(make_backbone("t5-tied"), config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    ids = model.add_prompt(random_ids(2, 7), None, torch.tensor([3, 5]))[0]
    inputs = {"input_ids": ids, "decoder_input_ids": random_ids(2, 4)}
    once, again = (
        teacher_states(model.backbone, model.method.distillation, random_ids(2, 4), **inputs) for _ in range(2)
    )
    assert torch.equal(once.hidden, again.hidden)
    assert torch.equal(once.head_inputs, again.head_inputs)


def test_mpt_target_starts_from_the_source_tasks(make_backbone: Make, tmp_path: Path) -> None:
    source = far_from_start(get_adept_model(make_backbone("llama"), mpt()))
    source.save_pretrained(tmp_path / "source")
    theirs = source.trainable_parameters()

    def target(**changed: object) -> dict[str, nn.Parameter]:
        config = MptConfig(num_virtual_tokens=LENGTH, rank=2, init_from=str(tmp_path / "source"), **changed)
        return get_adept_model(make_backbone("llama"), config).trainable_parameters()

    mean, second = target(), target(factors_from="hard")
    for name in ("prefix_task_cols", "prefix_task_rows"):
        torch.testing.assert_close(mean[name], theirs[name].mean(0, keepdim=True))
        assert torch.equal(second[name], theirs[name][1:2])
        assert torch.equal(target(tasks=("p", "q"))[name][1], mean[name][0])
        of_own_names = torch.stack([theirs[name][2], mean[name][0], theirs[name][0]])
        assert torch.equal(target(tasks=("odd", "new", "easy"))[name], of_own_names)
        assert torch.equal(target(tasks=TASKS, factors_from="hard")[name], theirs[name][[1, 1, 1]])
    assert torch.equal(mean["soft_prompt"], theirs["soft_prompt"])
    assert torch.equal(target(tasks=TASKS)["prefix_task_rows"], theirs["prefix_task_rows"])
    with pytest.raises(UserError, match=r"factors_from is 'hart'; .* has parameters of easy, hard, odd.*'hard'"):
        target(factors_from="hart")


def test_a_row_without_its_task_is_refused(make_backbone: Make) -> None:
    model = get_adept_model(make_backbone("llama"), mpt())
    with pytest.raises(UserError, match="each of easy, hard, odd has values of its own: task_ids"):
        model(random_ids(2, 5))
    for task_ids, message in (
        ([0, -1], r"task_ids are \[0, -1\]; expected 0 to 2, the numbers of easy, hard, odd"),
        ([3, 0], r"task_ids are \[3, 0\]; expected 0 to 2"),
        ([1], "task_ids are 1, and there are 2 rows"),
    ):
        with pytest.raises(UserError, match=message):
            model(random_ids(2, 5), task_ids=torch.tensor(task_ids))
    with model.disable_adapter():
        model(random_ids(2, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["a", "b"], "teachers": {"a": "x"}}, r"teachers are of \['a'\]; expected one for each of tasks"),
        ({"teachers": {"a": "x"}}, r"teachers are of \['a'\]"),
        ({"tasks": ["a", "a"]}, "one of them twice"),
        ({"factors_from": "a"}, "init_from gives, which is missing"),
    ],
)
def test_mpt_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MptConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"method\.tasks needs data\.format: tasks; data\.format .* has none"),
        (
            {"format": "tasks", "tasks": ["cb", "rte"]},
            r"data\.tasks has 'rte'; expected tasks of method\.tasks: .*'cb'",
        ),
    ],
)
def test_prompts_by_task_need_those_tasks(data: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run_of(method={"name": "mpt", "tasks": ["cb", "mnli"]}, data=data)


# Tasks of a run


@pytest.fixture
def task_files(tmp_path: Path) -> DataConfig:
    """Two tasks of unequal size, so that an equal mixture repeats examples."""
    for task, count in (("easy", 2), ("hard", 5)):
        lines = [json.dumps({"text": f"{task} {n}", "answer": str(n)}) for n in range(count)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
        declared = {"source": "{text}", "target": "answer", "metrics": ["exact_match"]}
        files = {"files": dict.fromkeys(("train", "validation", "test"), f"{task}.jsonl")}
        (tmp_path / f"{task}.json").write_text(json.dumps(declared | files))
    tasks = tuple(str(tmp_path / f"{task}.json") for task in ("easy", "hard"))
    return DataConfig(format="tasks", tasks=tasks, mixture="equal")


def test_batches_say_which_task_a_row_is_of(task_files: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = load_examples(task_files, "train")
    dataset = EncodedDataset(examples, tokenizer, task_files, LENGTH, True, prompt_tasks=("hard", "easy"))
    assert len(dataset) == 10
    batch = collate([dataset[index] for index in range(10)], PAD)
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert batch["task_ids"].tolist() == [int(text.startswith("easy")) for text in texts]
    plain = EncodedDataset(examples, tokenizer, task_files, LENGTH, True)
    assert "task_ids" not in collate([plain[0]], PAD)
    message = r"easy/train/0: the method has values for each of hart \(method\.tasks\), and .* of easy"
    with pytest.raises(UserError, match=message):
        EncodedDataset(examples, tokenizer, task_files, LENGTH, True, prompt_tasks=("hart",))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["easy", "hart"], "data.tasks has 'hard', which would have no parameters; did you mean 'hart'"),
        (["hard"], "'easy'"),
    ],
)
def test_a_dry_run_refuses_a_task_without_parameters(task_files: DataConfig, tasks: list[str], message: str) -> None:
    method = {"name": "mpt", "tasks": tasks}
    run = run_of(method=method, data=task_files.model_dump(), model={"name_or_path": "t5-base"})
    with pytest.raises(UserError, match=message):
        make_plan(run, 1)


def test_what_tasks_a_run_is_trained_on_is_told(task_files: DataConfig) -> None:
    run = run_of(method={"name": "mpt", "tasks": ["hard", "easy", "odd"]}, data=task_files.model_dump())
    assert task_notes(run, load_examples(run.data, "train")) == [
        "examples of each task: 5 of easy (2 different ones), 5 of hard",
        "not in data.tasks, so their parameters stay as they start: odd",
    ]
    one = run_of(method={"name": "pt"}, data={**task_files.model_dump(), "tasks": task_files.tasks[:1]})
    assert task_notes(one, load_examples(one.data, "train")) == []


def test_an_evaluation_on_a_task_without_parameters_is_refused_before_weights_are_loaded(
    task_files: DataConfig, tiny_t5: Path, tmp_path: Path
) -> None:
    backbone = T5ForConditionalGeneration.from_pretrained(tiny_t5)
    get_adept_model(backbone, AdapterConfig(tasks=("hard",))).save_pretrained(tmp_path / "adapter")
    tuned = open_tuned(ModelConfig(name_or_path=str(tiny_t5)), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"values for each of hard .* example of easy"):
        tuned.check_prompts(list(load_examples(task_files, "test")), task_files, 3)


def test_an_adapter_that_does_not_fit_is_refused_by_the_dry_run(
    task_files: DataConfig, tiny_t5: Path, tmp_path: Path
) -> None:
    backbone = T5ForConditionalGeneration.from_pretrained(tiny_t5)
    get_adept_model(backbone, AdapterConfig(tasks=("a", "b"))).save_pretrained(tmp_path / "source")
    method = {"name": "adapter", "init_from": str(tmp_path / "source")}
    model = {"name_or_path": str(tiny_t5)}
    with pytest.raises(UserError, match=r"has parameters of a, b; set method\.task_from"):
        make_plan(run_of(method=method, data=task_files.model_dump(), model=model), 1)
    other_size = run_of(method={**method, "task_from": "a", "bottleneck": 7}, data=task_files.model_dump(), model=model)
    with pytest.raises(UserError, match=r"has shape \(24, 32\), expected \(7, 32\)"):
        make_plan(other_size, 1)


def test_evaluation_puts_the_tasks_prompt_in_front(
    task_files: DataConfig, tokenizer: PreTrainedTokenizerFast, make_backbone: Make, world
) -> None:
    model = far_from_start(get_adept_model(make_backbone("t5-tied"), mpt()))
    examples, seen = list(load_examples(task_files, "test")), []
    reader = model.method.embedding
    reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generate_samples(
        model, tokenizer, examples, GenerationConfig(max_new_tokens=3, do_sample=False, batch_size=7), task_files, world
    )
    (ids,) = seen
    texts = [tokenizer.decode(row[row < VOCABULARY], skip_special_tokens=True) for row in ids]
    prompts = [[i for i in row.tolist() if i >= VOCABULARY] for row in ids]
    assert len(texts) == 7
    for text, prompt in zip(texts, prompts, strict=True):
        start = VOCABULARY + LENGTH * TASKS.index(text.split()[0])
        assert prompt == list(range(start, start + LENGTH))


# ATTEMPT


@pytest.mark.parametrize("name", BACKBONES)
def test_attempt_mixes_prompts_by_what_is_read(make_backbone: Make, make_sources, name: str) -> None:
    folders = make_sources(name)
    config = AttemptConfig(num_virtual_tokens=LENGTH, sources=folders, bottleneck=5)
    model = far_from_start(get_adept_model(make_backbone(name), config))
    table = model.method.embedding.table.weight.detach()
    with torch.no_grad():
        table[PAD] = 50.0  # would be the largest everywhere
    seen, ids = embedded(model), random_ids(2, 7)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = PAD, 0
    labels = ids.clone()
    labels[:, :5] = IGNORE_INDEX
    read = [ids[0], ids[1, 3:]] if model.is_encoder_decoder else [ids[0, :5], ids[1, 3:5]]
    model(ids, mask, labels=labels)

    values = model.trainable_parameters()
    own = values["soft_prompt"]
    prompts = torch.stack([*(prompt_of(folder, make_backbone(name)) for folder in folders), own])
    for row, tokens in enumerate(read):
        largest = table[tokens].max(0).values
        hidden = F.silu(largest @ values["network.w_down"]) @ values["network.w_up"]
        query = F.layer_norm(hidden, (WIDTH,), values["network.norm_weight"], values["network.norm_bias"])
        scores = prompts.max(1).values @ query / (torch.e * WIDTH)
        expected = own + (scores.softmax(0)[:, None, None] * prompts).sum(0)
        first = 3 * row
        torch.testing.assert_close(seen[0][row, first : first + LENGTH], expected)


def test_attempt_of_a_causal_model_does_not_look_at_the_answer(make_backbone: Make, make_sources) -> None:
    config = AttemptConfig(num_virtual_tokens=LENGTH, sources=make_sources("llama"), temperature=0.1)
    model = far_from_start(get_adept_model(make_backbone("llama"), config))
    seen, labels = embedded(model), random_ids(1, 9)
    labels[:, :5] = IGNORE_INDEX
    for seed in (1, 2):
        ids = torch.cat([random_ids(1, 5), random_ids(1, 4, seed)], 1)
        model(ids, labels=ids.where(labels != IGNORE_INDEX, labels))
    model(random_ids(1, 5))
    model(random_ids(1, 5, seed=8))
    answers, other_answer, prefill, other_input = (out[0, :LENGTH] for out in seen)
    assert torch.equal(answers, other_answer)
    assert torch.equal(answers, prefill)
    assert not torch.allclose(answers, other_input, atol=1e-3)


def test_attempt_refuses_an_input_in_parts(make_backbone: Make, make_sources) -> None:
    config = AttemptConfig(num_virtual_tokens=LENGTH, sources=make_sources("llama"), bottleneck=5)
    model = get_adept_model(make_backbone("llama"), config).eval()
    ids = random_ids(2, 9)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
    with pytest.raises(ValueError, match="generate without prefill_chunk_size"):
        model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=5)


def test_attempt_without_anything_to_read_has_gradients(make_backbone: Make, make_sources) -> None:
    config = AttemptConfig(num_virtual_tokens=LENGTH, sources=make_sources("llama"))
    model = get_adept_model(make_backbone("llama"), config).train()
    ids = random_ids(2, 5)
    model(ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.trainable_parameters().values()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_an_attempt_adapter_needs_its_sources_no_longer(make_backbone: Make, make_sources, tmp_path: Path) -> None:
    folders = make_sources("llama")
    config = AttemptConfig(num_virtual_tokens=LENGTH, sources=folders[:2], temperature=0.5)
    model = far_from_start(get_adept_model(make_backbone("llama"), config))
    model.save_pretrained(tmp_path / "adapter")
    later = AttemptConfig.model_validate(
        config.model_dump() | {"sources": folders[1:], "init_from": str(tmp_path / "adapter")}
    )
    started = get_adept_model(make_backbone("llama"), later)
    for name, value in started.trainable_parameters().items():
        assert torch.equal(value, model.trainable_parameters()[name])
    assert torch.equal(started.method.constants()["sources"][0], model.method.constants()["sources"][1])
    for folder in folders:
        shutil.rmtree(folder)
    ids = random_ids(2, 6)
    loaded = AdaptedModel.from_pretrained(make_backbone("llama"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# Source prompts


@pytest.mark.parametrize("method", ["mpt", "attempt"])
def test_sources_that_do_not_fit_are_refused(make_backbone: Make, make_sources, tmp_path: Path, method: str) -> None:
    good = make_sources("llama")[:2]
    get_adept_model(make_backbone("llama"), PromptTuningConfig(num_virtual_tokens=3)).save_pretrained(tmp_path / "3")
    get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=LENGTH)).save_pretrained(tmp_path / "adept")
    get_adept_model(make_backbone("gpt2"), PromptTuningConfig(num_virtual_tokens=LENGTH)).save_pretrained(
        tmp_path / "gpt2"
    )
    for folder, message in (
        ("nowhere", "is not an adapter folder"),
        ("3", "3 has a prompt of 3 tokens; expected 4, which is method.num_virtual_tokens"),
        ("adept", "is an adapter of method 'adept'; expected one of method 'pt'"),
        ("gpt2", "was trained on .* other token embeddings"),
    ):
        folders = [*good, str(tmp_path / folder)]
        config = AttemptConfig(num_virtual_tokens=LENGTH, sources=folders)
        where = r"method\.sources\[2\]"
        if method == "mpt":
            config, where = mpt(teachers=dict(zip(TASKS, folders, strict=True))), r"method\.teachers\.odd"
        with pytest.raises(UserError, match=f"{where}: .*{message}"):
            get_adept_model(make_backbone("llama"), config)


@pytest.mark.parametrize("architecture", [llama(), t5()], ids=BACKBONES)
def test_the_planner_counts_the_teachers_pass(architecture: PreTrainedConfig) -> None:
    """Without the folders: what is planned needs no files."""

    def head_calls(**method: object) -> int:
        run = run_of(method=method, data={"format": "tasks", "tasks": ["rte", "cb"]})
        model = meta_model(run, architecture)
        trace, modules = trace_step(model, SHAPE), list(model.modules())
        assert 0 < trace.held_bytes <= trace.peak_bytes
        entered = [modules[call.module] for call in trace.calls if call.event == "enter" and call.is_forward]
        return sum(isinstance(module, LossHead) for module in entered)

    teachers = {"rte": "nowhere", "cb": "nowhere"}
    assert head_calls(name="mpt", tasks=["rte", "cb"]) == 1
    assert head_calls(name="mpt", tasks=["rte", "cb"], teachers=teachers) == 2
    assert head_calls(name="attempt", sources=["nowhere"]) == 1
