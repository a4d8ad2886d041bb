"""What EAH did in the last prefill, as plain data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from eah.method import Knobs
from eah.reasons import Filled, Reason, Why, sentence
from eah.uniform import Sight, uniform_means

HELD = "a forward of several tokens on the cache was lent the held head's map, which no token of it helped to choose"


class Acted(NamedTuple):
    """What a layer leaves behind in a prefill: tensors on their device, read only when a report is asked for.

    Of packed sequences each is a row, its tokens the first of the S.
    """

    head: Tensor  # (B,) int32
    sink_counts: Tensor  # (B, Hq) int32
    image_mask: Tensor  # (B, S) bool
    sight: Sight
    by_embedding: bool = False  # image tokens were looked for among embeddings
    complete: Tensor | None = None  # () bool, of a static cache: all that was cached is in the sums
    held: Tensor | None = None  # () bool: later forwards of several tokens were lent a held head's map
    afterwards: Why | None = None


class StoodAside(NamedTuple):
    """A forward that was left to the layer's own attention, and why a later one was."""

    why: Why
    afterwards: Why | None = None


Record = Acted | StoodAside


@dataclass(frozen=True)
class RowReport:
    """One batch row of a prefill, or one of the sequences packed into one: the head that lent its map, or None and why.

    How much the choice says depends on the prompt's length: in a short prompt attention that favours nothing exceeds
    the threshold, too. That uniform attention gives each of the keys that a row sees the same, and its mean u_j down a
    column is taken over the rows that count for the column; image columns without such a row are left out.
    """

    head: int | None
    sinks: tuple[int, ...]  # per query head
    image_tokens: int
    density: float  # most sinks of a head / image tokens; 0 without image tokens
    why_none: str | None
    tied: bool = False  # another head has as many sinks as the chosen one, which has the lowest index
    saturated: bool = False  # all image tokens are sinks of the chosen head
    uniform_level: float = 0.0  # mean of u_j over the image columns; 0 without any
    uniform_share: float = 0.0  # share of the image columns whose u_j exceeds the threshold

    def caution(self) -> str | None:
        """What makes the choice of a head say little, in one line."""
        parts = ["another head has as many sinks"] * self.tied
        parts += ["all image tokens are its sinks"] * self.saturated
        if self.uniform_share:
            share = f"{100 * self.uniform_share:.0f} % of the image tokens"
            parts.append(f"uniform attention, {self.uniform_level:.2g}, would make sinks of {share}")
        return "; ".join(parts) or None


@dataclass(frozen=True)
class LayerReport:
    """One enabled layer. `rows` is empty when nothing ran yet or EAH stood aside, for the reason `stood_aside`.

    `afterwards`: why a later forward, a second turn for instance, used ordinary attention.
    `continued`: what a later forward of several tokens was lent, with decode="hold".
    """

    layer: int
    rows: tuple[RowReport, ...] = ()
    stood_aside: str | None = None
    afterwards: str | None = None
    continued: str | None = None

    def __str__(self) -> str:
        lines = [f"layer {self.layer}"]
        if self.rows:
            lines.append("  row  head  sinks  image tokens  density")
        for number, row in enumerate(self.rows):
            most, head = max(row.sinks, default=0), "none" if row.head is None else row.head
            lines.append(f"  {number:>3}  {head:>4}  {most:>5}  {row.image_tokens:>12}  {row.density:>7.3f}")
            lines.append(f"       sinks per head: {' '.join(map(str, row.sinks))}")
            if row.caution():
                lines.append(f"       {row.caution()}")
            if row.why_none:
                lines.append(f"       {row.why_none}: the row kept its own attention maps")
        if self.stood_aside:
            lines.append(f"  stood aside: {self.stood_aside}")
        if self.continued:
            lines.append(f"  later: {self.continued}")
        if self.afterwards:
            lines.append(f"  later, ordinary attention: {self.afterwards}")
        return "\n".join(lines if len(lines) > 1 else [f"layer {self.layer}: nothing ran yet"])


@dataclass(frozen=True)
class Report:
    """The last prefill, layer by layer; `str()` is a table. `notes`: what to know about this model."""

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), *(f"note: {note}" for note in self.notes)])


def layer_report(layer: int, record: Record | None, knobs: Knobs) -> LayerReport:
    """Reads the record's tensors: this waits for the device."""
    if record is None:
        return LayerReport(layer)
    afterwards, continued = record.afterwards, None
    if isinstance(record, StoodAside):
        return LayerReport(layer, stood_aside=sentence(record.why), afterwards=afterwards and sentence(afterwards))
    image_tokens, uniform = record.image_mask.sum(-1).tolist(), uniform_means(record.sight, record.image_mask)
    columns = zip(record.head.tolist(), record.sink_counts.tolist(), image_tokens, uniform, strict=True)
    rows = tuple(_row(*row, knobs, record.by_embedding) for row in columns)
    if record.held is not None:
        if record.held.item():
            continued = HELD
        else:
            afterwards = afterwards or Reason.NOTHING_HELD
    if record.complete is not None and not record.complete.item():
        afterwards = afterwards or Reason.MISSED
    return LayerReport(layer, rows, afterwards=afterwards and sentence(afterwards), continued=continued)


def _row(
    head: int, sinks: list[int], image_tokens: int, uniform: Tensor, knobs: Knobs, by_embedding: bool
) -> RowReport:
    most, chosen = max(sinks), head >= 0
    uniform = uniform[head if chosen and len(uniform) > 1 else 0]
    uniform = uniform[uniform > 0]  # elsewhere there is no image token, or no row that counts
    level, share = (t.double().mean().item() if len(t) else 0.0 for t in (uniform, uniform > knobs.threshold))
    return RowReport(
        head=head if chosen else None,
        sinks=tuple(sinks),
        image_tokens=image_tokens,
        density=most / image_tokens if image_tokens else 0.0,
        why_none=None if chosen else sentence(_why_none(most, image_tokens, knobs, by_embedding)),
        tied=chosen and sinks.count(most) > 1,
        saturated=chosen and most == image_tokens,
        uniform_level=level,
        uniform_share=share,
    )


def _why_none(most: int, image_tokens: int, knobs: Knobs, by_embedding: bool) -> Why:
    """Of a row whose heads have `most` sinks at most."""
    if not image_tokens:
        return Reason.NO_PLACEHOLDER if by_embedding else Reason.NO_IMAGE_TOKEN
    return Filled(Reason.SPARSE, (knobs.min_density,)) if most else Reason.NO_SINK
