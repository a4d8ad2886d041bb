import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .engine import ENGINES, ENVIRONMENT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """family -> the folder of its tiny model; saved once."""
    folders = {}

    def folder_of(family):
        from .models import save

        if family not in folders:
            folders[family] = save(family, tmp_path_factory.mktemp("models") / family)
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def answered(saved, tmp_path_factory):
    """The name of an engine -> what it answered; each runs once, in a process of its own."""
    results = {}

    def run(name):
        if name not in results:
            path = tmp_path_factory.mktemp("engine") / "result.json"
            folder = saved(ENGINES[name].family)
            command = [sys.executable, "-W", "ignore", "-m", "tests.vllm.engine", name, str(folder), str(path)]
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            results[name] = json.loads(path.read_text())
        return results[name]

    return run


@pytest.fixture(scope="session")
def reference(saved):
    """family -> the same model in transformers."""
    models = {}

    def of(family):
        from .reference import Reference

        if family not in models:
            models[family] = Reference(family, saved(family))
        return models[family]

    return of


def environment(**more):
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", **more}
