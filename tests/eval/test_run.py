"""`eah eval run` on a tiny LLaVA in a folder: answers, interruptions, refusals."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from eah import cli

from ..support.processors import processor_of
from ..support.tiny_models import build
from . import coco

ROOT = Path(__file__).parents[2]
IMAGES = 7


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A folder with the model, POPE's questions, CHAIR's annotations and the pictures. The model likes to repeat."""
    folder = tmp_path_factory.mktemp("eval")
    model, processor = build("llava"), processor_of("llava")
    model.generation_config.eos_token_id = [16, 83]
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    coco.write(folder, [["dog"]] * IMAGES)
    (folder / "images").mkdir()
    names = [image["file_name"] for image in json.loads((folder / "instances_val2014.json").read_text())["images"]]
    for number, name in enumerate(names):
        Image.new("RGB", (12, 12), (30 * number, 90, 200 - 20 * number)).save(folder / "images" / name)
    lines = [
        {
            "question_id": n,
            "image": names[n % IMAGES],
            "text": "abcdefghi"[: 1 + 2 * n % 9],
            "label": ("yes", "no")[n % 2],
        }
        for n in range(11)
    ]
    (folder / "pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(folder, out, *more, bench="pope"):
    data = folder / "pope_random.json" if bench == "pope" else folder
    common = ["eval", "run", bench, "--model", folder / "model", "--data", data, "--images", folder / "images"]
    return [*map(str, [*common, "--out", out, "--max-new-tokens", 6, "--dtype", "float32", "--device", "cpu", *more])]


def run(capsys, *given, **options):
    try:
        status = cli.main(arguments(*given, **options))
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def answers(out):
    return {path.name: path.read_bytes() for path in sorted((out / "answers").iterdir())}


SWEEP = ("--layers", "1", "0+1", "--threshold", "0.002", "0.05", "--batch-size", 4)


@pytest.fixture(scope="module")
def finished(saved_model, tmp_path_factory):
    """What an uninterrupted run of the sweep leaves."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert cli.main(arguments(saved_model, out, *SWEEP)) == 0
    return out


def test_a_sweep(finished, capsys):
    names = ["base", "eah-l1-t0.002", "eah-l1-t0.05", "eah-l0+1-t0.002", "eah-l0+1-t0.05"]
    result = json.loads((finished / "result.json").read_text())
    assert [(row["variant"], row["part"], row["n"]) for row in result["rows"]] == [
        (name, "random", 11) for name in names
    ]
    assert result["rows"][1]["acted"] == 1 and result["rows"][0]["acted"] is None
    records = [json.loads(line) for line in answers(finished)["eah-l0+1-t0.002.random.jsonl"].decode().splitlines()]
    assert [record["id"] for record in records] == list(range(11))
    assert list(records[0]) == ["id", "image", "prompt", "answer", "tokens", "stopped", "heads"]
    assert set(records[0]["heads"]) == {"0", "1"} and records[0]["prompt"] == "<image>\na"
    stops = {(record["stopped"], record["tokens"] < 6) for record in records}
    assert stops <= {("eos", True), ("length", False)}
    settings = json.loads((finished / "run.json").read_text())
    assert settings["generation"]["max_new_tokens"] == 6 and "repetition_penalty" not in settings["generation"]
    assert settings["dtype"] == "float32" and settings["batch_size"] == 4 and settings["example_prompt"] == "<image>\na"
    assert len(settings["data"]["pope_random.json"]) == 64 and {"torch", "eah-kernels"} <= set(settings["versions"])
    assert {path.name for path in finished.iterdir() if path.suffix} == {
        *("run.json", "result.json", "result.md", "by_threshold.png")
    }


def test_both_ways_of_stopping_occur(finished):
    text = b"".join(answers(finished).values())
    assert b'"stopped": "eos"' in text and b'"stopped": "length"' in text


def test_again_nothing_is_generated(saved_model, finished, capsys, monkeypatch):
    before = answers(finished), (finished / "result.json").read_bytes()
    monkeypatch.setattr("eah.eval.run.answer_batch", lambda *_: pytest.fail("it was answered"))
    assert run(capsys, saved_model, finished, *SWEEP)[0] == 0
    assert (answers(finished), (finished / "result.json").read_bytes()) == before


TORN = {
    "half of the last line": lambda text: text[:-30],
    "no end of the last line": lambda text: text[:-1],
    "a batch of which one line is there": lambda text: text[: text.index(b"\n", text.index(b'"id": 4')) + 1],
    "nothing": lambda text: b"",
    "zeros, as after a power cut": lambda text: text[:-200] + b"\0" * 200,
    "a line twice": lambda text: text + text[: text.index(b"\n") + 1],
    "half a line in the middle": lambda text: text[:20] + b"\n" + text[text.index(b"\n") + 1 :],
    "others' line ends": lambda text: text.replace(b"\n", b"\r\n"),
    "another order": lambda text: b"".join(reversed(text.splitlines(keepends=True))),
}


def begun_as(other, out):
    """A folder that was begun with the settings of another; its folder of answers, which is empty."""
    (out / "answers").mkdir(parents=True)
    (out / "run.json").write_bytes((other / "run.json").read_bytes())
    return out / "answers"


@pytest.mark.parametrize("how", TORN)
def test_what_is_torn_is_made_again_and_nothing_else(saved_model, finished, tmp_path, capsys, how):
    one = ("--batch-size", 4, "--no-base")
    path = begun_as(finished, tmp_path / "out") / "eah-l1-t0.002.random.jsonl"
    whole = answers(finished)["eah-l1-t0.002.random.jsonl"]
    path.write_bytes(TORN[how](whole))
    status, _, err = run(capsys, saved_model, tmp_path / "out", *one)
    assert status == 0, err
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(records, key=lambda r: r["id"]) == [json.loads(line) for line in whole.decode().splitlines()]
    if how.startswith(("half of", "no end", "a batch", "nothing", "zeros", "a line twice")):
        assert path.read_bytes() == whole


def test_sampling_resumed_equals_sampling_at_one_go(saved_model, tmp_path, capsys):
    how = ("--generation", "do_sample=true", "temperature=2.0", "--seeds", 0, 1, "--batch-size", 4, "--no-base")
    assert run(capsys, saved_model, tmp_path / "a", *how)[0] == 0
    whole = answers(tmp_path / "a")
    assert set(whole) == {"eah-l1-t0.002.random-seed0.jsonl", "eah-l1-t0.002.random-seed1.jsonl"}
    assert len(set(whole.values())) == 2
    path = begun_as(tmp_path / "a", tmp_path / "b") / "eah-l1-t0.002.random-seed0.jsonl"
    path.write_bytes(b"".join(whole[path.name].splitlines(keepends=True)[:6]))
    assert run(capsys, saved_model, tmp_path / "b", *how)[0] == 0
    assert answers(tmp_path / "b") == whole
    summary = json.loads((tmp_path / "b/result.json").read_text())["summary"]
    assert {entry["parts"] for entry in summary} == {2}


def start(saved_model, out, *more):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([f"{ROOT}", f"{ROOT / 'python'}", *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "eah", *arguments(saved_model, out, *more)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_it_goes_on_and_two_do_not_share_a_folder(saved_model, finished, tmp_path, capsys):
    process, out = start(saved_model, tmp_path / "out", *SWEEP), tmp_path / "out"
    first = out / "answers/base.random.jsonl"
    deadline = time.monotonic() + 120
    while not (first.exists() and first.read_bytes()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    status, _, err = run(capsys, saved_model, out, *SWEEP)
    assert status == 1 and "another process is writing to" in err and err.count("\n") == 1
    process.kill()
    process.communicate()
    before = answers(out)
    assert run(capsys, saved_model, out, *SWEEP)[0] == 0
    after = answers(out)
    assert all(after[name].startswith(text[: text.rfind(b"\n") + 1]) for name, text in before.items())
    assert after == answers(finished)


def test_no_space_left(saved_model, tmp_path, capsys, finished):
    """The files' largest size stands for the device's: a write ends in the middle of a batch."""
    one, whole = ("--batch-size", 4, "--no-base"), answers(finished)["eah-l1-t0.002.random.jsonl"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 100, hard))
    try:
        status, out, err = run(capsys, saved_model, tmp_path / "out", *one)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and out == "" and "File too large" in err.splitlines()[-1] and ".jsonl" in err
    path = tmp_path / "out/answers/eah-l1-t0.002.random.jsonl"
    there = path.read_bytes()
    assert whole.startswith(there) and there.endswith(b"\n") and 0 < len(there) < len(whole)
    assert not (tmp_path / "out/result.json").exists()
    assert run(capsys, saved_model, tmp_path / "out", *one)[0] == 0
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name_before_the_weights_are_read(saved_model, finished, capsys, monkeypatch):
    from transformers import PreTrainedModel

    before = answers(finished)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the weights were read"))
        for more, named in (
            (("--batch-size", 2), "batch_size was 4 and is 2"),
            (("--prompt-suffix", "llava"), "prompt_suffix was '' and is '\\nAnswer the question using a single word"),
            (("--limit", 3), "limit was None and is 3"),
            (("--seeds", 1), "seeds was [0] and is [1]"),
        ):
            status, out, err = run(capsys, saved_model, finished, *SWEEP, *more)
            assert status == 1 and out == "" and err.count("\n") == 1 and named in err
    for more, named in (
        (("--max-new-tokens", 7), "generation.max_new_tokens was 6 and is 7"),
        (("--generation", "num_beams=2"), "generation.num_beams was 1 and is 2"),
    ):
        status, _, err = run(capsys, saved_model, finished, *SWEEP, *more)
        assert status == 1 and named in err
    assert answers(finished) == before


def test_answers_of_which_nothing_says_how_they_were_made(saved_model, finished, tmp_path, capsys):
    import shutil

    shutil.copytree(finished / "answers", tmp_path / "out/answers")
    status, out, err = run(capsys, saved_model, tmp_path / "out", *SWEEP)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert f"{tmp_path / 'out'} has results, and no run.json that says how they were made" in err


def test_settings_without_an_answer_bind_nothing(saved_model, tmp_path, capsys):
    """A prompt without a picture ends in an error of the model; the next try need not go elsewhere."""
    status, _, err = run(capsys, saved_model, tmp_path / "out", "--prompt-format", "{}")
    assert status == 1 and "image" in err.splitlines()[-1].lower() and (tmp_path / "out/run.json").exists(), err
    status, _, err = run(capsys, saved_model, tmp_path / "out", "--prompt-format", "<image>{}")
    assert status == 0, err


def test_more_variants_join_those_that_are_there(saved_model, finished, tmp_path, capsys):
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    assert run(capsys, saved_model, tmp_path / "out", "--threshold", 0.1, "--batch-size", 4)[0] == 0
    variants = {row["variant"] for row in json.loads((tmp_path / "out/result.json").read_text())["rows"]}
    assert variants == {"base", "eah-l1-t0.1"}
    assert {name: text for name, text in answers(tmp_path / "out").items() if "t0.1" not in name} == answers(finished)


def test_chair_in_subsets(saved_model, tmp_path, capsys):
    more = ("--limit", 2, "--subsets", 3, "--words", "builtin", "--prompt", "abc", "--batch-size", 2)
    status, _, err = run(capsys, saved_model, tmp_path / "out", *more, bench="chair")
    assert status == 0, err
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert [row["part"] for row in result["rows"]] == ["1", "2", "3"] * 2 and all(
        row["n"] == 2 for row in result["rows"]
    )
    texts = answers(tmp_path / "out")
    ids = [json.loads(line)["id"] for part in "123" for line in texts[f"base.{part}.jsonl"].decode().splitlines()]
    assert len(set(ids)) == 6
    again = run(capsys, saved_model, tmp_path / "other", *more, "--seed", 1, bench="chair")
    assert again[0] == 0 and answers(tmp_path / "other").keys() == texts.keys() and answers(tmp_path / "other") != texts


def test_annotated_images_without_a_picture_are_counted(saved_model, tmp_path, capsys):
    """Of COCO's images a folder holds those of one split. Others are drawn when there are more: not into one folder."""
    import shutil

    shutil.copytree(saved_model / "images", tmp_path / "images")
    name = sorted(os.listdir(tmp_path / "images"))[0]
    (tmp_path / "images" / name).unlink()
    more = ("--images", tmp_path / "images", "--limit", 2, "--words", "builtin", "--no-base")
    status, _, err = run(capsys, saved_model, tmp_path / "out", *more, bench="chair")
    assert status == 0
    assert f"eah eval: annotated, but not in {tmp_path / 'images'}: 1 images\n" in err
    assert json.loads((tmp_path / "out/run.json").read_text())["candidates"] == 6
    shutil.copy(saved_model / "images" / name, tmp_path / "images")
    status, _, err = run(capsys, saved_model, tmp_path / "out", *more, bench="chair")
    assert status == 1 and "candidates was 6 and is 7" in err


def test_a_part_without_an_item(saved_model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other_popular.json").write_text(
        json.dumps({"image": "1.jpg", "text": "a", "label": "no"}) + "\n", encoding="utf-8"
    )
    (tmp_path / "list.txt").write_text("1.jpg\n")
    two = ("--data", saved_model / "pope_random.json", tmp_path / "other_popular.json")
    for bench, more, named in (
        ("chair", ("--images", tmp_path / "empty", "--words", "builtin"), f"no picture of {tmp_path / 'empty'} has"),
        ("pope", (*two, "--image-list", tmp_path / "list.txt"), "part random has no item of the images"),
    ):
        status, out, err = run(capsys, saved_model, tmp_path / "out", *more, bench=bench)
        assert status == 1 and out == "" and err.count("\n") == 1 and named in err, err


def test_our_answers_can_be_scored_again(saved_model, finished, tmp_path, capsys):
    given = [f"{name}={finished / 'answers' / name}.random.jsonl" for name in ("base", "eah-l1-t0.05")]
    data = saved_model / "pope_random.json"
    status = cli.main(["eval", "score", "pope", "--data", str(data), "--answers", *given, "--out", str(tmp_path)])
    assert status == 0
    ours = json.loads((finished / "result.json").read_text())["rows"]
    scored = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert scored == [row for row in ours if row["variant"] in ("base", "eah-l1-t0.05")]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--generation", "num_return_sequences=2"], "a question has one answer"),
        (["--generation", "temprature=2"], "transformers has no such setting"),
        (["--generation", "num_beams=2", "num_beams=3"], "--generation num_beams was given twice"),
        (["--layers", "0+1", "1+0"], "eah-l0+1-t0.002 was asked for twice"),
        (["--device", "cuda:7"], "--device 'cuda:7' cannot be used"),
        (["--device", "meta"], "--device 'meta' cannot be used"),
        (["--prompt", "x"], "--prompt has no meaning for pope"),
        (["--threshold", "0.002", "0.002"], "eah-l1-t0.002 was asked for twice"),
        (["--threshold", "-1"], "threshold must be"),
        (["--prompt-format", "<image> A:"], "--prompt-format must have {} where the question is, got '<image> A:'"),
        (["--layers", "9"], "layers must be within 0..2"),
        (["--backend", "fast"], "backend must be"),
        (["--seeds", "1", "1"], "--seeds must be distinct"),
        (["--seed", "1"], "--seed 1 is of the choice of --limit images"),
        (["--out", __file__], "--out must be a folder, and"),
        (["--out", f"{__file__}/below"], "--out must be a folder, and"),
        (["--seeds", "0", "1"], "--seeds 0 1 are of sampling: --generation do_sample=true"),
        (["--images", "nowhere"], "there is no picture nowhere"),
        (["--data", "nowhere"], "there is no file nowhere"),
        (["--image-list", "nowhere"], "there is no file nowhere"),
        (["--model", "nowhere"], "--model must be a folder, and there is none nowhere"),
    ],
)
def test_bad_input_is_one_line_and_comes_before_the_weights_are_read(
    saved_model, tmp_path, capsys, monkeypatch, more, named
):
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the weights were read"))
    status, out, err = run(capsys, saved_model, tmp_path / "out", *more)
    assert status == 1 and out == "" and err.count("\n") == 1, err
    assert named in err
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_read(saved_model, tmp_path, capsys):
    for file in (saved_model / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    status, out, err = run(capsys, saved_model, tmp_path / "out", "--model", tmp_path)
    assert status == 1 and out == "" and "the weights of" in err and err.count("\n") == 1, err


def test_a_picture_that_cannot_be_read(saved_model, tmp_path, capsys):
    import shutil

    shutil.copytree(saved_model / "images", tmp_path / "images")
    name = sorted(os.listdir(tmp_path / "images"))[5]
    (tmp_path / "images" / name).write_bytes(b"no picture")
    more = ("--images", tmp_path / "images", "--batch-size", 4, "--no-base")
    status, _, err = run(capsys, saved_model, tmp_path / "out", *more)
    assert status == 1 and f"{name} is no picture that can be read" in err.splitlines()[-1]
    [text] = answers(tmp_path / "out").values()
    assert text.count(b"\n") == 4  # the batch before it


def test_a_model_without_pictures(saved_model, tmp_path, capsys):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    processor_of("llava").tokenizer.save_pretrained(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for name, error in (("text", "is no vision-language model (model_type 'llama')"), ("empty", "")):
        status, out, err = run(capsys, saved_model, tmp_path / "out", "--model", tmp_path / name)
        assert status == 1 and out == "" and err.count("\n") == 1 and error in err, err
    assert not (tmp_path / "out/answers").exists()


def test_an_image_list(saved_model, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("COCO_val2014_000000000003.jpg\r\n000000000002\n")
    more = ("--image-list", tmp_path / "list.txt", "--words", "builtin", "--no-base")
    assert run(capsys, saved_model, tmp_path / "out", *more, bench="chair")[0] == 0
    [text] = answers(tmp_path / "out").values()
    assert [json.loads(line)["id"] for line in text.splitlines()] == [2, 3]
    (tmp_path / "list.txt").write_text("COCO_val2014_000000000099.jpg\n")
    status, _, err = run(capsys, saved_model, tmp_path / "other", *more, bench="chair")
    assert status == 1 and "line 1: 'COCO_val2014_000000000099.jpg' is an image without annotations" in err


def test_mmhal_responses(saved_model, tmp_path, capsys):
    names = sorted(os.listdir(saved_model / "images"))[:2]
    template = [{"image_src": f"https://host/{name}", "question": "abc", "gt_answer": "x"} for name in names]
    (tmp_path / "template.json").write_text(json.dumps(template))
    more = ("--data", tmp_path / "template.json", "--no-base")
    status, out, err = run(capsys, saved_model, tmp_path / "out", *more, bench="mmhal")
    assert status == 0 and "have a judge rate it" in out, err
    responses = json.loads((tmp_path / "out/responses/eah-l1-t0.002.all.json").read_text())
    assert [list(response) for response in responses] == [["image_src", "question", "gt_answer", "model_answer"]] * 2
    parts = ("--limit", 1, "--subsets", 2, "--json")
    status, out, err = run(capsys, saved_model, tmp_path / "parts", *more, *parts, bench="mmhal")
    assert status == 0, err
    kept = json.loads(out)["responses"]
    assert [(one["variant"], one["part"]) for one in kept] == [("eah-l1-t0.002", "1"), ("eah-l1-t0.002", "2")]
    assert all(len(json.loads(Path(one["path"]).read_text())) == 1 for one in kept)
