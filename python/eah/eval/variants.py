"""What is compared: the model as it is, and EAH with each combination of its knobs."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

BASE = "base"
NAME = re.compile(r"eah-l(?P<layers>\d+(?:\+\d+)*)-t(?P<threshold>\d+(?:\.\d+)?(?:e[+-]\d+)?)(?P<others>(?:-[a-z].*)?)")


@dataclass(frozen=True)
class Variant:
    """The knobs of `eah.enable`."""

    layers: tuple[int, ...]
    threshold: float
    min_density: float = 0.0
    decode: str = "off"
    backend: str = "auto"

    @property
    def name(self) -> str:
        """What is not the default beside layers and threshold comes after them: eah-l0+1-t0.002-d0.15-hold."""
        others = [f"d{self.min_density:g}"] if self.min_density else []
        others += [self.decode] if self.decode != "off" else []
        others += [self.backend] if self.backend != "auto" else []
        return "-".join([f"eah-l{'+'.join(map(str, self.layers))}", f"t{self.threshold:g}", *others])


def product(layers, thresholds, min_densities, decodes, backend: str) -> dict[str, Variant]:
    """Every combination by name, in order.

    Raises:
        ValueError: two of them have one name, being equal in their first six digits.
    """
    found: dict[str, Variant] = {}
    for knobs in itertools.product(layers, thresholds, min_densities, decodes):
        variant = Variant(*knobs, backend=backend)
        if variant.name in found:
            raise ValueError(f"the variant {variant.name} was asked for twice")
        found[variant.name] = variant
    return found


def family_and_threshold(name: str) -> tuple[str, float] | None:
    """A variant's name without its threshold, and the threshold; None where it is no name of EAH's."""
    match = NAME.fullmatch(name)
    return (f"layers {match['layers']}{match['others']}", float(match["threshold"])) if match else None
