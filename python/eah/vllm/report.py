"""What became of the prompts of an engine: counts, the newest records, a line in the log."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from eah.reasons import Reason, Why, sentence
from eah.vllm.plan import OPTED_OUT, Plan, Prompt

logger = logging.getLogger("vllm.eah")  # vLLM prints what loggers below its own say
KEPT = 1000  # records, and steps whose heads are still on the device
SECONDS = 10.0  # between two lines in the log
NAMES = {"enhanced": "enhanced", "no_head": "without a head", OPTED_OUT: "opted out"}


class Acted(NamedTuple):
    """What a layer did with N prompts: head (N,) and sink_counts (N, Hq), on their device."""

    prompts: list[Prompt]
    layer: int
    head: Tensor
    sink_counts: Tensor


class Tally:
    """Each prompt is counted once, also where preemption has it computed again.

    Heads stay on their device until the report is read, a line is due in the log, or KEPT steps wait. On the CPU they
    are read at once.
    """

    def __init__(self, count: Callable[[str], None] | None, layers: int = 1):
        """count: is told each outcome; None: another process of the tensor-parallel group keeps the tally.

        layers: how many are enhanced.
        """
        self.count, self.layers = count, layers
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.last: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._acted: list[Acted] = []  # in the step that runs
        self._aside: dict[str, Why] = {}
        self._waiting: list[tuple[list[Acted], set[str]]] = []  # by step, with the requests that are new
        self._counted: set[str] = set()
        self._told, self._said = time.monotonic() - SECONDS, 0

    def acted(self, prompts: list[Prompt], layer: int, head: Tensor, sink_counts: Tensor) -> None:
        self._acted.append(Acted(prompts, layer, head, sink_counts))

    def aside(self, prompts: Iterable[Prompt], why: Why) -> None:
        self._aside |= {prompt.request_id: why for prompt in prompts}

    def failed(self, prompts: Iterable[Prompt], why: Why) -> None:
        """Within an `except`: its traceback goes to the log."""
        self.aside(prompts, why)
        logger.exception("eah: %s", sentence(why))

    def end_step(self, plan: Plan, due: Iterable[str] = ()) -> None:
        """`due`: requests that must be in the plan, for this step was to enhance them."""
        acted, others = self._acted, {**plan.others, **self._aside}
        self._acted, self._aside = [], {}
        if self.count is None:
            return
        reached = Counter(prompt.request_id for part in acted for prompt in part.prompts)
        planned = [prompt.request_id for run in plan.runs for prompt in run.prompts]
        if missed := {one for one in (*due, *planned) if reached[one] < self.layers and one not in others}:
            others |= dict.fromkeys(missed, Reason.NOT_REACHED)
            if not self.reasons[sentence(Reason.NOT_REACHED)]:
                logger.warning("eah: request %s: %s", min(missed), sentence(Reason.NOT_REACHED))
        for request_id, said in plan.misread.items():
            if request_id not in self._counted:
                self.reasons[sentence(Reason.MISREAD)] += 1
                logger.warning('eah: request %s: "eah" must be "on" or "off", got %.80r', request_id, said)
        for request_id in self._new(others):
            why = others[request_id]
            self._count(OPTED_OUT if isinstance(why, str) else "stood_aside")
            if not isinstance(why, str):
                self.reasons[sentence(why)] += 1
        if new := self._new(prompt.request_id for part in acted for prompt in part.prompts):
            self._waiting.append((acted, new))
            if acted[0].head.device.type == "cpu" or len(self._waiting) >= KEPT:
                self._read()
        self._tell()

    def finished(self, request_ids: Iterable[str]) -> None:
        self._counted.difference_update(request_ids)

    def report(self) -> dict[str, Any]:
        """Plain data; docs/vllm.md says what is in it."""
        self._read()
        counted = {outcome: self.outcomes[outcome] for outcome in NAMES}
        return {**counted, "stood_aside": dict(self.reasons), "last": list(self.last)}

    def _new(self, request_ids: Iterable[str]) -> set[str]:
        new = set(request_ids) - self._counted
        self._counted |= new
        return new

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        if self.count is not None:
            self.count(outcome)

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, []
        for acted, new in waiting:
            enhanced = dict.fromkeys(new, False)
            for prompts, layer, heads, sink_counts in acted:
                for prompt, head, sinks in zip(prompts, heads.tolist(), sink_counts.tolist(), strict=True):
                    if prompt.request_id in new:
                        enhanced[prompt.request_id] |= head >= 0
                        self.last.append(
                            {
                                "request_id": prompt.request_id,
                                "layer": layer,
                                "head": head if head >= 0 else None,
                                "sinks": sinks,
                                "image_tokens": prompt.image_tokens,
                            }
                        )
            for found in enhanced.values():
                self._count("enhanced" if found else "no_head")

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < SECONDS:
            return
        self._read()
        if self.outcomes.total() == self._said:
            return
        self._told, self._said = now, self.outcomes.total()
        counted = ", ".join(f"{self.outcomes[outcome]} {name}" for outcome, name in NAMES.items())
        reasons = "; ".join(f"{why}: {count}" for why, count in self.reasons.items())
        logger.info("eah: prompts: %s%s", counted, f"; stood aside: {reasons}" if reasons else "")
