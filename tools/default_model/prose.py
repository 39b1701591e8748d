"""English prose whose licence allows it, from what is on the machine: which text, under which licence, and in which shape.

Sources: the project's own Markdown; docstrings and help topics of the standard library (PSF); docstrings of installed packages
whose metadata name a permissive licence. Docstrings are read with `ast`, nothing is imported. Only paragraphs that read like
prose are kept. The XQuAD questions and texts are no source, and no paragraph of theirs could be: none is in a package.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense|Zlib)\b", re.IGNORECASE)
COPYLEFT = re.compile(r"\b(A?L?GPL|MPL|Mozilla|CC-BY-SA|EPL|proprietary)", re.IGNORECASE)
# Their wheels bundle libraries of other licences, but their Python files are under their own (BSD); the rest of the rule holds.
SKIPPED_FOLDERS = {"tests", "test", "_vendor", "vendor", "_vendored_packages", "pip", "setuptools"}
MAX_FILE_BYTES = 2_000_000
MIN_CHARS, MAX_CHARS = 90, 1500  # of a paragraph
_FIELD = re.compile(r"(?:[\w*]+ ?(?:\([^)]*\))? ?:|Args\b|Returns?\b.{0,20}:)")  # a parameter's entry, not a sentence
_WORDY = re.compile(r"[A-Za-z][a-z']+")
_MARKUP = re.compile(r":[a-z:]+:`~?([^`<]+)`|``([^`]+)``|`([^`<]+)(?:<[^`]+>)?`_*|\*\*([^*]+)\*\*|\[([^\]]+)\]\([^)]+\)")


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    licence: str
    paragraphs: int
    characters: int


@dataclass(frozen=True, slots=True)
class Prose:
    """Paragraphs of plain English, each on one line, and where they are from."""

    paragraphs: tuple[str, ...]
    sources: tuple[Source, ...]

    def save(self, path: Path) -> None:
        content = {"sources": [asdict(source) for source in self.sources], "paragraphs": self.paragraphs}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Prose:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(content["paragraphs"]), tuple(Source(**source) for source in content["sources"]))


def collect(project: Path, most_paragraphs_a_source: int = 12_000) -> Prose:
    """Everything that is at hand, sources in a fixed order, no paragraph twice (*blocking*, about a minute)."""
    known: set[str] = set()
    paragraphs: list[str] = []
    sources: list[Source] = []
    for name, licence, texts in _texts(project):
        fresh: list[str] = []
        for text in texts:
            for paragraph in paragraphs_of(text):
                key = re.sub(r"\W+", "", paragraph.lower())[:160]
                if key not in known and len(fresh) < most_paragraphs_a_source:
                    known.add(key)
                    fresh.append(paragraph)
        if fresh:
            paragraphs += fresh
            sources.append(Source(name, licence, len(fresh), sum(map(len, fresh))))
    return Prose(tuple(paragraphs), tuple(sources))


def paragraphs_of(text: str) -> Iterator[str]:
    """The paragraphs of a docstring or page that are sentences: no lists of parameters, no code, no doctests."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().splitlines()
        if len(lines) > 1 and re.fullmatch(r"\s*([-=~^\"'*#+.])\1{2,}\s*", lines[1]):
            continue  # a heading with its underline, and what hangs on it
        plain = " ".join(" ".join(lines).split())
        plain = _MARKUP.sub(lambda match: next(group for group in match.groups() if group), plain)
        if MIN_CHARS <= len(plain) <= MAX_CHARS and _reads_like_prose(plain):
            yield plain


def _reads_like_prose(text: str) -> bool:
    if not text[0].isupper() or "¶" in text or ">>>" in text or text[-1] not in '.!?)"' or _FIELD.match(text):
        return False
    wordy = sum(map(len, _WORDY.findall(text)))
    return wordy >= 0.74 * len(text.replace(" ", "")) and text.isascii() and not re.search(r"[{}\\<>]|::|\|", text)


def _texts(project: Path) -> Iterator[tuple[str, str, Iterator[str]]]:
    """Name, licence and texts of each source."""
    pages = [*sorted(project.glob("*.md")), *sorted((project / "docs").rglob("*.md"))]
    yield "this project's documents", "Apache-2.0", (page.read_text(encoding="utf-8") for page in pages)
    library = Path(sysconfig.get_paths()["stdlib"])
    yield "Python standard library: docstrings", "PSF-2.0", _docstrings(_files(library))
    yield "Python standard library: help topics", "PSF-2.0", _topics(library / "pydoc_data" / "topics.py")
    installed = {each.metadata["Name"]: each for each in importlib.metadata.distributions()}
    for name in sorted(installed, key=str.lower):
        licence = _licence(installed[name])
        files = [Path(str(installed[name].locate_file(each))) for each in installed[name].files or [] if each.suffix == ".py"]
        if licence and files:
            yield f"{name} {installed[name].version}", licence, _docstrings(sorted(each for each in files if _wanted(each)))


def _licence(package: importlib.metadata.Distribution) -> str:
    """A permissive licence that the metadata name, in few words; empty: none, or not only."""
    head = package.metadata
    classifiers = [each for each in head.get_all("Classifier") or [] if each.startswith("License")]
    said = [str(head.json.get("license_expression") or ""), *classifiers]
    if not any(said):
        said = [str(head.json.get("license") or "").split("\n")[0][:80]]
    text = "; ".join(part.rpartition(":: ")[2] for part in said if part)
    own = text.split(" AND ")[0] if package.metadata["Name"] in ("numpy", "scipy", "scikit-learn", "torch") else text
    return text if PERMISSIVE.search(own) and not COPYLEFT.search(own) else ""


def _wanted(path: Path) -> bool:
    return not SKIPPED_FOLDERS & set(path.parts[-6:])


def _files(folder: Path) -> list[Path]:
    found = folder.rglob("*.py")
    return sorted(path for path in found if "site-packages" not in path.parts and _wanted(path))


def _docstrings(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                continue
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
                doc := ast.get_docstring(node)
            ):
                yield doc


def _topics(path: Path) -> Iterator[str]:
    """The help topics are one dictionary of texts."""
    if not path.is_file():
        return
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > MIN_CHARS:
            yield node.value
