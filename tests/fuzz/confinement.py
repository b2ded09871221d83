"""What a case may do: no program, no code from data, no file outside its folder, no network but loopback; in time.

The checks are audit hooks of the interpreter, which cannot be taken back: for a process of their own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Positions of a path and, where it may be relative to one, of a folder's descriptor among the event's arguments.
_CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    **dict.fromkeys(("os.truncate", "os.chown", "os.utime", "shutil.rmtree"), ((0, None),)),
    **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.rename", "os.link"), ((0, 2), (1, 3))),
    "os.symlink": ((1, 2),),
}
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen")
_CODE = ("pickle.find_class", "ctypes.dlopen", "code.__new__")
# What is imported when it is first needed.
_STORES = ("fsspec", "s3fs", "gcsfs", "adlfs", "huggingface_hub")
_LAZY_MODULES = {"PIL", "numpy", "urllib3", "requests", "idna", *_STORES, *sys.stdlib_module_names}
_LOOPBACK = "127.0.0.1"


class ViolationError(BaseException):
    """A case did what it must not; no `except Exception` gets hold of it."""


class CaseTimeout(BaseException):  # like KeyboardInterrupt
    """A case did not end."""


class Confinement:
    """The limits of this process, from now on, and of the cases in it."""

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._folder = os.path.realpath(folder)
        self._is_on = False
        self.violations: list[str] = []
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, _time_is_up)
        sys.addaudithook(self._audit)

    @contextlib.contextmanager
    def case(self, limit_s: float) -> Iterator[None]:
        """One case; raises CaseTimeout in it when its time is up, and ViolationError for the first violation."""
        self.violations.clear()
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.violations:  # of a thread, or caught
            raise ViolationError(self.violations[0])

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            self._check_network(event, arguments)
            return
        problem = self._problem(event, arguments)
        if problem:
            self.violations.append(problem)
            raise ViolationError(problem)

    @staticmethod
    def _check_network(event: str, arguments: tuple[Any, ...]) -> None:
        place = arguments[1][0] if event == "socket.connect" else arguments[0]
        if place not in (_LOOPBACK, _LOOPBACK.encode()):
            raise OSError("no network here")

    def _problem(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in _PROGRAMS or event in _CODE:
            return f"{event}{arguments!r}"
        if event == "exec" and self._is_foreign(arguments[0]):
            return f"code was run: {arguments[0]!r}"
        if event == "import" and str(arguments[0]).split(".")[0] not in _LAZY_MODULES:
            return f"import of {arguments[0]}"
        if event == "open":
            path, _, flags = arguments
            return self._outside(event, path) if isinstance(flags, int) and flags & _WRITING else None
        for position, descriptor in _CHANGES.get(event, ()):
            folder = -1 if descriptor is None else arguments[descriptor]
            problem = self._outside(event, arguments[position], folder)
            if problem:
                return problem
        return None

    @staticmethod
    def _is_foreign(code: Any) -> bool:
        """Whether code is neither of a file nor an annotation, which `typing` evaluates."""
        # The frames between: this function, `_problem`, `_audit`, and who runs the code.
        caller = sys._getframe(3).f_code.co_filename
        return isinstance(code, CodeType) and code.co_filename == "<string>" and caller != typing.__file__

    def _outside(self, event: str, path: Any, folder: int = -1) -> str | None:
        if isinstance(path, int):
            return None
        start = os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        absolute = os.path.normpath(os.path.join(start, os.fsdecode(path)))
        is_inside = absolute == self._folder or absolute.startswith(f"{self._folder}/")
        return None if is_inside else f"{event} of {absolute}, outside of the case's folder"


def _time_is_up(*_: object) -> None:
    raise CaseTimeout("did not end")
