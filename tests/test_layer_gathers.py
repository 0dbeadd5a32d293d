"""Which weights are gathered with their layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from adept_ds.backbone.blocks import backbone_layers
from adept_ds.backbone.layer_gathers import frozen_layers, modules_by_layer


class Stack(nn.Module):
    """Layers that no list of `transformers` names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.requires_grad_(False)


def test_layers_are_those_that_transformers_keeps_on_one_device(make_backbone: Callable[[str], Any]) -> None:
    t5 = make_backbone("t5-tied")
    assert backbone_layers(t5) == [*t5.encoder.block, *t5.decoder.block]
    assert backbone_layers(make_backbone("gpt2"))[0].__class__.__name__ == "GPT2Block"


def test_without_names_they_are_the_members_of_lists() -> None:
    stack = Stack()
    assert backbone_layers(stack) == list(stack.layers)
    assert {layer: len(own) for layer, own in frozen_layers(stack, stack).items()} == dict.fromkeys(stack.layers, 4)


def test_what_lies_beside_trained_weights_is_left_to_deepspeed() -> None:
    stack = Stack()
    first, second = stack.layers[0]
    first.bias.requires_grad_(True)
    layers = frozen_layers(stack, stack)
    assert layers[stack.layers[0]] == [second.weight, second.bias]
    assert first not in modules_by_layer(layers)


def test_what_lies_outside_too_is_left_to_deepspeed() -> None:
    stack = Stack()
    stack.layers[0][0].weight = stack.layers[1][0].weight = stack.layers[1][1].weight
    assert [len(own) for own in frozen_layers(stack, stack).values()] == [3, 2]
    stack.layers[0][0].weight = stack.layers[0][1].weight
    assert [len(own) for own in frozen_layers(stack, stack).values()] == [3, 3]
