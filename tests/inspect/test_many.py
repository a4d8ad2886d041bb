"""Many pictures: the statistics against their definitions, runs that go on, and calibration."""

import dataclasses
import json
import math
import os
import statistics
import types
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

import eah
from eah import cli
from eah.cli import look as command
from eah.cli.samples import load_picture
from eah.eval.files import write_json, write_records
from eah.inspect import look
from eah.inspect.calibrate import DENSE, calibrate, candidates
from eah.inspect.many import (
    BINS,
    THRESHOLDS,
    correlation,
    hallucinations,
    in_common,
    pictures_in,
    record_of,
    thresholds_around,
)

from .test_page import Page

PROMPT, OWN = "What is it?", 0.05


@pytest.fixture
def run(tiny, pictures, tmp_path, capsys, monkeypatch):
    """`eah inspect --images` with the tiny model; the status, stdout and stderr. run.looks: the pictures looked at."""
    processor, looks = tiny[1], []
    monkeypatch.setattr(command, "checked", lambda _: torch.device("cpu"))
    monkeypatch.setattr(command, "loaded", lambda *_: (processor, tiny[0]))

    def seen_by(model, processor, image, *rest, **options):
        looks.append(image)
        return look(model, processor, image, *rest, **options)

    monkeypatch.setattr("eah.inspect.many.look", seen_by)

    def run(*more, **changes):
        given = {
            "--model": "m",
            "--images": pictures,
            "--prompt": PROMPT,
            "--out": tmp_path / "out",
            "--threshold": OWN,
        }
        words = [str(word) for pair in (given | changes).items() for word in pair]
        status = cli.main(["inspect", *words, *map(str, more)])
        return status, *capsys.readouterr()

    run.looks, run.out = looks, tmp_path / "out"
    return run


def test_pictures_in_common_are_those_of_each_alone(run, tiny, pictures):
    status, out, err = run()
    assert status == 0, err
    assert out.split() == [str(run.out / "inspect.html"), str(run.out / "inspect.json")]
    data = json.loads((run.out / "inspect.json").read_text())
    alone = [look(*tiny, load_picture(str(path))[0], PROMPT, threshold=OWN) for path in pictures_in(pictures, None)]
    assert [one["image"] for one in data["pictures"]] == sorted(path.name for path in pictures.iterdir())
    for number, layer in enumerate(data["layers"]):
        heads = [seen.layers[number].head(OWN) for seen in alone]
        densities = [int(seen.layers[number].counts(OWN).max()) / 9 for seen in alone]
        wins = Counter(-1 if head is None else head for head in heads)
        assert layer["wins"] == {str(head): count for head, count in sorted(wins.items())} and layer["pictures"] == 7
        assert layer["density"]["median"] == pytest.approx(statistics.median(densities))
        assert layer["agreement"] == max(wins.values()) / 7
        assert layer["entropy_bits"] == pytest.approx(-sum(n / 7 * math.log2(n / 7) for n in wins.values()))
        assert len(layer["places"]) == len(layer["places"][0]) == BINS
    page = Page((run.out / "inspect.html").read_text())
    assert "What EAH sees in 7 pictures" in page.text and all(image["alt"] for image in page.images)
    assert {path.name for path in run.out.glob("*.png")} == {"wins.png", "density.png", "places.png"}


def test_a_second_run_goes_on_and_gives_the_same(run, pictures):
    assert run("--limit", 3)[0] == 0 and len(run.looks) == 3
    assert run()[0] == 0 and len(run.looks) == 7
    first = (run.out / "inspect.json").read_bytes()
    (run.out / "looks" / "2.png.json").unlink()
    load_picture(str(pictures / "5.png"))[0].rotate(90).save(pictures / "4.png")  # another picture by the same name
    assert run()[0] == 0 and len(run.looks) == 9
    assert run()[0] == 0 and len(run.looks) == 9
    load_picture(str(pictures / "4.png"))
    changed = json.loads((run.out / "inspect.json").read_text())["pictures"]
    for old, new in zip(json.loads(first)["pictures"], changed, strict=True):
        assert (old == new) or new["image"] == "4.png"
    for changes in ({"--prompt": "Why?"}, {"--threshold": 0.04}, {"--model": "n"}):
        status, _, err = run(**changes)
        assert status == 1 and "was begun with other settings" in err and err.count("\n") == 1


