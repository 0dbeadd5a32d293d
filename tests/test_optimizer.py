"""Two groups with their own peaks, AdamW's settings and steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from adept_ds.config.batch import learning_rates
from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import TrainConfig
from adept_ds.model.adapted_model import get_adept_model
from adept_ds.training.optimizer import build_optimizer, set_learning_rates

Make = Callable[[str], PreTrainedModel]


def train_config(**changes: object) -> TrainConfig:
    values = {"max_steps": 40, "warmup_steps": 7, "learning_rate": {"soft_prompt": 0.3, "network": 1e-4}} | changes
    return TrainConfig.model_validate(values)


def test_groups_hold_each_trained_parameter_once(make_backbone: Make):
    model = get_adept_model(make_backbone("llama"), AdeptConfig())
    groups = {group["name"]: group["params"] for group in build_optimizer(model, train_config()).param_groups}
    parameters = model.trainable_parameters()
    assert groups["soft_prompt"] == [parameters["soft_prompt"]]
    assert {id(p) for p in groups["network"]} == {
        id(parameters[f"network.{n}"]) for n in ("w_down", "b1", "w_up", "b2")
    }
    assert sum(map(len, groups.values())) == len(parameters)


def test_without_a_prompt_there_is_one_group(make_backbone: Make):
    model = get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=0))
    assert [group["name"] for group in build_optimizer(model, train_config()).param_groups] == ["network"]


def test_each_group_has_its_own_peak(make_backbone: Make):
    optimizer = build_optimizer(get_adept_model(make_backbone("llama"), AdeptConfig()), train_config())
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"soft_prompt": 0.3, "network": 1e-4}
    set_learning_rates(optimizer, {"soft_prompt": 0.15, "network": 5e-5, "adapter": 1.0})
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"soft_prompt": 0.15, "network": 5e-5}


def test_adamw_has_the_papers_settings(make_backbone: Make):
    optimizer = build_optimizer(get_adept_model(make_backbone("llama"), AdeptConfig()), train_config())
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-6, 0.01)


def test_steps_are_those_of_a_plain_adamw(make_backbone: Make):
    ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    results = []
    for reference in (False, True):
        model = get_adept_model(make_backbone("llama"), AdeptConfig(prompt_init="normal")).eval()
        parameters, config = model.trainable_parameters(), train_config(warmup_steps=1)
        if reference:
            prompt = parameters["soft_prompt"]
            network = [parameter for parameter in parameters.values() if parameter is not prompt]
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                [{"params": [prompt], "lr": 0.3}, {"params": network, "lr": 1e-4}],
                betas=(0.9, 0.98),
                eps=1e-6,
                weight_decay=0.01,
            )
            scheduler = get_linear_schedule_with_warmup(optimizer, 1, 40)
        else:
            optimizer = build_optimizer(model, config)
        rates = learning_rates(config, model.learning_rate_groups(), 40)
        for step in range(4):
            if not reference:
                set_learning_rates(optimizer, rates(step))
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            if reference:
                scheduler.step()
        results.append([parameter.detach() for parameter in parameters.values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
