"""Classes and functions of the user's that a run configuration names.

Importing them runs their code, so their names may come from the user's own configuration or arguments alone. A name
that a checkpoint or an export holds must first be trusted by the user (`check_trusted`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from jmvae_dist.errors import ConfigError


def check_trusted(paths: Mapping[str, str], trusted: Collection[str]) -> None:
    """Refuse to import what a checkpoint names and the user has not.

    Args:
        paths: Setting -> `module.name`.
        trusted: The names that the user trusts.

    Raises:
        ConfigError: Some are not trusted; the message names them all.
    """
    unknown = {key: path for key, path in paths.items() if path not in trusted}
    if unknown:
        named = ", ".join(f"{path} ({key})" for key, path in unknown.items())
        flags = " ".join(f"--trust-class {path}" for path in dict.fromkeys(unknown.values()))
        raise ConfigError(
            f"the model was trained with code of yours, {named}, which no checkpoint may choose to run: add {flags} "
            "(in Python: trusted=[...])"
        )


def import_object(key: str, path: str) -> Any:
    """The class or function at `module.name`.

    Raises:
        ConfigError: It cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be imported ({error}); is its folder in PYTHONPATH?") from None


def constructor(
    key: str, settings: Mapping[str, Any], offered: Mapping[str, Any] = MappingProxyType({})
) -> tuple[type, dict[str, Any]]:
    """The class of a `{class_path, init_args}` section and its arguments, which are checked against its signature.

    Args:
        key: Of the section.
        settings: The section.
        offered: Arguments that are passed if the class has such parameters and `init_args` does not set them.

    Raises:
        ConfigError: The class cannot be imported, or does not take these arguments.
    """
    path = settings["class_path"]
    kind = import_object(f"{key}.class_path", path)
    if not isinstance(kind, type):
        raise ConfigError(f"{key}.class_path: {path} is not a class")
    given = dict(settings.get("init_args") or {})
    try:
        signature = inspect.signature(kind)
        arguments = {name: value for name, value in offered.items() if name in signature.parameters} | given
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}.init_args: {path} does not take them ({error})") from None
    return kind, arguments


def construct(key: str, settings: Mapping[str, Any], offered: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """An instance of the class that a `{class_path, init_args}` section names; see `constructor`.

    Raises:
        ConfigError: It cannot be built.
    """
    kind, arguments = constructor(key, settings, offered)
    try:
        return kind(**arguments)
    except Exception as error:  # whatever the user's class objects to
        raise ConfigError(
            f"{key}: {settings['class_path']} cannot be built: {type(error).__name__}: {error}"
        ) from error


def path_of(key: str, function: Any) -> str:
    """`module.name` of a function, by which another process can import it.

    Raises:
        ConfigError: It has no such name: a lambda, a local function, an object.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or not name.isidentifier():
        raise ConfigError(
            f"{key}: {function!r} has no name by which a checkpoint could be loaded again; define the function at "
            "the top level of a module that can be imported"
        )
    return f"{module}.{name}"
