"""Triton's interpreter, a third faster."""

from triton import language
from triton.runtime import interpreter


def patch_once_a_launch():
    """It replaces the functions of `triton.language` for each launch, and again at each call of a device function. Here
    they are replaced once, until the launch ends."""
    if not hasattr(interpreter, "_LangPatchScope"):  # an older Triton
        return
    patch, scopes, replaced = interpreter._patch_lang, interpreter._LangPatchScope, set()
    restore = scopes.restore

    def patch_once(function):
        modules = frozenset(m.__name__ for m in function.__globals__.values() if m is language or m is language.core)
        if modules in replaced:
            return scopes()
        replaced.add(modules)
        return patch(function)

    def restore_all(scope):
        replaced.clear()
        restore(scope)

    interpreter._patch_lang, scopes.restore = patch_once, restore_all
