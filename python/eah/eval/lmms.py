"""A model of lmms-eval in which EAH acts: --model eah_hf --model_args pretrained=DIR,layers=0+1,threshold=0.002.

lmms-eval finds it by the entry point in `lmms_entry`. Its metrics are not those of the official scripts;
docs/evaluation.md says where they differ.
"""

from __future__ import annotations

import json
import warnings
from itertools import groupby

from lmms_eval.api.model import lmms

from eah.eval.benchmark import Item
from eah.eval.generation import answer_batch, check_changes, generating_by, neutral_config
from eah.eval.variants import Variant
from eah.pictures import in_rgb
from eah.transformers.inputs import Prompts, check_form
from eah.transformers.pretrained import device_of, load_pretrained

IMAGE = "<image>"


class EahHf(lmms):
    """A vision-language model of transformers with EAH, or as it is with eah=False; questions about one picture each.

    Args:
        pretrained: a folder with the model and its processor.
        layers: "1", or "0+1" for several.
        threshold, min_density, decode, backend: as in `eah.enable`.
        prompt_format: with <image> and {}, in place of the chat template.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        layers: int | str = 1,
        threshold: float = 0.002,
        min_density: float = 0.0,
        decode: str = "off",
        backend: str = "auto",
        eah: bool = True,
        prompt_format: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,  # lmms-eval hands it to every model
    ):
        super().__init__()
        check_form(prompt_format, "prompt_format")
        numbers = str(layers).split("+")
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(f"layers must be numbers such as 1 or 0+1, got {layers!r}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number from 1 on, got {batch_size!r}")
        processor, self._model = load_pretrained(pretrained, dtype, device_of(device), trust_remote_code)
        self._prompts = Prompts(processor, form=prompt_format)
        knobs = tuple(map(int, numbers)), float(threshold), float(min_density), decode, backend
        self._variant = Variant(*knobs) if eah else None
        self._batch_size = int(batch_size)

    def generate_until(self, requests) -> list[str]:
        """The answers in the order of the requests, each cut where one of its `until` begins."""
        answers, acted = [], not requests or self._variant is None
        for settings, group in groupby((request.args for request in requests), lambda args: json.dumps(args[1])):
            same, wanted = list(group), json.loads(settings)
            until, config = wanted.pop("until", []), self._config(wanted)
            for begin in range(0, len(same), self._batch_size):
                batch = same[begin : begin + self._batch_size]
                with generating_by(self._model, config):
                    records = self._answer(batch, config)
                for (context, given, *_), record in zip(batch, records, strict=True):
                    text = _cut(record["answer"], [until] if isinstance(until, str) else until)
                    acted = acted or any(head is not None for head in record["heads"].values())
                    self.cache_hook.add_partial("generate_until", (context, given), text)
                    answers.append(text)
        if not acted:
            warnings.warn("EAH chose no head in any answer: the figures are of the model as it is", stacklevel=2)
        return answers

    def _answer(self, batch, config) -> list[dict]:
        items, pictures = [], []
        for number, (context, _, to_visual, doc, task, split) in enumerate(batch):
            visuals = to_visual(self.task_dict[task][split][doc]) or []
            if len(visuals) != 1 or not hasattr(visuals[0], "convert"):
                raise ValueError(
                    f"eah_hf answers questions about one picture; task {task!r}, document {doc} has {visuals}"
                )
            items.append(Item(number, "", context.replace(IMAGE, "").strip()))
            pictures.append(in_rgb(visuals[0]))
        return answer_batch(self._model, self._prompts, config, self._variant, items, pictures)

    def _config(self, wanted: dict):
        """Greedy unless the task samples; what only sampling reads is left out of greedy decoding."""
        wanted = {name: value for name, value in wanted.items() if value is not None}
        limit, temperature = wanted.pop("max_new_tokens", 1024), wanted.pop("temperature", 0)
        if wanted.setdefault("do_sample", temperature > 0):
            wanted["temperature"] = temperature or 1.0
        else:
            wanted = {name: value for name, value in wanted.items() if name not in ("top_p", "top_k")}
        check_changes(wanted)
        return neutral_config(self._model, limit, wanted)

    def loglikelihood(self, requests):
        raise NotImplementedError("eah_hf generates; tasks that compare log-likelihoods are not for it")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(
            "eah_hf answers one question about one picture; tasks of several rounds are not for it"
        )


def _cut(text: str, until: list[str]) -> str:
    return text[: min((text.index(end) for end in until if end and end in text), default=len(text))].strip()
