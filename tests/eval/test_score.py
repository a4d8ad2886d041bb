"""`eah eval score` and `report`, as a user runs them, and the statistics."""

import contextlib
import io
import json
import random

import pytest

pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

import numpy as np

from eah import cli
from eah.eval.bootstrap import interval, resampled
from eah.eval.journal import alone_in
from eah.eval.pope import Pope
from eah.eval.score import score
from eah.eval.variants import Variant, family_and_threshold, product

from . import coco


def run(capsys, *arguments):
    status = cli.main(["eval", *map(str, arguments)])
    return status, *capsys.readouterr()


def questions(folder, part, images=8):
    path = folder / f"pope_{part}.json"
    lines = [
        {"question_id": 3 * i + q, "image": f"{i}.jpg", "text": f"{i} {q}?", "label": ("yes", "no")[(i + q) % 2]}
        for i in range(images)
        for q in range(3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(folder, name, seed, wrong, images=8):
    """Answers with EAH's notes, of which a share is wrong."""
    chance = random.Random(seed)
    lines = []
    for i in range(images):
        for q in range(3):
            right = ("yes", "no")[(i + q) % 2]
            said = {"yes": "no", "no": "yes"}[right] if chance.random() < wrong else right
            record = {"id": 3 * i + q, "image": f"{i}.jpg", "prompt": "", "answer": said, "tokens": 1, "stopped": "eos"}
            lines.append(record | ({"heads": {"1": chance.choice([None, 3])}} if name.startswith("eah") else {}))
    path = folder / f"{name}.{seed}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with `out`, the arguments that made it, and what they printed."""
    tmp_path = tmp_path_factory.mktemp("scored")
    data = [questions(tmp_path, part) for part in ("random", "popular")]
    names = {"base": 0.4, "eah-l1-t0.002": 0.2, "eah-l1-t0.01": 0.1}
    given = [
        f"{name}:{part}={answers(tmp_path, name, seed, wrong)}"
        for seed, part in enumerate(("random", "popular"))
        for name, wrong in names.items()
    ]
    arguments = ["score", "pope", "--data", *data, "--answers", *given, "--out", tmp_path / "out"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["eval", *map(str, arguments)]) == 0
    return tmp_path, arguments, out.getvalue()


def test_result_json(scored):
    folder, _, _ = scored
    result = json.loads((folder / "out/result.json").read_text())
    assert (
        result["schema"] == "eah-eval/1" and result["bench"] == "pope" and result["settings"] == {"yes_no": "official"}
    )
    assert [(row["variant"], row["part"], row["n"]) for row in result["rows"][:4]] == [
        ("base", "random", 24),
        ("eah-l1-t0.002", "random", 24),
        ("eah-l1-t0.01", "random", 24),
        ("base", "popular", 24),
    ]
    base, eah = result["rows"][:2]
    assert base["acted"] is None and 0 < eah["acted"] < 1 and eah["truncated"] == 0 and eah["unparsed"] == 0
    assert list(base["metrics"]) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
    by = {(row["variant"], row["part"]): row["metrics"]["accuracy"] for row in result["rows"]}
    for entry in result["summary"]:
        if entry["metric"] == "accuracy":
            values = [by[entry["variant"], part] for part in ("random", "popular")]
            assert entry["mean"] == pytest.approx(sum(values) / 2) and entry["parts"] == 2
            assert entry["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    one = next(d for d in result["differences"] if d["part"] == "mean" and d["variant"] == "eah-l1-t0.01")
    assert one["against"] == "base" and one["metric"] == "accuracy" and one["level"] == 0.95
    assert one["resamples"] == 2000 and one["unit"] == "image" and one["units"] == 8
    assert one["low"] <= one["difference"] <= one["high"] and one["difference"] > 0
    assert {d["part"] for d in result["differences"]} == {"random", "popular", "mean"}
    details = (folder / "out/details/base.random.jsonl").read_text().splitlines()
    assert set(json.loads(details[0])) == {"id", "parsed", "label"} and len(details) == 24


def test_the_table_and_the_plots(scored):
    folder, _, out = scored
    text = (folder / "out/result.md").read_text()
    assert text.strip() == out.strip()
    assert "| base |" in text and "## mean" in text and "95 % interval" in text
    assert text.count("[") >= 2 * 3 * 5 - 5 and "EAH chose a head in" in text
    assert (folder / "out/by_threshold.png").stat().st_size > 5000


def test_scoring_again_gives_the_same(scored, capsys):
    folder, arguments, out = scored
    before = (folder / "out/result.json").read_bytes()
    assert run(capsys, *arguments)[1] == out and (folder / "out/result.json").read_bytes() == before


def test_report_of_several_runs(scored, capsys):
    folder, arguments, _ = scored
    run(capsys, *arguments[:-1], folder / "other")
    status, out, err = run(capsys, "report", folder / "out", folder / "other", "--out", folder / "both")
    assert status == 0, err
    assert "# pope: out" in out and "# pope: other" in out
    assert list(json.loads((folder / "both/result.json").read_text())["runs"]) == ["out", "other"]
    assert {path.name for path in (folder / "both").iterdir() if path.suffix} == {
        *("result.json", "result.md", "out.by_threshold.png", "other.by_threshold.png")
    }


def test_a_report_does_not_overwrite_what_it_tells_of(scored, capsys):
    folder, _, _ = scored
    before = (folder / "out/result.json").read_bytes()
    status, _, err = run(capsys, "report", folder / "out", "--out", folder / "out/../out")
    assert status == 1 and "--out" in err and "is one of the folders" in err and err.count("\n") == 1
    assert (folder / "out/result.json").read_bytes() == before


@pytest.mark.parametrize("content", ["[]", "{}", '{"schema": "eah-eval/1", "rows": []}', '{"schema": "eah-eval/1"}'])
def test_a_report_of_what_is_no_result(tmp_path, capsys, content):
    (tmp_path / "result.json").write_text(content)
    status, _, err = run(capsys, "report", tmp_path, "--out", tmp_path / "out")
    assert status == 1 and "is not of the schema eah-eval/1" in err and err.count("\n") == 1


def test_two_do_not_write_to_one_folder(scored, capsys):
    folder, arguments, _ = scored
    for given in (arguments, ["report", folder / "out", "--out", folder / "held"]):
        with alone_in(folder / "held"):
            status, _, err = run(capsys, *given[:-1], folder / "held")
        assert status == 1 and "another process is writing to" in err
    assert {path.name for path in (folder / "held").iterdir()} == {".lock"}


def test_chair_against_length(tmp_path, capsys):
    data = coco.write(tmp_path, [["dog"], ["bear"]])
    (tmp_path / "a.json").write_text(
        json.dumps([{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A dog"}])
    )
    arguments = ["score", "chair", "--data", data, "--words", "builtin", "--answers", f"theirs={tmp_path / 'a.json'}"]
    status, out, err = run(capsys, *arguments, "--out", tmp_path / "out", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["settings"]["words"] == "builtin" and "not comparable" in result["settings"]["words_data"]
    assert result["rows"][0]["metrics"] == {"chair_s": 0.5, "chair_i": 0.5, "recall": 0.5, "length": 2.5}
    assert result["rows"][0]["truncated"] is None and result["differences"] == []
    assert (tmp_path / "out/chair_by_length.png").exists()


def test_a_list_of_images_and_a_limit(scored, capsys, tmp_path):
    _folder, arguments, _ = scored
    (tmp_path / "list.txt").write_text("3.jpg\r\n1.jpg\r\n")
    status, _, err = run(capsys, *arguments, "--image-list", tmp_path / "list.txt")
    assert status == 1 and "which part random does not have" in err  # the answers are to all images


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--answers", "a=x"], "--answers a=x: name the part, a:PART; parts are random"),
        (["--answers", "a:other=x"], "--answers a:other=x: parts are random, popular"),
        (["--answers", "a:random=nowhere"], "there is no file nowhere"),
        (["--words", "builtin"], "--words has no meaning for pope"),
        (["--subsets", "2"], "--subsets 2 needs --limit"),
        (["--seed", "3"], "--seed 3 is of the choice of --limit images, and there is no --limit"),
        (["--out", __file__], f"--out must be a folder, and {__file__} is a file"),
        (["--limit", "5", "--subsets", "2"], "--limit 5 x --subsets 2 are 10 images, and there are 8"),
        (["--data", "nowhere.json"], "there is no file nowhere.json"),
    ],
)
def test_bad_input_is_one_line_and_status_1(scored, capsys, more, error):
    folder, arguments, _ = scored
    before = (folder / "out/result.json").read_bytes()
    status, out, err = run(capsys, *arguments, *more)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert error in err and err.startswith("eah eval: ")
    assert (folder / "out/result.json").read_bytes() == before


def test_variants_have_to_answer_the_same(scored, capsys):
    _folder, arguments, _ = scored
    given = [a for a in arguments if "eah-l1-t0.01:popular" not in str(a)]
    status, _, err = run(capsys, *given)
    assert status == 1 and "eah-l1-t0.01 has no answers to part popular" in err


def test_a_full_device_leaves_the_old_result(scored, capsys):
    folder, arguments, _ = scored
    before = (folder / "out/result.json").read_bytes()
    (folder / "out/.result.part.json").symlink_to("/dev/full")
    status, _, err = run(capsys, *arguments)
    assert status == 1 and err.count("\n") == 1
    assert "No space left on device" in err and str(folder / "out/result.json") in err
    assert (folder / "out/result.json").read_bytes() == before


def test_an_option_of_wrong_form_is_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "score", "pope", "--data", "x", "--answers", "nothing", "--out", "y")
    assert stopped.value.code == 2 and "NAME=FILE or NAME:PART=FILE, got 'nothing'" in capsys.readouterr().err


def test_the_draws_are_paired_and_the_same_every_time():
    sums = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    drawn = resampled(sums, 500)
    assert drawn.shape == (500, 2) and (drawn[:, 1] == 10 * drawn[:, 0]).all() and len(set(drawn[:, 0])) == 9
    assert (drawn == resampled(sums, 500)).all()
    assert abs(drawn[:, 0].mean() - 7) < 0.3


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    sums = np.random.default_rng(1).random((40, 3))
    whole = resampled(sums, 50)
    monkeypatch.setattr("eah.eval.bootstrap.AT_ONCE", 90)
    assert np.array_equal(resampled(sums, 50), whole)


def test_an_interval_is_of_the_resamples_in_which_the_value_is_defined():
    values = np.append(np.arange(101.0), np.nan)
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(np.full(3, np.nan)) == (None, None)


def test_the_bootstrap_finds_the_standard_error(tmp_path):
    """Of the accuracies' difference, against its formula over images."""
    path = questions(tmp_path, "random", images=60)
    pope, chance = Pope([str(path)]), random.Random(3)
    from eah.eval.benchmark import Answer

    def said(wrong):
        flip = {"yes": "no", "no": "yes"}
        return [(i, Answer(flip[i.label] if chance.random() < wrong else i.label)) for i in pope.parts["random"]]

    answered = {("base", "random"): said(0.3), ("other", "random"): said(0.2)}
    [found, *_] = score(pope, answered, {}, 4000, tmp_path / "out")["differences"]
    right = {v: np.zeros(60) for v, _ in answered}
    for (variant, _), pairs in answered.items():
        for item, answer in pairs:
            right[variant][int(item.image[:-4])] += (answer.text == item.label) / 3
    differ = right["other"] - right["base"]
    error = differ.std() / 60**0.5
    assert found["difference"] == pytest.approx(differ.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_names_of_variants():
    names = list(product([(1,), (0, 1)], [0.002, 0.0005], [0.0], ["off", "hold"], "auto"))
    assert (
        names[:3] == ["eah-l1-t0.002", "eah-l1-t0.002-hold", "eah-l1-t0.0005"] and names[-1] == "eah-l0+1-t0.0005-hold"
    )
    assert Variant((0, 1), 1e-5, 0.15, "track", "torch").name == "eah-l0+1-t1e-05-d0.15-track-torch"
    assert family_and_threshold("eah-l0+1-t1e-05-d0.15-track-torch") == ("layers 0+1-d0.15-track-torch", 1e-5)
    assert family_and_threshold("eah-l1-t0.002") == ("layers 1", 0.002)
    for other in ("base", "eah-l1-t0.002-2", "eah-l1-t.", "eah-l1-t0.002.1", "eah-l1-tinf"):
        assert family_and_threshold(other) is None
    with pytest.raises(ValueError, match=r"eah-l1-t0.002 was asked for twice"):
        product([(1,)], [0.002, 0.0020000001], [0.0], ["off"], "auto")
