"""The word rules: the builtin ones, and those of nltk and spaCy against stubs (their data are not to be had here)."""

import sys
import types

import pytest

pytest.importorskip("numpy")

from eah.eval import words
from eah.eval.vectors import similarity_of


@pytest.mark.parametrize(
    ("token", "lemma"),
    [
        ("men", "man"),
        ("policemen", "policeman"),
        ("mice", "mouse"),
        ("geese", "goose"),
        ("dogs", "dog"),
        ("horses", "horse"),  # less s, before less es
        ("buses", "bus"),
        ("benches", "bench"),
        ("ponies", "pony"),
        ("knives", "knife"),
        ("calves", "calf"),
        ("scissors", "scissors"),  # a word of the vocabulary stays
        ("bus", "bus"),
        ("gloves", "gloves"),  # glove is not in the vocabulary
        ("s", "s"),
    ],
)
def test_builtin_singulars(token, lemma):
    vocabulary = [
        "man",
        "policeman",
        "mouse",
        "goose",
        "dog",
        "horse",
        "bus",
        "bench",
        "pony",
        "knife",
        "calf",
        "scissors",
        "hors",
    ]
    assert words.BuiltinWords(vocabulary).lemma(token) == lemma


def test_builtin_tokens():
    assert words.BuiltinWords([]).words("A t-shirt isn't 2nd-hand -- 'ok'_é!") == [
        *("A", "t-shirt", "isn't", "2nd-hand", "-", "-", "'", "ok", "'", "_", "é", "!")
    ]


@pytest.fixture
def stub_nltk(monkeypatch, tmp_path):
    """nltk's names, with tags and lemmas that a test can foresee."""
    nltk, data, stem = (types.ModuleType(name) for name in ("nltk", "nltk.data", "nltk.stem"))
    there = {"tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng", "corpora/wordnet.zip"}
    for name in there:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("zip"):
            path.write_bytes(b"zip")
        else:
            (path / "en").mkdir(parents=True)
            (path / "en/file").write_bytes(name.encode())

    def find(name):
        if name not in there:
            raise LookupError(name)
        return tmp_path / name

    class Lemmatizer:
        def lemmatize(self, word, pos="n"):
            return f"{word}/{pos}"

    data.find, stem.WordNetLemmatizer = find, Lemmatizer
    nltk.data, nltk.stem, nltk.__version__ = data, stem, "3.9"
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda tokens: [(token, token.split("_")[-1]) for token in tokens]
    for module in (nltk, data, stem):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return there


def test_nltk_lemmas_by_part_of_speech_else_as_nouns(stub_nltk):
    rules = words.words_of("nltk", [])
    text = "a_JJ b_VBZ c_RB d_NNS e_DT f_RP"
    assert rules.words(text) == ["a_JJ/a", "b_VBZ/v", "c_RB/r", "d_NNS/n", "e_DT/n", "f_RP/r"]
    assert rules.nouns("A_NN b_VB c_NNPS") == ["A_NN/n", "c_NNPS/n"]
    assert rules.about["nltk"] == "3.9" and len(rules.about["wordnet"]) == 64


def test_missing_nltk_data_are_named(stub_nltk):
    stub_nltk.clear()
    wanted = "punkt_tab averaged_perceptron_tagger_eng wordnet"
    with pytest.raises(ImportError, match=f"python -m nltk.downloader {wanted}"):
        words.NltkWords()


def test_nltk_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r'pip install "eah-kernels\[eval\]"'):
        words.NltkWords()


def test_spacy(monkeypatch):
    class Parsed(str):
        def similarity(self, other):
            return 1.0 if self == other else 0.81

    spacy = types.ModuleType("spacy")
    spacy.load = lambda name: Parsed
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    assert similarity_of("spacy:en_core_web_lg")("dog", "puppy") == 0.81

    def missing(name):
        raise OSError(name)

    spacy.load = missing
    with pytest.raises(ImportError, match="python -m spacy download en_core_web_lg"):
        similarity_of("spacy:en_core_web_lg")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="needs spaCy"):
        similarity_of("spacy:en_core_web_lg")


def test_vectors_of_a_file(tmp_path):
    (tmp_path / "v.txt").write_text("a 3 4\nb 4 3\nc 0 0\n")
    similarity = similarity_of(str(tmp_path / "v.txt"))
    assert similarity("a", "b") == pytest.approx(24 / 25)
    assert similarity("x", "x") == 1 and similarity("x", "a") == 0 and similarity("c", "a") == 0
    assert similarity("a b", "b a") == pytest.approx(1)  # a phrase is the sum of its words
    assert similarity_of("none")("a", "a") == 1 and similarity_of("none")("a", "b") == 0
