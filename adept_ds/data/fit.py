"""Whether tokenizer, data and backbone fit each other, told before any weight is loaded.

An id that the backbone's table has no row for would be taken for one of the soft prompt's, and a position that it has
no row for ends a run in the middle of a step.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from adept_ds.config.method import MethodConfig
from adept_ds.config.run import DataConfig
from adept_ds.data.encode import EncodedDataset, EncodedPrompts
from adept_ds.errors import UserError
from adept_ds.formats import FORMATS


def table_rows(architecture: PreTrainedConfig) -> int:
    """Rows V of the backbone's embedding table."""
    rows: int = architecture.get_text_config().vocab_size
    return rows


def most_positions(architecture: PreTrainedConfig) -> int | None:
    """Positions that the backbone has rows for; None where any number can be computed (rotary, relative, ALiBi)."""
    text = architecture.get_text_config()
    if getattr(text, "rope_parameters", None):
        return None
    for name in ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def fit_padding(tokenizer: PreTrainedTokenizerBase, architecture: PreTrainedConfig) -> str | None:
    """Give the tokenizer a padding token with a row in the table; return what was done, if anything.

    Padding is masked always, so any token serves: the end token, or the first one of a tokenizer without.
    """
    rows, missing = table_rows(architecture), tokenizer.pad_token
    if missing is not None and tokenizer.pad_token_id < rows:
        return None
    end = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end if end is not None and end < rows else 0)
    if missing is None:
        return None
    return (
        f"the tokenizer pads with {missing!r}, for which the backbone's table of {rows} rows has none; "
        f"{tokenizer.pad_token!r} takes its place, since padding is masked"
    )


def check_examples(
    dataset: EncodedDataset,
    tokenizer: PreTrainedTokenizerBase,
    architecture: PreTrainedConfig,
    method: MethodConfig,
    cfg: DataConfig,
) -> str | None:
    """Refuse examples that the backbone cannot read; return what is to be said of their length, if anything.

    Raises:
        UserError: A token without a row in the table, or more positions than there are.
    """
    _check_ids(dataset.highest_id(), tokenizer, architecture)
    limit = most_positions(architecture)
    source, target = dataset.longest()
    added = method.num_virtual_tokens + (0 if architecture.is_encoder_decoder else method.decoder_positions)
    longest = source + added
    if architecture.is_encoder_decoder and target + method.decoder_positions > longest:
        added, longest = method.decoder_positions, target + method.decoder_positions
    if limit is None:
        trained = getattr(architecture.get_text_config(), "max_position_embeddings", None)
        if trained is None or longest <= trained:
            return None
        return (
            f"the longest example has {longest} tokens, more than the {trained} that the backbone was trained to read"
        )
    if longest <= limit:
        return None
    prompt = f", {added} of them method.name {method.name}'s" if added else ""
    if FORMATS[cfg.format].has_tasks:
        expected = "shorter data.max_source_length and data.max_target_length"
    else:
        expected = f"data.max_length of at most {limit} (now {cfg.max_length})"
    raise UserError(
        f"the longest example has {longest} tokens{prompt}, and model.name_or_path {architecture.name_or_path!r} has "
        f"{limit} positions; expected {expected}"
    )


def check_rows(dataset: EncodedDataset, row_size: int | None, num_virtual_tokens: int) -> None:
    """Refuse examples that do not fit into a packed row; the settings' limits do not hold for label words of tasks.

    Raises:
        UserError: One has more tokens.
    """
    longest = max(dataset.lengths) + num_virtual_tokens
    if row_size is not None and longest > row_size:
        raise UserError(
            f"train.packing is {row_size}, the tokens of a row, and the longest example has {longest} with its soft "
            f"prompt; expected train.packing of at least {longest}, or a shorter data.max_source_length"
        )


def check_prompts(
    prompts: EncodedPrompts,
    tokenizer: PreTrainedTokenizerBase,
    architecture: PreTrainedConfig,
    method: MethodConfig | None,
    max_new_tokens: int,
) -> None:
    """Refuse prompts that the backbone cannot read, or has too few positions to go on from.

    Raises:
        UserError: As `check_examples`.
    """
    _check_ids(max((max(ids, default=0) for ids in prompts.ids), default=0), tokenizer, architecture)
    limit = most_positions(architecture)
    if limit is None:
        return
    read = max(map(len, prompts.ids), default=0) + (method.num_virtual_tokens if method else 0)
    before = (0 if architecture.is_encoder_decoder else read) + (method.decoder_positions if method else 0)
    if max(read, before + max_new_tokens) > limit:
        raise UserError(
            f"model.name_or_path {architecture.name_or_path!r} has {limit} positions, and the longest prompt has "
            f"{max(read, before)} tokens with what the method puts in front; expected eval.generation.max_new_tokens "
            f"of at most {max(0, limit - before)} (now {max_new_tokens}), or a shorter data.max_prompt_length"
        )


def _check_ids(highest: int, tokenizer: PreTrainedTokenizerBase, architecture: PreTrainedConfig) -> None:
    rows = table_rows(architecture)
    if highest >= rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} makes the token {tokenizer.convert_ids_to_tokens(highest)!r} "
            f"(id {highest}) of the data, and the table of model.name_or_path {architecture.name_or_path!r} has only "
            f"{rows} rows; expected the tokenizer of that model (model.tokenizer)"
        )
