"""Try what works on which architecture, and write it down as a table.

    python -m adept_ds.tools.families docs/families.md
    python -m adept_ds.tools.families --only gemma2 bart

Each architecture of `FAMILIES` is built small, with random weights, and compared with plain `transformers`, as
`INTRODUCTION` says.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from adept_ds.backbone.load import load_backbone, unsharded_creation
from adept_ds.backbone.quantization import QuantizedLinear
from adept_ds.backbone.sharding import full_numel, gathered
from adept_ds.config.method import (
    AdapterConfig,
    AdeptConfig,
    Ia3Config,
    LoraConfig,
    LstConfig,
    MethodConfig,
    PrefixTuningConfig,
)
from adept_ds.config.run import ModelConfig
from adept_ds.distributed import init_world
from adept_ds.errors import UserError
from adept_ds.export.export import Request, backbone_of, export_folded, export_lora, export_serving_base
from adept_ds.export.forms import FOLDED, LORA
from adept_ds.files import atomic_write
from adept_ds.model.adapted_model import AdaptedModel, decoder_inputs, get_adept_model
from adept_ds.storage.adapter_folder import load_adapter

VOCABULARY, WIDTH, END = 160, 32, 1
TOLERANCE = 1e-4
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": END, "bos_token_id": 2}
_TWO_SIDES = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": END,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "gpt2": _GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": {},
    "gpt_bigcode": _GPT,
    "codegen": {**_GPT, "rotary_dim": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "falcon": {},
    "stablelm": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm": {"head_dim": 8},
    "nemotron": {},
    "persimmon": {},
    "smollm3": {},
    "deepseek_v3": {
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "llama4_text": {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
    "mamba": {},
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "longt5": _T5,
    "bart": _TWO_SIDES,
    "mbart": _TWO_SIDES,
    "pegasus": _TWO_SIDES,
    "marian": _TWO_SIDES,
    "m2m_100": _TWO_SIDES,
    "blenderbot": _TWO_SIDES,
    "led": {**_TWO_SIDES, "attention_window": [4, 4], "max_encoder_position_embeddings": 128},
    "prophetnet": {
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
}
"""`model_type` of `transformers` to what its small model needs beside the usual names of sizes."""


INTRODUCTION = """# What works on which architecture

Each architecture was built small, with random weights, and compared with plain `transformers`:

| column | what was found |
|---|---|
| train | loss and gradients of ADePT are those of cross-entropy over whole logits |
| decode | what is generated with the cache, beside a longer row, is the likeliest token of a pass over all before it |
| shard | loaded under ZeRO-3 the backbone has the same logits |
| nf4 | share of the weights, the table aside, that is held in 4 bits: not stacked experts; logits are finite |
| adapter | an adapter that is saved and loaded again has the same logits |
| exports | as a whole model (`folded`) and a LoRA (`lora`) other programs have the live model's texts and logits |
| prefix, lora, ia3, lst, bottleneck | these methods find their places untold, and all that they train has gradients |

The table is made by

