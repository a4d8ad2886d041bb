"""Two packages from two folders; the metadata is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["eah_kernels", "eah_kernels.triton", "eah"],
    package_dir={"eah": "python/eah"},
)
