"""The private names of torch that the package uses exist; ``make gpu-matrix`` looks for them in each torch it takes."""

from __future__ import annotations

import importlib
from pathlib import Path

import gpu_matrix
import pytest
import torch

INSTALLED = Path(torch.__file__).parents[1]


def found(name: str) -> object:
    """What a name stands for, modules on its way imported."""
    value: object = torch
    place = "torch"
    for part in name.split(".")[1:]:
        place += f".{part}"
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(place)
    return value


def test_the_list_is_what_the_package_uses():
    names = gpu_matrix.private_names()
    assert "torch._C._len_torch_dispatch_stack" in names
    assert "torch._C._autograd._get_current_graph_task_keep_graph" in names
    assert "torch.utils._python_dispatch.TorchDispatchMode" in names
    assert not [name for name in names if "__" in name]


@pytest.mark.parametrize("name", gpu_matrix.private_names())
def test_it_is_in_the_installed_torch(name):
    assert found(name) is not None


def test_a_name_that_a_torch_has_not_is_found_missing(tmp_path):
    assert gpu_matrix.missing_names(INSTALLED) == []
    library, module = tmp_path / "torch/lib/libtorch_python.so", tmp_path / "torch/utils/_pytree.py"
    for path in (library, module):
        path.parent.mkdir(parents=True)
    code = (INSTALLED / "torch/lib/libtorch_python.so").read_bytes()
    library.write_bytes(code.replace(b"\0_len_torch_dispatch_stack\0", b"\0_len_torch_dispatch_trees\0"))
    module.write_text("")
    missing = gpu_matrix.missing_names(tmp_path)
    assert "torch._C._len_torch_dispatch_stack" in missing
    assert [name for name in missing if name.startswith("torch.utils._pytree")]
    assert "torch._C._autograd._profiler_enabled" not in missing
