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
    """family and changes to its text config -> the folder of its tiny model; saved once."""
    folders = {}

    def folder_of(family, **text):
        from .models import save

        key = family, *sorted(text.items())
        if key not in folders:
            folders[key] = save(family, tmp_path_factory.mktemp("models") / family, **text)
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def answered(saved, tmp_path_factory):
    """The name of an engine -> what it answered; each runs once, in a process of its own."""
    results = {}

    def run(name):
        from .models import save_adapter

        if name not in results:
            path = tmp_path_factory.mktemp("engine") / "result.json"
            folder = saved(ENGINES[name].family, **ENGINES[name].text)
            if name == "lora" and not (folder / "adapter").exists():
                save_adapter(folder / "adapter")
            command = [sys.executable, "-W", "ignore", "-m", "tests.vllm.engine", name, str(folder), str(path)]
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            results[name] = json.loads(path.read_text())
        return results[name]

    return run


@pytest.fixture(scope="session")
def reference(saved):
    """family, whether with its adapter, and changes to its text config -> the same model in transformers."""
    models = {}

    def of(family, lora=False, **text):
        from .reference import Reference

        folder = saved(family, **text)
        if (folder, lora) not in models:
            models[folder, lora] = Reference(family, folder, folder / "adapter" if lora else None)
        return models[folder, lora]

    return of


def environment(**more):
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", **more}
