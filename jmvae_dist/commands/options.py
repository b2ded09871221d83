"""Values of command-line options, checked where they are parsed."""

from __future__ import annotations

import argparse
import re
from fractions import Fraction


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def named_size(text: str) -> tuple[str, int]:
    """NAME=K with a whole number K of at least 1."""
    name, separator, number = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=NUMBER, such as label=10")
    return name, positive(number)


def named_number(text: str) -> tuple[str, float]:
    """NAME=NUMBER, where the number may be a fraction such as 1/255."""
    name, separator, number = text.partition("=")
    try:
        value = float(Fraction(number))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = None
    if not separator or not name or value is None:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=NUMBER, such as image=1/255")
    return name, value


def num_bytes(text: str) -> int:
    """A number of bytes: 1000000, 200MB, 1.5GiB."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kKMGT]?)(i?)B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes, such as 200MB or 1GiB")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    value = int(Fraction(number) * base ** "_KMGT".index(prefix.upper() or "_"))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1 byte")
    return value
