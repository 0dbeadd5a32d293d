"""What this project uses of other packages beyond what they promise, so that an upgrade is one clear failure.

`USES` has every private or fragile name, which of our files uses it, and, for functions, the arguments that they give.
A private name that our code uses and that is not in the table is found too. To try an environment with other versions:

    python -m tests.test_upstream

A name begins with a package, or with an object that `Objects` makes: `zero3_parameter.ds_id` is an attribute of one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from tests.ranks import REPOSITORY


@dataclass(frozen=True)
class Use:
    """One name of another package."""

    name: str
    """Dotted, from a package or from an object of `Objects`."""
    by: str
    """Our files, below the repository, that use it."""
    call: str = ""
    """The arguments that they give: `a, b` by position in this order, `c=` by name."""


INFERENCE, DISTRIBUTED = "adept_ds/backbone/inference.py", "adept_ds/distributed.py"
LOAD, SHARDING, STREAMING = (f"adept_ds/backbone/{name}.py" for name in ("load", "sharding", "streaming"))
SOURCES, TAIL = "adept_ds/backbone/weight_sources.py", "adept_ds/model/logits_tail.py"
QUANTIZATION, FROZEN, FP8 = (f"adept_ds/backbone/{name}.py" for name in ("quantization", "frozen_linear", "fp8"))
LAYER_GATHERS = "adept_ds/backbone/layer_gathers.py"
HIDING, ADAPTED = "adept_ds/model/prompt_hiding.py", "adept_ds/model/adapted_model.py"
LAYERS, PREFIX, DEPT, BITFIT = (f"adept_ds/methods/{name}.py" for name in ("layers", "prefix", "dept", "bitfit"))
PEFT_LAYERS, MPT, P_TUNING = (f"adept_ds/methods/{name}.py" for name in ("peft_layers", "mpt", "p_tuning"))
LST, NARROW = "adept_ds/methods/lst.py", "adept_ds/methods/narrow.py"
ENGINE, META_STEP, GATHERS = (
    f"adept_ds/{name}.py" for name in ("training/engine", "planner/meta_step", "planner/zero3_gathers")
)
CONTENDERS, MEMORY, OPERATORS, RANKS = (
    f"adept_ds/benchmark/{name}.py" for name in ("contenders", "memory", "operators", "ranks")
)
COLLECTIVES = "adept_ds/benchmark/collectives.py"
COMPILED, BLOCKS = "adept_ds/backbone/compiled_blocks.py", "adept_ds/backbone/blocks.py"
TRACKERS, MODEL_FOLDER = "adept_ds/storage/trackers.py", "adept_ds/storage/model_folder.py"
METER = "tests/distributed/zero3_meter.py"

USES: dict[str, tuple[Use, ...]] = {
    "transformers": (
        # Generation: exchanged while a prompt is hidden from it; were they not called, ids above V would reach scores.
        Use(
            "transformers.GenerationMixin._prepare_generated_length",
            HIDING,
            "generation_config=, has_default_max_length=",
        ),
        Use(
            "transformers.GenerationMixin._get_logits_processor",
            HIDING,
            "generation_config=, input_ids_seq_length=, encoder_input_ids=",
        ),
        Use("transformers.GenerationMixin._get_stopping_criteria", HIDING, "generation_config="),
        Use("transformers.generation.logits_process.LogitsProcessorList", HIDING),
        Use("generation_config.max_length", HIDING),
        Use("generation_config.min_length", HIDING),
        # Chats.
        Use(
            "transformers.utils.chat_template_utils.render_jinja_template",
            "adept_ds/data/chat.py",
            "conversations, chat_template=, return_assistant_tokens_mask=",
        ),
        # Loading.
        Use("transformers.utils.hub.cached_file", LOAD, "path_or_repo_id, filename"),
        Use("transformers.utils.hub.cached_files", LOAD, "_raise_exceptions_for_missing_entries=, revision="),
        Use(
            "transformers.utils.hub.cached_files",
            "adept_ds/export/hub_folder.py",
            "_raise_exceptions_for_missing_entries=, _raise_exceptions_for_connection_errors=, revision=",
        ),
        Use(
            "transformers.utils.hub.get_checkpoint_shard_files",
            LOAD,
            "pretrained_model_name_or_path, index_filename, revision=",
        ),
        Use("transformers.integrations.HfDeepSpeedConfig", LOAD, "config_file_or_dict"),
        Use("transformers.utils.logging.disable_progress_bar", LOAD),
        Use("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys", LOAD),
        Use("transformers.integrations.hub_kernels.is_kernel", LOAD),
        Use(
            "transformers.get_scheduler",
            "adept_ds/config/schedule.py",
            "name, optimizer, num_warmup_steps, num_training_steps, scheduler_specific_kwargs",
        ),
        Use("transformers.utils.SAFE_WEIGHTS_NAME", LOAD),
        Use("transformers.utils.SAFE_WEIGHTS_INDEX_NAME", f"{LOAD} {MODEL_FOLDER}"),
        Use("transformers.utils.CONFIG_NAME", MODEL_FOLDER),
        Use("transformers.AutoConfig.for_model", LOAD, "model_type"),
        Use("t5.all_tied_weights_keys", STREAMING),
        Use("t5.base_model_prefix", SOURCES),
        Use("llama._init_weights", STREAMING, "module"),
        Use("generation_config._from_model_config", LOAD),
        Use("llama._adjust_missing_and_unexpected_keys", SOURCES, "loading_info"),
        Use("llama._get_dtype_plan", LOAD, "dtype"),
        Use("llama.config._attn_implementation", f"{PREFIX} {NARROW} {ADAPTED} adept_ds/planner/packing.py"),
        Use("transformers.AutoModelForCausalLM._model_mapping", "adept_ds/backbone/text_part.py"),
        # Models.
        Use("llama.activation_checkpointing_enable", f"{ADAPTED} {CONTENDERS}", "activation_checkpointing_kwargs"),
        Use("llama.disable_input_require_grads", ADAPTED),
        Use("t5.prepare_decoder_input_ids_from_labels", ADAPTED, "labels="),
        # Blocks, and the checkpointing around their `forward` that is done around compiled ones.
        Use("transformers.LlamaForCausalLM._no_split_modules", BLOCKS),
        Use("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward.__wrapped__", COMPILED),
        Use("transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing", COMPILED),
        Use("checkpointed_llama.model.layers.0._gradient_checkpointing_func", COMPILED),
        Use("transformers.PreTrainedModel.get_encoder", f"{DEPT} {LST} {NARROW} {CONTENDERS} {OPERATORS}"),
        Use("transformers.PreTrainedModel.get_decoder", f"{PREFIX} {LST} {NARROW} adept_ds/model/distillation.py"),
        # Calls of decoders, whose arguments a hook changes: under other names its changes would be without effect.
        Use(
            "transformers.LlamaModel.forward",
            f"{PREFIX} {DEPT}",
            "input_ids=, attention_mask=, position_ids=, past_key_values=",
        ),
        Use(
            "transformers.CodeGenModel.forward", f"{PREFIX} {DEPT}", "attention_mask=, position_ids=, past_key_values="
        ),
        Use("transformers.GPT2Model.forward", f"{PREFIX} {DEPT}", "attention_mask=, position_ids=, past_key_values="),
        Use(
            "transformers.models.t5.modeling_t5.T5Stack.forward",
            f"{PREFIX} {DEPT}",
            "input_ids=, attention_mask=, past_key_values=",
        ),
        Use("transformers.DynamicCache.update", PREFIX, "key_states, value_states, layer_idx"),
        Use("transformers.DynamicCache.get_seq_length", PREFIX),
        Use("encoder_decoder_cache.self_attention_cache", f"{PREFIX} {LST}"),
        Use("encoder_decoder_cache.cross_attention_cache", LST),
        # Calls of layers, some of whose arguments a side network exchanges: under other names it would get those of the
        # backbone.
        Use(
            "transformers.models.t5.modeling_t5.T5Block.forward",
            LST,
            "hidden_states=, position_bias=, encoder_hidden_states=, encoder_decoder_position_bias=, past_key_values=",
        ),
        Use(
            "transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward",
            LST,
            "hidden_states=, position_embeddings=, past_key_values=",
        ),
        Use("transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.forward", LST, "position_ids="),
        # A narrow copy's sizes, layers and places in a cache.
        Use("t5.config.d_model", NARROW),
        Use("t5.config.d_ff", NARROW),
        Use("t5.config.num_hidden_layers", NARROW),
        Use("t5.encoder.block", NARROW),
        Use("t5.encoder.final_layer_norm", NARROW),
        Use("llama.model.rotary_emb", LST),
        Use("llama.model.layers.0.self_attn.layer_idx", NARROW),
        Use("llama.model.layers.0.post_attention_layernorm", NARROW),
        # Sizes of a cache's entries; a name that is missing falls back to another that is right for other models.
        Use("t5.config.d_kv", PREFIX),
        Use("t5.config.num_decoder_layers", PREFIX),
        Use("llama.config.head_dim", PREFIX),
        Use("llama.config.num_key_value_heads", PREFIX),
        # Names of modules.
        Use("t5.encoder.block.0.layer.0.SelfAttention.o", LAYERS),
        Use("t5.encoder.block.0.layer.1.DenseReluDense.wo", LAYERS),
        Use("llama.model.layers.0.self_attn.o_proj", LAYERS),
        Use("llama.model.layers.0.mlp.down_proj", LAYERS),
        Use("codegen.transformer.h.0.attn.out_proj", LAYERS),
        Use("codegen.transformer.h.0.mlp.fc_out", LAYERS),
        Use("gpt2.transformer.h.0.attn.c_proj", LAYERS),
        Use("gpt2.transformer.h.0.mlp.c_proj", LAYERS),
        Use("transformers.pytorch_utils.Conv1D", BITFIT),
        Use("gpt2.transformer.h.0.attn.c_attn.nf", BITFIT),
        Use(
            "transformers.BitsAndBytesConfig",
            CONTENDERS,
            "load_in_4bit=, bnb_4bit_quant_type=, bnb_4bit_use_double_quant=, bnb_4bit_compute_dtype=",
        ),
        Use("transformers.GgufConfig", "adept_ds/tools/demo_model.py", "dequantize="),
    ),
    "deepspeed": (
        # Splitting weights as they are loaded.
        Use("deepspeed.zero.Init", SHARDING, "module=, config_dict_or_path="),
        Use("deepspeed.zero.Init._convert_to_deepspeed_param", SHARDING, "param"),
        Use("deepspeed.zero.GatheredParameters", SHARDING, "params"),
        Use("zero3_parameter.ds_id", SHARDING),
        Use("zero3_parameter.ds_shape", f"{SHARDING} {LAYER_GATHERS}"),
        Use("zero3_parameter.ds_numel", f"{SHARDING} {INFERENCE} {LAYER_GATHERS} {METER}"),
        Use("zero3_parameter.ds_tensor", f"{SHARDING} {INFERENCE} {LAYER_GATHERS} {ENGINE} {MEMORY} {METER}"),
        Use("zero3_parameter.ds_tensor.ds_numel", SHARDING),
        Use("zero3_parameter.ds_zero_partition_rank", SHARDING),
        Use("zero3_parameter.partition", SHARDING),
        # Frozen weights that are gathered by their layers.
        Use("zero3_parameter.ds_status", LAYER_GATHERS),
        Use("zero3_parameter.ds_process_group", LAYER_GATHERS),
        Use("zero3_parameter.ds_process_group.allgather_into_tensor_coalesced", LAYER_GATHERS),
        Use("deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE", LAYER_GATHERS),
        Use("deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.NOT_AVAILABLE", LAYER_GATHERS),
        Use("z3_leaf._z3_leaf", LAYER_GATHERS),
        Use("zero3_parameter.ds_persist", ENGINE),
        Use("zero3_engine.optimizer.parameter_offload.persistent_parameters", ENGINE),
        Use("zero3_engine.optimizer.parameter_offload.forward_hooks", ENGINE),
        Use("zero3_engine.optimizer.parameter_offload.backward_hooks", ENGINE),
        # The engine.
        Use("deepspeed.initialize", ENGINE, "model=, optimizer=, config="),
        Use("deepspeed.init_distributed", DISTRIBUTED, "dist_backend=, verbose="),
        Use("deepspeed.ops.__compatible_ops__.async_io", ENGINE),
        Use("deepspeed.ops.__compatible_ops__.deepspeed_shm_comm", DISTRIBUTED),
        Use("zero3_engine.backward", ENGINE, "loss, scale_wrt_gas="),
        Use("zero3_engine.get_global_grad_norm", ENGINE),
        Use("zero3_engine.zero_optimization_stage", ENGINE),
        Use("zero3_engine.fp16_enabled", ENGINE),
        Use("zero3_engine.save_checkpoint", ENGINE, "save_dir, tag=, save_latest="),
        Use("zero3_engine.load_checkpoint", ENGINE, "load_dir, tag="),
        Use("zero3_engine.checkpoint_engine.load", ENGINE, "path, map_location"),
        Use("deepspeed.utils.tensor_fragment.fragment_address", ENGINE),
        Use("deepspeed.runtime.config.DeepSpeedConfig", "adept_ds/planner/deepspeed_values.py", "config"),
        Use("deepspeed.runtime.fp16.loss_scaler.LossScaler", ENGINE),
        Use("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", ENGINE),
        Use("deepspeed.runtime.zero.config.ZeroStageEnum", ENGINE),
        # Masters and moments by parameter.
        Use("deepspeed.utils.safe_get_full_fp32_param", ENGINE, "param"),
        Use("deepspeed.utils.safe_set_full_fp32_param", ENGINE, "param, value"),
        Use("deepspeed.utils.safe_set_local_fp32_param", ENGINE, "param, value"),
        Use("deepspeed.utils.safe_get_local_grad", ENGINE, "param"),
        Use("deepspeed.utils.safe_set_local_grad", ENGINE, "param, value"),
        Use("deepspeed.utils.safe_get_full_optimizer_state", ENGINE, "param, optim_state_key"),
        Use("deepspeed.utils.safe_set_full_optimizer_state", ENGINE, "param, value, optim_state_key"),
        Use("deepspeed.utils.safe_set_local_optimizer_state", ENGINE, "param, value, optim_state_key"),
        Use("zero1_optimizer._hp_optimizer_states_linked", ENGINE),
        Use("zero1_optimizer._lazy_init_hp_params_optimizer_state", ENGINE),
        Use("bf16_optimizer._hp_optimizer_states_linked", ENGINE),
        Use("bf16_optimizer._lazy_init_hp_params_optimizer_state", ENGINE),
        # What fp16 keeps beside them.
        Use("fp16_optimizer.loss_scaler.dynamic", ENGINE),
        Use("fp16_optimizer.loss_scaler.cur_scale", ENGINE),
        Use("fp16_optimizer.loss_scaler.cur_iter", ENGINE),
        Use("fp16_optimizer.loss_scaler.last_overflow_iter", ENGINE),
        Use("fp16_optimizer.loss_scaler.cur_hysteresis", ENGINE),
        # The time of gathers.
        Use("zero3_engine.optimizer.parameter_offload.get_param_coordinator", RANKS),
        Use(
            "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator.fetch_sub_module",
            f"{RANKS} {METER}",
        ),
        # What tests measure and pretend.
        Use("deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator.reset_step", METER),
        Use("deepspeed.runtime.zero.partitioned_param_coordinator.InflightParamRegistry.__setitem__", METER),
        Use("deepspeed.runtime.zero.partition_parameters.AllGatherCoalescedHandle", METER),
        Use(
            "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported",
            "tests/distributed/run_all.py tests/test_upstream.py",
        ),
    ),
    "torch": (
        Use("torch.cpu._is_avx512_bf16_supported", FROZEN),
        Use("torch.cpu._is_amx_tile_supported", FROZEN),
        Use("torch.ops.aten._unsafe_view", FROZEN),
        Use("torch._scaled_mm", FP8),
        Use("module._parameters", f"{STREAMING} {LAYER_GATHERS} {QUANTIZATION}"),
        Use("removable_handle.hooks_dict_ref", ENGINE),
        # Compiled blocks: without these names failures would not be caught, and compilations not told.
        Use("torch._dynamo.exc.TorchDynamoException", COMPILED),
        Use("torch._dynamo.exc.FailOnRecompileLimitHit", COMPILED),
        Use("torch._dynamo.utils.counters", f"{COMPILED} tests/test_compiled_blocks.py"),
        Use("torch._dynamo.config.recompile_limit", COMPILED),
        Use("torch._inductor.config.fallback_random", COMPILED),
        Use("module._forward_pre_hooks", f"{COMPILED} {ENGINE}"),
        Use("module._forward_hooks", f"{COMPILED} {ENGINE}"),
        Use("module._buffers", STREAMING),
        Use("torch.serialization.safe_globals", ENGINE, "safe_globals"),
        Use("torch.distributed.c10d_logger", DISTRIBUTED),
        Use("torch.distributed.DistError", "adept_ds/slurm/node_check.py"),
        # A step on the meta device.
        Use("torch.utils._python_dispatch.TorchDispatchMode", f"{META_STEP} {COLLECTIVES}"),
        Use("torch.utils._pytree.tree_leaves", f"{META_STEP} {TAIL} {LAYER_GATHERS} {COLLECTIVES}", "tree"),
        Use("torch.utils._pytree.tree_map", TAIL),
        Use("torch.utils._pytree.tree_map_only", META_STEP),
        Use("torch._C._current_graph_task_id", f"{META_STEP} {LAYER_GATHERS} {QUANTIZATION}"),
        Use("torch.ops.aten._to_copy.default", META_STEP),
        Use("storage._cdata", f"{META_STEP} {TAIL}"),
        Use("torch.ops.aten._local_scalar_dense.default.namespace", META_STEP),
        Use("torch.ops.aten.index.Tensor", META_STEP),
        Use("torch.ops.aten._grouped_mm.default", META_STEP),
        Use("torch.ops.aten.logsumexp.default", META_STEP),
        Use("torch.native_dropout", META_STEP),
        Use("torch.nn.functional.scaled_dot_product_attention", META_STEP),
        Use("torch.nn.functional.dropout", META_STEP, "input, p, training, inplace"),
        # Profiles.
        Use("torch.utils.flop_counter.FlopCounterMode", "adept_ds/benchmark/flops.py", "display="),
        Use("torch.utils.flop_counter.FlopCounterMode.get_total_flops", "adept_ds/benchmark/flops.py"),
        Use("kineto_event.start_ns", MEMORY),
        Use("kineto_event.nbytes", MEMORY),
        Use("kineto_event.name", MEMORY),
        Use("function_event.self_cpu_time_total", OPERATORS),
        Use("function_event.self_device_time_total", OPERATORS),
        Use("function_event.sequence_nr", OPERATORS),
        Use("function_event.cpu_parent", OPERATORS),
        Use("function_event.time_range.start", OPERATORS),
        Use("torch.autograd.DeviceType.CPU", OPERATORS),
        Use("torch.utils.cpp_extension._get_build_directory", "tests/distributed/test_offload.py"),
    ),
    "bitsandbytes": (
        Use("bitsandbytes.functional.create_dynamic_map", QUANTIZATION),
        Use("bitsandbytes.functional.quantize_blockwise", QUANTIZATION, "A, code=, blocksize="),
        Use("bitsandbytes.functional.quantize_4bit", QUANTIZATION, "A, blocksize=, quant_type="),
        Use("torch.ops.bitsandbytes.dequantize_blockwise.default", QUANTIZATION),
        Use("torch.ops.bitsandbytes.dequantize_4bit.default", QUANTIZATION),
        Use("torch.ops.bitsandbytes.gemm_4bit.default", QUANTIZATION),
        Use("quant_state.absmax", QUANTIZATION),
        Use("quant_state.state2", MEMORY),
        Use("quantized_parameter.quant_state", f"{CONTENDERS} {MEMORY}"),
        Use("bitsandbytes.nn.Linear4bit", CONTENDERS),
        Use("bitsandbytes.nn.Params4bit", f"{CONTENDERS} {MEMORY}"),
        Use("torch.ops.bitsandbytes.dequantize_4bit.default.namespace", META_STEP),
        Use("bitsandbytes.backends.cpu.ops", "adept_ds/__init__.py"),
    ),
    "peft": (
        Use("peft.inject_adapter_in_model", PEFT_LAYERS, "peft_config, model, adapter_name"),
        Use("peft.tuners.tuners_utils.BaseTunerLayer.enable_adapters", PEFT_LAYERS, "enabled"),
        Use("peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype", PEFT_LAYERS, "x, dtype"),
        Use("peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", PEFT_LAYERS),
        Use("peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING", PEFT_LAYERS),
        Use("peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING", PEFT_LAYERS),
        Use("peft.LoraConfig", PEFT_LAYERS, "r=, lora_alpha=, lora_dropout=, target_modules="),
        Use("peft.IA3Config", PEFT_LAYERS, "target_modules=, feedforward_modules="),
        Use("peft.utils.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING", PEFT_LAYERS),
        Use("peft.VeraConfig", PEFT_LAYERS, "r=, d_initial=, vera_dropout=, target_modules="),
        Use("peft.tuners.VeraModel", PEFT_LAYERS, "model, peft_config, adapter_name"),
        Use("peft.PrefixEncoder", PREFIX, "config"),
        Use(
            "peft.PrefixTuningConfig",
            PREFIX,
            "num_virtual_tokens=, token_dim=, num_layers=, encoder_hidden_size=, prefix_projection=",
        ),
        Use("peft.PromptEncoder", P_TUNING, "config"),
        Use(
            "peft.PromptEncoderConfig",
            P_TUNING,
            "encoder_reparameterization_type=, encoder_hidden_size=, num_virtual_tokens=, num_transformer_submodules=, "
            "token_dim=",
        ),
        Use(
            "peft.tuners.multitask_prompt_tuning.MultitaskPromptEmbedding",
            MPT,
            "config, word_embeddings",
        ),
        Use(
            "peft.MultitaskPromptTuningConfig",
            MPT,
            "num_virtual_tokens=, num_transformer_submodules=, token_dim=, num_tasks=, num_ranks=",
        ),
        Use("multitask_prompt.prefix_task_cols", MPT),
        Use("multitask_prompt.prefix_task_rows", MPT),
        Use("multitask_prompt.embedding.weight", MPT),
        Use("multitask_prompt.num_tasks", MPT),
        Use("multitask_prompt.num_virtual_tokens", MPT),
    ),
    "accelerate": (
        Use("accelerate.init_empty_weights", LOAD, "include_buffers="),
        Use("accelerate.tracking.get_available_trackers", TRACKERS),
        Use("accelerate.utils.LoggerType", TRACKERS),
        Use("accelerate.tracking.LOGGER_TYPE_TO_CLASS.tensorboard", TRACKERS, "run_name, logging_dir="),
        Use("accelerate.tracking.LOGGER_TYPE_TO_CLASS.wandb.tracker", TRACKERS),
        Use("accelerate.tracking.TensorBoardTracker.requires_logging_directory", TRACKERS),
        Use("accelerate.tracking.WandBTracker.store_init_configuration", TRACKERS, "values"),
        Use("accelerate.tracking.MLflowTracker.log_artifacts", TRACKERS),
        Use("accelerate.tracking.GeneralTracker.start", TRACKERS),
        Use("accelerate.tracking.TensorBoardTracker.log", "adept_ds/storage/run_log.py", "values, step="),
        Use("accelerate.tracking.GeneralTracker.finish", "adept_ds/storage/run_log.py"),
    ),
    "datasets": (
        Use("datasets.config.HF_DATASETS_CACHE", "adept_ds/data/load_hub.py"),
        Use("datasets.load.CachedDatasetModuleFactory", "adept_ds/data/hub.py", "name"),
        Use("datasets.load.CachedDatasetModuleFactory.get_module", "adept_ds/data/hub.py"),
        Use("datasets.Dataset", "adept_ds/data/tasks/sources.py", "arrow_table"),
        Use("datasets.load_dataset", "adept_ds/data/load_hub.py", "path, name"),
    ),
    "huggingface_hub": (
        Use("huggingface_hub.try_to_load_from_cache", "adept_ds/backbone/hub.py", "repo_id, filename, revision="),
        Use(
            "huggingface_hub.split_state_dict_into_shards_factory",
            MODEL_FOLDER,
            "state_dict, get_storage_size=, filename_pattern=, max_shard_size=",
        ),
        Use("huggingface_hub.constants.is_offline_mode", "adept_ds/slurm/node_check.py"),
    ),
}


class Objects:
    """Objects whose attributes are used, each made when it is asked for. For a process of its own: DeepSpeed changes
    functions of torch."""

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig()

    def __getattr__(self, name: str) -> Any:
        """A small model by its name."""
        from tests.models import BACKBONES, seeded

        model = seeded(BACKBONES[{"t5": "t5-tied"}.get(name, name)])
        setattr(self, name, model)
        return model

    @cached_property
    def encoder_decoder_cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    @cached_property
    def module(self) -> Any:
        from torch import nn

        return nn.Linear(2, 2)

    @cached_property
    def removable_handle(self) -> Any:
        return self.module.register_forward_hook(lambda *_: None)

    @cached_property
    def z3_leaf(self) -> Any:
        from deepspeed.utils import set_z3_leaf_module

        set_z3_leaf_module(self.module, True)
        return self.module

    @cached_property
    def storage(self) -> Any:
        return self.module.weight.untyped_storage()

    @cached_property
    def _profiler(self) -> Any:
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            torch.ones(2, 2) @ torch.ones(2, 2)
        return profiler

    @cached_property
    def kineto_event(self) -> Any:
        events = self._profiler.profiler.kineto_results.events()
        return next(event for event in events if event.name() == "[memory]")

    @cached_property
    def function_event(self) -> Any:
        return self._profiler.events()[0]

    @cached_property
    def quantized_parameter(self) -> Any:
        import torch
        from bitsandbytes.nn import Params4bit

        return Params4bit(torch.ones(64, 64), requires_grad=False, quant_type="nf4").to("cpu")

    @cached_property
    def quant_state(self) -> Any:
        return self.quantized_parameter.quant_state

    @cached_property
    def checkpointed_llama(self) -> Any:
        from tests.models import BACKBONES, seeded

        model = seeded(BACKBONES["llama"])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    @cached_property
    def multitask_prompt(self) -> Any:
        from peft import MultitaskPromptTuningConfig
        from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
        from torch import nn

        config = MultitaskPromptTuningConfig(
            num_virtual_tokens=2, num_transformer_submodules=1, token_dim=4, num_tasks=1, num_ranks=1
        )
        return MultitaskPromptEmbedding(config, nn.Embedding(5, 4))

    @staticmethod
    def _engine(stage: int, dtype: str) -> Any:
        """Our engine around a small ADePT model, on this process alone."""
        import torch

        from adept_ds.backbone.load import DTYPES
        from adept_ds.backbone.sharding import Partitioner
        from adept_ds.config.deepspeed import complete
        from adept_ds.config.method import AdeptConfig
        from adept_ds.config.run import RunConfig
        from adept_ds.distributed import init_world, prepare_deepspeed
        from adept_ds.model.adapted_model import get_adept_model
        from adept_ds.training.engine import Engine
        from adept_ds.training.optimizer import build_optimizer
        from tests.models import BACKBONES, seeded

        world = init_world()
        prepare_deepspeed(world)
        run = RunConfig.model_validate(
            {
                "model": {"name_or_path": "x", "dtype": dtype},
                "train": {"max_steps": 9, "warmup_steps": 1, "global_batch_size": 1},
                "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}},
            }
        )
        config = complete(run, 1).config
        backbone = seeded(BACKBONES["llama"]).to(DTYPES[dtype])
        if stage == 3:
            partitioner = Partitioner(config, backbone, torch.device("cpu"))
            for parameter in backbone.parameters():
                partitioner.split(parameter)
        model = get_adept_model(backbone, AdeptConfig(num_virtual_tokens=2, bottleneck=1))
        return Engine(model, build_optimizer(model, run.train), config, world).deepspeed

    @cached_property
    def zero3_engine(self) -> Any:
        return self._engine(3, "fp32")

    @cached_property
    def zero3_parameter(self) -> Any:
        return next(self.zero3_engine.module.backbone.parameters())

    @cached_property
    def zero1_optimizer(self) -> Any:
        return self._engine(1, "fp32").optimizer

    @cached_property
    def bf16_optimizer(self) -> Any:
        return self._engine(1, "bf16").optimizer

    @cached_property
    def fp16_optimizer(self) -> Any:
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True  # torch computes in it, DeepSpeed does not try
        return self._engine(1, "fp16").optimizer


def attribute(value: Any, name: str) -> Any:
    """An attribute, the element of a mapping, or of a list of modules."""
    if hasattr(value, name):
        return getattr(value, name)
    if isinstance(value, dict):
        return value[name]
    raise AttributeError(name)


def resolve(name: str, objects: Objects) -> Any:
    """What a name of the table stands for.

    Raises:
        ImportError, AttributeError, KeyError: It is not there.
    """
    path, *rest = name.split(".")
    if path not in USES:
        value = getattr(objects, path)
    else:
        value = importlib.import_module(path)
        # The module and not what its package may have under the same name.
        with suppress(ImportError):
            while rest:
                value = importlib.import_module(f"{path}.{rest[0]}")
                path = f"{path}.{rest.pop(0)}"
    for part in rest:
        value = attribute(value, part)
    return value


def call_problem(function: Any, call: str) -> str | None:
    """What about a call does not fit the function; None if it fits."""
    names = [name for name in parameter_names(function) if name != "self"]
    given = call.split(", ")
    by_name = [name.removesuffix("=") for name in given if name.endswith("=")]
    by_position = [name for name in given if not name.endswith("=")]
    if by_position != names[: len(by_position)] or not set(by_name) <= set(names):
        return f"takes ({', '.join(names)}), and is called with ({call})"
    return None


def parameter_names(function: Any) -> list[str]:
    """Names of a function's parameters; of what it wraps where it takes whatever comes."""
    names = list(inspect.signature(function).parameters)
    wrapped = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if names == ["args", "kwargs"] and len(wrapped) == 1 and callable(wrapped[0]):
        return parameter_names(wrapped[0])
    return names


