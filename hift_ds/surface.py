"""The surface of DeepSpeed that hift_ds stands on, named in one place.

`engine.py`, `optimizer.py`, `shards.py`, `gradients.py` and `checkpoint.py` use nothing of DeepSpeed's inside but this.
"""

from __future__ import annotations

import importlib

# module -> attribute path within it -> attributes that must exist
SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "deepspeed": {"": ("initialize", "init_distributed", "DeepSpeedEngine", "__version__")},
    "deepspeed.comm": {
        "": (
            "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "get_rank", "get_world_size",
            "init_distributed", "is_initialized", "reduce_scatter_tensor",
        ),
    },
    "deepspeed.accelerator": {"": ("get_accelerator",)},
    "deepspeed.ops": {"": ("__compatible_ops__",)},
    "deepspeed.runtime.engine": {
        "DeepSpeedEngine": (
            # overridden
            "_configure_optimizer", "_configure_lr_scheduler", "allreduce_gradients", "backward", "clip_fp32_gradients",
            "get_lr", "load_checkpoint", "save_checkpoint", "save_16bit_model",
            # called
            "_check_for_duplicates", "_configure_zero_optimizer", "bfloat16_enabled", "communication_data_type",
            "dynamic_loss_scale", "dynamic_loss_scale_args", "fp16_enabled", "get_data_types", "gradient_accumulation_steps",
            "gradient_clipping", "gradient_predivide_factor", "is_gradient_accumulation_boundary", "loss_scale",
            "managed_gradient_accumulation", "optimizer_name", "optimizer_params", "postscale_gradients",
            "zero_allgather_bucket_size", "zero_allgather_sequential", "zero_optimization_stage", "zero_overlap_comm", "zero_reduce_bucket_size",
        ),
    },
    "deepspeed.runtime.base_optimizer": {
        "ZeROOptimizer": (
            "backward_prologue", "clear_backward_seen_flag", "enter_backward", "exit_backward",
            "queue_post_backward_callback", "register_grad_acc_post_hook", "scale_if_loss",
            "set_gradient_accumulation_boundary",
        ),
    },
    "deepspeed.runtime.fp16.loss_scaler": {
        "": ("CreateLossScaler",),
        "LossScaler": ("scale_loss", "update_scale"),
        "DynamicLossScaler": ("scale_loss", "update_scale"),
    },
    "deepspeed.runtime.zero.parameter_offload": {
        "": ("PartitionedParameterCoordinator",),
        "DeepSpeedZeRoOffload": ("partition_all_parameters", "release_backward_leftovers", "mark_persistent_parameters"),
    },
}  # fmt: skip

# Attributes that exist only on instances: read by name in the source of the method that sets them.
INSTANCE_SURFACE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "deepspeed.runtime.engine": (
        "DeepSpeedEngine", "__init__", ("basic_optimizer", "client_optimizer", "lr_scheduler", "param_names"),
    ),
    "deepspeed.runtime.zero.parameter_offload": (
        "DeepSpeedZeRoOffload", "__init__", ("param_coordinator", "persistent_parameters"),
    ),
}  # fmt: skip


def missing() -> list[str]:
    """Dotted names of what the installed DeepSpeed lacks; empty when all is there."""
    found = []
    for module_name, owners in SURFACE.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            found.append(module_name)
            continue
        for owner_name, attributes in owners.items():
            owner = getattr(module, owner_name, None) if owner_name else module
            prefix = f"{module_name}.{owner_name}" if owner_name else module_name
            if owner is None:
                found.append(prefix)
                continue
            found.extend(f"{prefix}.{name}" for name in attributes if not hasattr(owner, name))
    return found + _missing_on_instances()


def _missing_on_instances() -> list[str]:
    found = []
    for module_name, (owner_name, method, attributes) in INSTANCE_SURFACE.items():
        code = getattr(getattr(importlib.import_module(module_name), owner_name, None), method, None)
        names = code.__code__.co_names if code is not None else ()
        found.extend(f"{module_name}.{owner_name}().{name}" for name in attributes if name not in names)
    return found


def require() -> None:
    """Raises:
    RuntimeError: The installed DeepSpeed lacks something that hift_ds relies on; names it.
    """
    lacking = missing()
    if lacking:
        import deepspeed

        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} lacks {', '.join(lacking)}, which hift_ds relies on: install "
            "deepspeed>=0.19.8,<0.20"
        )
