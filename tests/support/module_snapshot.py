"""What reverting a model must restore."""

from typing import Any

from torch import nn


def snapshot(module: nn.Module) -> list[Any]:
    """Return all about a model but the values of tensors: classes, identities, flags, hooks."""
    state: list[Any] = []
    for name, m in module.named_modules(remove_duplicate=False):
        state.append((name, id(m), type(m), sorted(m.__dict__)))
        for key, value in m.__dict__.items():
            if isinstance(value, dict):
                state.append((key, {k: id(v) for k, v in value.items()}))
            else:
                state.append((key, value))
    state += [(n, id(p), p.requires_grad, p.dtype) for n, p in module.named_parameters()]
    return state
