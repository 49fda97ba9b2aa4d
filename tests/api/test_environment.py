"""The test environment itself: poison that works, backends that are what they claim."""

from __future__ import annotations

import pytest
import torch
from support.backends import BACKENDS, CPU, require
from support.layouts import LAYOUTS

from flowdppo_fast import BACKENDS as NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fresh_memory_is_nan(dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    fresh = {
        "empty": torch.empty(1024, dtype=dtype),
        "new_empty": x.new_empty((7, 5)),
        "empty_like": torch.empty_like(x),
        "empty_strided": torch.empty_strided((4, 3), (1, 4), dtype=dtype),
        # what the stable ABI's allocations dispatch to
        "aten::new_empty": torch.ops.aten.new_empty.default(x, [9]),
        "aten::empty": torch.ops.aten.empty.memory_format([9], dtype=dtype),
        "resized": torch.empty(0, dtype=dtype).resize_(33),
    }
    assert {name for name, value in fresh.items() if not value.isnan().all()} == set()


def test_every_backend_is_under_test():
    assert {param.values[0].name for param in BACKENDS} == set(NAMES)


def test_a_missing_build_fails_where_it_is_required(monkeypatch):
    monkeypatch.setattr("flowdppo_fast.backend._CPU_PROBLEM", "not built")
    monkeypatch.setenv("FLOWDPPO_REQUIRE_CPU", "1")
    with pytest.raises(pytest.fail.Exception, match="not built"):
        require(CPU)
    monkeypatch.delenv("FLOWDPPO_REQUIRE_CPU")
    with pytest.raises(pytest.skip.Exception, match="not built"):
        require(CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_change_memory(layout):
    x = torch.randn(2, 3, 4, 5)
    for row_dims in (1, 2):
        laid_out = LAYOUTS[layout](x, row_dims)
        assert torch.equal(laid_out, x)
        same_memory = laid_out.is_contiguous() and laid_out.storage_offset() == 0
        assert same_memory == (layout == "contiguous" or (layout == "steps_first" and row_dims == 1))
