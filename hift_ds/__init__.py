"""Hierarchical full-parameter fine-tuning (HiFT) on DeepSpeed ZeRO 0-3."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hift_ds.chunked_loss import use_chunked_loss
    from hift_ds.compiled_layers import compile_layers
    from hift_ds.config.keys import HiFTConfig
    from hift_ds.distributed import init_distributed
    from hift_ds.enabling import disable, enable
    from hift_ds.engine import HiFTEngine
    from hift_ds.integrations.trainer import HiFTCallback
    from hift_ds.start import initialize
    from hift_ds.zero.activations import keep_activations

__version__ = "0.1.0"
__all__ = [
    "HiFTCallback", "HiFTConfig", "HiFTEngine", "compile_layers", "disable", "enable", "init_distributed",
    "initialize", "keep_activations", "use_chunked_loss",
]  # fmt: skip

_HOMES = {
    "HiFTCallback": "hift_ds.integrations.trainer",
    "HiFTConfig": "hift_ds.config.keys",
    "HiFTEngine": "hift_ds.engine",
    "compile_layers": "hift_ds.compiled_layers",
    "disable": "hift_ds.enabling",
    "enable": "hift_ds.enabling",
    "initialize": "hift_ds.start",
    "init_distributed": "hift_ds.distributed",
    "keep_activations": "hift_ds.zero.activations",
    "use_chunked_loss": "hift_ds.chunked_loss",
}


def __getattr__(name: str) -> Any:
    # DeepSpeed and torch load when they are first used: `import hift_ds` stays quick.
    if name not in _HOMES:
        raise AttributeError(f"module 'hift_ds' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
