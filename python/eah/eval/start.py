"""From the arguments of `eah eval run` to its results."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from eah.eval.command import finish, selected
from eah.eval.files import sha256, write_json
from eah.eval.generation import SUFFIXES, check_changes, neutral_config
from eah.eval.journal import alone_in
from eah.eval.mmhal import Mmhal
from eah.eval.run import answer, check_pictures, check_settings, check_variants, tasks, versions
from eah.eval.subsets import images_of, with_files
from eah.eval.variants import product
from eah.transformers.inputs import Prompts, check_form
from eah.transformers.pretrained import check_model, device_of, load_pretrained
from eah_kernels import BACKENDS


def start(benchmark, scoring: dict, arguments) -> int:
    """Answers, scores and tells; whatever can be refused without the weights is refused before they are read."""
    if not Path(arguments.model).is_dir():
        raise ValueError(f"--model must be a folder, and there is none {arguments.model}; nothing is downloaded")
    changes = dict(arguments.generation)
    for key in changes:
        if [name for name, _ in arguments.generation].count(key) > 1:
            raise ValueError(f"--generation {key} was given twice")
    check_changes(changes)
    check_form(arguments.prompt_format, "--prompt-format")
    variants = product(
        arguments.layers, arguments.threshold, arguments.min_density, arguments.decode, arguments.backend
    )
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"--seeds must be distinct, got {' '.join(map(str, arguments.seeds))}")
    if len(arguments.seeds) > 1 and not changes.get("do_sample"):
        raise ValueError(
            f"--seeds {' '.join(map(str, arguments.seeds))} are of sampling: --generation do_sample=true; "
            "greedy answers are the same for each"
        )
    candidates = pictured(benchmark, arguments)
    parts = selected(candidates, arguments)
    empty = [part for part, items in parts.items() if not items]
    if empty:
        raise ValueError(f"part {empty[0]} has no item of the images that were chosen")
    todo = tasks(variants, not arguments.no_base, parts, arguments.seeds)
    check_pictures(arguments.images, todo)
    device = device_of(arguments.device, "--device")
    if arguments.backend not in BACKENDS:
        raise ValueError(f"--backend must be one of {', '.join(BACKENDS)}, got {arguments.backend!r}")
    knobs = [{**asdict(variant), "backend": "auto"} for variant in variants.values()]  # the backend is of the device
    check_model(arguments.model, knobs, arguments.trust_remote_code)
    asked = {
        "bench": benchmark.name,
        "model": str(Path(arguments.model).resolve()),
        "data": {path.name: sha256(path) for path in benchmark.files},
        "image_list": sha256(arguments.image_list) if arguments.image_list else None,
        "images": arguments.images,
        "candidates": len(images_of(candidates)),
        "limit": arguments.limit,
        "subsets": arguments.subsets,
        "seed": arguments.seed or 0,
        "seeds": arguments.seeds,
        "prompt": arguments.prompt,
        "prompt_suffix": SUFFIXES.get(arguments.prompt_suffix, arguments.prompt_suffix),
        "prompt_format": arguments.prompt_format,
        "batch_size": arguments.batch_size,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }
    out = Path(arguments.out)
    with alone_in(out):
        check_settings(out, asked)
        processor, model = load_pretrained(arguments.model, arguments.dtype, device, arguments.trust_remote_code)
        check_variants(model, todo)
        config = neutral_config(model, arguments.max_new_tokens or benchmark.max_new_tokens, changes)
        prompts = Prompts(processor, asked["prompt_suffix"], arguments.prompt_format)
        resolved = {
            "generation": {
                name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"
            },
            "dtype": str(model.dtype).removeprefix("torch."),
            "example_prompt": prompts.text(todo[0].items[0].prompt),
        }
        check_settings(out, asked | resolved)
        write_json(out / "run.json", asked | resolved)
        left_out = len(images_of(benchmark.parts)) - asked["candidates"]
        if left_out:
            print(f"eah eval: annotated, but not in {arguments.images}: {left_out} images", file=sys.stderr)
        answered = answer(model, prompts, config, todo, arguments.images, arguments.batch_size, out)
        if isinstance(benchmark, Mmhal):
            return hand_to_judge(benchmark, answered, out, arguments.json)
        return finish(benchmark, answered, scoring, arguments)


def pictured(benchmark, arguments):
    """The parts' items that may be chosen: CHAIR's with a picture, for COCO's folder holds one split, its annotations
    often two; else, and where they are listed, all."""
    if benchmark.name != "chair" or arguments.image_list:
        return benchmark.parts
    parts = with_files(benchmark.parts, arguments.images)
    if not images_of(parts):
        raise ValueError(f"no picture of {arguments.images} has annotations")
    return parts


def hand_to_judge(benchmark: Mmhal, answered, out: Path, as_json: bool) -> int:
    written = []
    for (variant, part), pairs in answered.items():
        path = out / "responses" / f"{variant}.{part}.json"
        write_json(path, benchmark.responses(pairs))
        written.append({"variant": variant, "part": part, "path": str(path)})
        if not as_json:
            print(f"{path}: have a judge rate it, then: eah eval score mmhal --answers {variant}:{part}=JUDGED ...")
    if as_json:
        print(json.dumps({"responses": written}, indent=2))
    return 0
