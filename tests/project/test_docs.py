"""The documents keep their word: what the code cites is there, links lead somewhere, and the examples run."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("eah_kernels", "python", "csrc")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
]
CITATION = re.compile(r"\(spec, (steps? (\d)(?: to (\d))?|\"(\w+)\")\)")


def test_every_cited_step_is_in_the_definition():
    definition = (ROOT / "docs/definition.md").read_text()
    steps = set(re.findall(r"^\*\*Step (\d): ", definition, re.M))
    sections = set(re.findall(r"^## (.+)$", definition, re.M))
    cited = [(path.name, match) for path in SOURCES for match in CITATION.finditer(path.read_text())]
    assert len(cited) > 5
    for name, match in cited:
        _, first, last, section = match.groups()
        wanted = {section} if section else set(map(str, range(int(first), int(last or first) + 1)))
        assert wanted <= (sections if section else steps), f"{name}: {match[0]}"


def test_every_mention_of_the_spec_is_a_citation():
    for path in SOURCES:
        text = path.read_text()
        assert text.count("(spec") == len(CITATION.findall(text)), path.name


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, section = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        if section:
            assert section in map(anchor, re.findall(r"^#+ (.+)$", there.read_text(), re.M)), target


def test_the_tree_of_the_architecture_has_every_file_of_the_packages():
    listed, folders = set(), []
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    for line in filter(None, map(str.rstrip, tree.splitlines())):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name] if name.endswith("/") else []
        path = "".join(folders) + ("" if name.endswith("/") else name)
        assert (ROOT / path).exists(), path
        listed.add(path)
    there = [path for folder in ("eah_kernels", "python") for path in (ROOT / folder).rglob("*.py")]
    there = {path.relative_to(ROOT).as_posix() for path in there if "egg-info" not in str(path)}
    assert there <= listed, there - listed


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


EXAMPLES = {
    "swap.py": "new tokens: [",
    "one_layer.py": "largest difference",
    "look.py": "lends its map",
    "contrast.py": "ICD: heads of the two prompts",
    "text_contrast.py": "none: no image token",
    "vllm_client.py": "no answer from",  # with a server: tests/vllm/test_server.py
}


@pytest.mark.parametrize("example", sorted(path.name for path in ROOT.glob("examples/*.py")))
def test_an_example_runs_and_is_short(example, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = ROOT / "examples" / example
    assert len(path.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(path), run_name="__main__")
    assert EXAMPLES[example] in capsys.readouterr().out


def test_no_example_hides_a_module_that_someone_imports():
    """Python puts a script's folder first on its path: examples/kernels.py would stand for the package `kernels`."""
    import importlib.machinery

    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "examples")]
    taken = {"inspect", "kernels"}  # the second is a package that transformers looks for
    for path in ROOT.glob("examples/*.py"):
        assert path.stem not in taken
        assert importlib.machinery.PathFinder.find_spec(path.stem, elsewhere) is None, path.name