def problem(use: Use, objects: Objects) -> str | None:
    """What is wrong with one use; None if nothing is."""
    try:
        value = resolve(use.name, objects)
        wrong = call_problem(value, use.call) if use.call else None
    except (ImportError, AttributeError, KeyError) as error:
        wrong = f"is not there any more ({type(error).__name__}: {error})"
    return f"{use.name} {wrong}; used by {', '.join(use.by.split())}" if wrong else None


def problems() -> list[str]:
    """What is wrong, each with the package's version and our files."""
    objects = Objects()
    return [
        f"{package} {version(package)}: {found}"
        for package, uses in USES.items()
        for use in uses
        if (found := problem(use, objects))
    ]


def test_what_is_used_of_other_packages_is_there(run_ranks) -> None:
    done = run_ranks(0, "tests.test_upstream", None)
    assert done.returncode == 0, done.stdout


# A test of the table: what our code uses is in it.

LIBRARIES = tuple(USES)
NOT_LISTED = {
    "_about": "a key of our configs",
    "_base": "a key of our configs",
    "_ARGCOMPLETE": "the variable by which a shell asks argcomplete, as its documentation says",
    "_model_name_or_path": "deleted from a config by adept_ds/tools/demo_model.py, whose test fails without it",
    "ds_zero_partition_process_group": "read by DeepSpeed; adept_ds/backbone/sharding.py looks whether it did",
    "_exit": "os",
    "_base_executable": "sys",
    "_numerator": "fractions",
    "_denominator": "fractions",
}
"""Private names outside the table, and why."""


