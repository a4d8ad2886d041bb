"""`eah eval run | score | report`: what their arguments are. What they do is imported when they run."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from eah.transformers.modes import MODES

NAMES = ("pope", "chair", "amber", "mmhal")
ANSWERS = re.compile(r"(?P<name>[\w.+-]+)(?::(?P<part>[\w+-]+))?=(?P<path>.+)")


def add_eval(commands) -> list[argparse.ArgumentParser]:
    """Adds `eval` to the subparsers of `eah`; the parsers, to which its common options are added."""
    parser = commands.add_parser("eval", help="POPE, CHAIR, AMBER on your own model and data, without and with EAH")
    parser.set_defaults(run=lambda _: parser.print_help() or 0)
    actions = parser.add_subparsers(dest="action", metavar="run|score|report")
    run = actions.add_parser("run", help="let a model answer, and score; the same command again goes on where it was")
    _add_data(run)
    _add_model(run)
    _add_scoring(run)
    run.set_defaults(run=_run)
    score = actions.add_parser("score", help="score answer files, also others'; needs no model")
    _add_data(score)
    score.add_argument(
        "--answers",
        required=True,
        nargs="+",
        type=_answers,
        metavar="NAME[:PART]=FILE",
        help="answers of a variant to a part; the first name is what the others are compared with",
    )
    _add_scoring(score)
    score.set_defaults(run=_score)
    report = actions.add_parser("report", help="one table and its plots from several runs")
    report.add_argument("folders", nargs="+", metavar="DIR", help="the --out of a run or score")
    report.set_defaults(run=_report)
    for action in (run, score, report):
        action.add_argument("--out", required=True, metavar="DIR", help="where the results are written")
    return [run, score, report]


def _add_data(parser) -> None:
    parser.add_argument("bench", choices=NAMES)
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="pope: question files; chair: the folder of COCO's annotations; amber: its data; mmhal: the template",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only N images")
    parser.add_argument("--subsets", type=count, default=1, metavar="K", help="K disjoint subsets of --limit images")
    parser.add_argument("--seed", type=int, metavar="S", help="of the choice of --limit images (default: 0)")
    parser.add_argument("--image-list", metavar="FILE", help="only these images, one a line")


def _add_model(parser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder with the model and its processor")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of the pictures")
    knobs = parser.add_argument_group("variants: every combination of these, and the model as it is")
    knobs.add_argument("--layers", type=_layers, nargs="+", default=[(1,)], metavar="N[+N...]", help="(default: 1)")
    knobs.add_argument("--threshold", type=float, nargs="+", default=[0.002], metavar="T", help="(default: 0.002)")
    knobs.add_argument("--min-density", type=float, nargs="+", default=[0.0], metavar="D")
    knobs.add_argument("--decode", nargs="+", default=["off"], choices=MODES)
    knobs.add_argument("--backend", default="auto")
    knobs.add_argument("--no-base", action="store_true", help="without the model as it is")
    how = parser.add_argument_group("generation: greedy, whatever the model's folder says")
    how.add_argument("--batch-size", type=count, default=1, metavar="N")
    how.add_argument("--max-new-tokens", type=count, metavar="N", help="(default: 10 of pope, 512 of the others)")
    how.add_argument("--prompt", type=utf8, metavar="TEXT", help="of chair")
    how.add_argument(
        "--prompt-suffix", type=utf8, default="none", metavar="none|llava|vcd|TEXT", help="after every question"
    )
    how.add_argument(
        "--prompt-format", type=utf8, metavar="TEXT", help="with <image> and {}, in place of the chat template"
    )
    how.add_argument("--generation", type=_setting, nargs="+", default=[], metavar="KEY=VALUE", help="of transformers")
    how.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="of sampling, a part each")
    how.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    how.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    how.add_argument("--trust-remote-code", action="store_true", help="let the model's folder bring its own code")


def _layers(text: str) -> tuple[int, ...]:
    numbers = text.split("+")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"a set of layers is numbers from 0 on, such as 1 or 0+1; got {text!r}")
    return tuple(sorted(map(int, numbers)))


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _add_scoring(parser) -> None:
    parser.add_argument("--words", choices=("nltk", "builtin"), help="rules that find words (default: nltk)")
    parser.add_argument("--yes-no", choices=("official", "opera", "first-word"))
    parser.add_argument("--unfinished", choices=("keep", "drop"), help="of CHAIR: what follows the last full stop")
    parser.add_argument("--vectors", metavar="spacy:MODEL|FILE|none", help="of AMBER: what tells similar words")
    parser.add_argument("--synonyms", metavar="FILE", help="of CHAIR (default: synonyms.txt in the data folder)")
    parser.add_argument("--resamples", type=count, default=2000, metavar="N", help="of the bootstrap (default: 2000)")


def utf8(text: str) -> str:
    """A byte that is no UTF-8 arrives as half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"must be UTF-8, got {text!r}") from error
    return text


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int >= 1, got {text!r}")
    return int(text)


