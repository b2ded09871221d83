"""Text and JSON that nobody vouches for: parsed strictly, checked value by value, and shown harmlessly.

Manifests and JSON members are parsed here, the values of a manifest are checked here before anything is made of
them, and names found in the data are escaped here before a terminal shows them.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NoReturn

from jmvae_dist.checks import is_integer
from jmvae_dist.errors import DataError

# Of samples, bytes or whatever else a document counts: more than there can be, and far from overflow.
MAX_COUNT = 2**62


def parse_json(text: str, *, shares_integers: bool = False) -> Any:
    """The value of a JSON document, without what Python accepts beyond the standard.

    Args:
        text: the document.
        shares_integers: whether equal integers become one object: for documents with many that are kept.

    Raises:
        ValueError: not JSON; or an object has a key twice, or a number is NaN or infinite.
        RecursionError: nested too deep.
    """
    # Of bounded size: in a document of others all integers can differ.
    parse_int = functools.lru_cache(maxsize=1024)(int) if shares_integers else None
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=parse_int)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("an object has the same key twice")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


class DocumentChecks:
    """Checks of the values of one JSON document; what is wrong ends as a DataError that names file and key.

    Args:
        path: the file, as messages show it.
        max_nesting: how deep lists and objects may be nested.
    """

    def __init__(self, path: str, max_nesting: int) -> None:
        self.path = path
        self._max_nesting = max_nesting

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise the DataError of one key; of the whole document if it is empty."""
        raise DataError(f"{self.path}: {printable(key)}: {problem}" if key else f"{self.path}: {problem}")

    def nesting(self, value: Any) -> None:
        """Check how deep lists and objects are nested."""
        if _is_nested_deeper(value, self._max_nesting):
            self.fail("", f"lists and objects are nested more than {self._max_nesting} deep")

    def record(self, value: Any, key: str, keys: set[str], optional: frozenset[str] = frozenset()) -> Any:
        """An object that has all of `keys`, and besides them none but those that are optional."""
        if not isinstance(value, dict):
            self.fail(key, "must be an object")
        prefix = f"{key}." if key else ""
        for name in sorted(keys - value.keys()):
            self.fail(f"{prefix}{name}", "is missing")
        for name in sorted(value.keys() - keys - optional):
            self.fail(f"{prefix}{name}", "is not a known key")
        return value

    def non_empty_list(self, value: Any, key: str) -> list[Any]:
        """A list with at least one entry."""
        if not isinstance(value, list) or not value:
            self.fail(key, "must be a list with at least one entry")
        return value

    def integer(self, value: Any, key: str, minimum: int) -> int:
        """An integer from `minimum` on, below MAX_COUNT."""
        if not is_integer(value) or not minimum <= value < MAX_COUNT:
            self.fail(key, f"{shortened(value)} must be an integer of at least {minimum}")
        return value


def _is_nested_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects of a JSON value are nested more than `depth` deep; does not recurse further."""
    if not isinstance(value, list | dict):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_nested_deeper(entry, depth - 1) for entry in entries)


def printable(text: str) -> str:
    """The text with control and other unprintable characters escaped: a terminal would act on them."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shortened(value: Any) -> str:
    """The beginning of a value's representation, for messages."""
    return repr(value)[:80]
