"""The Triton kernels without a GPU: interpreted, compiled ahead of time, and in a training run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run, assert_losses_agree

pytest.importorskip("triton", reason="triton is not installed; pip install 'jmvae_dist[triton]'")


def test_interpreted_kernels_equal_the_reference() -> None:
    """All of interpreted_kernels.py, in two processes."""
    some = "TestKlTerms or TestKeyedNoise"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}

    def run(selection: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection]
        command += ["tests/unit/kernels/interpreted_kernels.py"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(run, (some, f"not ({some})")))
    for result in results:
        assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
        assert " passed" in result.stdout
        assert "skipped" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_every_kernel_compiles_without_spilling(tmp_path: Path, architecture: str) -> None:
    """For sm_80 and sm_90. Spilled registers would live in memory, which the kernels are there to spare."""
    out = tmp_path / "resources.csv"
    command = [sys.executable, "-m", "jmvae_dist", "bench", "kernels", "--resources"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(
        [*command, "--architectures", architecture, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rows = list(csv.DictReader(out.open()))
    # KL terms with given or keyed noise, the product with and without prior and mask, its gradient with and without
    # mask, three likelihoods; 6 sizes and dtypes.
    assert len(rows) == 6 * (2 + 2 + 4 + 2 + 3 + 3)
    assert {int(row["stack_bytes"]) for row in rows} == {0}
    assert max(int(row["registers"]) for row in rows) <= 128
    assert {row["architecture"] for row in rows} == {architecture}


def test_batch_sizes_share_their_binaries() -> None:
    """One binary for all batch sizes; two where D is no multiple of 16, because rows may then be aligned or not."""
    code = (
        "from collections import Counter\n"
        "from types import SimpleNamespace\n"
        "import torch\n"
        "from triton.runtime.jit import JITFunction\n"
        "from jmvae_dist.kernels import offline\n"
        # What would be compiled counts; compiling it would take its time.
        "JITFunction._do_compile = lambda self, key, *rest: self.device_caches[80][0].setdefault(\n"
        "    key, SimpleNamespace(hash=key, asm={'cubin': b''}))\n"
        "for dim in (32, 20):\n"
        "    with offline.compiling(80) as compiled:\n"
        "        for batch in (1, 2, 3, 4, 5, 16, 17, 100, 128, 1000):\n"
        "            offline.launch_all(batch, dim, 3, torch.float32)\n"
        "    names = Counter(name for name, _, _ in compiled.values())\n"
        "    print(*(names[kernel] for kernel in offline.KERNELS))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    # Kernels have 2, 2, 4, 2, 3 and 3 combinations of switches; outputs of decoders are contiguous.
    assert output.splitlines() == ["2 2 4 2 3 3", "4 4 8 4 3 3"]


def test_training_gives_the_same_losses(make_run: Callable[..., Run]) -> None:
    """Five steps in float32, noise generated in the kernels."""
    settings = ["--training.steps", "5", "--training.log_every_steps", "1", "--checkpoint.every_steps", "null"]
    reference = make_run("reference", *settings, "--model.kernels", "reference")
    assert "KL and products of experts on cpu: reference" in reference.train()
    fused = make_run("triton", *settings, "--model.kernels", "triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process = fused.start()  # Triton looks at the variable when it is imported
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("KL and products of experts on cpu: triton") == 1
    assert_losses_agree(reference, fused, 1e-5, 5)
