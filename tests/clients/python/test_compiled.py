"""Functions made of the fields of a class."""

from __future__ import annotations

import inspect
import traceback
from dataclasses import dataclass

import pytest

from proxystash.compiled import compile_function, field_sources


@dataclass
class _Fruit:
    name: str
    weight: int
    colour: str | None = None


def test_a_field_has_the_form_of_its_name_or_else_of_its_type() -> None:
    forms: dict[object, str] = {str: "fruit.{0}", int: "{0!r}", str | None: "unused", "colour": "'green'"}
    assert field_sources(_Fruit, forms) == {"name": "fruit.name", "weight": "'weight'", "colour": "'green'"}


def test_an_empty_form_leaves_its_field_out() -> None:
    assert list(field_sources(_Fruit, {str: "{0}", int: "", str | None: "{0}"})) == ["name", "colour"]


def test_a_field_without_a_form_is_an_error() -> None:
    with pytest.raises(KeyError):
        field_sources(_Fruit, {str: "{0}", int: "{0}"})


def test_a_compiled_function_sees_its_module_and_shows_its_source() -> None:
    make = compile_function("make(name)", ["fruit = _Fruit(name, 1 // len(name))", "return fruit"], globals())
    assert make("fig") == _Fruit("fig", 0)
    assert make.__module__ == __name__
    assert "_Fruit(name, 1 // len(name))" in inspect.getsource(make)
    with pytest.raises(ZeroDivisionError) as caught:
        make("")
    assert "1 // len(name)" in "".join(traceback.format_tb(caught.tb))
