"""Adapters in the forms that other programs load, each compared with the live model by the export itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from adept_ds.benchmark.decoding import FLOOR, Options, benchmark, text_report
from adept_ds.cli.export import main
from adept_ds.config.method import MethodConfig
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.export.checkpoint import Made, rewrite
from adept_ds.export.export import (
    Request,
    backbone_of,
    export_folded,
    export_lora,
    export_peft,
    export_serving_base,
)
from adept_ds.export.forms import FORMS
from adept_ds.export.manifest import read_manifest
from adept_ds.export.verification import Agreement
from adept_ds.methods import _METHODS
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.storage.adapter_folder import load_adapter
from adept_ds.tools.import_adapter import import_adapter
from tests.models import TOKENS, byte_tokenizer, causal, llama_config, save, seeded, t5_config, talkative_t5

TEXTS = ["The capital of France is def add(a, b): return Once upon a time 1, 2, 3 Who wrote Faust? In the village"] * 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
START, END = ("<s>", 2), ("</s>", 1)


def tokenizer(is_t5: bool) -> PreTrainedTokenizerFast:
    """With a start token in front, or as T5's an end token behind."""
    made = byte_tokenizer(TEXTS, 300)
    if is_t5:
        template = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[END])
    else:
        template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[START])
        made.chat_template = TEMPLATE
    made.backend_tokenizer.post_processor = template
    return made


SIZE = len(tokenizer(is_t5=False))