def sources() -> list[Path]:
    return [path for folder in ("adept_ds", "evals", "launchers") for path in (REPOSITORY / folder).rglob("*.py")]


def own_names() -> set[str]:
    """All names that our code gives to something."""
    found: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif is_set_on_self(node):
                found.add(node.attr)
    return found


def is_set_on_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether an attribute of our own object is set: what is set on something else may be anybody's."""
    is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return is_set and isinstance(node.value, ast.Name) and node.value.id in ("self", "ctx")


def used_private_names() -> dict[str, set[str]]:
    """Private names, and those that DeepSpeed gives to parameters, to the files that use them of something else."""
    own, found = own_names(), {}
    for path in sources():
        if path.is_relative_to(REPOSITORY / "adept_ds" / "sandbox"):
            continue  # imports the standard library alone
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value] if node.value.isidentifier() else []
            elif isinstance(node, ast.keyword) and node.arg:
                names = [node.arg]
            for name in names:
                is_private = name.startswith("_") and not name.startswith("__")
                if (is_private or re.match(r"ds_(?!configs)", name)) and name not in own:
                    found.setdefault(name, set()).add(str(path.relative_to(REPOSITORY)))
    return found


def test_the_table_has_every_private_name_that_the_code_uses() -> None:
    listed = {
        (part, path)
        for uses in USES.values()
        for use in uses
        for path in use.by.split()
        for part in re.findall(r"\w+", f"{use.name} {use.call}")
    }
    missing = [
        f"{name} in {path}"
        for name, paths in used_private_names().items()
        for path in paths
        if name not in NOT_LISTED and (name, path) not in listed
    ]
    assert not missing, "\n".join(missing)


