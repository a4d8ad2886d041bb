"""`make test-lmms`: lmms-eval itself runs our model, offline, on a tiny LLaVA and a task made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from eah.eval.benchmark import Item
from eah.eval.generation import answer_batch, generating_by, neutral_config
from eah.eval.variants import Variant
from eah.transformers.inputs import Prompts

from ..support.processors import processor_of
from ..support.tiny_models import build

QUESTIONS = ("a", "ab", "abc", "abcd", "abcde")  # of several lengths: a batch of them is padded
LENGTH, THRESHOLD = 6, 0.02
TASK = f"""\
dataset_path: json
dataset_kwargs:
  data_files: {{test: DATA}}
task: tiny_pope
test_split: test
output_type: generate_until
doc_to_visual: !function tiny.to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: {LENGTH}, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TO_VISUAL = """\
from PIL import Image


def to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, pictures = Path(name), picture_files(Path(name))
        model, processor = build("llava"), processor_of("llava")
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        write_task(folder, pictures)
        said = {}
        for variant in (None, Variant((1,), THRESHOLD)):
            said[variant] = by_lmms_eval(folder, variant)
            alone = one_by_one(model, processor, variant, pictures)
            assert said[variant] == alone, f"lmms-eval has {said[variant]}, generate() gives {alone}"
    assert len(set(map(tuple, said.values()))) == 2, f"EAH changes no answer: {said}"
    print("lmms-eval ran eah_hf without and with EAH, in batches: its answers are those of each prompt alone.")


def picture_files(folder: Path) -> list[Path]:
    paths = [folder / f"{number}.png" for number, _ in enumerate(QUESTIONS)]
    for number, path in enumerate(paths):
        Image.new("RGB", (12, 12), (60 * number, 90, 10)).save(path)
    return paths


def write_task(folder: Path, pictures: list[Path]) -> None:
    asked = zip(QUESTIONS, pictures, strict=True)
    lines = [{"image": str(path), "question": question, "answer": "yes"} for question, path in asked]
    (folder / "data.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks").mkdir()
    (folder / "tasks/tiny.yaml").write_text(TASK.replace("DATA", str(folder / "data.json")))
    (folder / "tasks/tiny.py").write_text(TO_VISUAL)


def by_lmms_eval(folder: Path, variant: Variant | None) -> list[str]:
    """The answers that its command line writes, found by the entry point; three prompts a batch."""
    out = folder / ("base" if variant is None else variant.name)
    model = f"pretrained={folder / 'model'},dtype=float32,threshold={THRESHOLD},eah={variant is not None}"
    command = [*("-m", "lmms_eval", "--model", "eah_hf", "--model_args", model, "--tasks", "tiny_pope")]
    command += [*("--include_path", folder / "tasks", "--device", "cpu", "--batch_size", 3)]
    command += [*("--log_samples", "--output_path", out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | offline)
    [samples] = out.rglob("*samples_tiny_pope.jsonl")
    records = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda record: record["doc_id"])
    return [record["filtered_resps"] for record in records]


def one_by_one(model, processor, variant: Variant | None, pictures: list[Path]) -> list[str]:
    prompts, config = Prompts(processor), neutral_config(model, LENGTH, {})
    found = []
    with generating_by(model, config):
        for question, path in zip(QUESTIONS, pictures, strict=True):
            with Image.open(path) as picture:
                item = Item(path.stem, path.name, question)
                found += answer_batch(model, prompts, config, variant, [item], [picture.convert("RGB")])
    return [record["answer"] for record in found]


if __name__ == "__main__":
    main()
