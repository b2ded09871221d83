"""Imports go one way, and importing the package does not load what the command at hand does not need."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.conftest import ROOT

PACKAGE = ROOT / "jmvae_dist"
# What each room may import, besides itself. `pure` is what the first row of docs/architecture.md says.
PURE = {
    "errors",
    "checks",
    "config",
    "config_io",
    "config_keys",
    "config_sources",
    "config_yaml",
    "data_config",
    "files",
    "model_config",
    "networks_config",
    "progress",
    "schedules",
    "training_config",
    "user_code",
}
ALLOWED = {
    "kernels": PURE,
    "model": PURE | {"kernels"},
    "data": PURE,
    "distributed": PURE,
    "checkpoint": PURE | {"distributed", "model"},
    "evaluation": PURE | {"kernels", "model", "data", "distributed"},
    "tracking": PURE,
    "training": PURE
    | {"kernels", "model", "data", "distributed", "checkpoint", "evaluation", "tracking", "jmvae_dist"},
    "cluster": PURE | {"kernels", "model", "data", "distributed", "checkpoint", "tracking", "training", "jmvae_dist"},
}


def imported_rooms(path: str) -> set[str]:
    """Rooms of jmvae_dist that a file imports anywhere, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "jmvae_dist":
                rooms.add(parts[1] if len(parts) > 1 else "jmvae_dist")
    return rooms


def test_imports_go_one_way() -> None:
    for room, allowed in ALLOWED.items():
        for file in (PACKAGE / room).rglob("*.py"):
            forbidden = imported_rooms(str(file.relative_to(PACKAGE))) - allowed - {room}
            assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}"
    for file in PACKAGE.glob("*.py"):
        if file.stem in PURE:
            forbidden = imported_rooms(file.name) - PURE
            assert not forbidden, f"{file.name} imports {sorted(forbidden)}"


def test_some_libraries_are_imported_in_few_files() -> None:
    importers: dict[str, list[str]] = {"wandb": [], "accelerate": [], "deepspeed": []}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} & importers.keys():
                importers[name].append(str(file.relative_to(PACKAGE)))
    assert set(importers["wandb"]) == {"tracking/wandb_process.py"}
    # engine.py needs it for a type annotation only.
    assert set(importers["accelerate"]) == {f"distributed/{name}.py" for name in ("runtime", "engine", "deepspeed")}
    assert set(importers["deepspeed"]) == {"distributed/deepspeed.py"}


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(' '.join(name for name in sys.modules if '.' not in name))"
    return set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_is_light() -> None:
    """`import jmvae_dist` loads not even torch; the model loads torch and nothing else that is heavy."""
    heavy = {"deepspeed", "wandb", "triton", "matplotlib", "sklearn", "webdataset", "accelerate", "rich"}
    assert not loaded_after("import jmvae_dist") & (heavy | {"torch"})
    loaded = loaded_after(
        "from jmvae_dist import JMVAE, JMVAEConfig, load_model; import jmvae_dist.checkpoint.export"
    )
    assert "torch" in loaded
    # torch itself may try to import triton; whether it is there is not ours to say.
    assert not loaded & (heavy - {"triton"})


def test_a_configuration_mistake_does_not_wait_for_torch() -> None:
    assert "torch" not in loaded_after(
        "import jmvae_dist.commands.train, jmvae_dist.commands.doctor, jmvae_dist.training.setup"
    )
