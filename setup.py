"""Two packages from two folders and, where it can be built, the native extension; the metadata is in pyproject.toml.

The extension has two parts: eah_kernels._C for the CPU needs a C++ compiler and torch in the environment that builds
(`pip install --no-build-isolation .`), eah_kernels._cuda also nvcc and a torch with CUDA. Without them everything else
is installed, as a wheel for any Python and platform. EAH_BUILD=none leaves both out; EAH_BUILD=cpu or cuda (both parts)
fails, saying why, when a part cannot be built.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

CPU_SOURCES = ["csrc/cpu/prefill.cpp", "csrc/cpu/few_rows.cpp"]
CPU_HEADERS = ["common", "cpu/attention", "cpu/few_rows", "cpu/masks", "cpu/products", "cpu/scores", "cpu/tiles"]
FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12's own AVX-512 header
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": AVX2,
    "AVX512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
CUDA_SOURCES = ["csrc/cuda/prefill.cu", "csrc/cuda/few_rows.cu"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of torch 2.10


class Wheel(bdist_wheel):
    """Tagged for what was built: Python's limited API, of 3.10 as torch's BuildExtension has it, or pure Python."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True  # it is done
        self.root_is_pure = not self.distribution.has_ext_modules()
        self.py_limited_api = "cp310"
        super().run()


def native_extension() -> dict:
    """What `setup` needs to build eah_kernels._C and eah_kernels._cuda, or nothing."""
    wanted = os.environ.get("EAH_BUILD")
    if wanted not in (None, "none", "cpu", "cuda"):
        sys.exit(f"EAH_BUILD must be none, cpu or cuda, or not set, got {wanted!r}")
    parts = []
    for part, name, make in (("cpu", "_C", cpu_extension), ("cuda", "_cuda", cuda_extension)):
        missing = why_not_cpu() or (part == "cuda" and why_not_cuda()) or None
        forced = wanted == "cuda" or wanted == part
        if forced and missing:
            sys.exit(f"EAH_BUILD={wanted}: eah_kernels.{name} cannot be built: {missing}")
        if missing or wanted == "none" or (wanted == "cpu" and part == "cuda"):
            print(f"eah_kernels.{name} is not built: {missing or f'EAH_BUILD={wanted}'}", file=sys.stderr)
            continue
        extension = make()
        extension.optional = not forced
        absent = [path for path in (*extension.sources, *extension.depends) if not os.path.exists(path)]
        if absent:
            sys.exit(f"eah_kernels.{name} cannot be built: its source file {absent[0]} is missing here: {os.getcwd()}")
        parts.append(extension)
    if not parts:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            super().run()
            # setuptools only warns where an optional extension fails, and would count it among what was built.
            built = [part for part in self.extensions if os.path.exists(self.get_ext_fullpath(part.name))]
            self.distribution.ext_modules = built

        def build_extension(self, extension: Extension) -> None:
            """Compiles the CPU kernels once per CPU capability; attention.h says how one is chosen."""
            path = self.get_ext_fullpath(extension.name)
            if os.path.exists(path):
                os.remove(path)  # of an earlier build, which a failure of this one would leave
            x86 = platform.machine().lower() in ("x86_64", "amd64")

            def compile_for(source: str, capability: str) -> list[str]:
                return self.compiler.compile(
                    [source],
                    output_dir=os.path.join(self.build_temp, capability),
                    macros=[("CPU_CAPABILITY", capability), (f"CPU_CAPABILITY_{capability}", None)],
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*extension.extra_compile_args, *CAPABILITIES[capability]],
                )

            if extension.name == "eah_kernels._C":
                jobs = product(CPU_SOURCES, CAPABILITIES if x86 else ["DEFAULT"])
                with ThreadPoolExecutor(2) as pool:
                    for objects in pool.map(lambda job: compile_for(*job), jobs):
                        extension.extra_objects += objects
            super().build_extension(extension)

    return {"ext_modules": parts, "cmdclass": {"build_ext": Build.with_options(use_ninja=False), "bdist_wheel": Wheel}}


def cpu_extension() -> Extension:
    """For one minor version of torch: it uses ATen."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "eah_kernels._C",
        ["csrc/cpu/bindings.cpp"],
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp", "-Wl,--strip-debug"],
        py_limited_api=True,
        depends=[*CPU_SOURCES, *(f"csrc/{name}.h" for name in CPU_HEADERS)],
    )


def cuda_extension() -> Extension:
    """For torch >= 2.10: its bindings use the stable ABI alone."""
    from torch.utils.cpp_extension import CUDAExtension

    targets = [80, 90, 100] if nvcc_release() >= (12, 8) else [80, 90]
    code = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in targets]
    return CUDAExtension(
        "eah_kernels._cuda",
        ["csrc/cuda/bindings.cpp", *CUDA_SOURCES],
        extra_compile_args={
            "cxx": ["-O2", "-fvisibility=hidden", STABLE_ABI],
            "nvcc": ["-O3", "-std=c++17", *code, "-gencode=arch=compute_80,code=compute_80"],
        },
        extra_link_args=["-Wl,--strip-debug"],
        py_limited_api=True,
        depends=[
            "csrc/common.h",
            *(f"csrc/cuda/{name}" for name in ("attention.h", "ptx.cuh", "tiles.cuh", "prefill_tiles.cuh")),
        ],
    )


def why_not_cpu() -> str | None:
    if platform.system() != "Linux":
        return f"it is built on Linux only, and this is {platform.system()}"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported where the build runs ({error}); use pip install --no-build-isolation"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not on the PATH"
    return None


def why_not_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    release = nvcc_release()
    if release is None:
        return "no CUDA compiler: nvcc is neither in CUDA_HOME/bin nor on the PATH"
    if release[0] != int(torch.version.cuda.split(".")[0]):
        return f"nvcc is of CUDA {release[0]}.{release[1]} and torch is built with CUDA {torch.version.cuda}"
    return None


def nvcc_release() -> tuple[int, int] | None:
    """The version of the nvcc that torch would run, (13, 0) for one; None where there is none."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc")) if CUDA_HOME else None
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", said).groups()))


setup(
    packages=[*find_packages(include=["eah_kernels*"]), *find_packages("python")],
    package_dir={"eah": "python/eah"},
    package_data={"eah_kernels": ["py.typed"], "eah": ["py.typed"]},
    **native_extension(),
)
