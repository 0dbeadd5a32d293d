"""Parameters of each of several tasks, and the published formulas of prompts that are made and of VeRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from adept_ds.config.method import (
    AdapterConfig,
    AttemptConfig,
    DptConfig,
    PromptTuningConfig,
    ResidualPromptConfig,
    VeraConfig,
)
from adept_ds.errors import UserError
from adept_ds.methods.bottleneck import AdaptedLayer
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from tests.models import WIDTH
from tests.test_methods import far_from_start, logits, random_ids
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[[str], PreTrainedModel]
MAIN = ("llama", "t5-tied")


def tuned(backbone: PreTrainedModel, config: object) -> tuple[AdaptedModel, dict[str, Tensor]]:
    model = far_from_start(get_adept_model(backbone, config))
    return model, {name: value.detach() for name, value in model.trainable_parameters().items()}


def read(model: AdaptedModel, tasks: list[int], seed: int = 0) -> Tensor:
    rows = len(tasks)
    inputs = {"input_ids": random_ids(rows, 6, seed), "task_ids": torch.tensor(tasks)}
    if model.is_encoder_decoder:
        inputs["decoder_input_ids"] = random_ids(rows, 3, seed + 1)
    with torch.no_grad():
        return model(**inputs).logits


# Prompts that are made


def read_prompt(model: AdaptedModel, length: int) -> Tensor:
    seen: list[Tensor] = []
    model.method.embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    logits(model)
    return seen[0][:, :length]


@pytest.mark.parametrize("name", MAIN)
def test_dpt_reads_a_product(make_backbone: Make, name: str) -> None:
    model, values = tuned(make_backbone(name), DptConfig(num_virtual_tokens=5, rank=2))
    expected = torch.einsum("lr,rd->ld", values["soft_prompt.a"], values["soft_prompt.b"])
    assert_equal_up_to_rounding(read_prompt(model, 5), expected.expand(2, -1, -1))


def test_dpt_starts_within_its_bounds(make_backbone: Make) -> None:
    model = get_adept_model(make_backbone("llama"), DptConfig(num_virtual_tokens=60))
    for value in model.trainable_parameters().values():
        assert 0.45 < float(value.detach().abs().max()) <= 0.5
        assert float(value.detach().std()) == pytest.approx(1 / 12**0.5, rel=0.1)


@pytest.mark.parametrize("name", MAIN)
def test_residual_prompt_tuning_adds_what_its_network_makes(make_backbone: Make, name: str) -> None:
    model, values = tuned(make_backbone(name), ResidualPromptConfig(num_virtual_tokens=5, bottleneck=7))
    network = nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, WIDTH), nn.LayerNorm(WIDTH))
    network.load_state_dict(
        {
            "0.weight": values["soft_prompt.w_down"].T,
            "0.bias": values["soft_prompt.b1"],
            "2.weight": values["soft_prompt.w_up"].T,
            "2.bias": values["soft_prompt.b2"],
            "3.weight": values["soft_prompt.norm_weight"],
            "3.bias": values["soft_prompt.norm_bias"],
        }
    )
    prompt = values["soft_prompt"]
    assert_equal_up_to_rounding(read_prompt(model, 5), (prompt + network(prompt)).detach().expand(2, -1, -1))


# VeRA


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied"])
def test_vera_is_a_change_of_weights(make_backbone: Make, name: str) -> None:
    model, values = tuned(make_backbone(name), VeraConfig(rank=5))
    shared, plain = model.method.constants(), make_backbone(name)
    layers = {key.removesuffix(".vera_lambda_b") for key in values if key.endswith(".vera_lambda_b")}
    assert layers
    for key in layers:
        weight, b, d = (
            plain.get_parameter(f"{key}.weight"),
            values[f"{key}.vera_lambda_b"],
            values[f"{key}.vera_lambda_d"],
        )
        inputs = weight.shape[0] if name == "gpt2" else weight.shape[1]
        delta = torch.diag(b) @ shared["vera_B"][: len(b)] @ torch.diag(d) @ shared["vera_A"][:, :inputs]
        weight.data += delta.T if name == "gpt2" else delta
    assert_equal_up_to_rounding(logits(model), logits(plain))


def test_veras_projections_are_drawn_by_the_seed(make_backbone: Make) -> None:
    first, again, other = (
        get_adept_model(make_backbone("llama"), VeraConfig(rank=5), seed=seed).method.constants() for seed in (1, 1, 2)
    )
    assert torch.equal(first["vera_A"], again["vera_A"])
    assert not torch.equal(first["vera_B"], other["vera_B"])
    # Kaiming-uniform: bound by sqrt(6 / inputs), those of A being the layer's.
    assert 0.9 < float(first["vera_A"].abs().max()) / (6 / WIDTH) ** 0.5 <= 1
    assert 0.9 < float(first["vera_B"].abs().max()) / (6 / 5) ** 0.5 <= 1


def test_vera_trains_where_its_values_are_kept_in_bf16(make_backbone: Make) -> None:
    """As DeepSpeed keeps them beside fp32 masters."""
    model, values = tuned(make_backbone("llama").bfloat16(), VeraConfig(rank=5))
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data.bfloat16()
    actual = logits(model)
    exact, _ = tuned(make_backbone("llama").bfloat16(), VeraConfig(rank=5))
    exact.load_trained({name: value.bfloat16().float() for name, value in values.items()} | model.method.constants())
    assert torch.equal(actual, logits(exact))


# Adapters of tasks


def through_adapters(model: AdaptedModel, tasks: list[int]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, input and output of each adapter while rows of these tasks are read."""
    seen: list[tuple[str, Tensor, Tensor]] = []
    for key, module in model.backbone.named_modules():
        if isinstance(module, AdaptedLayer):
            inner: list[Tensor] = []
            module.layer.register_forward_hook(lambda _, args, out, inner=inner: inner.append(out))
            module.register_forward_hook(
                lambda _, args, out, key=key, inner=inner: seen.append((key, inner.pop(), out))
            )
    read(model, tasks)
    return seen


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("post_norm", [False, True], ids=["", "norm"])
def test_a_row_goes_through_the_adapters_of_its_task(make_backbone: Make, name: str, post_norm: bool) -> None:
    config = AdapterConfig(bottleneck=3, tasks=("a", "b", "c"), post_norm=post_norm, activation="relu")
    model, values = tuned(make_backbone(name), config)
    tasks = [2, 0, 2]
    seen = through_adapters(model, tasks)
    assert len(seen) == len([key for key in values if key.endswith("w_down")])
    for key, y, out in seen:
        for row, task in enumerate(tasks):
            down, up = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)
            norm = nn.LayerNorm(WIDTH) if post_norm else nn.Identity()
            own = {end: values[f"{key}.adapter.{end}"][task] for end in ("w_down", "b_down", "w_up", "b_up")}
            down.load_state_dict({"weight": own["w_down"], "bias": own["b_down"]})
            up.load_state_dict({"weight": own["w_up"], "bias": own["b_up"]})
            if post_norm:
                shared = {end: values[f"{key}.adapter.norm_{end}"] for end in ("weight", "bias")}
                norm.load_state_dict(shared)
            with torch.no_grad():
                assert_equal_up_to_rounding(out[row], y[row] + norm(up(down(y[row]).relu())))


