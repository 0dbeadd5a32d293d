"""Files for engines, each compared with the live model by the export itself, in the engine."""

from __future__ import annotations

import io
import venv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import normalizers, processors
from transformers import LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

from adept_ds.cli.export import main
from adept_ds.errors import UserError
from adept_ds.export.checkpoint import Made, rewrite
from adept_ds.export.engine_forms import ENGINES, Environment, export_engine, find_engine
from adept_ds.export.engine_verification import compare_engine
from adept_ds.export.manifest import MANIFEST_NAME, read_manifest
from adept_ds.export.verification import Batch
from adept_ds.files import read_json, write_json
from tests.models import EOS, START, causal, llama_config, seeded
from tests.test_export import SIZE, TEMPLATE, TEXTS, adapter, request, same, t5
from tests.test_export import tokenizer as byte_tokenizer

Case = Callable[[str], tuple[Path, Path]]


def installed(form: str) -> str:
    try:
        find_engine(form)
    except UserError as error:
        pytest.skip(str(error))
    return form


def sentencepiece_tokenizer(folder: Path) -> int:
    """A tokenizer as Llama 2 and Mistral have one, with a start token in front; llama.cpp's converter takes other kinds
    only if it knows them. Returns how many tokens it has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=-1,
        unk_id=0,
        eos_id=EOS,
        bos_id=START,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    made = LlamaTokenizer.from_pretrained(folder)
    core = made.backend_tokenizer
    # Each piece of text begins with a space, also behind a special token, as in those models and in llama.cpp.
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.bos_token_id)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small random Llama, with a tokenizer that the engine of a form reads, and an ADePT adapter of it."""

    @cache
    def made(form: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(form)
        if form == "gguf":
            size = sentencepiece_tokenizer(folder)
        else:
            byte_tokenizer(is_t5=False).save_pretrained(folder)
            size = SIZE
        sizes = {"vocab_size": size, "hidden_size": 64, "head_dim": 16}
        config = llama_config(**sizes, initializer_range=0.2)
        seeded(lambda: LlamaForCausalLM(config)).save_pretrained(folder)
        return folder, adapter(folder, folder / "adapter", name="adept", num_virtual_tokens=8, bottleneck=3)

    return made


@pytest.mark.parametrize("form", ENGINES)
def test_an_engine_writes_what_the_live_model_writes(form: str, case: Case, tmp_path: Path) -> None:
    """By its own tokenizer and chat template, too: each text has the start token once, behind the soft prompt."""
    (llama, made), out = case(installed(form)), tmp_path / "out"
    same(export_engine(request(llama, made, out), form), limit=1e-4)
    manifest = read_manifest(out)
    assert manifest.form == form
    if ENGINES[form].has_post_processor:
        assert (manifest.prompt_in, manifest.text_prefix) == ("both", None)
    else:
        assert (manifest.prompt_in, manifest.text_prefix) == ("chat", "".join(manifest.prompt_tokens) + "<s>")
    assert manifest.verification is not None
    assert manifest.verification["engine"] == ENGINES[form].name
    assert {path.name for path in out.iterdir()} == {*manifest.files, MANIFEST_NAME}


def test_gguf_in_sixteen_bits(case: Case, tmp_path: Path) -> None:
    llama, made = case(installed("gguf"))
    agreement = export_engine(request(llama, made, tmp_path / "out", dtype="bf16"), "gguf")
    assert agreement is not None
    assert agreement.is_same
    size = (tmp_path / "out" / "model.gguf").stat().st_size
    assert size < 0.7 * sum(path.stat().st_size for path in llama.glob("*.safetensors"))


def test_a_merged_adapter_keeps_the_start_token(case: Case, tmp_path: Path) -> None:
    llama, _ = case(installed("gguf"))
    made = adapter(llama, tmp_path / "a", size=0.3, name="lora", rank=2)
    same(export_engine(request(llama, made, tmp_path / "out"), "gguf"), limit=1e-4)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.prompt_in, manifest.text_prefix) == ("none", None)


