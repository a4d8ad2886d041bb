"""Who may import whom: csrc -> eah_kernels -> eah; Triton only when a kernel is launched; nothing patched at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "eah_kernels").rglob("*.py"))
BINDING = sorted((ROOT / "python").rglob("*.py"))


def imported(path):
    """Every module a file imports, wherever the statement stands, as (module, name or None)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_neither_the_binding_nor_transformers(path):
    roots = {module.split(".")[0] for module, _ in imported(path)}
    assert not roots & {"eah", "transformers", "tests", "bench", "PIL", "matplotlib"}
    if "triton" not in path.relative_to(ROOT).parts[:-1]:
        assert "triton" not in roots


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_backends_do_not_import_what_they_are_tested_against(path):
    modules = {module for module, _ in imported(path)} | {f"{module}.{name}" for module, name in imported(path)}
    assert path.name == "api.py" or "eah_kernels.reference" not in modules


@pytest.mark.parametrize("path", BINDING, ids=lambda p: p.name)
def test_the_binding_uses_public_names_only(path):
    import eah_kernels

    for module, name in imported(path):
        root = module.split(".")[0]
        assert root not in {"tests", "bench", "triton"}
        if root == "eah_kernels" and module != "eah_kernels.testing":
            assert module == "eah_kernels" and name in {*eah_kernels.__all__, "__version__"}


METHOD = {"eah.method", "eah.reasons", "eah.report", "eah.uniform"}


@pytest.mark.parametrize("name", sorted(METHOD))
def test_the_method_knows_no_framework(name):
    """Whatever runs the model can use it."""
    path = ROOT / "python" / f"{name.replace('.', '/')}.py"
    modules = {module for module, _ in imported(path)}
    assert {module for module in modules if module.split(".")[0] == "eah"} <= METHOD
    assert {module.split(".")[0] for module in modules} - {"eah"} <= {"torch", "eah_kernels", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", BINDING, ids=lambda p: p.name)
def test_one_room_of_the_binding_knows_of_transformers(path):
    """Its names say where they are: within the package eah.transformers, too, `transformers` is the real one."""
    levels = {node.level for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    assert levels <= {0}
    room = path.relative_to(ROOT / "python/eah").parts[0]
    if room not in ("transformers", "cli", "eval", "patches"):
        assert "transformers" not in {module.split(".")[0] for module, _ in imported(path)}


def run(code, folder=None):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = "import sys; sys.modules['triton'] = sys.modules['transformers'] = sys.modules['numpy'] = None\n"


@pytest.mark.parametrize("first", ["eah.Handle", "eah_kernels.eah_attention"])
def test_without_triton_transformers_and_numpy(first):
    """Nothing fails or warns, torch's own warning about a missing numpy included; the command's findings say it."""
    out = run(
        BLOCKED + "import warnings; warnings.simplefilter('error')\n"
        "before = list(warnings.filters)\n"
        f"import {first.split('.')[0]}; {first}\n"
        "assert [f for f in before if f not in warnings.filters] == []\n"
        "import torch, eah_kernels, eah.cli\n"
        "x = torch.randn(1, 2, 8, 16); image = torch.ones(1, 8, dtype=torch.bool)\n"
        "for backend in ('auto', 'torch', 'reference'):\n"
        "    eah_kernels.eah_attention(x, x, x, image, backend=backend)\n"
        "for wrong in (['demo'], ['generate', '--model', '.', '--image', 'none.png', '--prompt', 'x']):\n"
        "    assert eah.cli.main(wrong) == 1\n"
    )
    assert out == ""


def test_the_doctor_without_triton_transformers_and_numpy():
    out = run(
        BLOCKED + "import warnings; warnings.simplefilter('error'); sys.argv[1:] = ['doctor']; import eah.__main__"
    )
    assert "eah.enable     no: it needs transformers >= 5.3" in out and "reference    works" in out


def test_importing_registers_ops_and_nothing_else():
    out = run(
        "import sys, torch\n"
        "from torch.nn.functional import scaled_dot_product_attention as before\n"
        "import eah_kernels, eah\n"
        "eah.enable\n"
        "assert torch.nn.functional.scaled_dot_product_attention is before\n"
        "print([m for m in ('triton.language', 'eah_kernels.triton', 'transformers') if m in sys.modules])\n"
        "print(hasattr(torch.ops.eah_kernels, 'eah_attention'))\n"
    )
    assert out.split("\n")[:2] == ["[]", "True"]


def test_importing_eah_loads_names_only():
    out = run(
        "import sys, eah\n"
        "print([m for m in ('torch', 'transformers', 'eah_kernels') if m in sys.modules])\n"
        "print(dir(eah) == sorted(eah.__all__))\n"
        "from eah import *\n"
        "import eah_kernels, eah.transformers.find as there\n"
        "print(__version__ == eah_kernels.__version__, there.UnsupportedModelError is UnsupportedModelError)\n"
        "print(hasattr(eah, 'settings'))\n"
    )
    assert out.split("\n")[:4] == ["[]", "True", "True True", "False"]


@pytest.mark.parametrize("package", ["eah", "eah_kernels"])
def test_the_hints_of_public_names_can_be_read(package):
    """As tools that check calls or render documentation do, without transformers."""
    out = run(
        f"import inspect, sys, typing, {package} as package\n"
        "for value in (getattr(package, name) for name in package.__all__):\n"
        "    methods = [f for f in vars(value).values() if inspect.isfunction(f)] if inspect.isclass(value) else []\n"
        "    for function in [*filter(callable, [value]), *methods]:\n"
        "        typing.get_type_hints(function)\n"
        "print('transformers' in sys.modules)\n"
    )
    assert out == "False\n"


def test_a_folder_of_eah_is_not_taken_for_transformers():
    """From python/eah Python finds eah's own folder first: that says so, instead of a missing name later on."""
    out = run("try: import transformers\nexcept ImportError as error: print(error)", folder=ROOT / "python/eah")
    assert "is a part of eah and was imported as transformers" in out and "start from another folder" in out
    for folder in ("python", "python/eah/cli", "python/eah/transformers"):
        run("import eah.transformers.find, transformers; transformers.AttentionInterface", folder=ROOT / folder)


def test_no_file_of_tests_or_bench_is_a_module_by_its_bare_name():
    """tests/transformers, say, would stand for transformers."""
    inside = [entry for entry in sys.path for folder in ("tests", "bench") if (ROOT / folder) in within(entry)]
    assert not inside


def within(entry):
    path = Path(entry or ".").resolve()
    return [path, *path.parents]
