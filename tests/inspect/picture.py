"""Makes docs/inspect.png, the picture in README.md: `python -m tests.inspect.picture`.

Figures of `eah inspect` of layer 1 of the demo's small LLaVA and photograph, side by side on white.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

from eah.cli.demo import PROMPT
from eah.cli.samples import load_picture, small_llava
from eah.inspect import look
from eah.inspect.one import write

ROOT = Path(__file__).parents[2]
LAYER, GAP, HEIGHT = 1, 24, 400


def main() -> None:
    processor, model = small_llava()
    picture, _ = load_picture(None)
    seen = look(model, processor, picture, PROMPT, pictured=(LAYER,))
    first, _, sparsest = seen.layer(LAYER).shown(seen.threshold)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write(seen, out, {}, (LAYER,))
        names = [f"head{head:02}.{kind}" for kind in ("picture", "map") for head in (first, sparsest)]
        parts = [Image.open(out / f"layer{LAYER:02}.{name}.png").convert("RGBA") for name in (*names, "means")]
    parts = [
        part.resize((round(part.width * HEIGHT / part.height), HEIGHT), Image.Resampling.LANCZOS) for part in parts
    ]
    canvas = Image.new("RGBA", (sum(part.width + GAP for part in parts) + GAP, HEIGHT + 2 * GAP), "white")
    at = GAP
    for part in parts:
        canvas.alpha_composite(part, (at, GAP))
        at += part.width + GAP
    content = io.BytesIO()
    canvas.convert("RGB").quantize(192).save(content, "PNG", optimize=True)
    (ROOT / "docs/inspect.png").write_bytes(content.getvalue())


if __name__ == "__main__":
    main()
