"""The keys of a `RunConfig`: which there are, what each takes, and what to say of those that there are not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jmvae_dist.config import RunConfig
from jmvae_dist.errors import ConfigError


def join(section: str, name: str) -> str:
    """The key of `name` in a section; '' is the top level."""
    return f"{section}.{name}" if section else name


def declared_type(key: str) -> Any:
    """The annotation of a (nested) key such as ``schedule.annealing.shape``; None if there is no such key."""
    current: Any = RunConfig
    for part in key.split(".") if key else ():
        current = get_type_hints(current).get(part) if dataclasses.is_dataclass(current) else None
    return current


def section_keys(section: str) -> list[str]:
    """Names of the keys of a section; of the top level for ''; nothing if it is not a section."""
    declared = declared_type(section)
    return [item.name for item in dataclasses.fields(declared)] if dataclasses.is_dataclass(declared) else []


def declared_default(key: str) -> Any:
    """What a declared key is where nothing sets it; None also where something has to."""
    section, _, name = key.rpartition(".")
    item = next(item for item in dataclasses.fields(declared_type(section)) if item.name == name)
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


@functools.cache
def optional_texts(section: str = "") -> tuple[str, ...]:
    """The keys that take text or null, such as ``tracking.wandb.name``."""
    keys: list[str] = []
    for name in section_keys(section):
        key = join(section, name)
        keys += [key] if declared_type(key) == (str | None) else optional_texts(key)
    return tuple(keys)


def split_declared(key: str) -> tuple[str, list[str]]:
    """The part of a key that is declared, and the names below it, such as those of modalities."""
    parts = key.split(".")
    count = 0
    while count < len(parts) and declared_type(".".join(parts[: count + 1])) is not None:
        count += 1
    return ".".join(parts[:count]), parts[count:]


def is_mapping(key: str) -> bool:
    """Whether a declared key takes a mapping whose names are the user's, such as those of modalities."""
    return _item_type(declared_type(key)) is not None


def takes_list(key: str) -> bool:
    """Whether a key is declared to take a list."""
    return any(get_origin(option) is list for option in _alternatives(declared_type(key)))


def takes_null(key: str) -> bool:
    """Whether a key is declared to take null."""
    return NoneType in _alternatives(declared_type(key))


def check_names_below(key: str, names: list[str]) -> None:
    """Raise a ConfigError unless something of the user's can be set at `names` below the declared `key`."""
    kind = declared_type(key)
    for number in range(len(names)):
        item = _item_type(kind)
        if item is None:
            whole = ".".join([key, *names[:number]])
            raise ConfigError(
                f"{'.'.join([key, *names])}: {whole} has no keys of its own; write --{whole} VALUE on the command "
                f"line, {whole.rpartition('.')[2]}: VALUE in a file, where VALUE must be {describe(kind)}"
            )
        kind = item


def explain_unknown(key: str) -> str:
    """What to say of a key that does not exist: the keys that do, and which is close."""
    section, _, name = key.rpartition(".")
    allowed = section_keys(section)
    if not allowed:
        return explain_unknown(section) if section else f"{key}: unknown key"
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{key}: unknown key{hint}; allowed in {section or 'the configuration'}: {', '.join(allowed)}"


def describe(declared: Any) -> str:
    """A type as users read it."""
    allowed = declared.__name__ if isinstance(declared, type) else str(declared).replace("typing.", "")
    return re.sub(r"Literal\[(.*?)\]", r"one of \1", allowed).replace("| None", "or null")


def _item_type(declared: Any) -> Any:
    """What the values of a mapping are declared as; None if no mapping is allowed."""
    if declared is Any:
        return Any
    for option in _alternatives(declared):
        if option is dict:
            return Any
        if get_origin(option) is dict:
            return get_args(option)[1]
    return None


def _alternatives(declared: Any) -> tuple[Any, ...]:
    """The types in a union; a type that is none is the only one."""
    return get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
