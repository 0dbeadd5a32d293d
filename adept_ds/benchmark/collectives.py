"""How often ranks exchange something in a step, and how many bytes of gathered weights reach each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.collectives = self.gathered_bytes = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled blocks compiled: ranks exchange nothing within them."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives += 1
            if "allgather" in func.name():
                # What arrives is its first argument.
                self.gathered_bytes += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def count_collectives(step: Callable[[], object]) -> dict[str, int]:
    """Run `step` and return the number of collectives and the bytes gathered, this rank's own part included."""
    with _Counter() as counter:
        step()
    return {"collectives": counter.collectives, "gathered_bytes": counter.gathered_bytes}
