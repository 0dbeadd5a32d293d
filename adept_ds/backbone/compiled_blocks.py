"""Blocks of a backbone compiled by `torch.compile`: one compilation for all blocks of a class that compute alike.

Compiled is what a block computes in training. Its hooks stay outside, and so does activation checkpointing, which keeps
what the compiled block is called with. In evaluation, where caches of keys and values grow, blocks run as they are. The
rest of the model is as it was: the embedding with prompt and offset, the LM head and the loss.

Dropout draws what it draws without the compiler, so that a compiled run is the same but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from adept_ds.backbone.blocks import backbone_layers

RECOMPILE_LIMIT = 64
"""Graphs of one class of blocks. T5 has four: of first and other blocks, in encoder and decoder."""

COMPILER: dict[str, Any] = {"backend": "inductor", "options": {"fallback_random": True}}
"""Random numbers are drawn as without the compiler."""

Say = Callable[[str], None]


class _Compiler:
    """What the compiled blocks of one backbone share."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.has_failed = False
        self._compiled: dict[type, Callable[..., Any]] = {}

    def compile(self, block: Any) -> None:
        """Exchange the block's forward."""
        # Without `transformers`' activation checkpointing, which is done around what is compiled, below.
        kind, uncompiled = type(block), block.forward
        plain = kind.forward.__wrapped__ if isinstance(block, GradientCheckpointingLayer) else kind.forward
        if kind not in self._compiled:
            # Dynamic: one graph serves batches of all lengths. A graph break is an error: what is left of a block in
            # pieces is no faster, and would be so silently.
            self._compiled[kind] = torch.compile(plain, fullgraph=True, dynamic=True, **COMPILER)
        run = partial(self._run, self._compiled[kind], plain, block)
        is_whole: bool | None = None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_whole
            if self.has_failed or not block.training:
                return uncompiled(*args, **kwargs)
            if is_whole is None:  # not before: an engine puts hooks in place, and takes some off, after this exchange
                is_whole = not _has_inner_hooks(block)
                if not is_whole:
                    self._fail(
                        f"modules within {kind.__name__} have hooks, with which it cannot be compiled (at ZeRO stage 3 "
                        "DeepSpeed gathers weights so: trained ones, and all without train.gather layer)"
                    )
                    return uncompiled(*args, **kwargs)
            if getattr(block, "gradient_checkpointing", False):
                return block._gradient_checkpointing_func(partial(run, **kwargs), *args)
            return run(*args, **kwargs)

        block.forward = forward

    def _run(
        self, compiled: Callable[..., Any], plain: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the compiled block, or the plain one where that does not work; checkpointing, which calls this twice,
        gets the same of both calls."""
        graphs, start = counters["stats"]["unique_graphs"], time.perf_counter()
        try:
            output = compiled(block, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self._fail(f"{type(block).__name__} cannot be compiled here: {_reason(error)}")
            return plain(block, *args, **kwargs)
        if counters["stats"]["unique_graphs"] > graphs:
            self.say(f"train.compile: compiled {type(block).__name__} in {time.perf_counter() - start:.1f} s")
        return output

    def _fail(self, reason: str) -> None:
        if not self.has_failed:
            self.say(f"train.compile: {reason}; the run goes on without it")
        self.has_failed = True


def _has_inner_hooks(block: nn.Module) -> bool:
    return any(module._forward_pre_hooks or module._forward_hooks for module in block.modules() if module is not block)


def _reason(error: BaseException) -> str:
    """What a compiler says, in a line: the beginning of its message, and its explanation if it has one."""
    inner = getattr(error, "inner_exception", None) or error
    first, *others = str(inner).strip().splitlines() or [type(inner).__name__]
    explanation = next((line.partition("Explanation:")[2] for line in others if "Explanation:" in line), "")
    return f"{first.rstrip('.:')}{':' if explanation else ''}{explanation.rstrip('.')}"


def compile_blocks(backbone: PreTrainedModel, say: Say) -> None:
    """Have the backbone's blocks compiled when training first calls them.

    Call it once the method is in the backbone, and before an engine puts its hooks in place.

    Args:
        backbone: Changed in place.
        say: Is told of each compilation and its time, and once if compiling does not work: blocks then run as they are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    compiler = _Compiler(say)
    for block in backbone_layers(backbone):
        compiler.compile(block)
