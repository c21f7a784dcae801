"""Triton's interpreter in less time: what it patches at each call of a function is patched once."""

from keras_xlstm.backends.kernels.load_triton import tl, triton  # before TensorFlow's LLVM

interpreter = triton.runtime.interpreter


def patch_lang(fn, patch=interpreter._patch_lang):
    """Nothing where all that `fn` names is patched, by the kernel that calls it."""
    languages = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
    patched = not any(tl.core.is_builtin(language.load) for language in languages)
    return interpreter._LangPatchScope() if patched else patch(fn)


if hasattr(interpreter, "_LangPatchScope"):  # not before Triton 3.7
    interpreter._patch_lang = patch_lang
