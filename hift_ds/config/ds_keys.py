"""Every DeepSpeed config key, and what becomes of it when HiFT is on. Imports deepspeed for its defaults, late."""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HONOURED, NO_EFFECT, REFUSED = "honoured", "no effect", "refused"

# The default of a section that one row covers as a whole: off unless its "enabled" is true.
OFF = object()
# The default that DeepSpeed's own config model has.
DEEPSPEED = object()


@dataclass(frozen=True)
class Row:
    """One row of the table: keys of one section that share a verdict.

    Attributes:
        section: Dotted path of the section; "" is the top level.
        keys: Key name -> DeepSpeed's default, or where it stands. A key at its default, or null, is neither refused
            nor noted.
        verdict: `HONOURED`, `NO_EFFECT` or `REFUSED`.
        note: Why, as half a sentence; docs/keys.md and messages print it.
        remedy: What to do about a refused key.
        values: The verdict holds for these values only; `None` = for every value but the default.
        also_off: Values besides the default that mean "off".
        label: How docs/keys.md names the row; "" = the keys themselves.
    """

    section: str
    keys: Mapping[str, Any]
    verdict: str
    note: str = ""
    remedy: str = "remove the key"
    values: tuple[Any, ...] | None = None
    also_off: tuple[Any, ...] = ()
    label: str = ""

    def applies(self, name: str, default: Any, value: Any) -> bool:
        """Whether the `value` of the key `name` with that `default` meets this row's verdict."""
        if self.values is not None:
            return value in self.values
        if default is OFF:
            return _is_on(value)
        if default is DEEPSPEED:
            default = _deepspeed_defaults(self.section)[name]
        return value is not None and value != default and value not in self.also_off


def check_ds_config(ds_config: Mapping[str, Any]) -> list[str]:
    """Refuses the DeepSpeed keys that HiFT cannot serve and names those that do nothing.

    Args:
        ds_config: The whole config, as `json.load` returns it. Not changed.

    Returns:
        One line for each key that has no effect though it is not at DeepSpeed's default, and for each key that
        DeepSpeed does not know.

    Raises:
        ValueError: A refused key, or a value "auto" that nobody filled in; the first in full, the others by name.
        TypeError: A section that is not an object.
    """
    notes, refusals = [], {}
    clip = ds_config.get("gradient_clipping", 0.0)
    if not _is_auto(clip) and not (isinstance(clip, (int, float)) and not isinstance(clip, bool) and clip >= 0):
        raise ValueError(f"gradient_clipping={clip!r}: must be a number, 0 (off) or more")
    for key, value in _leaves("", ds_config):
        section, _, name = key.rpartition(".")
        rows = _ROWS_OF.get(key, [])
        if not rows and section not in _OPEN_SECTIONS:
            notes.append(f"unknown DeepSpeed key {key!r}{_did_you_mean(section, name)}")
        elif _is_auto(value) and "auto" not in [default for _, default in rows]:
            refusals[key] = (
                f"{key}='auto': only the Hugging Face Trainer fills in \"auto\"; put a value, or remove the key to get "
                "DeepSpeed's default"
            )
        for row, default in rows:
            if row.verdict == HONOURED or _is_auto(value) or not row.applies(name, default, value):
                continue
            shown = reprlib.repr(value)
            if row.verdict == REFUSED:
                refusals[key] = f"{key}={shown}: not supported with HiFT, because {row.note}; {row.remedy}"
            else:
                notes.append(f"{key}={shown} has no effect with HiFT: {row.note}")
    if refusals:
        first, *others = refusals
        more = f" (refused as well: {', '.join(others)})" if others else ""
        raise ValueError(refusals[first] + more)
    return notes


