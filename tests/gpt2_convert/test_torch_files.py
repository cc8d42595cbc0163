import collections
import pickle
import zipfile

import numpy as np
import pytest
import torch

from gpt2_convert.torch_files import open_torch_file
from gpt2_core.errors import UserError
from gpt2_core.weights import LazyTensor


def read(value):
    if isinstance(value, LazyTensor):
        return value.read()
    return {k: read(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 2020"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_tensors_come_back_whatever_their_strides(tmp_path, new, dtype):
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    tensors = collections.OrderedDict(
        whole=base, transposed=base.T, part=base[2:5, 1:7:2], none=base[:0], one=base[3, 3], copy=base
    )
    tensors = {name: t.to(dtype) if dtype != torch.float32 else t for name, t in tensors.items()}
    torch.save({"model": tensors, "step": 3}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    for _ in range(2):  # a second reading of the same file too
        found = open_torch_file(tmp_path / "x.pt")
        assert found["step"] == 3
        for name, tensor in tensors.items():
            stored = found["model"][name]
            array = stored.read()
            assert (stored.shape, stored.dtype) == (array.shape, array.dtype)
            assert array.astype(np.float64).tolist() == tensor.double().tolist()
            assert stored.read().tobytes() == array.tobytes()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 2020"])
def test_tensors_that_share_their_memory_are_one(tmp_path, new):
    tensor = torch.randn(3, 4)
    torch.save({"a": tensor, "b": tensor, "c": tensor.T}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found = open_torch_file(tmp_path / "x.pt")
    assert found["a"] is found["b"] and found["a"] is not found["c"]


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 2020"])
def test_nothing_else_is_unpickled(tmp_path, new, capsys):
    torch.save({"model": Evil()}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"x.pt: holds an object of (builtins.)?print, and only tensors"):
        open_torch_file(tmp_path / "x.pt")
    assert capsys.readouterr().out == ""


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused_before_memory_is_taken(tmp_path):
    """A pickle may say anything of a tensor's size; here it says 2^40 numbers of a storage of 4."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    huge = pickle.dumps(1 << 40, protocol=2)[2:-1]
    assert entries[name].count(b"K\x04") == 2  # the storage's length and the tensor's shape
    for changed in (entries[name].replace(b"K\x04", huge), entries[name].replace(b"K\x04\x85", huge + b"\x85")):
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, changed if entry == name else content)
        with pytest.raises(UserError, match="x.pt: "):
            open_torch_file(path)


def test_compressed_entries_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(UserError, match="its entry archive/data.pkl is compressed or too large"):
        open_torch_file(path)


def test_containers_without_end_are_refused(tmp_path):
    endless: list = []
    endless.append(endless)
    torch.save(endless, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its containers are nested too deeply"):
        open_torch_file(tmp_path / "x.pt")
