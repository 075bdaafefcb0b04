"""safetensors files: as the library writes and reads them, by ranges, without copies."""

import hashlib

import pytest
import torch
from hift_testing.device_meter import StorageMeter
from safetensors import safe_open
from safetensors.torch import save_file

from hift_ds.checkpoint import tensor_files
from hift_ds.checkpoint.tensor_files import TensorFile, facts_of, num_bytes, write_tensors

TENSORS = {
    "byte": torch.arange(7, dtype=torch.uint8),  # after it nothing is aligned
    "bf16": torch.randn(5, 3).bfloat16(), "fp32": torch.randn(4, 2, 2), "half": torch.randn(3).half(),
    "rest": torch.arange(-4, 4, dtype=torch.int16), "long": torch.tensor(2**40), "flag": torch.tensor([True, False]),
    "none": torch.empty(0, 3), "wide": torch.randn(2, dtype=torch.float64),
}  # fmt: skip


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    facts = write_tensors(tmp_path / "ours", TENSORS, {"rank": "1"})
    with safe_open(tmp_path / "ours", "pt") as file:
        assert set(file.keys()) == set(TENSORS) and file.metadata() == {"rank": "1"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    content = (tmp_path / "ours").read_bytes()
    assert (facts.num_bytes, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert facts_of(tmp_path / "ours") == facts
    assert num_bytes(TENSORS) < facts.num_bytes
    save_file(TENSORS, tmp_path / "theirs", {"rank": "1"})
    for path in ("ours", "theirs"):
        read = TensorFile(tmp_path / path)
        assert read.metadata == {"rank": "1"} and "fp32" in read and "other" not in read
        for name, tensor in TENSORS.items():
            found = read.read(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor.reshape(-1)), name
            middle = (tensor.numel() // 3, tensor.numel() // 2)
            assert torch.equal(read.read(name, *middle), tensor.reshape(-1)[slice(*middle)]), name
        with pytest.raises(IndexError, match="'flag' has 2 elements, and 1 to 3"):
            read.read("flag", 1, 3)


def test_a_tensor_is_written_where_it_lies_and_its_storage_can_still_be_resized(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 1 << 12)
    tensor = torch.randn(1 << 16)
    meter = StorageMeter([tensor])
    with meter:
        write_tensors(tmp_path / "file", {"a": tensor[16:-16], "b": tensor.view(256, 256)[3]}, {})
    assert meter.peak == 0
    assert torch.equal(TensorFile(tmp_path / "file").read("a"), tensor[16:-16])
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("content", [b"", b"\0", b"\x08" + b"\0" * 7, b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_what_is_no_such_file_is_said_by_name(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="other' is not a safetensors file"):
        TensorFile(tmp_path / "other")


def test_a_file_that_is_cut_off_is_said_by_name(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, {})
    content = (tmp_path / "file").read_bytes()
    for cut in (content[:-1], content + b"\0"):
        (tmp_path / "file").write_bytes(cut)
        with pytest.raises(ValueError, match="file' is cut off"):
            TensorFile(tmp_path / "file")