def test_another_model_in_the_file_is_found(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, made = case(installed("gguf"))
    right = rewrite

    def wrong(paths: Any, out: Path, changed: dict[str, Made], *rest: Any) -> Any:
        (name, table), *others = changed.items()
        rolled = Made(table.type_name, table.shape, lambda: [torch.cat([part.roll(1, 0) for part in table.parts()])])
        return right(paths, out, {name: rolled, **dict(others)}, *rest)

    monkeypatch.setattr("adept_ds.export.export.rewrite", wrong)
    with pytest.raises(UserError, match=r"what llama\.cpp reads does not compute what the live model does: .*nothing"):
        export_engine(request(llama, made, tmp_path / "out" / "gguf"), "gguf")
    assert not list((tmp_path / "out").iterdir())


def test_a_start_token_before_the_prompt_is_found(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, made = case(installed("gguf"))
    monkeypatch.setattr("adept_ds.export.engine_forms._add_no_start_token", lambda folder: None)
    with pytest.raises(UserError, match=r"llama\.cpp reads the text 'The capital .*nothing was written"):
        export_engine(request(llama, made, tmp_path / "out"), "gguf")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_left_out_is_found(tmp_path: Path) -> None:
    """llama.cpp ties Gemma 2's; also where nothing is compared."""
    installed("gguf")
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": sentencepiece_tokenizer(tmp_path)}
    seeded(causal("gemma2", **sizes)).save_pretrained(tmp_path)
    made = adapter(tmp_path, tmp_path / "a", name="pt", num_virtual_tokens=2)
    with pytest.raises(UserError, match=r"--to gguf: llama\.cpp knows .* with a head that is tied .*nothing was"):
        export_engine(request(tmp_path, made, tmp_path / "out", verify=False), "gguf")
    assert not (tmp_path / "out").exists()


def test_layers_with_windows(tmp_path: Path) -> None:
    installed("gguf")
    size = sentencepiece_tokenizer(tmp_path)
    core = read_json(tmp_path / "tokenizer.json")
    core["normalizer"] = core["normalizer"]["normalizers"][1]  # of this kind no text begins with a space of its own
    write_json(tmp_path / "tokenizer.json", core)
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 7, "sliding_window": 16}
    sizes["query_pre_attn_scalar"] = sizes["head_dim"]
    seeded(causal("gemma3_text", **sizes, vocab_size=size, initializer_range=0.1)).save_pretrained(tmp_path)
    made = adapter(tmp_path, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=3)
    # llama.cpp's GELU is a table of 16 bits.
    same(export_engine(request(tmp_path, made, tmp_path / "out"), "gguf"), limit=1e-3)


def test_a_converter_that_refuses_is_quoted(case: Case, tmp_path: Path) -> None:
    """The byte tokenizer is none that llama.cpp's converter knows."""
    installed("gguf")
    byte_tokenizer(is_t5=False).save_pretrained(tmp_path / "llama")
    seeded(lambda: LlamaForCausalLM(llama_config(vocab_size=SIZE))).save_pretrained(tmp_path / "llama")
    made = adapter(tmp_path / "llama", tmp_path / "a", name="pt", num_virtual_tokens=2)
    with pytest.raises(UserError, match=r"the converter for llama\.cpp failed .* It said:\n(.*\n)*.*BPE pre-tokenizer"):
        export_engine(request(tmp_path / "llama", made, tmp_path / "out"), "gguf")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused with and without an engine."""
    environment = Environment("python", {}, {})
    monkeypatch.setattr("adept_ds.export.engine_forms.find_engine", lambda *rest: environment)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("form", ENGINES)
def test_an_encoder_decoder_is_refused(form: str, tmp_path: Path) -> None:
    t5(tied=True).save_pretrained(tmp_path / "t5")
    byte_tokenizer(is_t5=True).save_pretrained(tmp_path / "t5")
    made = adapter(tmp_path / "t5", tmp_path / "a", name="adept", num_virtual_tokens=2, bottleneck=2)
    with pytest.raises(UserError, match=rf"--to {form}: .* is an encoder-decoder, and .*; expected --to lora"):
        export_engine(request(tmp_path / "t5", made, tmp_path / "out"), form)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("anywhere")
def test_what_an_engine_does_not_do_is_refused(case: Case, tmp_path: Path) -> None:
    llama, made = case("onnx")
    with pytest.raises(UserError, match=r"computes in fp32 on CPUs.*and not in bf16; expected --dtype fp32"):
        export_engine(request(llama, made, tmp_path / "out", dtype="bf16"), "onnx")
    with pytest.raises(UserError, match=r"--prompt-in text: llama\.cpp does not run .*expected chat"):
        export_engine(request(llama, made, tmp_path / "out", prompt_in="text"), "gguf")
    prefix = adapter(llama, tmp_path / "a", name="prefix", prefix_length=2)
    with pytest.raises(UserError, match=r"--to gguf: method 'prefix' cannot be .*expected --to peft"):
        export_engine(request(llama, prefix, tmp_path / "out"), "gguf")


@pytest.mark.parametrize("form", ENGINES)
def test_where_an_engine_is_not_there(form: str, case: Case, tmp_path: Path) -> None:
    llama, made = case("onnx")
    bare = tmp_path / "bare"
    venv.create(bare)
    with pytest.raises(
        UserError, match=rf"--to {form} needs .*bare.* does not have.*pip install .*ADEPT_{form.upper()}"
    ):
        export_engine(request(llama, made, tmp_path / "out"), form, str(bare / "bin" / "python"))
    with pytest.raises(UserError, match="is no Python interpreter"):
        find_engine(form, str(tmp_path / "none"))


def batch(logits: list[list[float]], written: list[int]) -> Batch:
    return Batch(("a",), False, [[3]], torch.tensor([written]), torch.tensor([logits]))


def test_engines_are_compared_up_to_a_constant() -> None:
    """Three tokens and a prompt's fourth; the second place is nearly even."""
    live = batch([[4.0, 2.0, 1.0], [2.0, 2.0005, 0.0]], [0, 1])
    shifted = [[(0, 1.0), (1, -1.0), (2, -2.0)], [(1, 7.0005), (0, 7.0), (2, 5.0)]]
    agreement = compare_engine([live], [shifted], [3], 1e-3)
    assert (agreement.differing, agreement.ties) == (0, 0)
    assert agreement.logit_difference < 1e-6
    even = [shifted[0], [(0, 7.0004), (1, 7.0), (2, 5.0)]]
    assert (compare_engine([live], [even], [3], 1e-3).differing, compare_engine([live], [even], [3], 1e-3).ties) == (
        0,
        1,
    )
    for wrong in ([(1, 1.0), (0, 0.5), (2, -2.0)], [(3, 5.0), (0, 1.0), (1, -1.0), (2, -2.0)]):
        assert compare_engine([live], [[wrong, shifted[1]]], [3], 1e-3).differing == 1
    assert not compare_engine([live], [[[(0, 1.0), (1, -0.9), (2, -2.0)], shifted[1]]], [3], 1e-3).is_same
    assert not compare_engine([live], [[[(0, float("nan")), (1, -1.0)], shifted[1]]], [3], 1e-3).is_same


def test_the_command_says_what_to_put_before_a_text(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama, made = case(installed("gguf"))
    out = str(tmp_path / "out")
    command = ["--adapter", str(made), "--base", str(llama), "--to", "gguf", "--out", out]
    main([*command, "--no-verify"])
    said = capsys.readouterr().out
    assert f"{out}: not compared with the live model" in said
    assert said.strip().endswith(f"in front of plain text yourself: {read_manifest(Path(out)).text_prefix}")
    assert read_manifest(Path(out)).verification is None
    with pytest.raises(UserError, match="--serving-base is for --to lora, and not for --to gguf"):
        main([*command, "--serving-base", "somewhere"])


@pytest.mark.slow
def test_smollm2_in_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    installed("gguf")
    made = adapter(smollm2, tmp_path / "a", name="adept", num_virtual_tokens=10, bottleneck=8)
    same(export_engine(request(smollm2, made, tmp_path / "out", dtype="fp32"), "gguf"), limit=1e-4)
