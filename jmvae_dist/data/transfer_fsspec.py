"""Objects in stores such as s3://, through `fsspec` and the package of each store, which are installed apart.

Requests that never end, and failures of many packages, become the failures that `transfer` knows. Which schemes are
opened at all is fixed in `urls`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jmvae_dist.data.transfer_failures import LastingFailure, PassingFailure, WrongFile, cause_of, check_version
from jmvae_dist.data.urls import scheme_of
from jmvae_dist.data_config import RemoteSection

_Result = TypeVar("_Result")

_BLOCK_BYTES = 8 * 2**20
# What stores call that which differs between versions of an object: S3, Azure, Google, Hugging Face.
_VERSIONS = ("ETag", "etag", "generation", "blob_id")
_DRIVERS = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}


class StoreSource:
    """An object in a store, through `fsspec` and the package of the store; options are those of the environment."""

    def __init__(self, url: str, num_bytes: int | None, settings: RemoteSection, versions: dict[str, str]) -> None:
        self._url = url
        self._num_bytes = num_bytes
        self._versions = versions
        self._timeout_s = settings.connect_timeout_s + settings.stall_timeout_s
        self._size: int | None = None

    def read(self, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
        if self._size is None:
            self._size = self._look()
        stop = self._size if stop is None else stop
        while start < stop:
            end = min(stop, start + _BLOCK_BYTES)
            block = self._read_block(start, end)
            if len(block) > end - start:
                raise LastingFailure("the store answered with more than the part that was asked for")
            if not block:
                return
            yield start, block
            start += len(block)

    def _look(self) -> int:
        """The size, once size and version are what they should be: stores do not say them with each part."""
        facts = self._call(lambda system: system.info(self._url))
        size, version = facts.get("size"), next((str(facts[key]) for key in _VERSIONS if facts.get(key)), None)
        if not isinstance(size, int):
            raise WrongFile("not a file of known size")
        if self._num_bytes is not None and size != self._num_bytes:
            raise WrongFile(f"{size} bytes, the manifest says {self._num_bytes}: the file was replaced")
        if version is not None:
            check_version(self._versions, self._url, version)
        return size

    def identify(self) -> tuple[int, str]:
        facts = self._call(lambda system: system.info(self._url))
        if not isinstance(facts.get("size"), int):
            raise LastingFailure("not a file of known size")
        versions = (facts.get(key) for key in (*_VERSIONS, "LastModified", "mtime"))
        return facts["size"], next((str(version) for version in versions if version), "")

    def _read_block(self, start: int, end: int) -> bytes:
        return self._call(lambda system: system.cat_file(self._url, start=start, end=end))

    def _call(self, function: Callable[[Any], _Result]) -> _Result:
        """The result of a request; fsspec and the packages behind it know no common timeout."""
        answer: queue.SimpleQueue[tuple[_Result | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((function(_file_system(self._url)), None))
            except Exception as error:
                answer.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            result, error = answer.get(timeout=self._timeout_s)
        except queue.Empty:
            raise PassingFailure(f"no answer within {self._timeout_s:g} s (data.remote.stall_timeout_s)") from None
        if isinstance(error, (LastingFailure, PassingFailure)):
            raise error
        if isinstance(error, FileNotFoundError):
            raise WrongFile(cause_of(error)) from None
        if isinstance(error, (PermissionError, IsADirectoryError, NotImplementedError)):
            raise LastingFailure(cause_of(error)) from None
        if error is not None:
            raise PassingFailure(cause_of(error)) from None
        return result  # type: ignore[return-value]


def _file_system(url: str) -> Any:
    scheme = scheme_of(url)
    assert scheme is not None
    try:
        import fsspec

        # By scheme and not by URL, which fsspec would search for more than a place.
        return fsspec.filesystem(scheme)
    except ImportError:
        raise LastingFailure(
            f"{scheme}:// needs the packages fsspec and {_DRIVERS[scheme]}; install them beside jmvae_dist"
        ) from None
