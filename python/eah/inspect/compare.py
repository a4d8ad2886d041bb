"""The same prompt without and with EAH: the answers, and what changes in the layers on the way to them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

import eah
from eah.inspect import figures
from eah.inspect.look import Look, look_at
from eah.inspect.numbers import divergence
from eah.inspect.page import Picture, section, text
from eah.method import DEFAULT_LAYERS
from eah.report import Report
from eah.transformers.observe import Seen
from eah_kernels import shared_map_attention


@dataclass(frozen=True)
class Shares:
    """Where the attention of the tokens after the picture goes, mean over them and the heads. The shares add up to 1.

    first: the prompt's first token. text: all others that are not of the picture.
    """

    image: float
    first: float
    text: float


@dataclass(frozen=True)
class LayerChange:
    """change: of the attention's output at the tokens after the picture, ||with - without|| / ||without||."""

    layer: int
    change: float
    without: Shares
    with_eah: Shares


@dataclass(frozen=True)
class Compared:
    """report: of EAH, in the prefill with it. kl: KL(without || with) of the first answer token, in nats."""

    report: Report
    answers: dict[str, str]
    kl: float
    layers: tuple[LayerChange, ...]

    def numbers(self) -> dict:
        return {
            "eah_layers": [
                {
                    "layer": layer.layer,
                    "head": layer.rows[0].head if layer.rows else None,
                    "stood_aside": layer.stood_aside,
                }
                for layer in self.report.layers
            ],
            "answers": self.answers,
            "kl": self.kl,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def section(self, picture: Callable[..., Picture]) -> str:
        """The part of the page; picture(name, content, alt, caption) keeps a figure."""
        lent = "; ".join(
            f"layer {layer.layer}: {_lends(layer.rows[0].head) if layer.rows else layer.stood_aside}"
            for layer in self.report.layers
        )
        marked = zip(("without EAH", "with EAH"), mark_differences(*self.answers.values()), strict=True)
        answers = "".join(f"<div><h3>{name}</h3><p>{html}</p></div>" for name, html in marked)
        same = "The answers are the same. " if len(set(self.answers.values())) == 1 else ""
        words = f"{same}The first answer token's distributions are {self.kl:.2g} nats apart (KL). EAH: {lent}."
        largest = max(self.layers, key=lambda layer: layer.change)
        caption = (
            "Above: where the attention of the tokens after the picture goes, mean over heads; in each layer without "
            "EAH on the left, with EAH on the right. Below: how much the output of the layer's attention changes at "
            "these tokens, relative to its norm."
        )
        most = f"most changes in layer {largest.layer}, by {largest.change:.0%}"
        alt = f"Attention on picture, text and first token by layer; {most}"
        figure = picture("compare.png", figures.shares(self.layers), alt, caption)
        return section(
            "5. Without and with EAH", text(words), f'<div class="answers">{answers}</div>', figure.html("wide")
        )


def _lends(head: int | None) -> str:
    return "no head lends its map" if head is None else f"head {head} lends its map"


class Rows:
    """What the tokens after the picture, or the last one where there is none, make of each layer's attention."""

    def __init__(self) -> None:
        self.shares: dict[int, Shares] = {}
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, seen: Seen) -> None:
        call, image = seen.call, seen.image_mask[0]
        length = len(image)
        rows = slice(min(int(image.nonzero().max()) + 1, length - 1), length)
        query, key = call.query[:1, :, rows].float(), call.key[:1].float()
        scoring = call.scoring.at(0).of_rows(rows, length, length, image.device)
        places = torch.zeros_like(key)
        places[..., 0] = image
        places[:, :, 0, 1] = ~image[0]
        head = torch.full((1,), -1, dtype=torch.int32, device=image.device) if seen.head is None else seen.head[:1]
        attention = shared_map_attention(query, key, places, head, **scoring._asdict())
        on_image, first = attention[..., :2].double().mean((0, 1, 2)).tolist()
        self.shares[seen.layer] = Shares(on_image, first, 1 - on_image - first)
        self.outputs[seen.layer] = seen.output[0, rows].float().cpu()


@torch.no_grad()
def compare(
    model, processor, look: Look, *, layers: Sequence[int] = DEFAULT_LAYERS, max_new_tokens: int = 128
) -> Compared:
    """Runs the prompt of a look without and with EAH, in these layers, at the look's threshold; both answers greedily.

    Raises:
        ValueError: EAH is enabled on the model already, or it has no head on top.
        UnsupportedModelError: as from `eah.enable`.
    """
    if look.next_token is None:
        raise ValueError(f"model must have a language model head to answer, got {type(model).__name__}")
    before, after = Rows(), Rows()
    knobs: dict[str, Any] = {"layers": layers, "threshold": look.threshold}
    again = look.inputs, look.image, look.prompt, look.threshold, ()
    eah.enable(model, **knobs).disable()  # refused now or not at all
    plain = look_at(model, *again, also=before)
    without = _answer(model, processor, look.inputs, max_new_tokens)
    with eah.enable(model, **knobs) as handle:
        enhanced = look_at(model, *again, also=after)
        report = handle.report()
        answers = {"without": without, "with": _answer(model, processor, look.inputs, max_new_tokens)}
    assert plain.next_token is not None and enhanced.next_token is not None
    changes = []
    for layer, output in sorted(before.outputs.items()):
        change = (after.outputs[layer] - output).norm() / output.norm().clamp(min=torch.finfo(torch.float32).tiny)
        changes.append(LayerChange(layer, change.item(), before.shares[layer], after.shares[layer]))
    kl = divergence(plain.next_token, enhanced.next_token)
    return Compared(report, answers, kl, tuple(changes))


def _answer(model, processor, inputs, max_new_tokens: int) -> str:
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def mark_differences(without: str, with_eah: str) -> tuple[str, str]:
    """Both as HTML, the words that differ marked."""
    one, other = without.split(), with_eah.split()
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for words, html in zip((one[a:b], other[c:d]), marked, strict=True):
            if words:
                joined = escape(" ".join(words))
                html.append(joined if kind == "equal" else f"<mark>{joined}</mark>")
    return " ".join(marked[0]), " ".join(marked[1])
