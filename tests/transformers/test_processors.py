"""Real pixels through the families' own processors: text and images in, logits out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

import eah

from ..support.family_models import FAMILIES, build
from ..support.oracle import Oracle
from ..support.processors import PROCESSORS, processed
from ..support.tiny_models import IMAGE


@pytest.mark.parametrize("family", PROCESSORS)
def test_real_pixels(family, monkeypatch):
    if family == "smolvlm":  # it spells numbers only for videos
        monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
    picture = torch.randint(0, 256, (2, 12, 12, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    pictures = [[Image.fromarray(pixels.numpy())] for pixels in picture]
    inputs = processed(family, pictures, ["abcdefghi", "abc"])
    model = build(family)
    oracle = Oracle(model, inputs["input_ids"] == IMAGE, layers=(FAMILIES[family].layer,))
    oracle.tune(inputs, FAMILIES[family].layer)
    with torch.no_grad(), eah.enable(model, threshold=oracle.threshold) as handle:
        got = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], oracle(**inputs)[real], rtol=1e-3, atol=1e-3)
    rows = handle.report().layers[0].rows
    assert [row.head for row in rows] == [
        head if head >= 0 else None for head in oracle.head[FAMILIES[family].layer].tolist()
    ]
    assert all(row.image_tokens >= 9 for row in rows)
