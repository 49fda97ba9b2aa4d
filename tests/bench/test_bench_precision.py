"""The precision benchmark: its truth, its claims on a small grid, and the committed page."""

from __future__ import annotations

import pytest
import torch

from bench.pages import block_of
from bench.precision import measure, page


def test_the_truth_is_the_textbook():
    recorded = measure.record(1e-3, 500, torch.float32, "cpu", 3)
    truth = measure.exact(recorded)
    step = recorded.step
    old, new = (
        step.sample_coef * recorded.state + step.velocity_coef * v.double() for v in (recorded.old, recorded.new)
    )
    following = old + step.std * recorded.drawn().double()
    density = torch.distributions.Normal
    log_ratio = (density(new, step.std).log_prob(following) - density(old, step.std).log_prob(following)).mean(1)
    kl = torch.distributions.kl_divergence(density(old, step.std), density(new, step.std)).mean(1)
    torch.testing.assert_close(truth.log_ratio, log_ratio, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(truth.kl, kl, rtol=1e-9, atol=0)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return list(measure.sweep([1e-6, 1e-3], [65536], ["bfloat16"], ["cpu"], "cpu", seeds=1))


def pick(records, method: str, kl: float) -> dict:
    (found,) = [r for r in records if r["method"] == method and r["nominal_kl"] == kl]
    return found


def test_velocities_lose_nothing_and_sixteen_bit_means_do(records):
    for kl in (1e-6, 1e-3):
        for method in ("cpu: velocities", "cpu: velocities, seeded noise", "cpu: float32 means"):
            assert pick(records, method, kl)["kl_error"] < 1e-5
    assert pick(records, "cpu: bfloat16 means", 1e-6)["kl_quotient"] > 1.5
    assert pick(records, "peers: bfloat16 means", 1e-6)["kl_quotient"] > 1.5


def test_the_log_ratio_is_exact_where_a_difference_of_log_probs_is_rounding(records):
    ours, theirs = (
        pick(records, f"{who}", 1e-6)["log_ratio_error"] for who in ("cpu: velocities", "peers: float32 means")
    )
    assert ours < 1e-11
    assert theirs > 1e-9


def test_the_committed_page_is_what_its_results_say():
    source = block_of(page.PAGE.read_text(), "precision:source", page.PAGE.name)[1].split("`")[1]
    assert page.write((page.ROOT / source).parent, check=True) == 0
    assert (page.FIGURES / "precision.png").exists()
