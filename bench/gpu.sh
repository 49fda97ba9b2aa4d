#!/usr/bin/env bash
# everything a GPU is needed for, in one result folder: bench/results/<gpu>/<date>-<git sha>/
set -u

usage() {
    cat <<'TEXT'
usage: bench/gpu.sh [--quick] [--dry-run] [--seconds N] [--output DIR] [--archive FILE.tar.gz]

  --quick     ends in 3 minutes (otherwise 7), one of them for first light
  --dry-run   everything that needs no device, the kernels on an emulator; results go to runs/gpu-dry-run
  --seconds   another time for everything; steps are stopped so that it holds
  --output    another folder for the results
  --archive   also pack the folder into one file

Needs torch >= 2.10 and Triton >= 3.6, no network and no installation. PYTHON names the interpreter (default:
.venv/bin/python, else python3); FLOWDPPO_GIT_SHA names the commit where the tree travels without its history.
The CUDA library is compiled for this GPU alone, unless flowdppo_fast/ has one made from these sources already; without
setuptools >= 77 and nvcc its tests are skipped, which the summary says. A backend that fails at first light (a loss,
a step, a graph) is left out of all that follows; if none is left, the run ends there.
TEXT
}

quick=0 dry=0 total="" out="" archive=""
while [ $# -gt 0 ]; do
    case "$1" in
        --quick) quick=1 ;;
        --dry-run) dry=1 ;;
        --output | --archive | --seconds)
            if [ $# -lt 2 ]; then echo "gpu.sh: $1: expected a value after it" >&2; exit 2; fi
            case "$1" in --output) out=$2 ;; --archive) archive=$2 ;; *) total=$2 ;; esac
            shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "gpu.sh: got $1, expected one of the options below" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

SECONDS=0
caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }
[ -n "$out" ] && out=$(absolute "$out")
[ -n "$archive" ] && archive=$(absolute "$archive")

