"""Two packages from two folders and, where it can be built, the native extension; the metadata is in pyproject.toml.

The extension needs a C++ compiler and torch in the environment that builds (`pip install --no-build-isolation .`).
Without them everything else is installed. EAH_BUILD=none leaves it out; EAH_BUILD=cpu fails, saying why, when it cannot
be built.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup

CPU_SOURCE = "csrc/cpu/attention.cpp"
FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": AVX2,
    "AVX512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


def native_extension() -> dict:
    """What `setup` needs to build eah_kernels._C, or nothing."""
    wanted = os.environ.get("EAH_BUILD")
    if wanted not in (None, "none", "cpu"):
        sys.exit(f"EAH_BUILD must be none or cpu, or not set, got {wanted!r}")
    missing = why_not_built()
    if wanted == "cpu" and missing:
        sys.exit(f"EAH_BUILD=cpu: eah_kernels._C cannot be built: {missing}")
    if wanted == "none" or missing:
        print(f"eah_kernels._C is not built: {missing or 'EAH_BUILD=none'}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extension(self, extension: Extension) -> None:
            """Compiles the kernels once per CPU capability; attention.h says how one is chosen."""
            x86 = platform.machine().lower() in ("x86_64", "amd64")

            def compile_for(capability: str) -> list[str]:
                return self.compiler.compile(
                    [CPU_SOURCE],
                    output_dir=os.path.join(self.build_temp, capability),
                    macros=[("CPU_CAPABILITY", capability), (f"CPU_CAPABILITY_{capability}", None)],
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*extension.extra_compile_args, *CAPABILITIES[capability]],
                )

            with ThreadPoolExecutor(2) as pool:
                for objects in pool.map(compile_for, CAPABILITIES if x86 else ["DEFAULT"]):
                    extension.extra_objects += objects
            super().build_extension(extension)

    extension = CppExtension(
        "eah_kernels._C",
        ["csrc/bindings.cpp"],
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp", "-Wl,--strip-debug"],
        py_limited_api=True,
        depends=[CPU_SOURCE, *(f"csrc/cpu/{name}.h" for name in ("attention", "rules", "tiles"))],
    )
    extension.optional = wanted is None
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


def why_not_built() -> str | None:
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


setup(
    packages=["eah_kernels", "eah_kernels.triton", "eah"],
    package_dir={"eah": "python/eah"},
    **native_extension(),
)
