"""What the documents promise exists: commands, options, make targets, links, run-folder files; examples run."""

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/golden/README.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
MODULES = sorted((ROOT / "src" / "cryorbit").rglob("*.py"))


def code(text: str) -> list[str]:
    """Commands in the text: lines of fenced shell blocks and inline code."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()] + inline


def commands(text: str, program: str) -> list[list[str]]:
    """Arguments of every call of ``program`` in the text."""
    found = []
    for line in code(text):
        if line.split("#")[0].strip().startswith(program + " "):
            found.append(shlex.split(line, comments=True)[1:])
    return found


@lru_cache
def help_of(*verb: str) -> str:
    """What ``cryorbit VERB --help`` prints, in a process of its own."""
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cryorbit", *verb, "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    return done.stdout if done.returncode == 0 else ""


def options_of(help_text: str) -> set[str]:
    """Long and short options that a help text lists."""
    return set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", help_text))


def unknown_parts(arguments: list[str]) -> list[str]:
    """Words of a ``cryorbit`` call that the command line does not know: the verb, or options of it."""
    if arguments[0].startswith("-"):
        return [word for word in arguments if word.startswith("-") and word not in options_of(help_of())]
    text = help_of(arguments[0])
    if not text:
        return [arguments[0]]
    known = options_of(text)
    takes_words = re.search(r"Usage:.*\[OPTIONS\] \S", text) is not None
    if not takes_words and len(arguments) > 1 and not arguments[1].startswith("-"):
        return [arguments[1]]
    return [word for word in arguments[1:] if re.match(r"-+[a-zA-Z]", word) and word.split("=")[0] not in known]


def _documents(program: str) -> list[tuple[str, list[str]]]:
    return [
        (document.relative_to(ROOT).as_posix(), arguments)
        for document in DOCUMENTS
        for arguments in commands(document.read_text(encoding="utf-8"), program)
        if re.fullmatch(r"[\w-]+", arguments[0])  # not "cryorbit ..." as a figure of speech
    ]


def test_commands_of_the_documents_exist() -> None:
    calls = _documents("cryorbit")
    assert {arguments[0] for _, arguments in calls} >= {"inspect", "reconstruct", "simulate", "evaluate", "report"}
    wrong = [(document, shlex.join(a), unknown_parts(a)) for document, a in calls if unknown_parts(a)]
    assert wrong == []


def test_options_that_the_readme_names_alone_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {words.split()[0] for words in code(text) if words.startswith("--")} - {"--invert_hand"}
    assert len(named) >= 5
    known = options_of(help_of("reconstruct")) | options_of(help_of("refine"))
    assert named - known == set()


def test_command_check_can_fail() -> None:
    assert unknown_parts(["recontsruct", "particles.star"]) == ["recontsruct"]
    assert unknown_parts(["reconstruct", "particles.star", "--mask-diametre", "120"]) == ["--mask-diametre"]
    assert unknown_parts(["simulate", "4ake", "--output", "sim/"]) == ["4ake"]
    assert commands("```bash\ncryorbit inspect x  # y\n```\nand `cryorbit report run/`", "cryorbit") == [
        ["inspect", "x"],
        ["report", "run/"],
    ]


def test_make_targets_of_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.MULTILINE))
    calls = _documents("make")
    assert {arguments[0] for _, arguments in calls} >= {"demo", "test", "lint"}
    for document, arguments in calls:
        for word in arguments:
            name, equals, _ = word.partition("=")
            assert name in (variables if equals else targets), f"{document}: make {shlex.join(arguments)}"


def test_readme_shows_both_commands_alone() -> None:
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.M
    )
    assert "make demo\n" in blocks
    assert "make test\n" in blocks


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http://", "https://")) and not (document.parent / t).exists()]
    assert missing == []


def test_paths_in_the_code_map_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py|[a-z_]+\.py)`", text):
        assert any((base / path).exists() for base in (ROOT, ROOT / "src" / "cryorbit")), path


def test_run_folder_files_of_the_readme_are_written_by_the_package() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("### What is in the run folder")[1].split("###")[0]
    names = [
        name
        for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    ]
    assert {"map.mrc", "half_map_1.mrc", "particles.star", "fsc.csv", "report.html", "checkpoint/"} <= set(names)
    written = "\n".join(
        path.read_text(encoding="utf-8") for path in MODULES if path.parent.name in {"pipeline", "report", "training"}
    )
    patterns = {name: re.escape(name.rstrip("/")) for name in names}
    patterns |= {f"half_map_{i}.mrc": r"half_map_(\{|1|2)" for i in (1, 2)}
    assert [name for name in names if not re.search(patterns[name], written)] == []


def test_examples_in_docstrings_run() -> None:
    tried = failed = 0
    for path in MODULES:
        if ">>>" in path.read_text(encoding="utf-8"):
            name = path.relative_to(ROOT / "src").with_suffix("").as_posix().replace("/", ".")
            result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
            tried, failed = tried + result.attempted, failed + result.failed
    assert tried > 0
    assert failed == 0
