"""One training step executed on the meta device: which bytes are alive when, and which module is called when.

The model's own forward and backward code runs, so nothing here knows an architecture. Every tensor that comes into
being is counted by its storage until the storage dies. What a fused kernel keeps to itself does not show on the meta
device, so scaled dot product attention and dropout are replaced by stand-ins with the fused kernels' memory: attention
saves query, key, value, output and the log of the normaliser, not the [S, S] scores. Attention that a model writes out
itself (`eager`) is counted as it is written.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from adept_ds.backbone import fp8
from adept_ds.backbone.layer_gathers import frozen_layers, modules_by_layer
from adept_ds.backbone.load import DTYPES, unsharded_creation
from adept_ds.backbone.quantization import Scheme, quantize_linears
from adept_ds.config.run import RunConfig
from adept_ds.contexts import attribute_set
from adept_ds.errors import UserError
from adept_ds.methods import create_method
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.model.loss import LossHead

Purpose = Literal["activations", "logits", "dequantized"]
"""What a storage is for: the loss head's, a quantised weight in full precision (one in fp8 also where it is
copied), or all the rest."""


_WITH_SCRATCH = {torch.ops.aten.logsumexp.default}
"""Operations whose kernels allocate a tensor of the input's size within, which no dispatch mode sees."""


@dataclass(frozen=True)
class StepShape:
    """Sizes of one micro-batch."""

    micro_batch_size: int
    input_length: int
    """Tokens that the backbone reads, soft prompt included; for encoder-decoder models, the encoder."""
    label_length: int
    """Tokens with a label; for encoder-decoder models, the length of the target."""
    is_packed: bool = False
    """Whether examples stand one behind another in rows of `input_length`."""


class ModuleCall(NamedTuple):
    """One event in the life of a module, in the order of execution."""

    module: int
    """Index in `StepTrace.modules`."""
    event: Literal["enter", "leave"]
    """Its forward or backward pass begins or ends. The end of a backward pass is seen only where an input of the
    module that is given by position requires a gradient, as in DeepSpeed."""
    is_forward: bool
    is_recomputed: bool
    """A forward pass within the backward pass of a checkpointed layer."""


@dataclass(frozen=True)
class StepTrace:
    """What one forward and backward pass allocates and calls."""

    held_bytes: int
    """Alive between the forward and the backward pass: what is saved for the latter."""
    peak_bytes: int
    """Most that is alive at a time, parameters and their gathered copies aside."""
    peak_by_purpose: dict[Purpose, int]
    """`peak_bytes` by what it is for."""
    logits_bytes: int
    """Most that the loss head has alive at a time."""
    dequantized_bytes: int
    """Most that is alive at a time of quantised weights in full precision."""
    modules: tuple[tuple[int, ...], ...]
    """Of each module, its own parameters (not its children's) as indices into `list(model.parameters())`."""
    layers: dict[int, tuple[int, ...]]
    """Of each decoder or encoder layer, as an index of a module, the parameters that can be gathered with it."""
    by_layer: frozenset[int]
    """Modules within the layers that have no other parameters than those."""
    calls: tuple[ModuleCall, ...]


def meta_model(run: RunConfig, architecture: PreTrainedConfig) -> AdaptedModel:
    """Return the adapted model as it is trained, every parameter on the meta device: shapes, no values.

    Raises:
        UserError: The method cannot be put into the backbone, or the backbone cannot be trained.
    """
    auto: Any = AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM
    attention, scheme = run.model.attn_implementation, Scheme.of(run.model)
    if attention not in ("eager", "sdpa"):
        attention = None  # fused like sdpa, the usual choice, and with the same memory; the package need not be here
    with torch.device("meta"), unsharded_creation():
        backbone = auto.from_config(
            architecture,
            dtype=DTYPES[run.model.dtype],
            attn_implementation=attention,
            trust_remote_code=False,
        )
        if scheme:
            quantize_linears(backbone, scheme)
        model = AdaptedModel(backbone, create_method(run.method), seed=None).train()
    if model.backbone.get_output_embeddings().tail is None:
        trace_step(model, StepShape(1, model.num_virtual_tokens + 2, 2))  # which tells whether it can be trained
    if run.train.activation_checkpointing:
        model.checkpoint_activations()
    return model