# the package as it will be installed, by links: kernels/triton is flowdppo_fast.kernels
site=$root/build/gpu-site
rm -rf "$site"
mkdir -p "$site/flowdppo_fast"
link_package() {
    for entry in "$root"/flowdppo_fast/*; do
        [ "$(basename "$entry")" = __pycache__ ] || ln -sfn "$entry" "$site/flowdppo_fast/"
    done
    ln -sfn "$root/kernels/triton" "$site/flowdppo_fast/kernels"
}
link_package
# python puts the working directory first, so it has to be the one with the whole package
cd "$site" || exit 2
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

device=cuda
if [ $dry = 1 ]; then
    device=rehearsal total=${total:-600} out=${out:-$root/runs/gpu-dry-run}
elif [ $quick = 1 ]; then
    total=${total:-175}
else
    total=${total:-415}
fi
if [ -z "$out" ]; then
    folder=$("$python" -m bench.ops folder --device $device) || exit 2
    out=$root/$folder
fi
mkdir -p "$out/logs" "$site/status"
rm -f "$out"/logs/*.log "$out"/{results.json,table.md,codegen.md,environment.json,gpu-tests.json}
rows=() failed=0
declare -A pids

# begin NAME LIMIT COMMAND...: runs in the background, output into a log, never past LIMIT or what is left in all
begin() {
    local name=$1 limit=$2 left=$((total - SECONDS))
    shift 2
    [ "$limit" -gt "$left" ] && limit=$left
    [ "$limit" -lt 1 ] && limit=1
    (
        start=$SECONDS rc=0
        timeout -k 5 "$limit" "$@" >"$out/logs/$name.log" 2>&1 || rc=$?
        echo "$rc $((SECONDS - start)) $limit" >"$site/status/$name"
    ) &
    pids[$name]=$!
}

record() {
    rows+=("| $1 | $2 | $3 | $4 |")
    printf '%-12s %-9s %4s s  %s\n' "$1" "$2" "$3" "$4"
}

# finish NAME NOTE [PATTERN]: waits and records; a failure whose log matches PATTERN means that it cannot run here.
# A log says in a line that begins with "FAILED: " what has gone wrong.
finish() {
    local name=$1 note=$2 pattern=${3:-} rc=99 seconds=0 limit=0 said
    wait "${pids[$name]}"
    [ -f "$site/status/$name" ] && read -r rc seconds limit <"$site/status/$name"
    verdict=failed
    if [ "$rc" = 0 ]; then
        verdict=ok
        record "$name" ok "$seconds" "$note"
    elif [ -n "$pattern" ] && grep -qE "$pattern" "$out/logs/$name.log"; then
        record "$name" skipped "$seconds" "$(grep -m1 -oE "$pattern" "$out/logs/$name.log")"
    elif [ "$rc" = 124 ] || [ "$rc" = 137 ]; then
        failed=1
        record "$name" "TIMED OUT" "$seconds" "$note; stopped after $limit s"
    else
        failed=1
        said=$(grep -m1 '^FAILED: ' "$out/logs/$name.log" | tr '|' '/')
        record "$name" FAILED "$seconds" "$note; ${said:-exit status $rc}"
        tail -n 15 "$out/logs/$name.log"
    fi
}

skip() { record "$1" skipped 0 "$2"; }

step() {
    local name=$1 note=$2
    shift 2
    begin "$name" "$@"
    finish "$name" "$note"
}

# the end of every run
summarize() {
    local prefix log
    # logs are kept in the repository: no paths and no names of this machine
    prefix=$("$python" -c 'import sys; print(sys.prefix)')
    for log in "$out"/logs/*.log "$out"/codegen.md; do
        [ -f "$log" ] && sed -i -e "s#$site#.#g" -e "s#$root#.#g" -e "s#$prefix#<python>#g" \
            -e "s#/tmp/[^ '\":,)]*#<tmp>#g" -e "s#${HOME:-/nonexistent}/#~/#g" -e "s#$(uname -n)#<host>#g" "$log"
    done
    {
        echo "# $([ $dry = 1 ] && echo "Dry run without a GPU" || echo "GPU run")$([ $quick = 1 ] && echo ", quick")"
        echo
        echo "\`bench/gpu.sh\`, commit $(git -C "$root" rev-parse --short=10 --verify --quiet HEAD || echo "${FLOWDPPO_GIT_SHA:-nogit}"), $SECONDS s"
        echo
        echo "| step | verdict | seconds | note |"
        echo "|---|---|---|---|"
        printf '%s\n' "${rows[@]}"
    } >"$out/summary.md"
    [ -n "$archive" ] && tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")"
    echo "$([ $failed = 0 ] && echo "all checks that ran are green" || echo "A CHECK FAILED"); $SECONDS s; results in $out"
}

installed() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# nproc takes the number of OpenMP threads for one of cores
cores=$(env -u OMP_NUM_THREADS nproc)
lit=()
# light NAME: whether the backend runs here at all
light() {
    step "first-light-$1" "a loss, a step, a graph of $1 against float64" $([ $dry = 1 ] && echo 300 || echo 60) \
        "$python" -m bench.first_light "$1" --device $([ $dry = 1 ] && echo emulated || echo cuda)
    [ $verdict = ok ] && lit+=("$1")
}
dark() { case " ${lit[*]:-} " in *" $1 "*) return 1 ;; *) return 0 ;; esac }

# nvcc takes the time in which Triton's first light is seen; the package finds the library at its next import
compiles=1 building=0
nvcc=$(command -v nvcc || { [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"; })
if [ $dry = 1 ]; then
    skip build "an installation builds the CUDA library without a GPU"
    [ -n "$nvcc" ] || compiles=0
elif "$python" "$root/tests/codegen/cuda_code.py" --is-current >"$out/logs/build.log" 2>&1; then
    record build ok 0 "the CUDA library is there, made from these sources"
elif [ -z "$nvcc" ]; then
    skip build "nvcc is not installed here, so there is no CUDA backend"
    compiles=0
else
    building=1
    architecture=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
    begin build 120 env -C "$root" FLOWDPPO_BUILD_CPU=0 FLOWDPPO_BUILD_CUDA=1 \
        FLOWDPPO_CUDA_ARCHS="$architecture" "$python" setup.py build_ext --inplace
fi
light triton
if [ $building = 1 ]; then
    finish build "the CUDA library for sm_$architecture"
    [ $verdict = ok ] || compiles=0
    link_package
fi
if [ $compiles = 1 ]; then light cuda; fi

step environment "driver, torch, Triton, clocks" 30 "$python" -m bench.ops environment "$out" --device $device
if [ ${#lit[@]} = 0 ]; then
    summarize
    exit 1
fi

# compiles for the GPU by name and needs none, so it may run beside the tests
codegen=$root/tests/codegen/aot.py
arch=90 ptxas=90a
if [ $dry = 0 ]; then
    arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    ptxas=$arch$([ "$arch" -ge 90 ] && echo a)
fi
if [ $dry = 0 ] && [ -f "$codegen" ]; then
    begin codegen 150 "$python" "$codegen" --arch "$arch"
    [ $compiles = 1 ] && begin cuda-codegen 60 "$python" "$root/tests/codegen/cuda_code.py"
fi

# memory and race checkers see launches that the emulator has recorded, in a process that is little more than these
cannot="Device not supported|LibraryNotLoaded|Unable to find injection library|No attachable process found"
sanitizers=()
if [ $quick = 1 ]; then
    why="not part of --quick"
elif [ $dry = 0 ] && ! command -v compute-sanitizer >/dev/null; then
    why="compute-sanitizer is not installed here"
else
    if [ $dry = 1 ]; then
        include=$("$python" -c 'import pathlib, triton; print(pathlib.Path(triton.__file__).parent / "backends/nvidia/include")')
        step driver "a driver library that drops launches" 30 \
            "${CC:-cc}" -shared -fPIC "-I$include" "$root/tests/ptx/libcuda.c" -o "$site/libcuda.so.1"
    fi
    for backend in "${lit[@]}"; do
        # a dry run has seen the CUDA kernels on the emulator by now
        [ $dry = 1 ] && [ "$backend" = cuda ] && continue
        # beside the tests: it needs no GPU
        begin "record-$backend" 120 "$python" -m bench.record "$backend" "$site/launches-$backend" --arch "$ptxas"
        sanitizers+=("$backend")
    done
fi

# one run per backend, so that neither takes the other's time or evidence with it; what a report has is on disk as each
# test ends. Most of a GPU test's time is the compilation of its kernels, on the host.
marks="gpu"
[ $quick = 1 ] && marks="gpu and not slow"
workers=()
[ $dry = 0 ] && installed xdist && workers=(-n "$cores")
pytest=("$python" -m pytest -m "$marks" -q -p no:cacheprovider --color=no "${workers[@]}")
kernels=("$root"/tests/{api,compile,math,ops,triton})
others=("$root/tests")
for folder in api math ops triton; do others+=("--ignore=$root/tests/$folder"); done
trainer=1
if [ $dry = 1 ] || ! installed diffusers; then
    trainer=0
    for needs in docs endurance examples integrations packaging pipelines runs security trainer; do
        [ -d "$root/tests/$needs" ] && others+=("--ignore=$root/tests/$needs")
    done
fi
gpu_tests() {
    local of=$1 limit=$2
    shift 2
    step "gpu-tests-$of" "pytest -m '$marks'" "$limit" \
        env FLOWDPPO_GPU_TESTS_OF="$of" FLOWDPPO_GPU_TESTS_REPORT="$out/gpu-tests.json" \
        FLOWDPPO_REQUIRE_CUDA=$compiles "${pytest[@]}" "$@"
}
if [ $dry = 1 ]; then
    step gpu-tests "collected, not run" 150 "${pytest[@]}" "${others[@]}" "${kernels[@]}" --collect-only
    skip trainer-tests "not part of a dry run"
else
    for backend in triton cuda; do
        if dark $backend; then
            skip "gpu-tests-$backend" "$backend is not there, or failed at first light"
        else
            # how each backend fared is what `python -m bench.ops evidence` reads
            gpu_tests $backend $([ $quick = 1 ] && echo 40 || echo 100) "${kernels[@]}"
        fi
    done
    if [ $quick = 1 ]; then
        skip gpu-tests-others "not part of --quick"
    else
        gpu_tests others 40 "${others[@]}"
        [ $trainer = 0 ] && skip trainer-tests "diffusers is not installed here"
    fi
fi

for backend in "${sanitizers[@]}"; do
    finish "record-$backend" "launches of every form of this library on small latents"
    replay=("$python" -S "$root/bench/replay.py" "$site/launches-$backend")
    if [ $verdict != ok ]; then
        skip "memcheck-$backend" "nothing was recorded"
    elif [ $dry = 1 ]; then
        step "replay-$backend" "what checkers of memory watch, into a driver that drops it" 60 \
            env FLOWDPPO_LIBCUDA="$site/libcuda.so.1" "${replay[@]}"
    else
        for tool in memcheck racecheck; do
            begin "$tool-$backend" 40 compute-sanitizer --tool $tool --error-exitcode 9 "${replay[@]}"
            finish "$tool-$backend" "recorded launches of every form" "$cannot"
        done
    fi
done
if [ $dry = 1 ]; then why="needs a GPU"; fi
if [ $dry = 1 ] || [ ${#sanitizers[@]} = 0 ]; then
    skip memcheck "$why"
    skip racecheck "$why"
fi

if [ $dry = 1 ]; then
    skip codegen "the test suite does this without a GPU (tests/codegen)"
elif [ -f "$codegen" ]; then
    finish codegen "registers, loads, spills of the Triton kernels for sm_$arch"
    cp "$out/logs/codegen.log" "$out/codegen.md"
    if [ $compiles = 1 ]; then
        finish cuda-codegen "the same of the CUDA kernels"
        { echo && cat "$out/logs/cuda-codegen.log"; } >>"$out/codegen.md"
    fi
else
    skip codegen "tests/codegen/aot.py is not there"
fi

bench=("$python" -m bench.ops run --device $device --output "$out")
if [ $dry = 1 ]; then
    step bench "the GPU path on CPU tensors; no figure means anything" 150 \
        "${bench[@]}" --quick --workloads overhead --dtypes bfloat16 --contenders "peer-eager" "peer-eager, no syncs" reference cpu
elif [ $quick = 1 ]; then
    left=$((total - SECONDS - 10))
    step bench "core workloads, 10 samples" $left "${bench[@]}" --quick --dtypes bfloat16 --budget $((left > 40 ? left - 30 : 10))
else
    # what is left; with --seconds the rest is for the training iteration
    left=$((total - SECONDS - 20))
    [ $left -gt 150 ] && left=150
    step bench "all workloads that fit the time" $left "${bench[@]}" --budget $((left > 50 ? left - 40 : 10))
fi
# a training iteration, where time is left
absent=()
for package in diffusers transformers accelerate peft; do installed $package || absent+=("$package"); done
training=("$python" -m bench.train run --output "$out/train")
left=$((total - SECONDS - 30))
if [ ${#absent[@]} -gt 0 ]; then
    skip end-to-end "not installed here: ${absent[*]}"
elif [ $dry = 1 ]; then
    step end-to-end "a model of no size on a CPU; no figure means anything" 150 "${training[@]}" --device cpu --quick
elif [ $quick = 1 ]; then
    skip end-to-end "not part of --quick"
elif [ $left -lt 100 ]; then
    skip end-to-end "no time is left for it; --seconds gives more"
else
    step end-to-end "SD3.5-medium's dimensions" $left "${training[@]}" --device cuda --workloads sd35-medium --budget $((left - 40))
fi

if installed matplotlib; then
    step plots "time, bandwidth, memory, error" 25 "$python" -m bench.ops plot "$out"
else
    skip plots "matplotlib is not installed here"
fi
summarize
exit $failed
