"""Settings as text: those in effect as TOML, and the documentation of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from proxystash_server.settings import (
    CONFIG_VARIABLE,
    FLAGS,
    SECRETS,
    LoadedSettings,
    Settings,
    choices_of,
    variable_of,
)


def describe_setting(name: str) -> str:
    """The meaning and the default of a setting, in one line."""
    default = "" if name in SECRETS else f" Default: {_default(name)}."
    return _meaning(name) + default


def show_settings(loaded: LoadedSettings) -> Iterator[str]:
    """The settings in effect as lines of TOML, and where each comes from; of a secret, whether it is set."""
    for name in Settings.model_fields:
        origin = loaded.origins.get(name, "default")
        value = getattr(loaded.settings, name)
        if name in SECRETS:
            yield f"# {name} is {'set' if value else 'not set'} ({origin})"
        else:
            yield f"{name} = {_toml(value)}  # {origin}"


def document_settings() -> Iterator[str]:
    """The page on all settings, as lines of Markdown."""
    yield "# Settings"
    yield ""
    yield "<!-- Written by `proxystash-server settings --markdown`; a test compares the two. -->"
    yield ""
    yield (
        "A setting is taken from its flag, else from its environment variable, else from the TOML file named "
        f"by `--config` or `{CONFIG_VARIABLE}`, else it has its default. An unknown or wrong one is refused. "
        "`proxystash-server settings` shows what is in effect and where it comes from."
    )
    yield ""
    yield "| Setting | Flag | Environment variable | Values | Default | Meaning |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in Settings.model_fields:
        flag = f"`{FLAGS[name]}`" if name in FLAGS else "none: a command line is visible to others"
        default = "" if name in SECRETS else f"`{_default(name)}`"
        values = ", ".join(f"`{choice}`" for choice in choices_of(name))
        yield f"| `{name}` | {flag} | `{variable_of(name)}` | {values} | {default} | {_meaning(name)} |"


def _meaning(name: str) -> str:
    return " ".join((Settings.model_fields[name].description or "").split())


def _default(name: str) -> str:
    return _toml(Settings.model_fields[name].get_default(call_default_factory=True))


def _toml(value: object) -> str:
    """A setting's value as TOML, whose strings, numbers and booleans are JSON's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(name)} = {_toml(amount)}" for name, amount in value.items()) + "}"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
