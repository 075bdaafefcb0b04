"""The verdict of every DeepSpeed key, against the DeepSpeed that is installed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys

import deepspeed
import pytest
from deepspeed import comm as dist
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as ds_runtime_config
from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from hift_ds.config import ds_keys
from hift_ds.config.ds_keys import HONOURED, NO_EFFECT, OFF, REFUSED, ROWS, check_ds_config, markdown_table

# The table is of the newest DeepSpeed's keys.
AutoEPConfig = pytest.importorskip(
    "deepspeed.module_inject.auto_ep_config", reason="the verdicts are on the keys of DeepSpeed 0.19.8"
).AutoEPConfig

MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "compile": CompileConfig,
    "comms_logger": CommsLoggerConfig,
    "hybrid_engine": HybridEngineConfig,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "tensor_parallel": TPTrainingConfig,
    "tensor_parallel.tp": TPConfig,
    "weight_quantization": WeightQuantConfig,
}
# Makes `DeepSpeedConfig` look at every key it knows; the fields of MODELS are read from their classes.
EVERY_SECTION = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {}},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "torch_autocast": {"enabled": False, "dtype": "bf16", "lower_precision_safe_modules": []},
    "activation_checkpointing": {},
    "flops_profiler": {},
    "autotuning": {"model_info": {}},
    "aio": {},
    "data_types": {},
    "checkpoint": {"parallel_write": {}, "writer": {}},
    "timers": {"throughput": {}},
    "expert_parallel": {"enabled": False},
    "pipeline": {},
    "hybrid_engine": {},
    "compile": {},
    "tensor_parallel": {},
    "weight_quantization": {},
    "data_efficiency": {
        "data_sampling": {"curriculum_learning": {}, "dynamic_batching": {}},
        "data_routing": {"random_ltd": {"enabled": False}},
    },
}


class Recorder(dict):
    """A config that remembers the dotted path of every key that is looked up in it, present or not."""

    def __init__(self, content: dict, seen: set[str], path: str = "") -> None:
        super().__init__(
            {
                name: Recorder(value, seen, f"{path}{name}.") if isinstance(value, dict) else value
                for name, value in content.items()
            }
        )
        self._seen, self._path = seen, path

    def __copy__(self):
        return Recorder(dict(self), self._seen, self._path)

    def _record(self, name: object) -> None:
        self._seen.add(f"{self._path}{name}")

    def __getitem__(self, name):
        self._record(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self._record(name)
        return super().__contains__(name)

    def get(self, name, default=None):
        self._record(name)
        return super().get(name, default)

    def keys(self):
        return _RecordedKeys(self)


class _RecordedKeys:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __contains__(self, name):
        return name in self.recorder

    def __iter__(self):
        return iter(self.recorder)


@pytest.fixture(scope="module")
def keys_read() -> set[str]:
    """Dotted keys that the installed DeepSpeed looks up in a config dict."""
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        # With a process group DeepSpeedConfig also looks for the sequence parallel size.
        patch.setattr(dist, "get_rank", lambda *_: 0)
        patch.setattr(dist, "get_world_size", lambda *_: 1)
        DeepSpeedConfig(Recorder(EVERY_SECTION, seen))
    seen.update(re.findall(r'"(\w+)" in config\b', inspect.getsource(deepspeed.initialize)))
    return seen


def model_keys(section: str) -> set[str]:
    return {
        f"{section}.{name}"
        for field, info in MODELS[section].model_fields.items()
        for name in (field, info.alias)
        if name is not None
    }


def nested(key: str, value: object) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def without_verdict(keys: set[str]) -> list[str]:
    """Keys that are neither in the table, nor a section of it, nor within a section that one row covers."""
    whole = {
        f"{row.section}.{name}".lstrip(".") + "."
        for row in ROWS
        for name in row.keys
        if "*" in row.label or row.keys[name] is OFF
    }
    known = set(ds_keys._ROWS_OF) | ds_keys._SECTIONS
    return sorted(k for k in keys if k not in known and not any(k.startswith(prefix) for prefix in whole))


def claim(missing: list[str]) -> str:
    return f"DeepSpeed {deepspeed.__version__} knows keys that hift_ds/ds_keys.py has no verdict for: {missing}"


def test_every_key_that_deepspeed_reads_has_a_verdict(keys_read):
    removed = set(ds_runtime_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{name}" for name in ds_runtime_config._REMOVED_ZERO_CONFIG_KEYS}
    assert len(keys_read) > 100, "the recorder no longer sees what DeepSpeed reads"
    missing = without_verdict(keys_read | removed)
    assert not missing, claim(missing)


@pytest.mark.parametrize("section", MODELS)
def test_every_field_of_a_config_model_has_a_verdict(section):
    missing = without_verdict(model_keys(section))
    assert not missing, claim(missing)


def test_expert_parallel_and_zenflow_are_covered_as_whole_sections():
    keys = {f"expert_parallel.{field.name}" for field in dataclasses.fields(AutoEPConfig)}
    assert not without_verdict(keys | {"zero_optimization.zenflow.topk_ratio"})


def test_a_new_key_would_be_reported_by_its_name():
    assert without_verdict(
        {"zero_optimization.stage4_magic", "optimizer.new_switch", "fp16.enabled", "new_section"}
    ) == [
        "new_section",
        "optimizer.new_switch",
        "zero_optimization.stage4_magic",
    ]


def test_no_verdict_is_for_a_key_that_deepspeed_does_not_know(keys_read):
    known = set(keys_read) | set(ds_runtime_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    known |= {f"zero_optimization.{name}" for name in ds_runtime_config._REMOVED_ZERO_CONFIG_KEYS}
    for section in MODELS:
        known |= model_keys(section)
    # Read later, by the engine, the pipeline engine or the old form of "zero_optimization".
    known |= {"hift", "pipeline.use_reentrant", "allgather_size", "optimizer.params.max_grad_norm"}
    known |= {f"optimizer.params.{name}" for name in ("torch_adam", "adam_w_mode", "fp32_optimizer_states")}
    known |= {f"tensor_parallel.tensor_parallel.{name}" for name in TPConfig.model_fields}
    known |= {f"pipeline.{name}" for name in DeepSpeedConfig({"train_batch_size": 1}).pipeline}
    assert sorted(set(ds_keys._ROWS_OF) - known) == []


@pytest.mark.parametrize("section", MODELS)
def test_a_key_at_the_default_of_deepspeed_is_neither_refused_nor_noted(section):
    model = MODELS[section]()
    values = {name: getattr(model, name) for name in MODELS[section].model_fields if hasattr(model, name)}
    values = {name: value for name, value in values.items() if not hasattr(value, "model_fields")}
    values.pop("dtype", None)
    assert check_ds_config(nested(section, values)) == []


@pytest.mark.parametrize(
    "key",
    ["hybrid_engine", "torch_autocast", "expert_parallel", "autotuning", "elasticity", "amp", "nebula", "eigenvalue"],
)
def test_a_section_that_is_switched_off_passes(key):
    assert check_ds_config({key: {"enabled": False, "other": {"x": 1}}}) == []
    assert check_ds_config({key: {}}) == []


def test_values_that_mean_off_pass():
    off = {
        "zero_optimization": {"zero_hpz_partition_size": 0, "offload_param": {"device": "none"}, "cpu_offload": False},
        "tensor_parallel": {"autotp_size": 1},
        "sequence_parallel_size": 1,
        "pipeline": {"stages": 1},
        "sparse_gradients": False,
        "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}},
        "checkpoint": {"writer": None},
        "bf16": None,
    }
    assert check_ds_config(off) == []


REFUSALS = {
    "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_gradients": True,
    "zero_optimization.zero_quantized_nontrainable_weights": True,
    "zero_optimization.zero_hpz_partition_size": 8,
    "zero_optimization.mics_shard_size": 4,
    "zero_optimization.zenflow": {},
    "zero_optimization.offload_optimizer.device": "nvme",
    "zero_optimization.offload_optimizer.super_offload": True,
    "zero_optimization.offload_param.device": "nvme",
    "zero_optimization.elastic_checkpoint": True,
    "zero_optimization.pipeline_loading_checkpoint": True,
    "zero_optimization.load_from_fp32_weights": False,
    "zero_optimization.legacy_stage1": True,
    "fp16.fp16_master_weights_and_grads": True,
    "bf16.bf16_master_weights_and_grads": True,
    "bf16.bf16_optimizer_states": True,
    "bfloat16.bf16_optimizer_states": True,
    "optimizer.params.max_grad_norm": 1.0,
    "optimizer.params.fp32_optimizer_states": False,
    "torch_autocast": {"enabled": True},
    "tensor_parallel.autotp_size": 2,
    "tensor_parallel.tensor_parallel.tp_size": 2,
    "sequence_parallel_size": 2,
    "expert_parallel": {"enabled": True},
    "pipeline.stages": 2,
    "hybrid_engine": {"enabled": True},
    "compile.deepcompile": True,
    "autotuning": {"enabled": True},
    "weight_quantization.quantized_initialization": {"num_bits": 4},
    "checkpoint.load_universal": True,
    "checkpoint.writer": {},
    "datastates_ckpt": {},
    "activation_checkpointing.contiguous_memory_optimization": True,
    "data_efficiency.data_sampling.dynamic_batching": {"enabled": True},
    "data_efficiency.data_routing.random_ltd": {"enabled": True},
    "amp": {"enabled": True},
    "elasticity": {"enabled": True},
    "sparse_gradients": True,
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
}


@pytest.mark.parametrize("key", REFUSALS)
def test_what_is_not_supported_is_refused_by_key_value_reason_and_remedy(key):
    value = REFUSALS[key]
    with pytest.raises(ValueError) as error:
        check_ds_config({"zero_optimization": {"stage": 2}} | nested(key, value))
    message = str(error.value)
    assert message.startswith(f"{key}={str(value)[:10]}" if isinstance(value, dict) else f"{key}={value!r}: ")
    assert ", because " in message and "; " in message
    assert "\n" not in message


def test_several_refusals_name_every_key():
    config = {
        "bf16": {"bf16_optimizer_states": True},
        "zero_optimization": {"zenflow": {}},
        "sequence_parallel_size": 4,
    }
    with pytest.raises(ValueError) as error:
        check_ds_config(config)
    message = str(error.value)
    assert message.startswith("bf16.bf16_optimizer_states=True: ")
    assert message.endswith("(refused as well: zero_optimization.zenflow, sequence_parallel_size)")


@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": "auto"},
        {"zero_optimization": {"reduce_bucket_size": "auto"}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        {"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.9]}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
        {"zero_optimization": {"sub_group_size": "auto"}},
        {"zero_optimization": {"zero_quantized_weights": "auto"}},
    ],
    ids=str,
)
def test_a_left_over_auto_is_refused(config):
    with pytest.raises(ValueError, match=r"^[a-z_.]+='auto': only the Hugging Face Trainer fills in"):
        check_ds_config(config)


def test_auto_passes_where_it_is_a_value_of_deepspeed():
    assert check_ds_config({"data_types": {"keep_in_fp32_modules": "auto"}, "pipeline": {"stages": "auto"}}) == []


def test_keys_without_effect_are_noted_one_line_each():
    notes = check_ds_config(
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "round_robin_gradients": True,
                "contiguous_gradients": True,
            },
            "zero_force_ds_cpu_optimizer": False,
        }
    )
    assert [note.split(" ")[0] for note in notes] == [
        "zero_optimization.round_robin_gradients=True",
        "zero_force_ds_cpu_optimizer=False",
    ]
    assert all("has no effect with HiFT: " in note and "\n" not in note for note in notes)


@pytest.mark.parametrize(
    ("config", "suggestion"),
    [
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimization"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_comm"),
        ({"overlap_comm": True}, "zero_optimization.overlap_comm"),
        (
            {"activation_checkpointing": {"partitioned_activations": True}},
            "activation_checkpointing.partition_activations",
        ),
    ],
    ids=str,
)
def test_an_unknown_key_is_noted_with_the_key_that_was_meant(config, suggestion):
    (note,) = check_ds_config(config)
    assert note.startswith("unknown DeepSpeed key ")
    assert note.endswith(f"(did you mean {suggestion!r}?)")


def test_keys_of_our_own_section_and_of_optimizer_and_scheduler_are_left_alone():
    config = {
        "hift": {"enabled": True, "order": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "my_own": 1}},
        "scheduler": {"type": "WarmupLR", "params": {"anything": 1}},
    }
    assert check_ds_config(config) == []


@pytest.mark.parametrize("config", [{"fp16": True}, {"zero_optimization": {"offload_param": "cpu"}}], ids=str)
def test_a_section_that_is_no_object_is_refused(config):
    with pytest.raises(TypeError, match="must be an object"):
        check_ds_config(config)


def test_the_old_boolean_zero_optimization_passes():
    assert check_ds_config({"zero_optimization": True, "allgather_size": 1000}) == []


def test_the_config_is_not_changed():
    config = {"zero_optimization": {"stage": 3, "round_robin_gradients": True}, "typo": 1}
    before = json.dumps(config)
    check_ds_config(config)
    assert json.dumps(config) == before


def test_every_rule_says_why():
    for row in ROWS:
        assert row.verdict in (HONOURED, NO_EFFECT, REFUSED)
        assert row.verdict == HONOURED or row.note, row.keys


def test_the_markdown_table_is_well_formed_and_names_each_rule_once():
    lines = markdown_table().splitlines()
    assert len(lines) == len(ROWS) + 2
    assert all(line.count("|") == 4 for line in lines)
    labels = [line.split("|")[1] for line in lines]
    assert len(set(labels)) == len(labels)


def test_importing_the_table_loads_neither_deepspeed_nor_torch():
    program = "import sys, hift_ds.config.ds_keys; sys.exit('deepspeed' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("clip", ["x", -1.0, True, None, float("nan")])
def test_a_bound_of_the_norm_that_is_none_is_refused(clip):
    with pytest.raises(ValueError, match=r"^gradient_clipping=.*: must be a number, 0 \(off\) or more"):
        check_ds_config({"gradient_clipping": clip})
