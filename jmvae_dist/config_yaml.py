"""YAML as configurations are read and written: text stays text, no key is given twice, and sizes are bounded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import yaml

# jsonargparse reads the texts that it is given by the loader of this name.
PARSER_MODE = "strict_yaml"
# YAML's words for null.
NULLS = ("null", "Null", "NULL", "~")

# Numbers to jsonargparse, but text to PyYAML, which follows YAML 1.1: there an exponent needs a point and a sign.
_MORE_FLOATS = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")

# Far more than a run needs. A few lines of aliases to aliases stand for billions of values, which all that follows
# would go through one by one, and Python's stack ends at some hundred levels.
_MAX_VALUES = 100_000
_MAX_DEPTH = 100


def load_yaml(text: str) -> Any:
    """jsonargparse's loader, for text in which no key occurs twice: YAML would silently take the last one.

    Raises:
        yaml.YAMLError: The text is not YAML, repeats a key, refers to itself, holds too much or is nested too deeply.
    """
    import jsonargparse
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    _check_size(text, loader)
    try:
        node = yaml.compose(text, Loader=loader)
        if node is not None:
            _measure(node, {})
    except RecursionError:
        raise yaml.YAMLError("lists and mappings are nested too deeply") from None
    try:
        return jsonargparse.get_loader("yaml")(text)
    except TypeError:  # from its handling of keys without values, such as {0: null}
        raise yaml.YAMLError("keys must be text") from None
    except ValueError as error:  # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def load_value(text: str) -> Any:
    """The value of an option; text where it is not YAML, or is nothing but a comment, such as #1."""
    import yaml

    try:
        loaded = load_yaml(text)
    except yaml.YAMLError:
        return text
    return text if loaded is None and text.strip() not in NULLS else loaded


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `load_yaml` reads as the same values, in the same order."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes also the text that would be read back as a number, such as the name 1e3."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _MORE_FLOATS, list("-+0123456789"))
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _check_size(text: str, loader: Any) -> None:
    """Raise yaml.YAMLError for what must not be composed: that takes C stack for levels, and memory for values."""
    import yaml

    num_nodes = depth = 0
    for event in yaml.parse(text, Loader=loader):
        num_nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if num_nodes > 2 * _MAX_VALUES or depth > _MAX_DEPTH:  # twice: a value can have a key
            _refuse_size(event.start_mark)


def _refuse_size(mark: Any) -> NoReturn:
    import yaml

    problem = f"more than {_MAX_VALUES} values, aliases counted as often as used, or {_MAX_DEPTH} levels"
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


def _measure(node: yaml.Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values in a node, those that aliases stand for included, and levels of lists and mappings.

    Args:
        node: What to measure, with everything in it.
        measured: Of the collections met so far, by id; None for those that the node is in.

    Raises:
        yaml.YAMLError: A key is repeated, an alias refers to what it is part of, or a limit is exceeded.
    """
    import yaml

    if not isinstance(node, yaml.CollectionNode):
        return 1, 0
    if id(node) not in measured:
        measured[id(node)] = None
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node)
            children = [value for _, value in node.value]
        inner = [_measure(child, measured) for child in children]
        measured[id(node)] = 1 + sum(values for values, _ in inner), 1 + max((depth for _, depth in inner), default=0)
    size = measured[id(node)]
    if size is None:
        raise yaml.constructor.ConstructorError(None, None, "an alias refers to itself", node.start_mark)
    if size[0] > _MAX_VALUES or size[1] > _MAX_DEPTH:
        _refuse_size(node.start_mark)
    return size


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    import yaml

    names = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in names:
            problem = f"the key {key.value!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        names.add(key.value)
