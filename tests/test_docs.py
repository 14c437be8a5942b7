"""The examples of docstrings and README run, and every public function has one."""

import doctest
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import lolcats_ops as lo

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for place in ("*.md", "docs/*.md", "tests/**/*.md") for page in ROOT.glob(place)
)
README = (ROOT / "README.md").read_text()
FILES = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "lolcats_ops").rglob("*.py")]
NOT_IMPORTED = {"lolcats_ops.__main__", "lolcats_ops.cupy"}  # a command, and what wants a GPU
MODULES = {".".join(path.parts).removesuffix(".__init__") for path in FILES} - NOT_IMPORTED
# Without the reference, whose functions have the public ones' names and arguments.
PUBLIC = (lo, lo.convert, lo.hf, lo.numpy, importlib.import_module("lolcats_ops.features"))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_of_docstrings_are_true(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed


def public(module):
    """Functions by name."""
    names = getattr(module, "__all__", None) or [
        name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
    ]
    found = {name: getattr(module, name) for name in names if not name.startswith("_")}
    return {name: x for name, x in found.items() if inspect.isfunction(x)}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_function_has_an_example(module):
    assert public(module)
    lacking = [name for name, x in public(module).items() if ">>> " not in inspect.getdoc(x)]
    assert not lacking


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_of_the_readme_runs(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    from helpers.tiny_models import tiny, word_tokenizer

    monkeypatch.chdir(tmp_path)
    text = "call me Ishmael . " * 600
    tiny().save_pretrained("model")
    word_tokenizer(text).save_pretrained("model")
    names = {"path": "model", "texts": [text]}
    assert len(blocks("python")) == 4
    for block in blocks("python"):
        exec(block, names)
    assert lo.hf.attention_layers(lo.hf.from_pretrained("linear"))


def test_c_of_the_readme_compiles(tmp_path):
    (block,) = blocks("c")
    (tmp_path / "example.c").write_text(block)
    command = ["cc", "-std=c99", "-Wall", "-Werror", "-fsyntax-only", "-I", lo.get_include()]
    subprocess.run([*command, "example.c"], cwd=tmp_path, check=True)


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", prose):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in headings(target), f"{path}#{anchor}"
