"""Attention patterns kept from one run and used in another.

A pattern follows from queries, keys and the mask alone, so the patterns of a run are frozen by giving its queries and
keys to the attention of another run, beside that run's own values. It works with every implementation that transformers
calls through `ALL_ATTENTION_FUNCTIONS`: eager, SDPA, flash.
"""

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Patterns = dict[nn.Module, tuple[Tensor, Tensor]]
"""Queries and keys, (rows, heads, seq, head_dim), by attention module."""
_Attend = Callable[..., Any]


@contextlib.contextmanager
def keeping(kept: Patterns) -> Generator[None]:
    """Within the context, every attention module's queries and keys go into `kept`."""

    def keep(original: _Attend, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept[module] = query.detach(), key.detach()
        return original(module, query, key, *args, **kwargs)

    with _instead(keep):
        yield


@contextlib.contextmanager
def frozen(kept: Patterns) -> Generator[None]:
    """Within the context, every row attends by the patterns of the one row in `kept`; texts must have its length."""

    def attend(original: _Attend, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key = (part.expand(len(query), -1, -1, -1) for part in kept[module])
        return original(module, query, key, *args, **kwargs)

    with _instead(attend):
        yield


@contextlib.contextmanager
def _instead(attend: Callable[..., Any]) -> Generator[None]:
    """Within the context, attend(original, module, …) is called instead of every attention function."""
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)

    def wrapped(original: _Attend | None) -> _Attend:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Eager attention is not in the mapping: each family has its own.
            own = original or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
            return attend(own, module, *args, **kwargs)

        return call

    for name, original in [*ALL_ATTENTION_FUNCTIONS.items(), ("eager", None)]:
        ALL_ATTENTION_FUNCTIONS[name] = wrapped(original)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)
