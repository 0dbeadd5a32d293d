"""Programs that read prompts with an engine and say what it made of them.

Each runs in a process, and where need be an environment, of its own, with the standard library and its engine alone:

    python gguf_reader.py REQUEST ANSWER

Both are JSON files. The request has the `model`'s path; for each prompt its ids (`rows`) and those that the live model
generated (`written`); how many of the best logits are wanted (`count`); `threads`; whether what was read of a prompt
may be kept for the next token (`reuses`); and `texts` and `chats`, which the engine's own tokenizer and chat template
read. The answer has, for each prompt and each token of `written`, the best [id, logit] before it (`best`), where logits
may be shifted by a constant; and the ids of the texts (`text_ids`) and chats (`chat_ids`).
"""
