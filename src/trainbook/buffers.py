"""Keeps a module's buffers as they were before a forward pass that may not count."""

from collections.abc import Callable

from torch import nn


def keep_buffers(module: nn.Module) -> Callable[[], None]:
    """Copy a module's buffers (batch statistics); the function returned puts the copies back."""
    copies = [buffer.clone() for buffer in module.buffers()]

    def put_back() -> None:
        for buffer, earlier in zip(module.buffers(), copies, strict=True):
            buffer.copy_(earlier)

    return put_back
