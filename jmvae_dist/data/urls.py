"""Where the files of a data set are: paths and URLs, from a fixed list of schemes.

A URL never decides what runs: `pipe:` and the like, which start programs in other libraries, and schemes that a
plug-in could define are refused, and nothing is guessed from a URL but its place.
"""

from __future__ import annotations

import posixpath
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

HTTP_SCHEMES = ("http", "https")
# Opened with fsspec. What fsspec offers besides could read local files or memory, or start programs.
STORE_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
REMOTE_SCHEMES = (*HTTP_SCHEMES, *STORE_SCHEMES)

# In such a path there is nothing to escape, to normalise or to check.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

Location = Path | str
"""A local file (Path) or a remote one (str: an absolute URL of one of REMOTE_SCHEMES)."""


def scheme_of(url: str) -> str | None:
    """The scheme in lower case; None for a path."""
    match = _SCHEME.match(url)
    return None if match is None else match[1].lower()


def is_remote(url: str) -> bool:
    """Whether text from a user means a URL rather than a path, be it one that is refused later."""
    return "://" in url and scheme_of(url) not in (None, "file")


def check_remote(url: str) -> None:
    """Raise ValueError unless the URL is an absolute one of a scheme that may be opened."""
    scheme = scheme_of(url)
    if scheme not in REMOTE_SCHEMES:
        raise ValueError(
            f"scheme {scheme!r} of {shown(url)!r} is not supported; use a path or one of "
            f"{', '.join(f'{name}://' for name in ('file', *REMOTE_SCHEMES))}"
        )
    try:
        parts = urlsplit(url)
        complete = bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port of letters
        complete = False
    if not complete or not url.isprintable() or " " in url:
        raise ValueError(f"{shown(url)!r} must have the form {scheme}://place/path, without spaces")
    if scheme in STORE_SCHEMES and ("::" in url or parts.query or parts.fragment):
        # fsspec takes `::` for a chain of file systems, and options from queries.
        raise ValueError(f"{shown(url)!r} must have the form {scheme}://place/path, without '::', '?' or '#'")


def resolve(base: Location, url: str) -> Location:
    """The file that a manifest means by `url`.

    Args:
        base: Where the manifest is; relative URLs are relative to its folder.
        url: A relative or absolute path, `file:///path`, or a URL of one of REMOTE_SCHEMES.

    Raises:
        ValueError: Another scheme, a malformed URL, or a local file in a manifest that is not local itself.
    """
    scheme = scheme_of(url)
    if scheme is not None and scheme != "file":
        check_remote(url)
        return url
    if isinstance(base, Path):
        return base.parent / url if scheme is None else _local_file(url)
    if scheme == "file" or url.startswith("/"):
        raise ValueError(f"{url!r} is a local file, which a manifest at a URL must not name")
    if _PLAIN_PATH.fullmatch(url):  # nearly always, and a manifest may have 100,000
        return f"{_folder(base)}{url}"
    return _joined(base, url)


@lru_cache(maxsize=16)
def _folder(base: str) -> str:
    """The URL of the folder of a file, with a slash at the end."""
    return _joined(base, "x").removesuffix("x")


def _joined(base: str, url: str) -> str:
    parts = urlsplit(base)
    path = posixpath.normpath(posixpath.join("/", posixpath.dirname(parts.path), quote(url)))
    if scheme_of(base) in STORE_SCHEMES:  # names of objects, in which nothing is escaped
        path = unquote(path)
    joined = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    check_remote(joined)
    return joined


def _local_file(url: str) -> Path:
    match = re.fullmatch(r"file://(?:localhost)?(/.*)", url, flags=re.IGNORECASE)
    path = "" if match is None else unquote(match[1])
    # A zero byte (%00) ends a path for the operating system, and Python refuses it with an error of its own.
    if not path.isprintable() or not path:
        raise ValueError(f"{url!r} must have the form file:///absolute/path")
    return Path(path)


def shown(location: Location) -> str:
    """A location for messages: without password, and without the query, where signed URLs carry their signature."""
    if isinstance(location, Path):
        return str(location)
    text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/?#]*@", r"\1", location)
    bare = re.split(r"[?#]", text, maxsplit=1)[0]
    return bare if bare == text else f"{bare}?..."
