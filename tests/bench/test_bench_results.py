"""From JSON alone: tables, README block, goals, comparison, figures."""

from __future__ import annotations

import copy

import pytest
from support.figures import watched

from bench.ops import compare, goals, plots, results, table
from bench.ops.__main__ import main

COPY_BYTES, COPY_NS = 2_000_000_000, 100_000_000  # 20 GB/s


def entry(
    name, total, forward=None, *, extra=1000, nbytes=3_000_000, backend=None, status="ok", device=None, launches=(1, 2)
):
    """One contender whose samples lie within 2 % of ``total`` and ``forward`` nanoseconds."""

    def spread(value):
        return [round(value * (1 + 0.02 * (i % 5 - 2) / 2)) for i in range(30)]

    samples = {"wall_total": spread(total), "host_total": spread(total)}
    if forward:
        samples |= {"wall_forward": spread(forward), "host_forward": spread(forward)}
    if device:
        samples |= {"device_forward": spread(device[0]), "device_total": spread(device[1])}
    full = {
        "name": name, "status": status, "reason": None if status == "ok" else "because", "starts_from": "velocity",
        "objective": "dppo", "backend": backend, "single_pass": False, "bytes_forward": nbytes,
        "bytes_total": 2 * nbytes,
    }  # fmt: skip
    if status == "ok":
        full |= {
            "errors": {"loss": 1e-8, "kl": 1e-7, "log_ratio": 2e-7, "gradient": 1e-7},
            "launches_forward": launches[0], "launches_total": launches[1], "syncs": 0,
            "extra_bytes_forward": extra, "extra_bytes_total": extra, "samples": samples,
        }  # fmt: skip
    return full


