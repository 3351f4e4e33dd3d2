"""Triton's interpreter without two repetitions, which together take three quarters of its time."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


@functools.cache
def speed_up_interpreter() -> None:
    """Make the interpreter of this process quicker; it computes the same.

    It computes every integer sum and product again in 64 bits to look for overflows, which it
    reports only if its option `debug` is set, and nobody can set that. And a launch replaces the
    functions of `triton.language`; each call of a device function would look for all of them again.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[str] = set()  # the modules whose functions the current launch has called

    def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(executor, *args, **kwargs)

    def patch_once(function: Callable[..., Any]) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch_language(function)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_once
