"""Lets Triton's interpreter run loops of computed length beside NumPy 2.4 and later.

The interpreter of Triton 3.6 holds scalars as arrays of one element and turns a loop bound into a
Python int with int(array), which NumPy 2.4 accepts for arrays without dimensions only.
"""

from triton.runtime import interpreter

from .dispatch import interpreting


def _patched(patch_tensor):
    def patch(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


if interpreting() and not hasattr(interpreter, "_mamba2_apps_patched"):
    interpreter._patch_lang_tensor = _patched(interpreter._patch_lang_tensor)
    interpreter._mamba2_apps_patched = True