def test_the_files_that_the_table_names_use_what_it_says() -> None:
    stale = [
        f"{use.name} in {path}"
        for uses in USES.values()
        for use in uses
        for path in use.by.split()
        if not mentioned(use) & set(re.findall(r"\w+", (REPOSITORY / path).read_text(encoding="utf-8")))
    ]
    assert not stale, "\n".join(stale)


def mentioned(use: Use) -> set[str]:
    """The last part of its name, or what is given to it by name: some functions are only called by others."""
    return {re.findall(r"\w+", use.name)[-1], *re.findall(r"(\w+)=", use.call)}


# What no name shows: behaviour that is relied on.


def test_generation_calls_what_hides_the_prompt() -> None:
    from transformers import GenerationMixin

    called = inspect.unwrap(GenerationMixin.generate).__code__.co_names
    assert {"_prepare_generated_length", "_get_logits_processor", "_get_stopping_criteria"} <= set(called)


def test_transformers_knows_of_zero3_while_its_config_lives() -> None:
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    config: HfDeepSpeedConfig | None = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    config = None
    assert not is_deepspeed_zero3_enabled()
    assert config is None


def test_a_tied_head_is_listed_under_its_own_name(make_backbone: Callable[[str], Any]) -> None:
    assert "lm_head.weight" in make_backbone("t5-tied").all_tied_weights_keys
    assert "lm_head.weight" not in make_backbone("t5-untied").all_tied_weights_keys


