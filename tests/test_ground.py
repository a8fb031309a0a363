"""The modules that all others may use: versions and tensor files."""

import pytest
import torch
from safetensors.torch import save_file

import postgen
from postgen.errors import UserError
from postgen.tensor_files import opened, read_tensors
from postgen.versions import version_of, versions


def test_versions_are_told_and_missing_ones_too():
    found = versions("torch", "no-such-package-of-anyone")
    assert [*found] == ["postgen", "python", "torch", "no-such-package-of-anyone"]
    assert (found["postgen"], found["torch"]) == (postgen.__version__, version_of("torch"))
    assert (found["no-such-package-of-anyone"], version_of("no-such-package-of-anyone")) == ("missing", None)


def test_tensors_come_back_as_they_are(tmp_path):
    tensors = {"a": torch.randn(2, 3).bfloat16(), "b": torch.arange(3)}
    save_file(tensors, tmp_path / "x.safetensors", {"note": "kept"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert [*found] == ["a", "b"]
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    with opened(tmp_path / "x.safetensors", framework="numpy") as content:
        assert (sorted(content.keys()), content.metadata()) == (["a", "b"], {"note": "kept"})


def test_a_file_that_is_missing_or_damaged_is_told_in_one_line(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"no header")
    for name, reason in (("damaged", "header"), ("missing", "No such file")):
        with pytest.raises(UserError, match=rf"^weights of mine: .*{reason}") as told:
            read_tensors(tmp_path / f"{name}.safetensors", "weights of mine")
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"missing\.safetensors cannot be read: "):
        read_tensors(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"cannot be read: .*b"), opened(tmp_path / "x.safetensors") as content:
        content.get_tensor("b")
