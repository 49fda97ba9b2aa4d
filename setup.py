"""Builds the optional C++ backend; all metadata is in pyproject.toml.

FLOWDPPO_BUILD_CPU=0 skips it, =1 makes a build that cannot be done an error; by default (auto) a build environment
without torch or a C++ compiler gives a pure-Python install and says so. Build with ``--no-build-isolation``: the
extension is compiled against the torch that is installed (any torch >= 2.10 can then load it).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
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
KERNEL_FLAGS = [
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"baseline": []}
if IS_X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def why_not_cpu() -> str | None:
    """What keeps the C++ backend from being built here, or None."""
    if sys.platform == "win32":
        return "the C++ backend needs GCC or Clang"
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


def decide_cpu() -> tuple[bool, str | None]:
    """Whether to build the C++ backend, and why not."""
    wanted = os.environ.get("FLOWDPPO_BUILD_CPU", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FLOWDPPO_BUILD_CPU: got {wanted!r}, expected 0, 1 or auto")
    if wanted == "0":
        return False, "switched off by FLOWDPPO_BUILD_CPU=0"
    problem = why_not_cpu()
    if problem is not None and wanted == "1":
        raise SystemExit(f"FLOWDPPO_BUILD_CPU=1, but {problem}")
    return problem is None, problem


BUILD_CPU, NO_CPU_REASON = decide_cpu()


class PureBuild(build_py):
    """Says why there is no C++ backend, once."""

    def run(self) -> None:
        super().run()
        if not BUILD_CPU:
            print(f"warning: flowdppo_fast is installed without its C++ backend: {NO_CPU_REASON}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """The extension uses no Python ABI: one wheel serves every Python from 3.10 on."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py310", "none", tag[2])


def cpu_extension() -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        f"{PACKAGE}._C_cpu",
        [str(SOURCES / name) for name in ("bindings.cpp", "isa.cpp", "rows.cpp")],
        depends=[str(path) for path in sorted([*SOURCES.parent.glob("*.h"), *SOURCES.glob("*")])],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        # messages name files inside the project wherever it was built
        extra_compile_args=[
            *COMMON_FLAGS,
            f"-ffile-prefix-map={Path.cwd()}/=",
            *(["-DFLOWDPPO_X86"] if IS_X86 else []),
        ],
        language="c++",
    )


def extension_builder() -> type[build_ext]:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildCpu(BuildExtension):
        """Compiles the streaming kernels once per instruction set and links them all into one library."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def build_extension(self, extension: Extension) -> None:
            for isa, flags in ISA_FLAGS.items():
                extension.extra_objects += self.compiler.compile(
                    [str(SOURCES / "kernels.cpp")],
                    output_dir=os.path.join(self.build_temp, isa),
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*extension.extra_compile_args, *KERNEL_FLAGS, *flags, f"-DFLOWDPPO_ISA={isa}"],
                    depends=extension.depends,
                )
            super().build_extension(extension)

        def run(self) -> None:
            super().run()
            version = subprocess.run([*compiler_command(), "--version"], capture_output=True, text=True, check=True)
            info = {
                "torch": torch.__version__,
                "torch_target": TORCH_TARGET,
                "compiler": version.stdout.splitlines()[0],
                "flags": [*COMMON_FLAGS, *KERNEL_FLAGS],
                "isas": ISA_FLAGS,
            }
            folder = Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)
            (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    return BuildCpu


commands: dict[str, type] = {"build_py": PureBuild, "bdist_wheel": PlatformWheel}
extensions = []
if BUILD_CPU:
    extensions.append(cpu_extension())
    commands["build_ext"] = extension_builder()

setup(
    packages=[*find_packages(include=[f"{PACKAGE}*"]), f"{PACKAGE}.kernels"],
    package_dir={PACKAGE: PACKAGE, f"{PACKAGE}.kernels": "kernels/triton"},
    ext_modules=extensions,
    cmdclass=commands,
)
