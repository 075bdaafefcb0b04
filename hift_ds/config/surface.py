"""The surface of DeepSpeed that hift_ds stands on, named in one place.

The modules that import DeepSpeed (tests/unit/test_imports.py names them) use nothing of its inside but this.
"""

from __future__ import annotations

import dis
import functools
import importlib
import re
import types

SUPPORTED = "deepspeed>=0.18.5,<0.20"

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
    "deepspeed.ops.adam": {"": ("DeepSpeedCPUAdam",), "DeepSpeedCPUAdam": ("step",)},
    "deepspeed.runtime.engine": {
        "DeepSpeedEngine": (
            # overridden
            "_backward_post_hook", "_configure_optimizer", "_configure_lr_scheduler", "_get_ckpt_name",
            "_load_zero_checkpoint", "_save_checkpoint", "_save_zero_checkpoint", "_scheduler_from_config",
            "_take_model_step", "_zero3_consolidated_16bit_state_dict", "allreduce_gradients", "backward",
            "clip_fp32_gradients", "compile", "destroy", "forward", "get_global_grad_norm", "get_lr",
            "gradient_clipping", "load_checkpoint", "load_module_state_dict", "module_state_dict", "save_checkpoint",
            "save_16bit_model", "step", "zero_grad",
            # called
            "_backward_prologue", "_check_for_duplicates", "_configure_zero_optimizer",
            "_create_module_forward_post_hook", "_create_module_forward_pre_hook", "curriculum_learning_enabled",
            "dynamic_loss_scale", "dynamic_loss_scale_args", "get_data_types", "gradient_accumulation_steps",
            "is_gradient_accumulation_boundary", "loss_scale", "use_node_local_storage", "zero_allgather_sequential",
            "zero_optimization_stage",
        ),
    },
    "deepspeed.runtime.lr_schedules": {"": ("VALID_LR_SCHEDULES",)},
    "deepspeed.runtime.config": {"": ("DeepSpeedConfig", "DtypeEnum")},
    # the config models, for their defaults
    "deepspeed.compile.config": {"": ("CompileConfig",)},
    "deepspeed.runtime.precision_config": {"": ("DeepSpeedBF16Config", "DeepSpeedFP16Config")},
    "deepspeed.runtime.tensor_parallel.config": {"": ("TPConfig", "TPTrainingConfig")},
    "deepspeed.runtime.zero.config": {"": ("DeepSpeedZeroConfig",)},
    "deepspeed.runtime.zero.offload_config": {
        "": ("DeepSpeedZeroOffloadOptimizerConfig", "DeepSpeedZeroOffloadParamConfig"),
    },
    "deepspeed.runtime.base_optimizer": {
        "ZeROOptimizer": (
            "backward_prologue", "clear_backward_seen_flag", "enter_backward", "exit_backward",
            "queue_post_backward_callback", "register_grad_acc_post_hook", "scale_if_loss",
            "unregister_grad_acc_post_hooks",
        ),
    },
    "deepspeed.runtime.fp16.loss_scaler": {
        "": ("CreateLossScaler",),
        "LossScaler": ("scale_loss", "update_scale"),
        "DynamicLossScaler": ("scale_loss", "update_scale"),
    },
    "deepspeed.runtime.zero.parameter_offload": {
        "": ("FWD_MODULE_STACK", "PartitionedParameterCoordinator"),
        "DeepSpeedZeRoOffload": ("destroy", "mark_persistent_parameters", "partition_all_parameters"),
    },
}  # fmt: skip

# Attributes that exist only on instances: some method of the class must set them.
INSTANCE_SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "deepspeed.runtime.engine": {
        "DeepSpeedEngine": (
            "_config", "basic_optimizer", "config", "device", "global_rank",
            "inside_no_sync_ctxt", "local_rank", "lr_scheduler", "save_non_zero_checkpoint", "seq_data_parallel_group",
            "tput_timer", "training_dataloader",
        ),
    },
    "deepspeed.runtime.config": {
        "DeepSpeedConfig": (
            "communication_data_type", "grad_accum_dtype", "gradient_accumulation_steps", "gradient_clipping",
            "gradient_predivide_factor", "optimizer_params", "prescale_gradients", "train_micro_batch_size_per_gpu",
            "zero_config", "zero_optimization_stage",
        ),
    },
    "deepspeed.runtime.zero.parameter_offload": {
        "DeepSpeedZeRoOffload": ("param_coordinator", "persistent_parameters"),
    },
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
    found: list[str] = []
    for module_name, owners in INSTANCE_SURFACE.items():
        for owner_name, attributes in owners.items():
            try:
                owner = getattr(importlib.import_module(module_name), owner_name, object)
            except ImportError:
                owner = object
            present = _set_by_methods(owner)
            found.extend(f"{module_name}.{owner_name}().{name}" for name in attributes if name not in present)
    return found


def _set_by_methods(owner: type) -> set[str]:
    """Names that the methods of a class and of its bases assign on some object: what instances will have."""
    members = (value for cls in owner.__mro__ for value in vars(cls).values())
    codes = (getattr(getattr(member, "__wrapped__", member), "__code__", None) for member in members)
    return {name for code in codes if code is not None for name in _assigned(code)}


@functools.cache  # all of DeepSpeed's engine takes 0.1 s
def _assigned(code: types.CodeType) -> frozenset[str]:
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")


def gathers_on_cpu(version: str) -> bool:
    """Whether ZeRO-3 of this DeepSpeed gathers the right weights on CPU ranks.

    0.18.5 to 0.19.5 have given wrong ones in 2 to 5 % of plain `GatheredParameters`, on two gloo ranks; 0.19.8 in none.
    """
    return tuple(map(int, re.findall(r"\d+", version)[:3])) >= (0, 19, 8)


def require() -> None:
    """Raises RuntimeError if the installed DeepSpeed lacks something that hift_ds relies on; names it."""
    lacking = missing()
    if lacking:
        import deepspeed

        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} lacks {', '.join(lacking)}, which hift_ds relies on: install "
            f"{SUPPORTED}"
        )