def test_looks_of_unknown_settings_are_not_taken(run):
    """Who deletes run.json to be let in with another prompt is not given the looks of this one."""
    assert run("--limit", 2)[0] == 0
    (run.out / "run.json").unlink()
    status, out, err = run("--limit", 2, **{"--prompt": "Why?"})
    assert status == 1 and out == "" and err.count("\n") == 1 and len(run.looks) == 2
    assert f"{run.out} has results, and no run.json that says how they were made" in err


def test_a_name_that_is_no_utf8(run, pictures):
    name = os.fsdecode(b"\xff.png")
    (pictures / "0.png").rename(pictures / name)
    status, _, err = run("--limit", 7)
    assert status == 0, err
    assert json.loads((run.out / "inspect.json").read_text())["pictures"][-1]["image"] == name


def test_an_interrupted_run_keeps_what_it_has(run, pictures):
    (pictures / "5.png").write_bytes(b"no picture")
    status, _, err = run()
    assert status == 1 and "5.png is no picture that can be read" in err and err.count("\n") == 1
    assert len(run.looks) == 5 and not (run.out / "inspect.html").exists()
    load_picture(str(pictures / "6.png"))[0].save(pictures / "5.png")
    assert run()[0] == 0 and len(run.looks) == 7


def test_calibration_from_one_pass_is_what_the_report_says_at_every_threshold(run, tiny, pictures):
    status, out, err = run("--calibrate")
    assert status == 0, err
    kept, processor = json.loads((run.out / "calibration.json").read_text()), tiny[1]
    assert len(run.looks) == 7 and len(kept["thresholds"]) == THRESHOLDS
    steps = [math.log(b / a) for a, b in zip(kept["thresholds"], kept["thresholds"][1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps), rel=0.05)
    model, inputs = tiny[0], []
    for path in pictures_in(pictures, None):
        inputs.append(look(model, processor, load_picture(str(path))[0], PROMPT, pictured=()).inputs)
    cells = {(cell["layer"], cell["threshold"]): cell for cell in kept["cells"]}
    assert len(cells) == 3 * THRESHOLDS
    for threshold in kept["thresholds"][8::5]:
        rows = []
        for one in inputs:
            with torch.no_grad(), eah.enable(model, layers=(1,), threshold=threshold) as handle:
                model(**one)
                rows += handle.report().layers[0].rows
        cell, most = cells[1, threshold], [sorted(row.sinks)[::-1] for row in rows]
        assert cell["chosen"] == pytest.approx(statistics.fmean(row.head is not None for row in rows))
        assert cell["tied"] == pytest.approx(statistics.fmean(row.tied for row in rows))
        assert cell["saturated"] == pytest.approx(statistics.fmean(row.density > DENSE for row in rows))
        assert cell["margin"] == pytest.approx(statistics.fmean((a - b) / 9 for a, b, *_ in most))
    found = kept["candidates"]
    assert found and all(cell["usable"] for cell in found) and len({cell["layer"] for cell in found}) == len(found)
    best = found[0]
    kl = []
    for one in inputs:
        with torch.no_grad():
            plain = model(**one).logits[0, -1].double().log_softmax(-1)
            with eah.enable(model, layers=(best["layer"],), threshold=best["threshold"]):
                enhanced = model(**one).logits[0, -1].double().log_softmax(-1)
        kl.append((plain.exp() * (plain - enhanced)).sum().item())
    assert best["kl"]["pictures"] == 7 and best["kl"]["median"] == pytest.approx(statistics.median(kl), abs=1e-6)
    lines = out.splitlines()
    assert lines[-len(found) :] == kept["commands"] and len(kept["commands"]) == len(found)
    assert lines[5].split()[:2] == [str(best["layer"]), f"{best['threshold']:g}"]
    assert f"--layers {best['layer']} --threshold {best['threshold']:g}" in kept["commands"][0]
    page = Page((run.out / "inspect.html").read_text())
    assert kept["commands"][0] in page.text and "calibration.png" in {path.name for path in run.out.glob("*.png")}
    before = (run.out / "calibration.json").read_bytes()
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert run("--calibrate")[0] == 0 and not calls
    hook.remove()
    assert (run.out / "calibration.json").read_bytes() == before


def records(heads, best, second, tokens=10):
    layers = [{"1": {"head": [h], "best": [b], "second": [s]}} for h, b, s in zip(heads, best, second, strict=True)]
    return [{"image_tokens": tokens, "layers": {"1": {k: 2 * v for k, v in one["1"].items()}}} for one in layers]


def test_what_is_usable_and_stable():
    [cell] = calibrate(records([2, 2, 2, 3], [8, 7, 6, 9], [1, 1, 1, 1]), [0.002])
    assert cell == {
        "layer": 1,
        "threshold": 0.002,
        "chosen": 1,
        "saturated": 0,
        "tied": 0,
        "margin": pytest.approx(0.65),
        "stability": 0.75,  # head 2 wins in 1 of 2 of the second half, and in 2 of 2 of the first
        "usable": True,
    }
    [tied] = calibrate(records([2, 2], [8, 7], [8, 1]), [0.002])
    assert tied["tied"] == 0.5 and not tied["usable"]
    [full] = calibrate(records([0, 0], [10, 10], [1, 1]), [0.002])
    assert full["saturated"] == 1 and not full["usable"]
    [none] = calibrate(records([-1, -1], [0, 0], [0, 0]), [0.002])
    assert none["chosen"] == none["tied"] == none["stability"] == 0 and not none["usable"]
    [alone] = calibrate(records([1], [5], [1]), [0.002])
    assert alone["stability"] is None and alone["usable"]


def test_candidates_are_of_different_layers_and_the_widest_first():
    cells = [
        {"layer": layer, "threshold": t, "margin": m, "usable": u}
        for layer, t, m, u in [(0, 1, 0.1, True), (0, 2, 0.3, True), (1, 1, 0.9, False), (2, 1, 0.2, True)]
    ]
    assert [(c["layer"], c["threshold"]) for c in candidates(cells)] == [(0, 2), (2, 1)] and candidates([]) == []


def test_no_candidate_is_told(run):
    run("--limit", 1)
    path = run.out / "looks" / "0.png.json"
    record = json.loads(path.read_text())
    for entry in record["layers"].values():
        entry["head"] = [-1] * len(entry["head"])
    write_json(path, record)
    status, out, err = run("--limit", 1, "--calibrate")
    assert status == 0, err
    assert out.endswith("none is usable\n")
    assert "No combination of layer and threshold is usable" in (run.out / "inspect.html").read_text()


def test_places_follow_the_boxes(tiny, picture):
    seen = look(*tiny, picture, "abc", threshold=0.0)
    sink_of_all = record_of(seen, [0.0])["layers"]["1"]["places"]
    assert sink_of_all == [[1.0] * BINS] * BINS
    means = torch.zeros(4, 9)
    means[:, 2] = 1.0  # the third token: top right
    layer = dataclasses.replace(seen.layers[1], column_mean=means)
    places = record_of(dataclasses.replace(seen, layers=(layer,)), [0.5])["layers"]["1"]["places"]
    third = BINS // 3
    assert all(places[y][x] == float(y < third and x >= 2 * third) for y in range(BINS) for x in range(BINS))
    nowhere = dataclasses.replace(seen, grids=(), layers=(layer,))
    assert record_of(nowhere, [0.5])["layers"]["1"]["places"] is None
    assert in_common([{**record_of(nowhere, [0.5])}])[0]["places"] is None


def test_thresholds_follow_the_level_of_even_attention():
    layer = types.SimpleNamespace(uniform=torch.tensor([0.001, 0.003, 0.0]))
    grid = thresholds_around(types.SimpleNamespace(layers=[layer]))
    assert len(grid) == 24 and grid[0] == 0.0001 and grid[-1] == 0.02


def results(folder, bench="chair"):
    answers = [{"id": n, "image": f"{n}.png", "answer": "x"} for n in range(4)]
    if bench == "chair":
        details = [{"image_id": n, "objects": ["a"] * 4, "hallucinated": ["a"] * n} for n in range(4)]
    else:
        answers += [{"id": 9, "image": "0.png", "answer": "x"}]
        details = [{"id": n, "parsed": "yes", "label": "no" if n % 2 else "yes"} for n in (0, 1, 2, 3, 9)]
    write_records(folder / "answers/base.all.jsonl", answers)
    write_records(folder / "details/base.all.jsonl", details)
    rows = [{"variant": "base", "part": "all"}, {"variant": "eah", "part": "all"}]
    write_json(folder / "result.json", {"schema": "eah-eval/1", "bench": bench, "rows": rows, "summary": rows})
    return folder


def test_answers_of_an_evaluation_are_set_against_density(run, tmp_path):
    assert hallucinations(results(tmp_path / "chair")) == ("base", {f"{n}.png": n / 4 for n in range(4)})
    assert hallucinations(results(tmp_path / "pope", "pope"))[1] == {"0.png": 0.5, "1.png": 1, "2.png": 0, "3.png": 1}
    status, _, err = run("--answers", tmp_path / "chair")
    assert status == 0, err
    found = json.loads((run.out / "inspect.json").read_text())["hallucination"]
    assert found["pictures"] == 4 and found["variant"] == "base" and found["layer"] == 1
    assert (run.out / "hallucination.png").exists()
    write_records(tmp_path / "chair/answers/base.all.jsonl", [{"id": n, "image": f"x{n}.png"} for n in range(4)])
    write_json(tmp_path / "report/result.json", {"runs": {}})
    write_records(
        tmp_path / "chair/details/base.all.jsonl",
        [{"image_id": n, "objects": ["a"], "hallucinated": []} for n in range(9)],
    )
    for folder, named in (
        ("none", "no result.json"),
        ("report", "is not of the schema eah-eval/1"),
        ("chair", "none of the pictures that were looked at"),
    ):
        status, _, err = run("--answers", tmp_path / folder)
        assert status == 1 and named in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("result.json", "[]", "is not of the schema eah-eval/1"),
        ("answers/base.all.jsonl", '{"image": "0.png"}', "record 1: 'id' must be int or str, got None"),
        ("answers/base.all.jsonl", '{"id": 1, "image": 3}', "record 1: 'image' must be str, got 3"),
        ("details/base.all.jsonl", '{"id": [], "label": "yes"}', "record 1: 'id' must be int or str, got []"),
        ("details/base.all.jsonl", '{"image_id": 1, "hallucinated": 3}', "'hallucinated' must be list, got 3"),
    ],
)
def test_answers_that_are_broken_are_one_line(run, tmp_path, file, content, named):
    (results(tmp_path / "chair") / file).write_text(content)
    status, out, err = run("--answers", tmp_path / "chair")
    assert status == 1 and out == "" and err.count("\n") == 1 and named in err and file in err


def test_rank_correlation():
    assert correlation([(1, 2), (2, 4), (3, 8)]) == pytest.approx(1) and correlation([(1, 2), (2, 1)]) is None
    assert correlation([(1, 8), (2, 4), (3, 4), (4, 1)]) == pytest.approx(-0.9486832980505138)
    assert correlation([(1, 5), (2, 5), (3, 5)]) is None


@pytest.mark.parametrize(
    ("more", "changes", "named"),
    [
        ((), {"--images": "none"}, "there is no folder none"),
        ((), {"--images": "tests/inspect"}, "has no picture"),
        (("--compare",), {}, "--compare is of --image, which was not given"),
        (("--layers", "0"), {}, "--layers is of --image, which was not given"),
        (("--layers", "all"), {}, "--layers is of --image, which was not given"),
        (("--max-new-tokens", "3"), {}, "--max-new-tokens is of --image, which was not given"),
    ],
)
def test_errors_are_one_line(run, more, changes, named):
    status, out, err = run(*more, **changes)
    assert status == 1 and named in err and err.count("\n") == 1 and out == "" and not run.out.exists()
