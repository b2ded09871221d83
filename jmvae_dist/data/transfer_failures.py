"""What goes wrong with a transfer: failures that may pass, that last, and that say the file is another one.

`transfer_http` and `transfer_fsspec` raise them; `transfer` makes retries and errors for people out of them. Here is
also how a cause is put into words, without the URLs and secrets that the messages of libraries repeat.
"""

from __future__ import annotations

import http.client


class PassingFailure(Exception):  # noqa: N818  # becomes a DataError when it does not pass
    """Another attempt may succeed.

    Args:
        reason: for the message.
        pause_s: how long the server asks to wait.
    """

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class LastingFailure(Exception):  # noqa: N818
    """Another attempt would fail as well."""


class WrongFile(LastingFailure):
    """What is at the URL is not the file that the manifest means."""


def check_version(versions: dict[str, str], url: str, version: str) -> None:
    """Raise WrongFile unless the file has the version that this process has read parts of before."""
    if versions.setdefault(url, version) != version:
        raise WrongFile("the file has changed on the server since this process began to read it")


def cause_of(error: BaseException) -> str:
    """What the operating system said, from inside the libraries' exceptions, which repeat the URL."""
    chain = exception_chain(error)
    for inner in reversed(chain):
        if isinstance(inner, OSError) and inner.strerror:
            return str(inner.strerror)
        if isinstance(inner, http.client.IncompleteRead):
            return "the connection ended early"
    text = f" {' '.join(str(error).split())[:200]}" if len(chain) == 1 and str(error) else ""
    return f"{type(error).__name__}{text}"


def exception_chain(error: BaseException) -> list[BaseException]:
    """The exception and those it was made from, outermost first."""
    chain = [error]
    for item in chain:  # grows meanwhile
        inner = (*item.args, getattr(item, "reason", None), item.__cause__, item.__context__)
        chain += [other for other in inner if isinstance(other, BaseException) and other not in chain]
    return chain
