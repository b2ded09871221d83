"""Freed memory is kept: steps after the first ones take hardly any page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jmvae_dist.distributed.allocator import SETTINGS_OF_USERS

# Allocates and frees like backward passes do, and prints how many page faults a pass takes.
_PASSES = """
import resource
import torch
from jmvae_dist.distributed.allocator import keep_freed_memory

def take() -> None:
    pieces = [torch.ones(2**17) for _ in range(64)]  # 512 KiB each: less than a huge page
    del pieces

print(keep_freed_memory())
for _ in range(3):
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    take()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.parametrize("settings", [{}, {"MALLOC_TRIM_THRESHOLD_": "0"}])
def test_freed_memory_is_kept_unless_the_user_has_settings(settings: dict[str, str]) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS_OF_USERS}
    result = subprocess.run(
        [sys.executable, "-c", _PASSES], env={**kept, **settings}, text=True, capture_output=True, check=True
    )
    is_set, faults = result.stdout.split()
    assert is_set == str(not settings)
    assert (float(faults) < 100) == (not settings)  # 32 MiB are 8,192 pages