<!-- not run: it takes minutes, and a test compares some rows -->
```sh
HF_HUB_OFFLINE=1 python -m adept_ds.tools.families docs/families.md
```
"""


Findings = dict[str, str]
"""What was found of one architecture, by column: `yes`, a share, or `no` with the number of a note."""


class Wrong(Exception):
    """Something works otherwise than in plain `transformers`; the text says how."""


def build(model_type: str) -> PreTrainedModel:
    """Return the small model, in evaluation mode; the same weights at every call."""
    known = AutoConfig.for_model(model_type)
    usual = {
        name: value
        for name, value in {**_SIZES, **_HEADS, **_TOKENS}.items()
        if name in {**vars(known), **known.attribute_map}
    }
    config = AutoConfig.for_model(model_type, **usual | FAMILIES[model_type])
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(), unsharded_creation():
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(config).eval()
        # As trained ones have them: other than zero and one, and large enough to tell inputs apart.
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in values.items():
            if tensor.requires_grad or name == "final_logits_bias":
                with torch.no_grad():
                    tensor.add_(torch.randn_like(tensor) * (0.1 if tensor.dim() > 1 else 0.05))
    start = getattr(config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(decoder_start_token_id=start, pad_token_id=0)
    return model


def _adapted(model_type: str, config: MethodConfig | None = None) -> AdaptedModel:
    """The model with a method in it whose values have an effect."""
    model = get_adept_model(build(model_type), config or AdeptConfig(num_virtual_tokens=3, bottleneck=2)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _ids(rows: int, columns: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(2))


def _close(got: Tensor, right: Tensor, what: str) -> None:
    gap = float((got - right).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(right.abs().max())):
        raise Wrong(f"{what} differ by {gap:.2g}")


def _trains(model_type: str) -> str:
    model, ids = _adapted(model_type), _ids(2, 9)
    mask = torch.ones_like(ids)
    parameters = list(model.trainable_parameters().values())
    loss = model(ids, mask, labels=ids).loss
    gradients = torch.autograd.grad(loss, parameters)
    if model.is_encoder_decoder:
        read = decoder_inputs(model.backbone, ids)
        logits, targets = model(ids, mask, decoder_input_ids=read).logits, ids
    else:
        # The last token of the prompt predicts the first one.
        logits, targets = model(ids, mask).logits[:, model.num_virtual_tokens - 1 : -1], ids
    right = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    _close(loss, right, "losses")
    for got, expected in zip(gradients, torch.autograd.grad(right, parameters), strict=True):
        _close(got, expected, "gradients")
    return "yes"


@torch.no_grad()
def _decodes(model_type: str) -> str:
    model, ids, steps = _adapted(model_type), _ids(1, 5), 6
    left = 0 if model.is_encoder_decoder else 7
    rows = torch.cat([F.pad(ids, (left, 7 - left)), _ids(1, 12)])
    mask = torch.cat([F.pad(torch.ones_like(ids), (left, 7 - left)), torch.ones(1, 12, dtype=torch.long)])
    written = model.generate(input_ids=rows, attention_mask=mask, max_new_tokens=steps, do_sample=False)
    assert isinstance(written, Tensor)
    written = written[:1, -steps:]
    read = torch.tensor([[model.backbone.generation_config.decoder_start_token_id]]) if left == 0 else ids
    for step in range(steps):
        logits = model(ids, decoder_input_ids=read).logits if left == 0 else model(read).logits
        best = logits[:, -1].max(-1)
        chosen = logits[0, -1, written[0, step]]
        if best.values[0] - chosen > TOLERANCE * max(1.0, float(best.values.abs().max())):
            raise Wrong(f"token {step + 1} beside a longer row is another one")
        read = torch.cat([read, written[:, step : step + 1]], 1)
    return "yes"


@torch.no_grad()
def _shards(model_type: str, folder: Path) -> str:
    world = init_world()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    backbone = load_backbone(_model(folder), world.device, deepspeed_config=config, show_progress=False)
    with gathered(backbone.parameters()):
        _close(_logits(backbone), _logits(build(model_type)), "logits")
    return "yes"


@torch.no_grad()
def _quantises(model_type: str, folder: Path) -> str:
    backbone = load_backbone(_model(folder, quantization="nf4"), show_progress=False)
    if not _logits(backbone).isfinite().all():
        raise Wrong("logits are not finite")
    quantised = sum(full_numel(m.weight) for m in backbone.modules() if isinstance(m, QuantizedLinear))
    table = backbone.get_input_embeddings().weight
    layers = sum(full_numel(p) for p in backbone.parameters() if p is not table and p.dim() >= 1)
    return f"{100 * quantised / layers:.0f} %"


@torch.no_grad()
def _saves(model_type: str, folder: Path) -> str:
    model, ids = _adapted(model_type), _ids(1, 5)
    model.save_pretrained(folder / "adapter")
    again = AdaptedModel.from_pretrained(build(model_type), folder / "adapter")
    inputs = {"decoder_input_ids": ids} if model.is_encoder_decoder else {}
    _close(again(ids, **inputs).logits, model(ids, **inputs).logits, "logits")
    return "yes"


def _exports(model_type: str, folder: Path) -> str:
    """Both forms; their own comparison refuses what is not the same."""
    characters = {"<pad>": 0, "</s>": END, "<s>": 2, **{chr(32 + number): 3 + number for number in range(95)}}
    core = Tokenizer(models.WordLevel(characters, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder / "model")
    adapter = load_adapter(folder / "adapter")
    model = backbone_of(adapter, str(folder / "model"), dtype="fp32")
    reasons = {}
    try:
        export_folded(Request(adapter, model, folder / FOLDED))
    except UserError as error:
        reasons[FOLDED] = str(error)
    try:
        export_serving_base(model, adapter.method.num_virtual_tokens, folder / "serving")
        export_lora(Request(adapter, model, folder / LORA), folder / "serving")
    except UserError as error:
        reasons[LORA] = str(error)
    if len(reasons) == 2:
        raise UserError(reasons[FOLDED])
    return next((form for form in (FOLDED, LORA) if reasons and form not in reasons), "yes")


@dataclass(frozen=True)
class _HasMethod:
    config: MethodConfig

    def __call__(self, model_type: str) -> str:
        model, ids = _adapted(model_type, self.config), _ids(2, 6)
        model(ids, labels=ids).loss.backward()
        if not all(p.grad is not None and p.grad.any() for p in model.trainable_parameters().values()):
            raise Wrong("a trained parameter has no gradient")
        return "yes"


def _model(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name_or_path": str(folder / "model"), "dtype": "fp32", **changes})


def _logits(backbone: Any) -> Tensor:
    ids = _ids(1, 9)
    inputs = {"decoder_input_ids": ids} if backbone.config.is_encoder_decoder else {}
    logits: Tensor = backbone(input_ids=ids, **inputs).logits
    return logits


COLUMNS: dict[str, Callable[..., str]] = {
    "train": _trains,
    "decode": _decodes,
    "shard": _shards,
    "nf4": _quantises,
    "adapter": _saves,
    "exports": _exports,
    "prefix": _HasMethod(PrefixTuningConfig(prefix_length=3)),
    "lora": _HasMethod(LoraConfig(rank=2)),
    "ia3": _HasMethod(Ia3Config()),
    "lst": _HasMethod(LstConfig(reduction=2)),
    "bottleneck": _HasMethod(AdapterConfig()),
}


def examine(model_type: str, notes: list[str]) -> Findings:
    """Try all columns on one architecture; reasons go to `notes`, each once."""
    findings: Findings = {}
    with tempfile.TemporaryDirectory() as name:
        build(model_type).save_pretrained(Path(name) / "model")
        for column, check in COLUMNS.items():
            if findings.get("train", "yes") != "yes" and isinstance(check, _HasMethod):
                findings[column] = "-"
                continue
            try:
                with_folder = check in (_shards, _quantises, _saves, _exports)
                findings[column] = check(model_type, Path(name)) if with_folder else check(model_type)
            except UserError as error:
                findings[column] = _noted(f"refused: {_without(str(error), name)}", notes)
            except Wrong as error:
                findings[column] = _noted(f"WRONG: {error}", notes)
            except Exception as error:
                findings[column] = _noted(f"ERROR: {type(error).__name__}: {str(error)[:120]}", notes)
    return findings


def _without(text: str, folder: str) -> str:
    """A message without what is of this model alone: the place, the type, the names of its layers."""
    text = re.sub(rf"(model.name_or_path is )?'({re.escape(folder)}/model)?'( \(model type '\w+'\))?", "it", text)
    text = re.sub(r"has linear layers whose names end in [^;.]*", "has other layers", text)
    return re.sub(r"\w+For\w+", "such a model", text).splitlines()[0]


def _noted(reason: str, notes: list[str]) -> str:
    if reason not in notes:
        notes.append(reason)
    return f"no ({notes.index(reason) + 1})"


def table(found: dict[str, Findings], notes: Sequence[str]) -> str:
    """The findings as Markdown."""
    head = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    rows = [
        f"| {name} | " + " | ".join(findings[column] for column in COLUMNS) + " |" for name, findings in found.items()
    ]
    return "\n".join([*head, *rows, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def main() -> int:
    """Examine, print or write; the exit status is 1 if anything works otherwise than in plain `transformers`."""
    parser = argparse.ArgumentParser(description="Try what works on which architecture.")
    parser.add_argument("out", nargs="?", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), metavar="TYPE", default=list(FAMILIES))
    flags = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    notes: list[str] = []
    found = {}
    for name in tqdm(flags.only, unit="architecture"):
        with contextlib.redirect_stdout(io.StringIO()):
            found[name] = examine(name, notes)
    text = table(found, notes)
    if flags.out:
        with atomic_write(flags.out) as file:
            file.write(f"{INTRODUCTION}\n{text}\n")
    else:
        print(text)
    return int(any(note.startswith(("WRONG", "ERROR")) for note in notes))


if __name__ == "__main__":
    sys.exit(main())