def trace_step(model: AdaptedModel, shape: StepShape, device_type: Literal["cuda", "cpu"] = "cuda") -> StepTrace:
    """Execute one forward and backward pass of `model`.

    Args:
        model: A model of `meta_model`.
        shape: Sizes of the micro-batch. Of more than one example all but the longest are padded, so the attention
            mask is materialised; a single example has no padding. That of packed rows is always materialised.
        device_type: Whose kernels are meant. A CPU has no fused dropout.

    Raises:
        UserError: The backbone cannot be trained, or asks for values that there are none of.
    """
    memory = _LiveBytes(model, shape)
    columns = shape.input_length - (0 if shape.is_packed else model.num_virtual_tokens)
    ids = torch.zeros(shape.micro_batch_size, columns, dtype=torch.long, device="meta")
    targets = ids if not model.is_encoder_decoder else ids.new_zeros(shape.micro_batch_size, shape.label_length)
    with ExitStack() as stack:
        modules, calls = stack.enter_context(_recorded_calls(model))
        stack.enter_context(_loss_head_tagged(model, memory))
        stack.enter_context(_fused_kernels(device_type))
        stack.enter_context(memory)
        inputs = {"task_ids": ids.new_zeros(shape.micro_batch_size)}
        if shape.is_packed:
            examples = columns // (model.num_virtual_tokens + 1)
            inputs = {"task_ids": ids.new_zeros(shape.micro_batch_size, examples), "example_ids": torch.ones_like(ids)}
        try:
            loss = model(ids, torch.ones_like(ids), labels=targets, reduction="sum", **inputs).loss
            held = memory.total
            loss.backward()
        except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
            name, architecture = model.backbone.config.name_or_path, type(model.backbone).__name__
            raise UserError(
                f"model.name_or_path is {name!r}: a training step of {architecture} cannot be gone through without "
                f"its weights ({str(error).splitlines()[0]}), so its memory cannot be planned; if it trains at all, it "
                "does so with train.sharding replicate, node or global"
            ) from error
    for parameter in model.parameters():
        parameter.grad = None
    layers = frozen_layers(model, model.backbone)
    number_of_module = {module: index for index, module in enumerate(model.modules())}
    number = {parameter: index for index, parameter in enumerate(model.parameters())}
    return StepTrace(
        held_bytes=held,
        peak_bytes=memory.peak,
        peak_by_purpose=memory.at_peak,
        logits_bytes=memory.most["logits"],
        dequantized_bytes=memory.most["dequantized"],
        modules=modules,
        layers={
            number_of_module[layer]: tuple(number[parameter] for parameter in own) for layer, own in layers.items()
        },
        by_layer=frozenset(number_of_module[module] for module in modules_by_layer(layers)),
        calls=tuple(calls),
    )


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations create, and answers where an operation asks for values."""

    def __init__(self, model: nn.Module, shape: StepShape) -> None:
        super().__init__()
        self.purpose: Purpose = "activations"
        self.alive: Counter[Purpose] = Counter()
        self.most: Counter[Purpose] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[Purpose, int] = {}
        self._labelled_rows = shape.micro_batch_size * shape.label_length
        self._has_mask = shape.micro_batch_size > 1 or shape.is_packed
        self._weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        self._known = set(self._weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            # The one question asked of values: is every position of the attention mask a token, or all of a row one
            # example?
            return not self._has_mask
        if func is aten.index.Tensor and _is_boolean(args[1]):
            # Rows with a label; how many there are depends on values.
            values, (mask,) = args
            result = values.new_empty(self._labelled_rows, *values.shape[mask.dim() :])
        elif func is aten._grouped_mm.default:
            # The stacked weights of experts; the operation's own rule for the meta device knows bf16 only.
            result = args[0].new_empty(_grouped_product_shape(*args[:3]))
        else:
            if func in _WITH_SCRATCH:
                self._add(torch.empty_like(args[0]).untyped_storage(), self.purpose)
            result = _computed(func, args, kwargs or {})
        purpose = "dequantized" if func.namespace == "bitsandbytes" or self._copies_fp8(func, args) else self.purpose
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), purpose)
        return result

    def _copies_fp8(self, func: Any, args: Any) -> bool:
        return (
            func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
            and args[0].dtype == fp8.E4M3
            and args[0].untyped_storage()._cdata in self._weights
        )

    def _add(self, storage: torch.UntypedStorage, purpose: Purpose) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.alive[purpose] += size
        self.most[purpose] = max(self.most[purpose], self.alive[purpose])
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.alive)
        weakref.finalize(storage, self._remove, key, purpose, size)

    def _remove(self, key: int, purpose: Purpose, size: int) -> None:
        self._known.discard(key)
        self.alive[purpose] -= size
        self.total -= size


_MADE: dict[Any, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}
"""Shapes, strides and dtypes of what an operation makes of tensors of such forms: torch works them out in Python, a
model of many equal layers asks for the same ones again and again, and plans trace several steps."""


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation returns on the meta device."""
    if not _makes_tensors(func):
        return func(*args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    try:
        key = func, structure, tuple(_form(leaf) for leaf in leaves)
        made = _MADE.get(key)
    except TypeError:  # an argument that cannot be hashed
        return func(*args, **kwargs)
    if made is None:
        result = func(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        # Some return a view of what they read, whatever their schema says.
        read = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        if all(_is_whole(tensor) and tensor.untyped_storage()._cdata not in read for tensor in results):
            _MADE[key] = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in results]
        return result
    tensors = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in made]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether all that the operation returns are new tensors, and it changes none."""
    schema = func._schema
    return all(argument.alias_info is None for argument in schema.arguments) and all(
        str(value.type) == "Tensor" and value.alias_info is None for value in schema.returns
    )


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor is all that its storage holds, on the meta device."""
    if not isinstance(tensor, Tensor) or tensor.device.type != "meta" or tensor.storage_offset():
        return False
    alike = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return alike.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


