"""Conditions on single values of a configuration, and what to say when one does not hold."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from jmvae_dist.errors import ConfigError


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a `ConfigError` that names key, value and what is allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {value!r} is not allowed; it must be {allowed}")


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold; True and False are not numbers here."""
    # `math.isfinite` would raise for an integer beyond the range of floats.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def is_integer(value: Any) -> bool:
    """Whether `value` is an int; True and False, which Python counts as ints, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_sizes(value: Any) -> bool:
    """Whether `value` is a non-empty list of positive integers."""
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(is_integer(size) and size >= 1 for size in value)


def is_object_path(value: Any) -> bool:
    """Whether `value` reads like `module.name`, the place of a class or function of the user's."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))


def check_user_class(key: str, settings: Any, more_keys: Collection[str] = ()) -> None:
    """Check the form of a `{class_path: module.Class, init_args: {...}}` section; nothing is imported.

    Args:
        key: Of the section, for the message.
        settings: The section.
        more_keys: What it may hold besides.

    Raises:
        ConfigError: It has another form.
    """
    allowed = "a section with a class_path"
    require(isinstance(settings, dict) and "class_path" in settings, key, settings, allowed)
    path = settings["class_path"]
    require(is_object_path(path), f"{key}.class_path", path, "module.Class")
    unknown = sorted(settings.keys() - {"class_path", "init_args"} - set(more_keys))
    if unknown:
        raise ConfigError(f"{key}: unknown key {unknown[0]!r}; allowed: class_path, init_args")
    arguments = settings.get("init_args")
    require(arguments is None or isinstance(arguments, dict), f"{key}.init_args", arguments, "a dictionary, or null")