def llama_like(model_type: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    return causal(model_type, vocab_size=SIZE, num_key_value_heads=2, head_dim=8, **changes)


def gpt(config_class: Any, model_class: Any, **changes: Any) -> Callable[[], PreTrainedModel]:
    sizes = {"vocab_size": SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 400, "initializer_range": 0.3}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return lambda: model_class(config_class(**sizes | dropout | TOKENS | changes))


def t5(tied: bool) -> PreTrainedModel:
    config = t5_config(vocab_size=SIZE + 5, initializer_factor=2.0, tie_word_embeddings=tied)
    config.tie_word_embeddings = tied
    return talkative_t5(config)


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(llama_config(vocab_size=SIZE, initializer_range=0.3)),
    "llama-tied": lambda: LlamaForCausalLM(
        llama_config(vocab_size=SIZE, initializer_range=0.3, tie_word_embeddings=True)
    ),
    "qwen2": llama_like("qwen2"),
    "gemma": llama_like("gemma"),
    "gemma3_text": llama_like("gemma3_text"),
    "mistral": llama_like("mistral"),
    "gpt_neox": causal("gpt_neox", vocab_size=SIZE),
    "gpt2": gpt(GPT2Config, GPT2LMHeadModel),
    "codegen": gpt(CodeGenConfig, CodeGenForCausalLM, rotary_dim=4, vocab_size=SIZE + 5),
    "t5-tied": lambda: t5(tied=True),
    "t5-untied": lambda: t5(tied=False),
}
"""Gemma multiplies its rows; T5 and CodeGen have rows to spare; CodeGen's head has a bias, and GPT-2's layers are
transposed."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a small random backbone, in several files."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            seeded(BASES[name]).save_pretrained(made[name], max_shard_size="60KB")
            tokenizer(name.startswith("t5")).save_pretrained(made[name])
        return made[name]

    return folder


def backbone_in(folder: Path) -> PreTrainedModel:
    auto: Any = (
        AutoModelForSeq2SeqLM if "t5" in json.loads((folder / "config.json").read_text())["model_type"] else None
    )
    return (auto or AutoModelForCausalLM).from_pretrained(folder)


def adapter(folder: Path, out: Path, size: float = 1.0, seed: int = 1, **settings: Any) -> Path:
    """An adapter with random values."""
    config = TypeAdapter(MethodConfig).validate_python(settings)
    model = get_adept_model(backbone_in(folder), config, AutoTokenizer.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.trainable_parameters().values():
        scale = size * parameter.detach().float().abs().mean().clamp(min=0.1)
        parameter.data = parameter.data + scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)
    return out


def request(folder: Path, made: Path, out: Path, **options: Any) -> Request:
    loaded = load_adapter(made)
    dtype = options.pop("dtype", None)
    return Request(loaded, backbone_of(loaded, str(folder), None, dtype), out, **options)


def same(agreement: Agreement | None, limit: float = 2e-5) -> None:
    assert agreement is not None
    assert (agreement.differing, agreement.ties) == (0, 0)
    assert agreement.logit_difference <= limit * agreement.largest_logit


@pytest.mark.parametrize("family", BASES)
def test_adept_in_both_forms(base: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    """The proof is the export's own: greedy texts and logits, of plain, padded, long and chat prompts."""
    made = adapter(base(family), tmp_path / "a", name="adept", num_virtual_tokens=30, bottleneck=3)
    same(export_folded(request(base(family), made, tmp_path / "folded")))
    model = ModelConfig(name_or_path=str(base(family)), dtype="fp32")
    export_serving_base(model, 40, tmp_path / "serving")
    same(export_lora(request(base(family), made, tmp_path / "lora"), tmp_path / "serving"), limit=1e-4)
    assert {path.name for path in (tmp_path / "lora").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "pt", "num_virtual_tokens": 6},
        {"name": "pt_embedding", "num_virtual_tokens": 6},
        {"name": "p_tuning", "num_virtual_tokens": 6},
        {"name": "dpt", "num_virtual_tokens": 6, "rank": 2},
        {"name": "residual_pt", "num_virtual_tokens": 6, "bottleneck": 3},
        {"name": "adept", "num_virtual_tokens": 0, "bottleneck": 2},
        {"name": "adept", "num_virtual_tokens": 4, "bottleneck": 2, "offset_in_evaluation": False},
        {"name": "lora", "rank": 2},
        {"name": "ia3", "feed_forward": True},
        {"name": "vera", "rank": 3},
        {"name": "bitfit"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_other_methods_folded(base: Callable[[str], Path], settings: dict[str, Any], tmp_path: Path) -> None:
    folder = base("gpt2")
    made = adapter(folder, tmp_path / "a", size=0.3, **settings)
    same(export_folded(request(folder, made, tmp_path / "folded")))


def test_the_prompt_of_one_task_of_many(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="mpt", num_virtual_tokens=5, tasks=["first", "second"])
    same(export_folded(request(folder, made, tmp_path / "folded", task="second")))
    with pytest.raises(UserError, match="first, second; did you mean 'second'"):
        export_folded(request(folder, made, tmp_path / "other", task="secnd"))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "pt", "num_virtual_tokens": 6},
        {"name": "p_tuning", "num_virtual_tokens": 6},
        {"name": "residual_pt", "num_virtual_tokens": 6, "bottleneck": 3},
        {"name": "prefix", "prefix_length": 5},
        {"name": "prefix", "prefix_length": 5, "projection": True},
        {"name": "lora", "rank": 2},
        {"name": "ia3", "feed_forward": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_pefts_own_format_and_back(base: Callable[[str], Path], settings: dict[str, Any], tmp_path: Path) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", size=0.3, **settings)
    same(export_peft(request(folder, made, tmp_path / "peft")))
    import_adapter(tmp_path / "peft", tmp_path / "again", str(folder))
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        before, after = (
            AdaptedModel.from_pretrained(backbone_in(folder), one)(ids).logits for one in (made, tmp_path / "again")
        )
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["dept", "adapter", "adapter_drop", "hyperformer", "lst"])
def test_what_cannot_leave_says_why(base: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    settings = {
        "dept": {"num_virtual_tokens": 4, "rank": 2, "max_positions": 64},
        "adapter_drop": {"dropped_layers": 1},
        "lst": {"reduction": 2},
    }
    made = adapter(base("llama"), tmp_path / "a", name=name, **settings.get(name, {}))
    with pytest.raises(UserError, match=rf"method '{name}' cannot be exported so, since .*use it here"):
        export_folded(request(base("llama"), made, tmp_path / "folded"))
    assert not (tmp_path / "folded").exists()


def test_every_method_is_known() -> None:
    assert FORMS.keys() == _METHODS.keys()


def test_bf16_is_the_live_model_to_the_bit(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    agreement = export_folded(request(folder, made, tmp_path / "folded", dtype="bf16"))
    assert agreement is not None
    assert (agreement.differing, agreement.logit_difference) == (0, 0)
    with safe_open(tmp_path / "folded" / read_first(tmp_path / "folded"), "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def read_first(folder: Path) -> str:
    return min(path.name for path in folder.glob("*.safetensors"))


def test_only_files_that_change_are_written_anew(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    export_folded(request(folder, made, tmp_path / "folded", verify=False))
    manifest = read_manifest(tmp_path / "folded")
    kept = [name for name, digest in manifest.files.items() if digest is None]
    assert kept
    assert len(kept) < len(manifest.files)
    for name in kept:
        assert (tmp_path / "folded" / name).read_bytes() == (folder / name).read_bytes()
    assert manifest.adapter is not None
    assert manifest.adapter["tensors_sha256"] == load_adapter(made).facts["tensors_sha256"]


@pytest.mark.parametrize(("place", "text", "chat"), [("both", 8, 8), ("text", 8, 0), ("chat", 0, 8), ("none", 0, 0)])
def test_who_adds_the_prompt(base: Callable[[str], Path], place: str, text: int, chat: int, tmp_path: Path) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    same(export_folded(request(folder, made, tmp_path / "folded", prompt_in=place)))
    before, after = (AutoTokenizer.from_pretrained(one) for one in (folder, tmp_path / "folded"))
    assert len(after("a b")["input_ids"]) - len(before("a b")["input_ids"]) == text
    asked = [{"role": "user", "content": "a"}]
    lengths = [len(one.apply_chat_template(asked, return_dict=False)) for one in (before, after)]
    assert lengths[1] - lengths[0] == chat


def test_prompt_tokens_are_never_chosen(base: Callable[[str], Path], tmp_path: Path) -> None:
    for family in ("llama-tied", "codegen"):
        folder = base(family)
        made = adapter(folder, tmp_path / f"{family}-a", name="adept", num_virtual_tokens=8, bottleneck=2)
        export_folded(request(folder, made, tmp_path / family, verify=False))
        model = backbone_in(tmp_path / family)
        states = torch.randn(500, 32) * 10
        best = model.get_output_embeddings()(states).argmax(1)
        assert not set(best.tolist()) & set(read_manifest(tmp_path / family).prompt_token_ids)


def test_a_lora_needs_a_serving_base_of_its_backbone(base: Callable[[str], Path], tmp_path: Path) -> None:
    made = adapter(base("llama"), tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    for name, family, rows in (("short", "llama", 4), ("other", "gpt2", 10)):
        export_serving_base(ModelConfig(name_or_path=str(base(family)), dtype="fp32"), rows, tmp_path / name)
    asked = request(base("llama"), made, tmp_path / "lora")
    with pytest.raises(UserError, match=r"has 4 tokens for prompts, .* has 8; make one with --rows 8"):
        export_lora(asked, tmp_path / "short")
    with pytest.raises(UserError, match="other token embeddings"):
        export_lora(asked, tmp_path / "other")
    with pytest.raises(UserError, match=r"has no adept_export\.json"):
        export_lora(asked, base("llama"))


def test_three_adapters_and_none_in_one_batch(base: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT's mixed batches on a serving base."""
    folder = base("llama")
    export_serving_base(ModelConfig(name_or_path=str(folder), dtype="fp32"), 12, tmp_path / "serving")
    serving, live = AutoModelForCausalLM.from_pretrained(tmp_path / "serving"), {}
    model = None
    for number, (length, bottleneck) in enumerate([(3, 1), (12, 4), (7, 2)]):
        settings = {"name": "adept", "num_virtual_tokens": length, "bottleneck": bottleneck}
        made = adapter(folder, tmp_path / f"a{number}", seed=number, **settings)
        export_lora(request(folder, made, tmp_path / f"l{number}", verify=False), tmp_path / "serving")
        live[f"a{number}"] = made
        if model is None:
            model = PeftModel.from_pretrained(serving, tmp_path / f"l{number}", adapter_name=f"a{number}")
        else:
            model.load_adapter(tmp_path / f"l{number}", adapter_name=f"a{number}")
    assert model is not None
    text = [5, 9, 40, 41, 42]
    names = ["a0", "__base__", "a1", "a2"]
    rows = [[*read_manifest(tmp_path / f"l{n[1]}").prompt_token_ids, *text] if n in live else text for n in names]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 12, "do_sample": False}
    mixed = model.eval().generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)[:, width:]
    for name, row in zip(names, mixed, strict=True):
        alone = backbone_in(folder)
        tuned = AdaptedModel.from_pretrained(alone, live[name]) if name in live else alone
        expected = tuned.generate(torch.tensor([text]), attention_mask=torch.ones(1, 5, dtype=torch.long), **options)
        assert row[: expected.shape[1] - 5].tolist() == expected[0, 5:].tolist()


def test_a_wrong_copy_is_found_and_leaves_nothing(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    right = rewrite

    def wrong(paths: Any, out: Path, changed: dict[str, Made], *rest: Any) -> Any:
        def parts() -> list[Tensor]:
            return [torch.cat([part.roll(1, 0) for part in table.parts()])]

        (name, table), *others = changed.items()
        return right(paths, out, {name: Made(table.type_name, table.shape, parts), **dict(others)}, *rest)

    monkeypatch.setattr("adept_ds.export.export.rewrite", wrong)
    with pytest.raises(UserError, match=r"does not compute what the live model does: .*nothing was written"):
        export_folded(request(folder, made, tmp_path / "out" / "folded"))
    assert not list((tmp_path / "out").iterdir())


def test_a_tokenizer_from_elsewhere_goes_along(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder, other = base("llama"), tokenizer(is_t5=False)
    other.add_special_tokens({"additional_special_tokens": ["<other>"]})
    other.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "vocab.txt").write_text("of the tokenizer")
    made = load_adapter(adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2))
    model = backbone_of(made, str(folder), tokenizer=str(tmp_path / "tokenizer"))
    same(export_folded(Request(made, model, tmp_path / "folded")))
    assert "<other>" in AutoTokenizer.from_pretrained(tmp_path / "folded").get_vocab()
    assert (tmp_path / "folded" / "vocab.txt").read_text() == "of the tokenizer"


def test_a_backbone_without_room_for_a_comparison_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    save(seeded(gpt(GPT2Config, GPT2LMHeadModel, n_positions=28)), tokenizer(is_t5=False), folder)
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    with pytest.raises(UserError, match="no prompt of the comparison fits"):
        export_folded(request(folder, made, tmp_path / "folded"))
    assert export_folded(request(folder, made, tmp_path / "folded", verify=False)) is None


def test_the_precision_that_is_written_is_no_other_backbone(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    agreement = export_folded(request(folder, made, tmp_path / "folded", dtype="fp16"))
    assert agreement is not None
    assert agreement.is_same


def test_a_folder_that_is_there_stays(base: Callable[[str], Path], tmp_path: Path) -> None:
    made = adapter(base("llama"), tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    with pytest.raises(UserError, match="is there already"):
        export_folded(request(base("llama"), made, made))


def test_older_readers_find_the_rotary_base(base: Callable[[str], Path], tmp_path: Path) -> None:
    made = adapter(base("llama"), tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    export_folded(request(base("llama"), made, tmp_path / "folded", verify=False))
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert not config["tie_word_embeddings"]
    written = json.loads((tmp_path / "folded" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_rewritten_file_is_what_safetensors_would_write(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5, dtype=torch.bfloat16), "a": torch.arange(7), "c": torch.randn(4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    added = {"d": Made("F32", (4, 2), lambda: iter([torch.ones(1, 2), torch.zeros(3, 2)]))}
    rewrite([tmp_path / "model.safetensors"], tmp_path / "out", {}, added, show_progress=False)
    tensors["d"] = torch.tensor([[1.0, 1], [0, 0], [0, 0], [0, 0]])
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    found, expected = (
        load_file(path) for path in (tmp_path / "out" / "model.safetensors", tmp_path / "expected.safetensors")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_command_writes_a_folder_with_its_card(
    base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(base("llama"))
    made = str(adapter(base("llama"), tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2))
    main(["--adapter", made, "--base", folder, "--to", "folded", "--out", str(tmp_path / "folded")])
    assert "0 of 10 greedy texts of 20 tokens differ" in capsys.readouterr().out
    card = (tmp_path / "folded" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "Text of the template that is tokenised again" in card
    main(["--serving-base", "--rows", "9", "--base", folder, "--out", str(tmp_path / "serving")])
    serving = ["--serving-base", str(tmp_path / "serving")]
    main(["--adapter", made, "--base", folder, "--to", "lora", *serving, "--out", str(tmp_path / "lora")])
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"prompt = {list(read_manifest(tmp_path / 'lora').prompt_token_ids)}" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out FOLDER is needed"),
        (["--out", "o"], "--adapter FOLDER is needed"),
        (["--out", "o", "--adapter", "adapter"], "--to is needed"),
        (["--out", "o", "--adapter", "adapter", "--to", "lora"], "--to lora needs --serving-base FOLDER"),
        (["--out", "o", "--adapter", "adaptr"], "no such folder; did you mean 'adapter'"),
        (["--out", "o", "--serving-base"], "--base MODEL and --rows L are needed"),
        (
            ["--out", "o", "--serving-base", "--rows", "3", "--base", "m", "--adapter", "adapter"],
            "makes one, of no adapter",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_decoding_is_measured_beside_the_floor(base: Callable[[str], Path], tmp_path: Path) -> None:
    made = adapter(base("llama"), tmp_path / "a", name="adept", num_virtual_tokens=4, bottleneck=2)
    loaded = load_adapter(made)
    model = backbone_of(loaded, str(base("llama")), None, None)
    options = Options(batch=2, prompt_tokens=5, new_tokens=3, rounds=2)
    result = benchmark(model, loaded, options, torch.device("cpu"))
    assert set(result["ratios"]) == set(result["tokens_per_second"]) - {FLOOR}
    report = text_report(result)
    assert "mixed: 2 adapters" in report
    assert "goal: at least 0.98" in report