def _grouped_product_shape(x: Tensor, y: Tensor, ends: Tensor) -> tuple[int, ...]:
    """Shape of the products of groups of rows [S, n] with [G, n, m], or of those of gradients [n, S] and [S, m]."""
    return (*ends.shape, x.shape[0], y.shape[1]) if y.dim() == 2 else (x.shape[0], y.shape[2])


def _is_boolean(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


@contextmanager
def _fused_kernels(device_type: str) -> Iterator[None]:
    """Give attention, dropout and products of 8-bit floats the memory that their kernels have.

    By exchanging torch's functions: a mode would not reach the layers that a backward pass recomputes.
    """
    stepwise_attention = F.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        # A CPU's fused attention has no dropout; torch computes it in steps then, here as there.
        is_fused = device_type == "cuda" or not kwargs.get("dropout_p")
        return (_fused_attention if is_fused else stepwise_attention)(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(attribute_set(F, "scaled_dot_product_attention", attention))
        if device_type == "cuda":
            stack.enter_context(attribute_set(F, "dropout", _fused_dropout))
        # A GPU that is not here is taken for one that multiplies 8-bit floats.
        has_other = torch.cuda.is_available() and not fp8.multiplies_fp8(torch.device("cuda"))
        multiplies = device_type == "cuda" and not has_other
        stack.enter_context(attribute_set(fp8, "multiplies_fp8", lambda _: multiplies))
        yield


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # The kernels add a mask to the scores, so each call makes a copy in their precision.
        attn_mask = attn_mask.to(query.dtype)
    return _FusedAttention.apply(query, key, value, attn_mask)


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, _ = query.shape
        # The kernels lay the heads of a token side by side, so merging them afterwards copies nothing.
        output = value.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        normaliser = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, _, _, _ = ctx.saved_tensors
        return *(tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in inputs), None


@contextmanager
def _loss_head_tagged(model: AdaptedModel, memory: _LiveBytes) -> Iterator[None]:
    def tag(purpose: Purpose) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            memory.purpose = purpose

        return hook

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, LossHead):
                stack.callback(module.register_forward_pre_hook(tag("logits")).remove)
                stack.callback(module.register_forward_hook(tag("activations")).remove)
        yield


class _CallOnBackward(torch.autograd.Function):
    """Identity that calls back when its gradient arrives."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.callback()
        return grads[0], None


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[tuple[tuple[tuple[int, ...], ...], list[ModuleCall]]]:
    """Record the calls of all modules; yields `StepTrace.modules` and the calls so far.

    The places of the hooks are those of DeepSpeed's ZeRO-3 (`DeepSpeedZeRoOffload._register_deepspeed_module`): around
    forward, on every output's gradient, and on the last gradient among the inputs given by position.
    """
    number = {parameter: index for index, parameter in enumerate(model.parameters())}
    modules = list(model.modules())
    calls: list[ModuleCall] = []
    waiting: Counter[int] = Counter()
    """Gradients of its inputs that the module's backward pass is yet to produce."""

    def record(index: int, event: Literal["enter", "leave"], is_forward: bool) -> None:
        is_recomputed = is_forward and torch._C._current_graph_task_id() != -1
        calls.append(ModuleCall(index, event, is_forward, is_recomputed))

    def hooks(index: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def input_gradient() -> None:
            waiting[index] -= 1
            if waiting[index] == 0:
                record(index, "leave", is_forward=False)

        def watch_input(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            waiting[index] += 1
            return _CallOnBackward.apply(tensor, input_gradient)

        def watch_output(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            return _CallOnBackward.apply(tensor, lambda: record(index, "enter", is_forward=False))

        def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
            record(index, "enter", is_forward=True)
            waiting[index] = 0
            return tree_map_only(Tensor, watch_input, args)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            record(index, "leave", is_forward=True)
            return tree_map_only(Tensor, watch_output, output)

        return before, after

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            before, after = hooks(index)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        own = tuple(tuple(number[parameter] for parameter in module.parameters(recurse=False)) for module in modules)
        yield own, calls
