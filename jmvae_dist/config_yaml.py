"""YAML as configurations are read and written: text stays text, and no key is given twice."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

# jsonargparse reads the texts that it is given by the loader of this name.
PARSER_MODE = "strict_yaml"
# YAML's words for null.
NULLS = ("null", "Null", "NULL", "~")

# Numbers to jsonargparse, but text to PyYAML, which follows YAML 1.1: there an exponent needs a point and a sign.
_MORE_FLOATS = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


def load_yaml(text: str) -> Any:
    """jsonargparse's loader, for text in which no key occurs twice: YAML would silently take the last one.

    Raises:
        yaml.YAMLError: The text is not YAML, repeats a key, refers to itself, or is nested too deeply.
    """
    import jsonargparse
    import yaml

    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if node is not None:
            _refuse_repeated_keys(node, {})
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


def _refuse_repeated_keys(node: yaml.Node, is_checked: dict[int, bool]) -> None:
    """Raise a YAMLError for a repeated key, and for an alias to a list or mapping that it is part of.

    Args:
        node: What to check, with everything in it.
        is_checked: Nodes met so far, by id; False for those that the check is still inside of.
    """
    import yaml

    if not isinstance(node, yaml.CollectionNode) or is_checked.get(id(node)):
        return
    if id(node) in is_checked:
        raise yaml.constructor.ConstructorError(None, None, "an alias refers to itself", node.start_mark)
    is_checked[id(node)] = False
    children = node.value
    if isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for number, key in enumerate(keys):
            if key.value in names[:number]:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
    for child in children:
        _refuse_repeated_keys(child, is_checked)
    is_checked[id(node)] = True