def _answers(text: str) -> tuple[str, str | None, str]:
    match = ANSWERS.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE or NAME:PART=FILE, got {text!r}")
    return match["name"], match["part"], match["path"]


def _run(arguments) -> int:
    from eah.eval.start import start

    benchmark, settings = load(arguments)
    return start(benchmark, settings, arguments)


def _score(arguments) -> int:
    from eah.eval.answers import read_answers
    from eah.eval.journal import alone_in

    benchmark, settings = load(arguments)
    benchmark.parts = selected(benchmark.parts, arguments)
    answered = {}
    for name, part, path in arguments.answers:
        if part is None and len(benchmark.parts) > 1:
            raise ValueError(
                f"--answers {name}={path}: name the part, {name}:PART; parts are {', '.join(benchmark.parts)}"
            )
        part = part or next(iter(benchmark.parts))
        if part not in benchmark.parts:
            raise ValueError(f"--answers {name}:{part}={path}: parts are {', '.join(benchmark.parts)}")
        if (name, part) in answered:
            raise ValueError(f"--answers has {name}:{part} twice")
        answered[name, part] = read_answers(path, benchmark, part)
    with alone_in(Path(arguments.out)):
        return finish(benchmark, answered, settings, arguments)


def load(arguments):
    """The benchmark and the settings of its scoring."""
    from eah.eval.benchmarks import Scoring, load

    options = {name: getattr(arguments, name, None) for name in Scoring.__dataclass_fields__}
    return load(arguments.bench, arguments.data, Scoring(**options))


def selected(parts, arguments):
    from eah.eval.subsets import listed, sliced

    if arguments.subsets > 1 and arguments.limit is None:
        raise ValueError(f"--subsets {arguments.subsets} needs --limit, the number of images of each")
    if arguments.seed is not None and arguments.limit is None:
        raise ValueError(f"--seed {arguments.seed} is of the choice of --limit images, and there is no --limit")
    parts = listed(parts, arguments.image_list) if arguments.image_list else parts
    return sliced(parts, arguments.limit, arguments.subsets, arguments.seed or 0)


def finish(benchmark, answered, settings: dict, arguments) -> int:
    """Scores, writes result.json, result.md and the plots, and prints the tables."""
    from eah.eval import markdown
    from eah.eval.plots import plot
    from eah.eval.score import score

    out = Path(arguments.out)
    result = score(benchmark, answered, settings, arguments.resamples, out)
    markdown.write(out / "result.md", {"": result})
    plot(result, out)
    print(json.dumps(result, indent=2) if arguments.json else markdown.section("", result))
    return 0


def _report(arguments) -> int:
    from eah.eval import markdown
    from eah.eval.files import write_json
    from eah.eval.journal import alone_in
    from eah.eval.plots import plot
    from eah.eval.score import SCHEMA, read_result

    results, out = {}, Path(arguments.out)
    for folder in arguments.folders:
        result, name = read_result(Path(folder)), Path(folder).resolve().name
        if Path(folder).resolve() == out.resolve():
            raise ValueError(f"--out {out} is one of the folders that are reported, and would lose its result.json")
        if name in results:
            raise ValueError(f"two folders are named {name}: give them names of their own")
        results[name] = result
    whole = {"schema": SCHEMA, "runs": results}
    with alone_in(out):
        write_json(out / "result.json", whole)
        markdown.write(out / "result.md", results)
        for name, result in results.items():
            plot(result, out, prefix=f"{name}.")
    text = "\n\n".join(markdown.section(name, result) for name, result in results.items())
    print(json.dumps(whole, indent=2) if arguments.json else text)
    return 0
