import random

import pytest
import torch

from ..transformers.conftest import one_thread  # noqa: F401


@pytest.fixture(scope="package")
def tiny():
    """A tiny LLaVA of random weights and its processor: nobody changes them."""
    from ..support.processors import processor_of
    from ..support.tiny_models import build

    return build("llava"), processor_of("llava")


@pytest.fixture
def pictures(tmp_path):
    """A folder of seven pictures, wide, tall and square."""
    from PIL import Image

    from ..eval import scenes

    folder, chance = tmp_path / "pictures", random.Random(1)
    folder.mkdir()
    for number in range(7):
        picture = Image.fromarray(scenes.scene(chance).pixels())
        picture.resize((48 + 16 * (number % 3), 48 + 8 * (number % 2))).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def picture():
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    return Image.fromarray(torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8).numpy())