def case(workload, entries, *, elements=262_144, threads=2, dtype="bfloat16"):
    return {
        "workload": workload, "name": workload.split("/")[0], "rows": [16], "latent": [elements // 64, 64],
        "elements_per_row": elements, "dtype": dtype, "threads": threads, "input_sets": 6, "cold": True,
        "contenders": entries, "seconds": 1.0,
    }  # fmt: skip


def result(cases, device="cpu", quick=False):
    environment = {
        "date": "2026-11-20T10:00:00Z", "git_sha": "0123456789", "git_dirty": False, "torch": "2.13.0",
        "triton": "3.7.1", "python": "3.11.7", "cpu": "Some CPU", "cpus": 2, "cpu_capability": "AVX512", "openmp": {},
    }  # fmt: skip
    if device == "cuda":
        environment["gpu"] = {"name": "Some GPU", "driver_version": "580"}
    threads = {one["threads"] for one in cases}
    return {
        "schema": results.SCHEMA, "kind": "bench.ops", "device": device, "command": "python -m bench.ops run",
        "quick": quick, "complete": True, "environment": environment,
        "copy": [{"threads": t, "bytes": COPY_BYTES, "samples": [COPY_NS] * 30} for t in threads],
        "cases": cases, "left_out": [], "goals": [],
    }  # fmt: skip


@pytest.fixture
def cpu_result():
    entries = [
        entry("peer-eager", 9e6, 5e6, extra=50_000_000),
        entry("peer-eager, no syncs", 8e6, 4e6, extra=50_000_000),
        entry("peer-compiled", 2e6, 1e6, extra=10_000_000),
        entry("cpu/velocity", 1e6, 0.4e6, backend="cpu"),
        entry("cpu/seeded", 1.5e6, 0.9e6, backend="cpu"),
        entry("triton/velocity", 1, 1, backend="triton", status="missing"),
        entry("cpu/means", 1, 1, backend="cpu", status="refused"),
    ]
    return result([case("flux-1024/16", entries), case("sd3-512/8", copy.deepcopy(entries), elements=65_536)])


def test_json_round_trip(tmp_path, cpu_result):
    results.write(cpu_result, tmp_path)
    assert results.load(tmp_path) == cpu_result


@pytest.mark.parametrize(("field", "value"), [("schema", 99), ("kind", "other")])
def test_results_of_another_kind_are_refused(tmp_path, cpu_result, field, value):
    results.write({**cpu_result, field: value}, tmp_path)
    with pytest.raises(ValueError, match=r"expected kind 'bench\.ops'"):
        results.load(tmp_path)


def test_statistics():
    stat = results.Stat.of([10, 20, 30, 40, 50])
    assert (stat.median, stat.low, stat.high, stat.count) == (30, 20, 40, 5)
    assert results.Stat.of([COPY_NS] * 3).rate(COPY_BYTES) == pytest.approx(20e9)


def test_full_table(cpu_result):
    text = table.full(cpu_result)
    row = next(line for line in text.splitlines() if line.startswith("| cpu/velocity"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("0.4000 [")
    assert cells[2].startswith("1.00 [")
    # against eager 8 ms, compiled 2 ms; 3 MB in 0.4 ms and 6 MB in 1 ms of 20 GB/s
    assert cells[3:7] == ["8.00", "2.00", "38", "30"]
    assert "- triton/*: missing: because" in text
    assert "- cpu/means: refused: because" in text
    assert "## Wrong or failed" in text
    assert "20.0 GB/s" in text


def test_readme_block_round_trip(tmp_path, cpu_result, quiet, capsys):
    folder, page = tmp_path / "result", tmp_path / "README.md"
    results.write(cpu_result, folder)
    page.write_text("# Title\n\n<!-- bench:ops:cpu -->\n<!-- /bench:ops:cpu -->\n\nafter\n")
    command = ["readme", str(folder), "--page", str(page)]
    assert main([*command, "--check"]) == 1
    assert main(command) == 0
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nafter\n")
    assert "flux-1024 [16, 4096, 64]" in text
    assert "| 8.00 " in text
    assert str(tmp_path) not in text
    assert main([*command, "--check"]) == 0
    page.write_text(text.replace("| 8.00 ", "| 9.00 "))
    capsys.readouterr()
    assert main([*command, "--check"]) == 1
    assert "what stands there is not what is generated" in capsys.readouterr().err
    assert main(command) == 0
    assert page.read_text() == text


def test_readme_has_a_group_of_columns_per_machine(cpu_result):
    other = copy.deepcopy(cpu_result)
    other["environment"]["cpu"] = "Other CPU"
    other["cases"][0]["contenders"][3] = entry("cpu/velocity", 4e6, 0.4e6, backend="cpu")
    rows = [line for line in table.short([(cpu_result, "a"), (other, "b")]).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][2::3] == ["Some CPU: this library ms", "Other CPU: this library ms"]
    # only core workloads: sd3-512/8 is not one
    assert cells[2:] == [["flux-1024 [16, 4096, 64]", "bfloat16", "1.00", "8.00", "2.00", "4.00", "2.00", "0.50"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("no markers\n", "expected one line <!-- bench:ops:cpu -->"),
        ("<!-- /bench:ops:cpu -->\n<!-- bench:ops:cpu -->\n", "expected one line"),
    ],
)
def test_a_page_without_markers_is_a_clear_error(tmp_path, cpu_result, quiet, capsys, text, message):
    folder, page = tmp_path / "result", tmp_path / "README.md"
    results.write(cpu_result, folder)
    if text is not None:
        page.write_text(text)
    assert main(["readme", str(folder), "--page", str(page)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"quick": True}, {"device": "rehearsal"}])
def test_quick_runs_and_rehearsals_do_not_reach_the_readme(tmp_path, cpu_result, quiet, capsys, change):
    results.write({**cpu_result, **change}, tmp_path)
    page = tmp_path / "README.md"
    page.write_text("<!-- bench:ops:cpu -->\n<!-- /bench:ops:cpu -->\n")
    assert main(["readme", str(tmp_path), "--page", str(page)]) == 2
    assert "nothing to put into a README" in capsys.readouterr().err


def verdicts(*found):
    return {goal.key: goal for goal in goals.evaluate(found)}


def test_goals_on_a_cpu(cpu_result):
    found = verdicts(cpu_result)
    assert found["cpu-compiled-long-rows"].status == goals.MET
    assert "worst 2.00x (flux-1024/16 bfloat16 forward+backward, 2 threads)" in found["cpu-compiled-long-rows"].measured
    assert found["cpu-compiled-anywhere"].status == goals.MET
    assert found["cpu-eager"].status == goals.MET
    assert found["cpu-memory"].status == goals.MET
    assert all(goal.status == goals.NOT_MEASURED for key, goal in found.items() if key.startswith("gpu-"))


def test_goals_are_judged_by_the_worst_case(cpu_result):
    slow = copy.deepcopy(cpu_result)
    slow["cases"][1]["contenders"][3] = entry("cpu/velocity", 2.1e6, 0.4e6, backend="cpu", extra=2_000_000)
    found = verdicts(slow)
    assert found["cpu-compiled-anywhere"].status == goals.MISSED
    assert "worst 0.95x (sd3-512/8" in found["cpu-compiled-anywhere"].measured
    assert found["cpu-compiled-long-rows"].status == goals.MET
    assert found["cpu-eager"].status == goals.MISSED
    assert found["cpu-memory"].status == goals.MISSED
    assert "quick run" in verdicts({**slow, "quick": True})["cpu-eager"].measured


def test_a_refused_contender_meets_no_goal(cpu_result):
    for one in cpu_result["cases"]:
        one["contenders"][3] = entry("cpu/velocity", 1, 1, backend="cpu", status="refused")
    assert verdicts(cpu_result)["cpu-eager"].status == goals.NOT_MEASURED


def gpu_result(ours, compiled, *, sd3=(30e3, 60e3), launches=(2, 3), seeded=0.9):
    # 300 MB of inputs; forward and total device nanoseconds
    nbytes = 300_000_000
    large = [
        entry("peer-eager", 9e7, 5e7),
        entry("peer-eager, no syncs", 9.6e7, 4.8e7, device=(4e7, 8e7)),
        entry("peer-compiled", 3 * compiled, compiled, device=(3 * compiled, 4 * compiled)),
        entry("peer-compiled, max-autotune", compiled, compiled, device=(compiled, 2 * compiled)),
        entry("triton/velocity", 2 * ours, ours, backend="triton", device=(ours, 2 * ours), nbytes=nbytes),
        entry("triton/seeded", ours, ours, backend="triton", device=(seeded * ours, 1.8 * ours), nbytes=nbytes),
    ]
    small = [
        entry("peer-compiled", 300e3, 150e3, device=(1e4, 2e4)),
        entry("triton/velocity", sd3[1], sd3[0], backend="triton", device=(5e3, 9e3), launches=launches),
    ]
    return result([case("wan-480p/8", large, threads=None), case("sd3-512/16", small, threads=None)], device="cuda")


def test_goals_on_a_gpu():
    # 300 MB at 20 GB/s take 15 ms
    found = verdicts(gpu_result(ours=16e6, compiled=32e6))
    for key in ("bandwidth-forward", "bandwidth-total", "seeded", "compiled-large", "compiled-sd3-512", "host-triton"):
        assert found[f"gpu-{key}"].status == goals.MET, found[f"gpu-{key}"]
    assert found["gpu-bandwidth-forward"].measured.startswith("94 %")
    assert found["gpu-compiled-large"].measured.startswith("worst 2.00x")
    assert found["gpu-launches-forward"].status == goals.MET
    assert found["gpu-launches-backward"].status == goals.MET
    assert found["gpu-host-cuda"].status == goals.NOT_MEASURED
    assert found["gpu-eager"].status == goals.MISSED
    missed = verdicts(gpu_result(ours=20e6, compiled=25e6, sd3=(60e3, 120e3), launches=(3, 5), seeded=1.1))
    for key in ("bandwidth-forward", "seeded", "compiled-large", "compiled-sd3-512", "host-triton", "launches-forward"):
        assert missed[f"gpu-{key}"].status == goals.MISSED, missed[f"gpu-{key}"]
    assert missed["gpu-launches-backward"].status == goals.MISSED


def test_goals_page_round_trip(tmp_path, cpu_result, quiet, capsys):
    folder, page = tmp_path / "result", tmp_path / "performance.md"
    results.write(cpu_result, folder)
    page.write_text("before\n<!-- bench:goals -->\n<!-- /bench:goals -->\nafter\n")
    assert main(["goals", "--page", str(page)]) == 0
    assert page.read_text().count("not yet measured") == len(goals.GOALS)
    assert main(["goals", str(folder), "--page", str(page), "--check"]) == 1
    assert main(["goals", str(folder), "--page", str(page)]) == 0
    assert main(["goals", str(folder), "--page", str(page), "--check"]) == 0
    assert " met " in page.read_text()


def test_tables_of_a_gpu_keep_clocks_apart():
    """A call that syncs has no device time: its ratio is of wall times on both sides."""
    text = table.full(gpu_result(ours=16e6, compiled=32e6))
    eager = next(line for line in text.splitlines() if line.startswith("| peer-eager  "))
    cells = [cell.strip() for cell in eager.strip("|").split("|")]
    assert cells[3] == f"{9.6e7 / 9e7:.2f}"
    assert cells[5:7] == ["-", "-"]
    ours = next(line for line in text.splitlines() if line.startswith("| triton/velocity"))
    assert ours.split("|")[4].strip() == f"{8e7 / 32e6:.2f}"


def test_comparison_knows_noise(tmp_path, cpu_result, quiet, capsys):
    other = copy.deepcopy(cpu_result)
    other["cases"][0]["contenders"][3] = entry("cpu/velocity", 0.5e6, 0.404e6, backend="cpu")
    other["cases"][0]["contenders"][4] = entry("cpu/seeded", 3e6, 0.9e6, backend="cpu")
    other["environment"]["torch"] = "2.14.0"
    found = {(c.where, c.contender, c.part): c for c in compare.changes(cpu_result, other)}
    where = "flux-1024/16 bfloat16 2t"
    assert found[where, "cpu/velocity", "total"].verdict == compare.FASTER
    assert found[where, "cpu/velocity", "total"].ratio == pytest.approx(0.5, rel=0.01)
    assert found[where, "cpu/velocity", "forward"].verdict == compare.NOISE
    assert found[where, "cpu/seeded", "total"].verdict == compare.SLOWER
    assert all(change.verdict == compare.NOISE for change in compare.changes(cpu_result, cpu_result))
    for name, one in (("a", cpu_result), ("b", other)):
        results.write(one, tmp_path / name)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "1 faster, 1 slower" in text
    assert "note: torch differs" in text


def test_figures_from_json_alone(tmp_path, cpu_result, monkeypatch):
    overlapping = watched(monkeypatch)
    paths = plots.draw(cpu_result, tmp_path / "plots")
    assert {path.name for path in paths} == {"time.png", "bandwidth.png", "memory.png", "error.png"}
    assert overlapping == {path.name: [] for path in paths}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
