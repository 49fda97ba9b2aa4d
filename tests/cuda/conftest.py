"""The kernels on the host layer, and the public API on top of them."""

from __future__ import annotations

import pytest
from host_kernels import HostBackend, kernels

import flowdppo_fast.autograd


@pytest.fixture
def host() -> HostBackend:
    """The operators, in launches of small blocks, threads and blocks in order."""
    backend = HostBackend()
    kernels().seed(0)
    yield backend
    kernels().seed(0)


@pytest.fixture
def api(host, monkeypatch) -> HostBackend:
    """``host``, serving the public API's "reference" for all but float64."""
    monkeypatch.setattr(flowdppo_fast.autograd, "operator", host.operator(flowdppo_fast.autograd.operator))
    return host
