"""Full fine-tuning in one process: what is trained, and the same gradients as the backbone's own loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from adept_ds.errors import UserError
from adept_ds.method_config import FullConfig
from adept_ds.model import get_adept_model
from tests.conftest import VOCABULARY

Make = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied", "t5-untied"])
def test_every_parameter_is_trained_under_its_name_in_a_checkpoint(make_backbone: Make, name):
    expected = [name for name, _ in make_backbone(name).named_parameters()]
    model = get_adept_model(make_backbone(name), FullConfig())
    assert list(model.trainable_parameters()) == expected
    assert model.learning_rate_groups() == {"backbone": expected}
    trainable, total = model.count_parameters()
    assert trainable == total == sum(parameter.numel() for parameter in make_backbone(name).parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "codegen", "t5-tied", "t5-untied"])
def test_gradients_are_those_of_the_plain_model(make_backbone: Make, name):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    plain, model = make_backbone(name), get_adept_model(make_backbone(name), FullConfig())
    reference = plain(input_ids=ids, labels=ids).loss
    reference.backward()
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, reference)
    gradients = {name: parameter.grad for name, parameter in model.trainable_parameters().items()}
    assert gradients.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:  # T5's own table, where encoder and decoder have theirs
            assert gradients[name] is None
            continue
        tolerance = 1e-4 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=tolerance)


def test_the_backbone_as_it_was_is_gone(make_backbone: Make):
    model = get_adept_model(make_backbone("llama"), FullConfig())
    with pytest.raises(UserError, match="load the backbone anew"), model.disable_adapter():
        pass
