"""Which methods leave the toolkit in which form, and why others cannot."""

from __future__ import annotations

from adept_ds.config.method import MethodConfig
from adept_ds.errors import UserError

FOLDED, LORA, PEFT = "folded", "lora", "peft"
GGUF, ONNX, OPENVINO = "gguf", "onnx", "openvino"
MADE_OF = dict.fromkeys((GGUF, ONNX, OPENVINO), FOLDED)
"""Forms that are converted from another one."""
FORMS: dict[str, tuple[str, ...]] = {
    "adept": (FOLDED, LORA),
    "pt": (FOLDED, LORA, PEFT),
    "p_tuning": (FOLDED, LORA, PEFT),
    "dpt": (FOLDED, LORA, PEFT),
    "residual_pt": (FOLDED, LORA, PEFT),
    "mpt": (FOLDED, LORA),
    "pt_embedding": (FOLDED,),
    "lora": (FOLDED, PEFT),
    "ia3": (FOLDED, PEFT),
    "vera": (FOLDED,),
    "prefix": (PEFT,),
    "bitfit": (FOLDED,),
    "full": (),
    "dept": (),
    "attempt": (),
    "adapter": (),
    "adapter_drop": (),
    "hyperformer": (),
    "hyperdecoder": (),
    "lst": (),
}
"""Name of each method to its forms. What a method does must be a change of the backbone's own weights, or of those and
rows in front of the input: nothing else has a place in a folder that programs load without our code."""
_HERE = "use it here: `adept-ds eval`, `text2text`, `try`, or AdaptedModel.from_pretrained"
REASONS = {
    "adept": "PEFT has no such method",
    "mpt": "PEFT's module of that name keeps its prompts in another form, which is not written here",
    "lora": "it is a LoRA on layers and not on the input table",
    "vera": "it changes layers and not the input table, and PEFT's form of it is not written here",
    "ia3": "it scales layers, and leaves the input table as it is",
    "bitfit": "it trains biases, for which PEFT has no format",
    "dept": f"its offsets go by a token's position, so no table of tokens gives them; {_HERE}, or train method adept",
    "attempt": f"its prompt is made for each input from that input; {_HERE}, or train method adept or pt",
    "adapter": f"its bottlenecks are layers that the backbone's architecture does not have; {_HERE}",
    "adapter_drop": f"its bottlenecks are layers that the backbone's architecture does not have; {_HERE}",
    "hyperformer": f"its bottlenecks are layers that the backbone's architecture does not have; {_HERE}",
    "hyperdecoder": f"its bottlenecks are made for each input from that input; {_HERE}",
    "lst": f"its side network is a second model beside the backbone's layers; {_HERE}",
    "prefix": "its keys and values stand in front of every layer's, and no hub folder has a place for them",
    "pt_embedding": "it moves every token freely, which no low rank holds",
    "full": "it is a whole model already: its folder is what other programs load",
}


def check_form(method: MethodConfig, form: str) -> None:
    """Refuse a form that the method cannot have.

    Raises:
        UserError: Says why, and what to do.
    """
    possible = FORMS.get(method.name, ())
    if MADE_OF.get(form, form) in possible:
        return
    reason = REASONS.get(method.name, "its values are of another kind")
    ways = f"; expected --to {' or '.join(possible)}" if possible else ""
    raise UserError(f"--to {form}: method {method.name!r} cannot be exported so, since {reason}{ways}")
