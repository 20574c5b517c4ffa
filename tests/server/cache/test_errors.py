"""Errors of the two libraries: on the way to another process they lose nothing."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType

import pytest

import proxystash
from proxystash.pool_models import Shortage
from proxystash_server import cache
from proxystash_server.cache import InvalidEntryError
from tests.server.cache.stash import Stash

# What the parameters of their constructors may be called.
ARGUMENTS = {
    "message": "what is wrong",
    "field": "proxy_url",
    "reason": "INVALID_PROXY_URL",
    "code": "UNAVAILABLE",
    "sent": False,
    "request_id": "0123456789abcdef",
    "group": "a kind of reason",
    "kind": "failed",
    "shortage": Shortage.RESTING,
    "retry_after": timedelta(seconds=3),
}


def modules(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        # The command line is no library.
        if not module.name.startswith("proxystash.cli"):
            yield importlib.import_module(module.name)


ERRORS = [
    thing
    for package in (proxystash, cache)
    for module in modules(package)
    for thing in vars(module).values()
    if inspect.isclass(thing) and issubclass(thing, Exception) and thing.__module__ == module.__name__
    # What a module raises to itself nobody else sees.
    if not thing.__name__.startswith("_")
]


def make(error: type[Exception]) -> Exception:
    if not inspect.isfunction(error.__init__):
        # As Exception itself.
        return error(ARGUMENTS["message"])
    positional, named = [], {}
    for parameter in list(inspect.signature(error).parameters.values()):
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = ARGUMENTS[parameter.name]
        else:
            positional.append(ARGUMENTS[parameter.name])
    return error(*positional, **named)


def test_they_are_found() -> None:
    assert {"InvalidEntryError", "TierLostError", "UnavailableError", "InvalidProxyUrl"} <= {
        error.__name__ for error in ERRORS
    }


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_can_be_pickled_and_copied(error: type[Exception], protocol: int) -> None:
    made = make(error)
    made.add_note("a note")
    for same in (pickle.loads(pickle.dumps(made, protocol)), copy.copy(made)):
        assert type(same) is error
        assert (str(same), same.args, vars(same)) == (str(made), made.args, vars(made))


def test_an_error_of_bad_input_names_the_field_in_another_process_too(stash: Stash) -> None:
    with pytest.raises(InvalidEntryError) as caught:
        stash.open().new_entry("http://192.0.2.1:1", ttl_us=0)
    loaded = pickle.loads(pickle.dumps(caught.value))
    assert (loaded.field, loaded.reason, str(loaded)) == ("ttl", "INVALID_TTL", str(caught.value))
