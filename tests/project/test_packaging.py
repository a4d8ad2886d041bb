"""What setup.py builds and refuses, and what the distributions hold. wheels.sh builds the extension for real."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copytree, which

import pytest
import torch

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]
NOT_SHIPPED = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}


def setup(folder, *command, build=None, compiler=None, flags=None):
    asked = {"EAH_BUILD": build, "CXX": compiler, "CFLAGS": flags, "CXXFLAGS": flags}
    environment = {k: v for k, v in os.environ.items() if k not in asked}
    environment |= {k: v for k, v in asked.items() if v is not None}
    command = [sys.executable, "setup.py", "-q", *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def sources(tmp_path):
    """A copy of what a build reads, for builds write beside their sources."""
    for folder in ("csrc", "eah_kernels", "python"):
        copytree(ROOT / folder, tmp_path / folder, ignore=lambda _, names: [n for n in names if n.endswith(".so")])
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("build", "compiler", "error"),
    [
        ("none", None, None),
        ("gpu", None, "EAH_BUILD must be none, cpu or cuda, or not set, got 'gpu'"),
        ("cuda", "no-such-compiler", "EAH_BUILD=cuda: eah_kernels._C cannot be built: no C++ compiler"),
        pytest.param(
            "cuda",
            sys.executable,  # stands for a compiler, which is not run
            f"EAH_BUILD=cuda: eah_kernels._cuda cannot be built: torch {torch.__version__} is built without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
        ),
        ("cpu", "no-such-compiler", "EAH_BUILD=cpu: eah_kernels._C cannot be built: no C++ compiler"),
        (None, "no-such-compiler", None),
    ],
)
def test_what_setup_builds(build, compiler, error):
    done = setup(ROOT, "--name", build=build, compiler=compiler)
    assert (done.returncode != 0) == (error is not None), done.stderr
    assert error is None or error in done.stderr


def test_a_missing_source_file_is_an_error(sources):
    (sources / "csrc/cpu/tiles.h").unlink()
    done = setup(sources, "--name", compiler=sys.executable)
    assert done.returncode != 0
    assert "eah_kernels._C cannot be built: its source file csrc/cpu/tiles.h is missing" in done.stderr


@pytest.mark.skipif(sys.platform != "linux" or which("c++") is None, reason="needs Linux and a C++ compiler")
def test_a_wheel_whose_extension_failed_is_pure_python(sources):
    """By the name of its file and by what it holds, though an earlier build left an extension."""
    stale = sources / f"build/lib.linux-{os.uname().machine}-{sys.implementation.cache_tag}/eah_kernels/_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = setup(sources, "bdist_wheel", flags="--no-such-flag")
    assert done.returncode == 0, done.stderr
    (wheel,) = (sources / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = [archive.read(name).decode() for name in names if name.endswith("/WHEEL")]
    assert "Root-Is-Purelib: true" in about
    assert not [name for name in names if name.endswith(".so")]
    tops = {ROOT / "eah_kernels": ROOT, ROOT / "python": ROOT / "python"}
    packages = {path.parent.relative_to(base).as_posix() for top, base in tops.items() for path in top.rglob("*.py")}
    assert {str(Path(name).parent) for name in names if name.endswith(".py")} == packages
    assert {"eah/py.typed", "eah_kernels/py.typed"} <= set(names)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone, to know what belongs to it")
def test_the_source_distribution_is_the_clone(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shipped = {name for name in listed.split("\0") if name and name.split("/")[0] not in NOT_SHIPPED}
    for name in shipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = setup(tmp_path, "sdist", build="none")
    assert done.returncode == 0, done.stderr
    (distribution,) = (tmp_path / "dist").iterdir()
    with tarfile.open(distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert shipped <= names
