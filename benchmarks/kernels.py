"""Gaussian KL terms and products of experts: times, errors against float64, registers on GPUs.

    python benchmarks/kernels.py [--sizes 1024,256,3 ...] [--dtype bfloat16] [--out FILE.csv]
    python benchmarks/kernels.py --errors        # the table in docs/kernels.md
    python benchmarks/kernels.py --resources     # compiles for GPUs that need not be there

The same as `jmvae-dist bench kernels`, which also works where only the package is installed.
"""

from __future__ import annotations

import sys

from jmvae_dist.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
