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


def run(code):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = "import sys; sys.modules['triton'] = sys.modules['transformers'] = sys.modules['numpy'] = None\n"


def test_without_triton_transformers_and_numpy():
    """Nothing fails or warns, torch's own warning about a missing numpy included; the command's findings say it."""
    out = run(
        BLOCKED + "import warnings; warnings.simplefilter('error')\n"
        "before = list(warnings.filters)\n"
        "import eah\n"
        "assert [f for f in before if f not in warnings.filters] == []\n"
        "import torch, eah_kernels, eah.cli\n"
        "x = torch.randn(1, 2, 8, 16); image = torch.ones(1, 8, dtype=torch.bool)\n"
        "for backend in ('auto', 'torch', 'reference'):\n"
        "    eah_kernels.eah_attention(x, x, x, image, backend=backend)\n"
        "assert eah.cli.main(['doctor']) == 0\n"
        "for wrong in (['demo'], ['generate', '--model', '.', '--image', 'none.png', '--prompt', 'x']):\n"
        "    assert eah.cli.main(wrong) == 1\n"
    )
    assert "eah.enable     no: it needs transformers >= 5.3" in out and "reference    works" in out


def test_importing_registers_ops_and_nothing_else():
    out = run(
        "import sys, torch\n"
        "from torch.nn.functional import scaled_dot_product_attention as before\n"
        "import eah_kernels, eah\n"
        "assert torch.nn.functional.scaled_dot_product_attention is before\n"
        "print([m for m in ('triton.language', 'eah_kernels.triton', 'transformers') if m in sys.modules])\n"
        "print(hasattr(torch.ops.eah_kernels, 'eah_attention'))\n"
    )
    assert out.split("\n")[:2] == ["[]", "True"]
