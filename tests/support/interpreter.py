"""Triton's interpreter, made quicker for the tests: what it computes stays the same."""

from __future__ import annotations

from functools import cache

from triton import language as tl
from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def replace_once_a_launch() -> None:
    """A launch replaces the language's built-ins by the interpreter's and restores them at its end.

    In between, every call of a device function replaced them again, which took almost half of the time.
    """
    replace = interpreter._patch_lang
    languages = cache(lambda function: [m for m in function.__globals__.values() if m is tl or m is tl.core])

    def replace_where_needed(function):
        done = languages(function) and not any(is_builtin(language.load) for language in languages(function))
        return interpreter._LangPatchScope() if done else replace(function)

    interpreter._patch_lang = replace_where_needed
