"""Builds the optional C++ and CUDA backends; all metadata is in pyproject.toml.

FLOWDPPO_BUILD_CPU and FLOWDPPO_BUILD_CUDA: 0 skips a backend, 1 makes a build that cannot be done an error. By default
(auto) a build environment without torch, a C++ compiler or, for CUDA, nvcc gives an install without it and says so, and
so does a build that fails: one backend never takes the other, or the install, down with it. No GPU is needed.
FLOWDPPO_CUDA_ARCHS (default: 80;90a;100, those that nvcc knows) names the GPUs, the newest also as PTX.
FLOWDPPO_SYSROOT (an older system's headers and libraries) makes a library that older systems load, and CXX may be a
compiler for another processor. A wheel for it is named through _PYTHON_HOST_PLATFORM.
Build with ``--no-build-isolation``: the extensions are compiled against the torch that is installed (any torch >= 2.10
can then load them).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# without build isolation nobody else checks what pyproject.toml requires
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"setuptools: got {setuptools.__version__}, expected >= 77; pip install -U setuptools")

from setuptools.command.bdist_wheel import bdist_wheel  # older ones do not have it

PACKAGE = "flowdppo_fast"
SOURCES = Path("csrc/cpu")
CUDA_SOURCES = Path("kernels/cuda")
CUDA_BINDINGS = Path("csrc/cuda")
# torch 2.10 is the oldest whose stable ABI has what the extension uses
TORCH_TARGET = "0x020a000000000000"
COMMON_FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # the epilogue decides at thresholds as torch does: no fused multiply-adds there
    "-ffp-contract=off",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    "-DTORCH_STABLE_ONLY",
]
# where operators are registered; a copy for a kernel hub has a namespace of its own (hub/layout.py)
NAMESPACE = os.environ.get("FLOWDPPO_NAMESPACE", "flowdppo")
if not NAMESPACE.isidentifier():
    raise SystemExit(f"FLOWDPPO_NAMESPACE: got {NAMESPACE!r}, expected a name of letters, digits and underscores")
COMMON_FLAGS.append(f"-DFLOWDPPO_NAMESPACE={NAMESPACE}")
KERNEL_FLAGS = [
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def target_machine() -> str:
    """The processor that the compiler makes code for, which may be another than this machine's."""
    try:
        said = subprocess.run([*compiler_command(), "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(said.partition("-")[0].strip(), said.partition("-")[0].strip())


MACHINE = target_machine()
IS_X86 = MACHINE == "x86_64"
IS_CROSS = {"amd64": "x86_64", "arm64": "aarch64"}.get(
    platform.machine().lower(), platform.machine().lower()
) != MACHINE
ISA_FLAGS = {"baseline": []}
if IS_X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]


CUDA_ARCHITECTURES = ("80", "90a", "100")
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    # the epilogue decides at thresholds as torch does; where one rounding is wanted the sources say fmaf
    "-fmad=false",
    # the only float32 root is that of a normal's radius
    "-prec-sqrt=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]


def why_no_extension() -> str | None:
    """What keeps any C++ from being built here, or None."""
    if sys.platform == "win32":
        return "it needs GCC or Clang"
    if shutil.which(compiler_command()[0]) is None:
        return f"there is no C++ compiler ({compiler_command()[0]}; CXX names another)"
    try:
        import torch
    except ImportError:
        return "torch cannot be imported in the build environment (install with --no-build-isolation)"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the path, or in the usual place."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


NVCC = find_nvcc()


def nvcc_says(*arguments: str) -> str:
    done = subprocess.run([str(NVCC), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def cuda_toolkit() -> tuple[list[str], list[str]]:
    """The toolkit's folders of headers and of libraries, by its own account: nvcc may be a script that leads there."""
    said = nvcc_says("--dryrun", "-x", "cu", os.devnull)
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    above = [top[1]] if top else []
    includes = re.findall(r'"?-I([^"\s]+)', said) + [f"{folder}/include" for folder in above]
    libraries = re.findall(r'"?-L([^"\s]+)', said) + [f"{folder}/lib64" for folder in above]
    existing = [[os.path.realpath(x) for x in folders if os.path.isdir(x)] for folders in (includes, libraries)]
    return list(dict.fromkeys(existing[0])), [x for x in dict.fromkeys(existing[1]) if not x.endswith("stubs")]


def cuda_architectures() -> list[str]:
    """The GPUs to compile for, oldest first."""
    named = os.environ.get("FLOWDPPO_CUDA_ARCHS")
    if named:
        return [name for name in named.replace(",", ";").split(";") if name]
    known = set(nvcc_says("--list-gpu-code").split())
    return [name for name in CUDA_ARCHITECTURES if f"sm_{name.rstrip('a')}" in known]


def why_no_cuda() -> str | None:
    """What keeps the CUDA backend from being built here, or None."""
    problem = why_no_extension()
    if problem is not None:
        return problem
    if NVCC is None:
        return "there is no CUDA compiler (nvcc; CUDA_HOME names a toolkit)"
    includes, libraries = cuda_toolkit()
    for name, folders in (("cuda_runtime.h", includes), ("libcudart_static.a", libraries)):
        if not any(Path(folder, name).exists() for folder in folders):
            return f"nvcc is there, but its toolkit has no {name}"
    if not cuda_architectures():
        return f"nvcc compiles for none of {', '.join(CUDA_ARCHITECTURES)} (FLOWDPPO_CUDA_ARCHS names others)"
    return None


def decide(variable: str, why_not) -> tuple[bool, str | None]:
    """Whether to build a backend, and why not."""
    wanted = os.environ.get(variable, "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"{variable}: got {wanted!r}, expected 0, 1 or auto")
    if wanted == "0":
        return False, f"switched off by {variable}=0"
    problem = why_not()
    if problem is not None and wanted == "1":
        raise SystemExit(f"{variable}=1, but {problem}")
    return problem is None, problem


BUILD_CPU, NO_CPU_REASON = decide("FLOWDPPO_BUILD_CPU", why_no_extension)
BUILD_CUDA, NO_CUDA_REASON = decide("FLOWDPPO_BUILD_CUDA", why_no_cuda)


def say_missing(library: str, reason: str | None) -> None:
    kind, name = ("warning", "C++") if library == "_C_cpu" else ("note", "CUDA")
    print(f"{kind}: flowdppo_fast is installed without its {name} backend: {reason}", file=sys.stderr)


class PureBuild(build_py):
    """Says which backends are missing and why, once."""

    def run(self) -> None:
        super().run()
        for library, built, reason in (("_C_cpu", BUILD_CPU, NO_CPU_REASON), ("_C_cuda", BUILD_CUDA, NO_CUDA_REASON)):
            if not built:
                say_missing(library, reason)


class PlatformWheel(bdist_wheel):
    """The extension uses no Python ABI: one wheel serves every Python from 3.10 on."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py310", "none", tag[2])


def portable() -> tuple[list[str], list[str]]:
    """Flags to compile and to link with that keep a library loadable on the systems of FLOWDPPO_SYSROOT and later."""
    folder = os.environ.get("FLOWDPPO_SYSROOT")
    if folder is None:
        return [], []
    if not Path(folder, "usr", "include", "features.h").exists():
        raise SystemExit(
            f"FLOWDPPO_SYSROOT: got {folder!r}, expected a folder with an older system's usr/include and lib"
        )
    places = [Path(folder, part, f"{MACHINE}-linux-gnu") for part in ("usr/lib", "lib")]
    for link in (place / "libm.so" for place in places):
        if link.is_symlink() and not link.exists():
            raise SystemExit(
                f"FLOWDPPO_SYSROOT: {link} leads out of it, to {os.readlink(link)}, expected a relative link; what is "
                "compiled in from libm.a instead would ask for glibc's private symbols"
            )
    compile_flags = [f"--sysroot={folder}", "-include", str(Path("csrc/portable.h").absolute())]
    # the compiler's own folders hold the newer system's libraries beside its own
    # streams that are compiled in are nobody else's
    hide = f"-Wl,--version-script={Path('csrc/exports.map').absolute()}"
    return compile_flags, [f"--sysroot={folder}", *(f"-L{place}" for place in places), hide]


def torch_libraries(folders: list[str], scratch: Path) -> list[str]:
    """Where ``libtorch_cpu.so`` is to link with: torch's own, or for another processor an empty one of that name."""
    if not IS_CROSS:
        return folders
    scratch.mkdir(parents=True, exist_ok=True)
    made = scratch / "libtorch_cpu.so"
    empty = [*compiler_command(), "-shared", "-nostdlib", "-x", "c", os.devnull, "-Wl,-soname,libtorch_cpu.so"]
    subprocess.run([*empty, "-o", str(made)], check=True)
    return [str(scratch)]


PORTABLE_COMPILE, PORTABLE_LINK = portable()


def cpu_extension() -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        f"{PACKAGE}._C_cpu",
        [str(SOURCES / name) for name in ("bindings.cpp", "isa.cpp", "rows.cpp")],
        depends=[str(path) for path in sorted([*SOURCES.parent.glob("*.h"), *SOURCES.glob("*")])],
        include_dirs=include_paths(),
        library_dirs=torch_libraries(library_paths(), Path("build", f"stub-{MACHINE}")),
        libraries=["torch_cpu"],
        # messages name files inside the project wherever it was built
        extra_compile_args=[
            *COMMON_FLAGS,
            *PORTABLE_COMPILE,
            f"-ffile-prefix-map={Path.cwd()}/=",
            *(["-DFLOWDPPO_X86"] if IS_X86 else []),
        ],
        # the stand-in for another processor defines nothing that is needed
        extra_link_args=[*PORTABLE_LINK, *(["-Wl,--no-as-needed", "-ltorch_cpu", "-lm"] if IS_CROSS else [])],
        language="c++",
    )


def cuda_extension() -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes, libraries = cuda_toolkit()
    headers = [*Path("csrc").glob("*.h"), *CUDA_SOURCES.glob("*.h"), *CUDA_SOURCES.glob("*.cuh")]
    return Extension(
        f"{PACKAGE}._C_cuda",
        [str(CUDA_BINDINGS / "bindings.cpp")],
        depends=[str(path) for path in sorted([*headers, *CUDA_SOURCES.glob("*.cu")])],
        include_dirs=[*include_paths(), *includes],
        library_dirs=[*library_paths(), *libraries],
        # the runtime goes into the library: torch's own may be of another version
        libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args=[
            *COMMON_FLAGS,
            *PORTABLE_COMPILE,
            f"-ffile-prefix-map={Path.cwd()}/=",
            f'-DFLOWDPPO_CUDA_ARCHS="{";".join(cuda_architectures())}"',
        ],
        # nobody outside needs the static runtime's symbols
        extra_link_args=[*PORTABLE_LINK, "-Wl,--exclude-libs,ALL"],
        language="c++",
    )


def compile_cuda(folder: Path, depends: list[str]) -> list[str]:
    """Objects of all CUDA sources, compiled side by side where the last build's are out of date."""
    architectures = cuda_architectures()
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    newest = architectures[-1]
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    flags = [*NVCC_FLAGS, f"-Xcompiler=-ffile-prefix-map={Path.cwd()}/=", *code]
    if "CXX" in os.environ:
        flags.append(f"-ccbin={compiler_command()[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    newest_header = max(Path(path).stat().st_mtime for path in depends if not path.endswith(".cu"))
    last_flags = folder / "flags.txt"
    same_flags = last_flags.exists() and last_flags.read_text() == shlex.join(flags)

    def compile_one(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        newest_input = max(newest_header, source.stat().st_mtime)
        if not (same_flags and made.exists() and made.stat().st_mtime > newest_input):
            command = [str(NVCC), *flags, "-c", str(source), "-o", str(made)]
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
        return str(made)

    # the largest take longest, and go first
    sources = sorted(CUDA_SOURCES.glob("*.cu"), key=lambda source: source.stat().st_size, reverse=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = sorted(pool.map(compile_one, sources))
    last_flags.write_text(shlex.join(flags))
    return made


def cuda_source_digest() -> str:
    """Tells the tests whether a library was built from the sources beside it."""
    digest = hashlib.sha256()
    for folder, pattern in (("csrc", "*.h"), ("csrc/cuda", "*"), ("kernels/cuda", "*")):
        for path in sorted(Path(folder).glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def extension_builder() -> type[build_ext]:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    reasons = {"_C_cpu": NO_CPU_REASON, "_C_cuda": NO_CUDA_REASON}
    missing = {library: reason for library, reason in reasons.items() if reason is not None}

    class BuildBackends(BuildExtension):
        """Compiles the CPU's streaming kernels once per instruction set and the CUDA kernels with nvcc; each backend
        is one library."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def build_extension(self, extension: Extension) -> None:
            try:
                if extension.name.endswith("_C_cuda"):
                    extension.extra_objects += compile_cuda(Path(self.build_temp, "cuda"), extension.depends)
                else:
                    self.compile_isas(extension)
                super().build_extension(extension)
            except Exception as error:
                # asked for by name
                if not extension.optional:
                    raise
                library = extension.name.rpartition(".")[2]
                # the compilers have said the rest
                failed = isinstance(error, subprocess.CalledProcessError)
                why = (
                    f"{Path(error.cmd[0]).name} ended with {error.returncode}" if failed else str(error).splitlines()[0]
                )
                missing[library] = f"its build failed: {why}"
                say_missing(library, missing[library])

        def compile_isas(self, extension: Extension) -> None:
            """Objects of the streaming kernels, compiled side by side."""

            def compile_one(isa: str) -> list[str]:
                return self.compiler.compile(
                    [str(SOURCES / "kernels.cpp")],
                    output_dir=os.path.join(self.build_temp, isa),
                    include_dirs=extension.include_dirs,
                    extra_postargs=[
                        *extension.extra_compile_args, *KERNEL_FLAGS, *ISA_FLAGS[isa], f"-DFLOWDPPO_ISA={isa}"
                    ],
                    depends=extension.depends,
                )  # fmt: skip

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                extension.extra_objects += [made for objects in pool.map(compile_one, ISA_FLAGS) for made in objects]

        def run(self) -> None:
            super().run()
            version = subprocess.run([*compiler_command(), "--version"], capture_output=True, text=True, check=True)
            info = {
                "torch": torch.__version__,
                "torch_target": TORCH_TARGET,
                "namespace": NAMESPACE,
                "compiler": version.stdout.splitlines()[0],
                "flags": [*COMMON_FLAGS, *KERNEL_FLAGS],
                "isas": {} if "_C_cpu" in missing else ISA_FLAGS,
                "missing": missing,
            }
            if "_C_cuda" not in missing:
                info["nvcc"] = nvcc_says("--version").splitlines()[-2]
                info["nvcc_flags"] = NVCC_FLAGS
                info["cuda_architectures"] = cuda_architectures()
                info["cuda_sources"] = cuda_source_digest()
            folder = Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)
            for library in missing:
                # of an earlier build, from other sources
                (folder / f"{library}.so").unlink(missing_ok=True)
            (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    return BuildBackends


commands: dict[str, type] = {"build_py": PureBuild, "bdist_wheel": PlatformWheel}
extensions = []
if BUILD_CPU:
    extensions.append(cpu_extension())
if BUILD_CUDA:
    extensions.append(cuda_extension())
for built in extensions:
    variable = "FLOWDPPO_BUILD_CUDA" if built.name.endswith("_C_cuda") else "FLOWDPPO_BUILD_CPU"
    built.optional = os.environ.get(variable, "auto") != "1"
if extensions:
    commands["build_ext"] = extension_builder()

setup(
    packages=[*find_packages(include=[f"{PACKAGE}*"]), f"{PACKAGE}.kernels"],
    package_dir={PACKAGE: PACKAGE, f"{PACKAGE}.kernels": "kernels/triton"},
    ext_modules=extensions,
    cmdclass=commands,
)