def assert_recomputed_alike(make_backbone: Make, name: str, config: object) -> None:
    """Gradients where layers are recomputed after another batch has been read are those where they are not."""
    gradients = []
    for checkpointing in (False, True):
        model, _ = tuned(make_backbone(name), config)
        model.train()
        if checkpointing:
            model.checkpoint_activations()
        ids = random_ids(2, 6)
        loss = model(ids, labels=ids, task_ids=torch.tensor([1, 0])).loss
        read(model, [0, 0], seed=7)
        gradients.append(torch.autograd.grad(loss, list(model.trainable_parameters().values())))
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    assert largest > 0
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_equal_up_to_rounding(checkpointed, plain, largest)


@pytest.mark.parametrize("name", MAIN)
def test_recomputed_adapters_are_those_of_the_rows_tasks(make_backbone: Make, name: str) -> None:
    assert_recomputed_alike(make_backbone, name, AdapterConfig(bottleneck=3, tasks=("a", "b"), post_norm=True))


# ATTEMPT's tasks


@pytest.fixture
def sources(make_backbone: Make, tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    def make(name: str) -> tuple[str, ...]:
        folders = [str(tmp_path / f"{name}-{seed}") for seed in range(2)]
        for seed, folder in enumerate(folders):
            pt = PromptTuningConfig(num_virtual_tokens=4, prompt_init="normal")
            get_adept_model(make_backbone(name), pt, seed=seed).save_pretrained(folder)
        return tuple(folders)

    return make


@pytest.mark.parametrize("name", MAIN)
def test_a_row_is_read_with_the_target_prompt_of_its_task(make_backbone: Make, sources, name: str) -> None:
    """As by ATTEMPT of one task with that prompt, whose formula `test_source_prompts.py` has."""
    shape = {"num_virtual_tokens": 4, "sources": sources(name), "bottleneck": 5, "temperature": 1.0}
    model, values = tuned(make_backbone(name), AttemptConfig(**shape, tasks=("a", "b", "c")))
    tasks = [2, 0, 2]
    together = read(model, tasks)
    for row, task in enumerate(tasks):
        one = get_adept_model(make_backbone(name), AttemptConfig(**shape)).eval()
        own = values["soft_prompt"][4 * task : 4 * task + 4]
        one.load_trained({**values, "soft_prompt": own, "sources": model.method.constants()["sources"]})
        assert_equal_up_to_rounding(together[row], read(one, [0, 0, 0])[row])


def test_all_target_prompts_can_start_at_the_first_source(make_backbone: Make, sources) -> None:
    folders = sources("llama")
    config = AttemptConfig(num_virtual_tokens=4, sources=folders, tasks=("a", "b"), prompt_init="source")
    model = get_adept_model(make_backbone("llama"), config)
    prompt = AdaptedModel.from_pretrained(make_backbone("llama"), folders[0]).trainable_parameters()["soft_prompt"]
    assert torch.equal(model.trainable_parameters()["soft_prompt"], prompt.repeat(2, 1))


# Starting from other tasks


@pytest.mark.parametrize("kind", ["adapter", "attempt"])
def test_tasks_start_from_those_of_a_source(make_backbone: Make, sources, tmp_path: Path, kind: str) -> None:
    shape = {"num_virtual_tokens": 4, "sources": sources("llama"), "bottleneck": 5} if kind == "attempt" else {}
    made = AttemptConfig if kind == "attempt" else AdapterConfig
    source, values = tuned(make_backbone("llama"), made(**shape, tasks=("mnli", "qqp", "rte")))
    source.save_pretrained(tmp_path / "source")

    def started(tasks: tuple[str, ...] = (), **settings: str) -> dict[str, Tensor]:
        config = made(**shape, tasks=tasks, init_from=str(tmp_path / "source"), **settings)
        return get_adept_model(make_backbone("llama"), config).trainable_parameters()

    def of_task(task: int) -> dict[str, Tensor]:
        if kind == "attempt":
            return {"soft_prompt": values["soft_prompt"][4 * task : 4 * task + 4]}
        return {name: value[task] for name, value in values.items() if name.endswith((".w_down", ".b_up"))}

    def stacked(*tasks: int) -> dict[str, Tensor]:
        join = torch.cat if kind == "attempt" else torch.stack
        return {name: join([of_task(task)[name] for task in tasks]) for name in of_task(0)}

    cases = [
        (started(task_from="qqp"), of_task(1)),
        (started(("cb", "wic"), task_from="qqp"), stacked(1, 1)),
        (started(("rte", "mnli")), stacked(2, 0)),
    ]
    for actual, expected in cases:
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match=r"has parameters of mnli, qqp, rte; set method\.task_from"):
        started()
    with pytest.raises(UserError, match=r"task_from is 'qq'; .* has parameters of mnli, qqp, rte.*did you mean 'qqp'"):
        started(task_from="qq")
    with pytest.raises(UserError, match=r"'cb'; .* has parameters of mnli, qqp, rte"):
        started(("cb",))
    with pytest.raises(ValidationError, match="task_from names a task of the adapter that init_from gives"):
        made(**shape, task_from="qqp")


def test_one_task_serves_all_that_start_from_it(make_backbone: Make, tmp_path: Path) -> None:
    source, _ = tuned(make_backbone("llama"), AdapterConfig())
    source.save_pretrained(tmp_path / "source")
    config = AdapterConfig(tasks=("a", "b"), init_from=str(tmp_path / "source"))
    started = get_adept_model(make_backbone("llama"), config).eval()
    assert_equal_up_to_rounding(read(started, [1, 0]), read(source, [0, 0]))
