"""`eah.Handle`: the switch of an enabled model, and its report."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from eah.report import Report, layer_report
from eah.transformers.enabled import EnabledModel, enabled_on


class Handle:
    """An enabled model's switch and its report. As a context manager, exit disables."""

    def __init__(self, enabled: EnabledModel):
        self._enabled = enabled

    def __repr__(self) -> str:
        layers = ", ".join(str(layer.index) for layer in self._enabled.layers)
        state = "enabled" if self._enabled.layers[0].attached else "disabled"
        return f"<eah.Handle of {type(self._enabled.base).__name__}, layers {layers}: {state}>"

    @classmethod
    def of(cls, model) -> Handle:
        """The handle of an enabled model: for a deep copy or an unpickled model, which is enabled too.

        Raises:
            ValueError: the model is not enabled.
        """
        enabled = enabled_on(model)
        if enabled is None:
            raise ValueError("model is not enabled: eah.enable(model) does that")
        return cls(enabled)

    def report(self) -> Report:
        """What the last prefill did in each layer, or why EAH stood aside. Waits for the device."""
        return self._report([layer.record for layer in self._enabled.layers])

    @property
    def history(self) -> tuple[Report, ...]:
        """The reports of the last prefills, oldest first, as many as `enable(history=...)` asked for.

        A layer that an interrupted prefill did not reach has no rows there.
        """
        layers = self._enabled.layers
        prefills = tuple(layers[0].history.prefills) if layers[0].history else ()  # other threads add to it meanwhile
        return tuple(self._report([records.get(layer.index) for layer in layers]) for _, records in prefills)

    def _report(self, records) -> Report:
        layers = zip(self._enabled.layers, records, strict=True)
        reports = tuple(layer_report(layer.index, record, layer.settings.knobs) for layer, record in layers)
        return Report(reports, self._enabled.notes)

    def image_mask(self, mask: torch.Tensor) -> AbstractContextManager[None]:
        """Within `with handle.image_mask(mask):` the prompt's image tokens are those that `mask` marks.

        For a prompt given as embeddings into which the image features were merged already, or to choose among the
        image tokens. It holds for the calls of this thread only.

        Args:
            mask: (B, S) bool, S the length of the prompt with its padding, B its rows or a divisor of them.

        Raises:
            TypeError, ValueError: mask is not that; the second also from a forward that it does not fit.
        """
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a torch.bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2 or mask.shape[0] == 0:
            raise ValueError(f"mask must be (B, S) with B >= 1, got {tuple(mask.shape)}")
        return self._enabled.given(mask)

    def disable(self) -> None:
        """Restores the model as it was; a second call does nothing. The report stays readable."""
        if self._enabled.layers[0].attached:
            self._enabled.detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception) -> None:
        self.disable()
