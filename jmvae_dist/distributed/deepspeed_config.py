"""DeepSpeed's configuration, from the run's; without importing DeepSpeed or torch, to be checked before a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jmvae_dist.errors import ConfigError
from jmvae_dist.training_config import DeepSpeedSection

# Elements per bucket. DeepSpeed's default of 5e8 allocates 2 GB of float32 per rank, several times this model.
BUCKET_ELEMENTS = 50_000_000
# What the run's configuration decides; the same key in a user's file would silently contradict it.
_RESERVED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.gradient_clip_norm",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "torch_autocast": "training.precision",
    "amp": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "optimizer": "optimizer",
    "scheduler": "schedule.learning_rate",
    "checkpoint": "checkpoint",
    # The loss is scaled for gradients that are averaged over ranks, in the order in which DDP does it.
    "gradient_allreduce_op": "nothing",
    "gradient_predivide_factor": "nothing",
    "prescale_gradients": "nothing",
}
_RESERVED_ZERO_KEYS = {
    "stage": "training.engine",
    "offload_optimizer": "training.deepspeed.offload_optimizer",
    "offload_param": "training.deepspeed.offload_parameters",
    # Their former names, which DeepSpeed still takes.
    "cpu_offload": "training.deepspeed.offload_optimizer",
    "cpu_offload_param": "training.deepspeed.offload_parameters",
    "compute_grad_norm": "training.gradient_clip_norm",
}


def build_config(engine: str, section: DeepSpeedSection) -> dict[str, Any]:
    """DeepSpeed's configuration for an engine; checked before any process group starts.

    Args:
        engine: zero0 .. zero3.
        section: The user's options.

    Raises:
        ConfigError: The user's file cannot be read, or sets what the run's configuration decides.
    """
    stage = int(engine.removeprefix("zero"))
    given = {} if section.config_file is None else _read_options(Path(section.config_file).expanduser())
    zero = {
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        **given.pop("zero_optimization", {}),
        "stage": stage,
    }
    if section.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    elif stage in (1, 2):
        # The norm is computed on our side, in an order that does not depend on the engine.
        zero["compute_grad_norm"] = False
    if section.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    return {
        **given,
        "zero_optimization": zero,
        # Rank shares of the global batch may differ by a lane: DeepSpeed only counts samples with these.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # until `ZeroEngine` is told: it may have to be found first
        "gradient_clipping": 0.0,
        # Torch's AdamW also where the optimizer is offloaded: DeepSpeed's own is compiled at the first start.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _read_options(path: Path) -> dict[str, Any]:
    key = "training.deepspeed.config_file"
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as JSON ({error})") from None
    if not isinstance(options, dict) or not isinstance(options.get("zero_optimization", {}), dict):
        raise ConfigError(f"{key}: {path} must hold an object, and zero_optimization in it too")
    for reserved, values in ((_RESERVED_KEYS, options), (_RESERVED_ZERO_KEYS, options.get("zero_optimization", {}))):
        for name in values:
            if name in reserved:
                raise ConfigError(f"{key}: {path} sets {name!r}; set {reserved[name]} instead")
    return options
