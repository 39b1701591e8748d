"""Lists the functions, methods and classes that source files define, under the names and lines that their code objects carry."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mesh", "membership", "routing", "rag", "node", "cli")  # what a node runs

Kind = Literal["class", "function"]


@dataclass(frozen=True, slots=True)
class Definition:
    """One `class` or `def`. A method is a function; `qualified_name` is as in `__qualname__`."""

    kind: Kind
    qualified_name: str
    first_line: int  # of its first decorator, else of the statement: as a code object's `co_firstlineno`

    @property
    def name(self) -> str:
        return self.qualified_name.rpartition(".")[2]


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[Definition]:
    """Yields every class and function of a parsed module, nested ones too, each before what is nested in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield Definition("class", prefix + node.name, _first_line(node))
            yield from definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield Definition("function", prefix + node.name, _first_line(node))
            yield from definitions(node, f"{prefix}{node.name}.<locals>.")
        else:
            yield from definitions(node, prefix)


def _first_line(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def source_files(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> dict[str, ast.Module]:
    """Returns the parsed source files of the packages, by path relative to `root`."""
    paths = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
