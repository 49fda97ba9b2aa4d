"""The kernels under the sanitizers, and every meeting point of theirs taken away once: each of that must be noticed."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from host_build import (
    HOST,
    KERNELS,
    kernel_sources,
    linked,
    objects_of,
    run_program,
)
from host_layer import FAULTS, Site, parse_sites

# seeds 0 to 8 are all pairs of policy and order, see Scheduler in fibers.cpp
SEEDS = range(9)
CAUGHT = {1: "wrong result or misuse", 66: "sanitizer"}
# OS threads take milliseconds to meet: one scenario of each kernel, the shortest with all its meeting points
ON_THREADS = ("objective_coupled", "gradient", "step_seeded", "single_pass_cluster_of_3")
CALL = re.compile(rf"\b({'|'.join(FAULTS)})\s*(?:<[^>]*>)?\(")


@functools.cache
def driver(sanitizer: str, scheduler: str = "fibers") -> Path:
    sources = [HOST / "kernels_api.cpp", HOST / "kernels_driver.cpp"]
    return linked(objects_of([*kernel_sources(), *sources], sanitizer), "exe", sanitizer, scheduler)


def sites_in_text() -> list[str]:
    """All meeting points that the kernels' sources name, as the layer names them."""
    found = []
    for path in sorted([*KERNELS.glob("*.cuh"), *KERNELS.glob("*.cu")]):
        if path.name == "platform.cuh":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            found += [f"{match[1]} {path.name}:{number}" for match in CALL.finditer(code)]
    return found


ALL_FAULTS = [f"{site} {fault}" for site in sites_in_text() for fault in FAULTS[site.split()[0]]]


def scenarios_of(output: str) -> dict[str, list[Site]]:
    parts = output.split("scenario ")[1:]
    return {part.splitlines()[0]: parse_sites(part.split("\n", 1)[1]) for part in parts}


@functools.cache
def visited() -> dict[str, set[str]]:
    """The sites that each scenario visits."""
    result = run_program(driver("thread"), ["0", "all"], "thread")
    assert result.returncode == 0, result.stdout + result.stderr
    return {name: {site.name for site in sites if site.visits} for name, sites in scenarios_of(result.stdout).items()}


def test_text_and_runs_name_the_same_meeting_points():
    assert set.union(*visited().values()) == set(sites_in_text())


@pytest.mark.parametrize("seed", [0, 4, 8])
def test_threads_do_not_race(seed):
    result = run_program(driver("thread"), [str(seed), "all"], "thread")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("scenario", ON_THREADS)
def test_threads_of_the_system_do_not_race(scenario):
    result = run_program(driver("thread", "threads"), ["1", scenario], "thread")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("seed", [0, 5])
def test_memory_is_used_as_it_may_be(seed):
    result = run_program(driver("address"), [str(seed), "all"], "address")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("seed", SEEDS)
def test_results_in_every_order(seed):
    result = run_program(driver("none"), [str(seed), "all"])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("fault", ALL_FAULTS)
def test_a_fault_is_noticed(fault):
    site = fault.rsplit(" ", 1)[0]
    where = [name for name, sites in visited().items() if site in sites]
    assert where, f"no scenario gets to {site}"
    # a race is one in any order; what is only a wrong number may need its own
    for seed in (0, 4, 8):
        for scenario in where:
            code = run_program(driver("thread"), [str(seed), scenario, fault], "thread").returncode
            assert code in (0, *CAUGHT), f"ended with {code}"
            if code != 0:
                return
    pytest.fail(f"{fault} changes nothing in {where}: what is it for?")
