"""The Triton kernels stay readable: what travels together is one argument (eah_kernels/triton/bundles.py)."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "eah_kernels/triton"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_or_helper_takes_more_than_twenty_parameters(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 20, node.name


@pytest.mark.parametrize("path", sorted(KERNELS.glob("**/*.py")), ids=lambda path: path.name)
def test_a_mask_is_unpacked_before_an_early_return(path):
    """Triton 3.6 compiles no kernel that reads a View of its Packed past one: bundles.py."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and "packed" in [argument.arg for argument in function.args.args]:
            nodes = list(ast.walk(function))
            read = [n.lineno for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "packed"]
            returns = [n.lineno for n in nodes if isinstance(n, ast.Return)]
            assert not read or not returns or max(read) < min(returns), function.name


def test_do_not_specialize_does_not_reach_into_a_bundle():
    """Why kernels take the lengths one by one: in a bundle, 1 and multiples of 16 would be compiled for anew."""
    pytest.importorskip("triton")
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.compiler import make_backend

    from eah_kernels.triton.bundles import Sizes

    backend = make_backend(GPUTarget("cuda", 90, 32))
    assert isinstance(backend, BaseBackend)
    types, marks = native_specialize_impl(backend, Sizes(1, 17, 16), False, False, False)
    assert (types.q_len, types.kv_len, marks.window) == ("constexpr", "i32", "D")
    assert native_specialize_impl(backend, 16, False, False, False) == ("i32", None)