def markdown_table() -> str:
    """The table for docs/keys.md, one line per row of `ROWS`."""
    lines = ["| key | verdict | note |", "|---|---|---|"]
    for row in ROWS:
        label = row.label or ", ".join(f"`{_join(row.section, name)}`" for name in row.keys)
        lines.append(f"| {label} | {row.verdict} | {row.note} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _leaves(section: str, mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        key = _join(section, str(name))
        if key not in _SECTIONS:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _leaves(key, value)
        # `"zero_optimization": true` is DeepSpeed's old way to write stage 1; null leaves a section at its defaults.
        elif value is not None and not (key == _ZERO and isinstance(value, bool)):
            raise TypeError(f"{key}={value!r}: must be an object of keys and values")


def _is_on(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return bool(value)
    if "enabled" in value:
        return bool(value["enabled"])
    return any(_is_on(part) for part in value.values() if isinstance(part, Mapping))


def _is_auto(value: Any) -> bool:
    return value == "auto" or (isinstance(value, (list, tuple)) and "auto" in value)


def _did_you_mean(section: str, name: str) -> str:
    siblings = {key.rpartition(".")[2]: key for key in _ROWS_OF if key.rpartition(".")[0] == section}
    siblings.update({s.rpartition(".")[2]: s for s in _SECTIONS if s.rpartition(".")[0] == section and s})
    elsewhere = [key for key in _ROWS_OF if key.rpartition(".")[2] == name]
    if len(elsewhere) == 1:
        return f" (did you mean {elsewhere[0]!r}?)"
    close = difflib.get_close_matches(name, siblings, n=1)
    return f" (did you mean {siblings[close[0]]!r}?)" if close else ""


def _names(*names: str) -> dict[str, Any]:
    """Keys whose default decides nothing, because they are honoured."""
    return dict.fromkeys(names)


def _off(*names: str) -> dict[str, Any]:
    """Keys that mean nothing special at DeepSpeed's default, which its own config model knows."""
    return dict.fromkeys(names, DEEPSPEED)


@functools.cache
def _deepspeed_defaults(section: str) -> dict[str, Any]:
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime import precision_config as precision
    from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    model = {
        _ZERO: zero.DeepSpeedZeroConfig,
        f"{_ZERO}.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        _OFFLOAD: offload.DeepSpeedZeroOffloadOptimizerConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
        "compile": CompileConfig,
        "tensor_parallel": TPTrainingConfig,
        "tensor_parallel.tp": TPConfig,
    }[section]
    made = model()
    return {name: getattr(made, name) for name in model.model_fields if hasattr(made, name)}


_ZERO, _OFFLOAD = "zero_optimization", "zero_optimization.offload_optimizer"
_SAMPLING, _ROUTING = "data_efficiency.data_sampling", "data_efficiency.data_routing"
_REMOVED = "DeepSpeed 0.19.8 has removed it and refuses the key itself"
_ZEROPP = "ZeRO++ quantizes or regroups what HiFT sends exactly"
_STAGE3 = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

# Dense on purpose: the table is read as a table.
# fmt: off
ROWS: tuple[Row, ...] = (
    Row("", _names("hift"), HONOURED, "the section of hift_ds; DeepSpeed ignores it"),
    # batch
    Row("", _names("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), HONOURED,
        "the block changes between accumulation windows, never within one"),
    Row("", _names("managed_gradient_accumulation"), HONOURED, "with false each `engine.step()` is one step of HiFT"),
    Row("", _names("gradient_clipping"), HONOURED, "the norm is the active block's; DeepSpeed's default is 1.0"),
    Row("", _names("dataloader_drop_last"), HONOURED),
    # optimizer, scheduler
    Row("optimizer", _names("type", "params"), HONOURED, "hift_ds has its own list of update rules"),
    Row("optimizer", {"legacy_fusion": False}, NO_EFFECT, "it belongs to DeepSpeed's FP16_Optimizer"),
    Row("optimizer.params", _names("adam_w_mode"), HONOURED, "with false `Adam` adds L2 instead of decoupled decay"),
    Row("optimizer.params", _names("torch_adam"), HONOURED, "for torch's default `weight_decay`; the Adam is ours"),
    Row("optimizer.params", {"fp32_optimizer_states": True}, REFUSED, "`hift.state` says how moments are kept",
        "use hift.state.moments instead"),
    Row("optimizer.params", {"max_grad_norm": None}, REFUSED, "DeepSpeed rejects it as an optimizer parameter",
        "set gradient_clipping instead"),
    Row("scheduler", _names("type", "params"), HONOURED, "`hift.lr_update` says when its rate is taken"),
    # No note: accelerate writes it by itself.
    Row("", _names("zero_allow_untested_optimizer"), HONOURED, "hift_ds has its own list of optimizers either way"),
    Row("", {"zero_force_ds_cpu_optimizer": True}, NO_EFFECT,
        "only `offload_optimizer.device: cpu` brings DeepSpeedCPUAdam in"),
    # precision
    Row("fp16", _names("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
                       "consecutive_hysteresis", "min_loss_scale"), HONOURED,
        "an overflow skips the step and does not rotate; with a static scale and fused kernels the turn passes",
        label="`fp16.*`"),
    Row("fp16", _off("fp16_master_weights_and_grads"), REFUSED, "masters of fp16 weights are kept in fp32"),
    Row("bf16", _names("enabled"), HONOURED, "`bfloat16` is DeepSpeed's old name of the section"),
    Row("bf16", _off("check_grad_overflow"), NO_EFFECT, "an update with inf or nan is always left out, in fp32 too"),
    Row("bf16", _off("immediate_grad_update"), NO_EFFECT, "it belongs to DeepSpeed's BF16_Optimizer"),
    Row("bf16", _off("bf16_master_weights_and_grads", "bf16_optimizer_states"), REFUSED,
        "`hift.state` says how masters and moments are kept", "use hift.state.master and hift.state.moments instead"),
    Row("data_types", _names("grad_accum_dtype", "param_dtype", "buffer_dtype") | {"keep_in_fp32_modules": "auto"},
        HONOURED, "with accumulation `grad_accum_dtype` is fp32 if not given", label="`data_types.*`"),
    Row("", {"torch_autocast": OFF}, REFUSED, "its dtypes per module for gradients and communication are not "
        "implemented", "use bf16 or fp16 instead", label="`torch_autocast.*`"),
    # gradients
    Row("", _names("communication_data_type", "prescale_gradients", "gradient_predivide_factor",
                   "gradient_allreduce_op"), HONOURED,
        "for the gradients of the active block; DeepSpeed refuses `sum` at stage 3"),
    Row("", {"disable_allgather": False}, NO_EFFECT, "DeepSpeed reads it and never uses it"),
    # ZeRO
    Row(_ZERO, _names("stage"), HONOURED, "0, 1, 2 or 3"),
    Row(_ZERO, _names("reduce_bucket_size"), HONOURED, "elements of the active block reduced at a time; a larger "
        "parameter is a bucket of its own"),
    Row(_ZERO, _names("allgather_bucket_size"), HONOURED, "elements gathered at a time after an update, stages 1, 2"),
    Row("", _names("allgather_size"), HONOURED, "its old name, beside the old `zero_optimization: true` only"),
    Row(_ZERO, _names("overlap_comm"), HONOURED, "reduction overlaps with backward at stages 2 and 3"),
    Row(_ZERO, _off("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce"),
        NO_EFFECT, "gradients of the active block are always packed into one buffer and reduce-scattered (stage 0: "
        "all-reduced)"),
    Row(_ZERO, _off("allgather_partitions"), NO_EFFECT, "the updated block is always all-gathered"),
    Row(_ZERO, _off("round_robin_gradients", "parameter_alignment", "sub_group_size"),
        NO_EFFECT, "it lays out DeepSpeed's own optimizer; HiFT cuts each parameter into equal shards"),
    Row(_ZERO, _off("compute_grad_norm"), NO_EFFECT, "the norm of the active block is always computed"),
    Row(_ZERO, _off("ignore_unused_parameters"), NO_EFFECT, "frozen blocks have no gradients; a parameter of the "
        "active block without one counts as zeros"),
    Row(_ZERO, _names(*(f"stage3_{name}" for name in _STAGE3), *_STAGE3, "stage3_gather_fp16_weights_on_model_save"),
        HONOURED, "by DeepSpeed's own ZeRO-3; also without the prefix", label="`zero_optimization.stage3_*`"),
    Row(_ZERO, _names("memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings",
                      "enable_sanity_checks"), HONOURED, "stage 3, by DeepSpeed"),
    Row(f"{_ZERO}.leaf_module", _names("classes", "names", "name_suffixes"), HONOURED, "stage 3, by DeepSpeed",
        label="`zero_optimization.leaf_module.*`"),
    Row(f"{_ZERO}.offload_param", _names("device", "pin_memory"), HONOURED, "`cpu` at stage 3; DeepSpeed ignores it "
        "at the other stages"),
    Row(f"{_ZERO}.offload_param", _off("device"), REFUSED, "weights on NVMe cannot be updated in place",
        'use "cpu" instead', values=("nvme",), label="`zero_optimization.offload_param.device: nvme`"),
    Row(f"{_ZERO}.offload_param", _off("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
        NO_EFFECT, "it belongs to NVMe offload", label="the other `zero_optimization.offload_param.*`"),
    Row(_ZERO, _names("cpu_offload_param"), HONOURED, "old name of `offload_param.device: cpu`"),
    Row(_OFFLOAD, _off("device"), HONOURED, "updates run on the host, by DeepSpeedCPUAdam for Adam and AdamW, "
        "else by torch; masters and moments are fp32 then; without an accelerator torch updates there anyway",
        values=("cpu",), label="`zero_optimization.offload_optimizer.device: cpu`"),
    Row(_OFFLOAD, _off("device"), REFUSED, "masters and state live in host memory, not on NVMe", values=("nvme",),
        label="`zero_optimization.offload_optimizer.device: nvme`"),
    Row(_OFFLOAD, _names("pin_memory"), HONOURED, "with false the host copies are not page-locked"),
    Row(_OFFLOAD, _off("super_offload"), REFUSED, "SuperOffload is another optimizer in the place of ours"),
    Row(_OFFLOAD, _off("ratio", "cpuadam_cores_perc", "nvme_path", "buffer_count", "pipeline_read", "pipeline_write",
                       "fast_init"),
        NO_EFFECT, "it belongs to NVMe or to DeepSpeed's own use of CPU Adam",
        label="the other `zero_optimization.offload_optimizer.*`"),
    Row(_ZERO, _off("cpu_offload"), HONOURED, "old name of `offload_optimizer.device: cpu`", also_off=(False,)),
    Row(_ZERO, _off("cpu_offload_use_pin_memory"), NO_EFFECT, "DeepSpeed ignores it, too", also_off=(False,)),
    Row(_ZERO, _off("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        REFUSED, _ZEROPP, label="`zero_optimization.zero_quantized_*`"),
    Row(_ZERO, _off("zero_hpz_partition_size"), REFUSED, _ZEROPP, also_off=(0,)),
    Row(_ZERO, {"mics_shard_size": -1, "mics_hierarchical_params_gather": False, "zeropp_loco_param": None}, REFUSED,
        _REMOVED),
    Row(_ZERO, _off("zenflow"), REFUSED, "ZenFlow is another optimizer in the place of ours",
        label="`zero_optimization.zenflow.*`"),
    Row(_ZERO, _off("legacy_stage1"), REFUSED, "DeepSpeed has dropped that implementation"),
    Row(_ZERO, _off("save_muon_momentum_buffer_in_memory"), NO_EFFECT, "Muon is not among the update rules"),
    # checkpoints
    Row("checkpoint", _names("tag_validation", "use_node_local_storage", "checkpoint_serialization"), HONOURED),
    Row("checkpoint.parallel_write", {"pipeline_stage": False}, NO_EFFECT, "it belongs to pipeline parallelism"),
    Row("checkpoint", {"load_universal": False}, REFUSED, "without it engine.load_checkpoint reads a "
        "universal checkpoint, and any stage's, by its tag"),
    Row("checkpoint", {"writer": None}, REFUSED, "such a writer may read host buffers after the next step has changed "
        "them", label="`checkpoint.writer.*`"),
    Row("", {"datastates_ckpt": False}, REFUSED, "it reads host buffers after the next step has changed them",
        label="`datastates_ckpt.*`"),
    Row(_ZERO, _off("pipeline_loading_checkpoint"), REFUSED, "DeepSpeed's optimizers pass the turn to load from "
        "rank to rank, and HiFT does not"),
    Row(_ZERO, _off("elastic_checkpoint"), REFUSED, "it is a layout of DeepSpeed's own optimizer"),
    Row(_ZERO, _off("load_from_fp32_weights"), REFUSED, "a load restores masters as they were saved, or with "
        "`load_optimizer_states=False` takes them from the weights"),
    # activation checkpointing
    Row("activation_checkpointing", _names("partition_activations", "cpu_checkpointing", "number_checkpoints",
                                           "synchronize_checkpoint_boundary", "profile"), HONOURED,
        "for models that call `deepspeed.checkpointing.non_reentrant_checkpoint` (its `checkpoint` is reentrant); "
        "those of Hugging Face do not",
        label="`activation_checkpointing.*`"),
    Row("activation_checkpointing", {"contiguous_memory_optimization": False}, REFUSED, "its buffers are freed by the "
        "backward of a checkpointed layer, and with HiFT a backward may reach none"),
    # other parallelism and engines
    Row("tensor_parallel", _off("autotp_size"), REFUSED, "tensor parallelism is not implemented", also_off=(1,)),
    Row("tensor_parallel.tp", _off("tp_size"), REFUSED, "tensor parallelism is not implemented"),
    Row("tensor_parallel", {"dtype": None, "tp_overlap_comm": False, "vocab_parallel_lm_head": None,
                            "vocab_parallel_ce_backend": "torch", "injection_policy_tuple": None,
                            "partition_config": None, "preset_model": None, "keep_module_on_host": False,
                            "replace_with_kernel_inject": False, "kernel_inject": False, "tp.tp_grain_size": 1,
                            "tp.mpu": None, "tp.tp_group": None},
        NO_EFFECT, "tensor parallelism is refused", label="the other `tensor_parallel.*`"),
    Row("", {"sequence_parallel_size": 1}, REFUSED, "the data-parallel group of HiFT is not split by sequence"),
    Row("", _names("data_parallel_size"), HONOURED, "DeepSpeed reads it beside `sequence_parallel_size` only"),
    Row("", {"seq_parallel_communication_data_type": "fp32"}, NO_EFFECT, "sequence parallelism is refused"),
    Row("", {"expert_parallel": OFF}, REFUSED, "expert parallelism is not implemented", label="`expert_parallel.*`"),
    Row("", {"use_data_before_expert_parallelism": False}, NO_EFFECT, "expert parallelism is refused"),
    Row("pipeline", {"stages": "auto"}, REFUSED, "pipeline parallelism is not implemented", also_off=(1,)),
    Row("pipeline", {"partition": "best", "seed_layers": False, "activation_checkpoint_interval": 0,
                     "pipe_partitioned": True, "grad_partitioned": True, "use_reentrant": None},
        NO_EFFECT, "pipeline parallelism is refused", label="the other `pipeline.*`"),
    Row("", {"hybrid_engine": OFF}, REFUSED, "it is another engine in the place of ours", label="`hybrid_engine.*`"),
    Row("compile", _off("deepcompile", "autoep_non_moe"), REFUSED, "its graph is built for one set of "
        "trainable parameters"),
    Row("compile", _off("free_activation", "free_activation_threshold", "offload_activation",
                        "offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory",
                        "debug_log", "offload_parameters", "sync_before_reduce", "sync_after_reduce",
                        "sync_before_allgather", "sync_after_allgather", "keep_int_input_tensors",
                        "keep_all_input_tensors", "passes"),
        NO_EFFECT, "it belongs to DeepCompile", label="the other `compile.*`"),
    Row("", {"autotuning": OFF}, REFUSED, "its search knows DeepSpeed's own optimizers only", label="`autotuning.*`"),
    Row("weight_quantization", {"quantized_initialization": {}}, REFUSED, "quantized weights cannot be trained"),
    Row("weight_quantization", {"enabled": True, "num_bits": 8, "q_type": "symmetric", "q_groups": 1,
                                "post_init_quant": {}},
        NO_EFFECT, "it belongs to DeepSpeed's inference", label="the other `weight_quantization.*`"),
    Row("aio", {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False,
                "overlap_events": True, "use_gds": False},
        NO_EFFECT, "it belongs to NVMe offload", label="`aio.*`"),
    Row("", dict.fromkeys(("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity",
                           "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
                           "sparse_attention", "sparse_gradients"), OFF), REFUSED, _REMOVED),
    # data
    Row("data_efficiency", _names("enabled", "seed", *(f"data_sampling.{name}" for name in (
        "enabled", "num_epochs", "num_workers", "pin_memory", "curriculum_learning"))), HONOURED,
        label="`data_efficiency.*`"),
    Row(_SAMPLING, {"dynamic_batching": OFF}, REFUSED, "it scales the rate at each step and HiFT holds it for a cycle",
        label="`data_efficiency.data_sampling.dynamic_batching.*`"),
    Row(_ROUTING, {"enabled": False}, NO_EFFECT, "random LTD is refused"),
    Row(_ROUTING, {"random_ltd": OFF}, REFUSED, "layers that drop tokens are not tested with the rotation",
        label="`data_efficiency.data_routing.random_ltd.*`"),
    # reports
    Row("", _names("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level",
                   "disable_python_gc", "vocabulary_size", "timers.throughput.enabled"),
        HONOURED),
    Row("timers.throughput", _names("synchronized"), HONOURED, "if absent false, not DeepSpeed's true: a wait for "
        "the device at every micro step would keep state from streaming meanwhile"),
    Row("", _names(*(f"{monitor}.{name}" for monitor, names in (
        ("tensorboard", ("enabled", "output_path", "job_name")),
        ("csv_monitor", ("enabled", "output_path", "job_name")),
        ("wandb", ("enabled", "group", "team", "project")),
        ("comet", ("enabled", "samples_log_interval", "project", "workspace", "api_key", "experiment_name",
                  "experiment_key", "online", "mode")),
        ("comms_logger", ("enabled", "prof_all", "prof_ops", "verbose", "debug")),
    ) for name in names)), HONOURED, label="`tensorboard.*`, `csv_monitor.*`, `wandb.*`, `comet.*`, `comms_logger.*`"),
    Row("flops_profiler", _names("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules",
                                 "detailed", "output_file"), HONOURED,
        "it counts a backward as two forwards; that of HiFT is shorter", label="`flops_profiler.*`"),
)
# fmt: on

_ROWS_OF: dict[str, list[tuple[Row, Any]]] = {}  # with the default
for _row in ROWS:
    for _name, _default in _row.keys.items():
        _ROWS_OF.setdefault(_join(_row.section, _name), []).append((_row, _default))
# Other names that DeepSpeed accepts for a section.
for _alias, _section in (("bfloat16", "bf16"), ("tensor_parallel.tensor_parallel", "tensor_parallel.tp")):
    for _key in [key for key in _ROWS_OF if key.startswith(f"{_section}.")]:
        _ROWS_OF[_alias + _key.removeprefix(_section)] = _ROWS_OF[_key]
# Sections whose keys belong to a class of the user's choice: any key is known there.
_OPEN_SECTIONS = frozenset({"optimizer.params", "scheduler.params"})
_SECTIONS = _OPEN_SECTIONS | {
    ".".join(parts[:depth]) for parts in (key.split(".") for key in _ROWS_OF) for depth in range(1, len(parts))
}
