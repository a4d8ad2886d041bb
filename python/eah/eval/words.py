"""From text to words: nltk's rules, which published figures are of, and builtin ones for tests."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

NLTK_DATA = {
    "punkt_tab": "tokenizers/punkt_tab",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet",
}
TOKEN = re.compile(r"[A-Za-z0-9]+(?:['-][A-Za-z0-9]+)*|[^\sA-Za-z0-9]")


class BuiltinWords:
    """Plurals by a few rules, into words of a vocabulary. Not comparable with published figures."""

    name = "builtin"
    about = "builtin: not comparable with published figures"

    def __init__(self, vocabulary: Collection[str]):
        self.vocabulary = frozenset(vocabulary)

    def words(self, text: str) -> list[str]:
        return [self.lemma(token) for token in TOKEN.findall(text)]

    nouns = words  # any token may be one

    def lemma(self, token: str) -> str:
        if token in self.vocabulary:
            return token
        return next((word for word in singulars(token) if word in self.vocabulary), token)


def singulars(token: str):
    if token.endswith("men"):
        yield f"{token[:-3]}man"
    if token in ("mice", "geese"):
        yield {"mice": "mouse", "geese": "goose"}[token]
    if token.endswith("s"):
        yield token[:-1]
    if token.endswith("es"):
        yield token[:-2]
    if token.endswith("ies"):
        yield f"{token[:-3]}y"
    if token.endswith("ves"):
        yield from (f"{token[:-3]}f", f"{token[:-3]}fe")


class NltkWords:
    """word_tokenize, pos_tag and WordNetLemmatizer, as OPERA's copy of CHAIR and AMBER's script use them.

    Raises:
        ImportError: nltk is not installed.
        ValueError: its data are not there; the message says what to fetch.
    """

    name = "nltk"

    def __init__(self):
        missing = why_no_nltk()
        if missing:
            raise ImportError(missing)
        import nltk
        from nltk.stem import WordNetLemmatizer

        self.tagged = lambda text: nltk.pos_tag(nltk.word_tokenize(text))
        self.lemmatize = WordNetLemmatizer().lemmatize
        found = {name: _found(nltk, where) for name, where in NLTK_DATA.items()}
        self.about = {"nltk": nltk.__version__, **{name: _checksum(path) for name, path in found.items() if path}}

    def words(self, text: str) -> list[str]:
        """Lemmas by part of speech; what is neither adjective, verb nor adverb as a noun."""
        speech = {"J": "a", "V": "v", "R": "r"}
        return [self.lemmatize(word, pos=speech.get(tag[:1], "n")) for word, tag in self.tagged(text)]

    def nouns(self, text: str) -> list[str]:
        return [self.lemmatize(word) for word, tag in self.tagged(text) if tag.startswith("NN")]


def why_no_nltk() -> str | None:
    """Why the nltk rules cannot be used here, and what to fetch; or None."""
    try:
        import nltk
    except ModuleNotFoundError:
        return 'the nltk word rules need nltk: pip install "eah-kernels[eval]"'
    missing = [name for name, where in NLTK_DATA.items() if _found(nltk, where) is None]
    return f"nltk's data are missing: python -m nltk.downloader {' '.join(missing)}" if missing else None


def why_no_spacy(model: str = "en_core_web_lg") -> str | None:
    """Why AMBER's similarity of words cannot be had from spaCy here, and what to fetch; or None."""
    if importlib.util.find_spec("spacy") is None:
        return 'the similarity of words needs spaCy: pip install "eah-kernels[eval]"'
    missing = importlib.util.find_spec(model) is None
    return f"spaCy has no model {model}: python -m spacy download {model}" if missing else None


def _found(nltk, where: str) -> Path | None:
    """A folder or a zip file: nltk reads both."""
    for form in (where, f"{where}.zip"):
        try:
            return Path(str(nltk.data.find(form)))
        except LookupError:
            continue
    return None


def _checksum(found: Path) -> str:
    files = sorted(path for path in found.rglob("*") if path.is_file()) if found.is_dir() else [found]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def words_of(name: str, vocabulary: Collection[str]) -> BuiltinWords | NltkWords:
    return NltkWords() if name == "nltk" else BuiltinWords(vocabulary)
