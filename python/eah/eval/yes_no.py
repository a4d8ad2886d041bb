"""Yes or no: the rules by which the official scripts and others read it from an answer."""

from __future__ import annotations

import re

RULES = ("official", "opera", "first-word")


def pope_official(answer: str) -> str:
    """POPE's evaluate.py: no where a word of the first sentence is No, not or no, else yes, whatever was said."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def opera(answer: str) -> str:
    """OPERA's and what copies it: of the whole answer, with NO and the words that end in n't."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words) else "yes"


def amber_official(answer: str) -> str | None:
    """AMBER's inference.py: exactly Yes or No."""
    return {"Yes": "yes", "No": "no"}.get(answer)


def first_word(answer: str) -> str | None:
    """None, which is wrong whatever the label, where the first word is neither."""
    word = re.search(r"\w+", answer)
    return word[0].lower() if word and word[0].lower() in ("yes", "no") else None


def unparsed(answer: str) -> bool:
    """No word of it is yes, no or not: whatever a rule makes of it, it was not said."""
    return not {"yes", "no", "not"}.intersection(re.findall(r"\w+", answer.lower()))
