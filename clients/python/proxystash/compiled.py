"""Functions whose source is put together at import from the fields of a class, as dataclasses' are.

For what is done with each field where it must be fast: a loop over the fields takes several times as long.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, get_type_hints


@cache
def types_of(model: type) -> Mapping[str, object]:
    """The types of the fields of a class, by their names and in their order."""
    return get_type_hints(model, include_extras=True)


def field_sources(model: type, forms: Mapping[object, str]) -> dict[str, str]:
    """What stands for each field of a class in a source, in the order of the fields.

    `forms` has it by the field's name or else by its type, with {0} for the name. An empty one leaves a field
    out; a field that has none is a KeyError.
    """
    types = types_of(model)
    forms_of_fields = {name: forms[name if name in forms else type_] for name, type_ in types.items()}
    return {name: form.format(name) for name, form in forms_of_fields.items() if form}


def compile_function(signature: str, body: Iterable[str], module: dict[str, Any]) -> Callable[..., Any]:
    """Make `def {signature}:` with the lines of `body`, in the module whose `globals()` are given.

    Tracebacks and `inspect.getsource` show the source.
    """
    source = "\n    ".join((f"def {signature}:", *body)) + "\n"
    name = signature.partition("(")[0]
    filename = f"<compiled {module['__name__']}.{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    made: dict[str, Callable[..., Any]] = {}
    exec(compile(source, filename, "exec"), module, made)  # noqa: S102 -- of texts in this package alone
    return made[name]
