"""Makes Triton's interpreter several times faster, without a change in what it computes."""

import functools
import inspect


@functools.cache
def speed_up_interpreter() -> None:
    """Patch `triton.language` once per kernel launch instead of once per call of a helper.

    The interpreter replaces the language's functions by its own at a launch, and again at every call of another
    ``@triton.jit`` function from inside (`tl.sum` is one), which takes a millisecond and finds nothing to do.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[str] = set()

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_once(fn):
        modules = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (language, language.core)]
        new = {x.__name__ for x in modules} - patched
        if not new:
            return Nothing()
        scope = patch(fn)
        patched.update(new)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            patched.difference_update(new)

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once