def test_layer_norms_are_known_by_their_classes_names(make_backbone: Callable[[str], Any]) -> None:
    from adept_ds.methods.layers import norms

    assert {name: len(norms(make_backbone(name))) for name in ("llama", "gpt2", "codegen", "t5-tied")} == {
        "llama": 5,
        "gpt2": 5,
        "codegen": 3,
        "t5-tied": 12,
    }


def test_a_decoder_that_takes_its_cache_by_another_name_gets_no_prefix(make_backbone, monkeypatch) -> None:
    from transformers import LlamaModel

    from adept_ds.config.method import PrefixTuningConfig
    from adept_ds.errors import UserError
    from adept_ds.methods.prefix import PrefixTuning

    monkeypatch.setattr(LlamaModel, "forward", lambda self, input_ids=None, cache=None, **kwargs: None)
    with pytest.raises(UserError, match="does not; expected another method"):
        PrefixTuning(PrefixTuningConfig()).inject(make_backbone("llama"), None, None)


# DeepSpeed's configuration.


class ReadKeys(dict):
    """A config that notes which keys are asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> ReadKeys:
        return self


@pytest.fixture
def deepspeed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.usefixtures("deepspeed_on_cpu")
def test_top_level_keys_are_those_that_the_installed_deepspeed_reads() -> None:
    from deepspeed.runtime import config

    from adept_ds.config.deepspeed import REFUSED_KEYS, TOP_LEVEL_KEYS

    values = ReadKeys({"train_batch_size": 1})
    config.DeepSpeedConfig(values)
    removed = config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    # `bfloat16` is an old name of `bf16`, which has an owner.
    assert values.read - removed - {"bfloat16"} | {"sequence_parallel_size"} == TOP_LEVEL_KEYS
    assert REFUSED_KEYS.keys() <= TOP_LEVEL_KEYS


@pytest.mark.usefixtures("deepspeed_on_cpu")
def test_section_keys_are_those_that_the_installed_deepspeed_reads() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    from adept_ds.config.deepspeed import OFFLOAD_KEYS, SECTION_KEYS

    fields = DeepSpeedZeroConfig.model_fields
    assert SECTION_KEYS["zero_optimization"] == fields.keys() | {
        field.alias for field in fields.values() if field.alias
    }
    assert OFFLOAD_KEYS["offload_param"] == DeepSpeedZeroOffloadParamConfig.model_fields.keys()
    assert OFFLOAD_KEYS["offload_optimizer"] == DeepSpeedZeroOffloadOptimizerConfig.model_fields.keys()
    assert SECTION_KEYS["bf16"] == DeepSpeedBF16Config.model_fields.keys()
    assert SECTION_KEYS["fp16"] == DeepSpeedFP16Config.model_fields.keys()
    names = ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    assert SECTION_KEYS["data_types"] == {getattr(constants, name) for name in names}


@pytest.mark.usefixtures("deepspeed_on_cpu")
def test_the_planners_defaults_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from adept_ds.planner.memory import DEFAULT_REDUCE_BUCKET_SIZE
    from adept_ds.planner.zero3_gathers import GatherSettings

    theirs = DeepSpeedZeroConfig()
    assert {name: getattr(theirs, name) for name in vars(GatherSettings())} == vars(GatherSettings())
    assert theirs.reduce_bucket_size == DEFAULT_REDUCE_BUCKET_SIZE


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for found in (result := problems()):
        print(found)
    sys.exit(bool(result))
