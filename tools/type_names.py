"""Lists what the types of the product leave open: `python -m tools.type_names`.

1. Class names that are defined more than once, and names that are a class or a module's type alias in several places.
2. Uses of `Any` in annotations, aliases and base classes, per package, with and without those at JSON's edge.
3. Untyped dicts (`dict[str, Any]`, `Mapping[str, object]` and the like) in signatures of functions that other files call.

The rule for JSON's edge: an `Any` in a module-level type alias (`Json = dict[str, Any]`), or in a file that imports `json`,
`tomllib` or `msgspec.json`, or speaks of `msgspec.json`.

Whether a function is called from another file is told by its name: another file imports it, or reads an attribute of that name.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tools.definitions import definitions, source_files

JSON_MODULES = ("json", "tomllib", "msgspec.json")
DICTS = ("dict", "Dict", "Mapping", "MutableMapping", "defaultdict", "OrderedDict")
OPEN_VALUES = ("Any", "object")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Trees = dict[str, ast.Module]


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, and what stands there."""

    file: str
    line: int
    text: str

    @property
    def package(self) -> str:
        return self.file.split("/")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.text}".rstrip()


def module_aliases(tree: ast.Module) -> dict[str, ast.expr]:
    """Returns the module's type aliases: names in CapWords that are set to a type expression."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
            if not (isinstance(node.annotation, ast.Name) and node.annotation.id == "TypeAlias"):
                continue
            name, value = node.target.id, node.value
        else:
            continue
        bare = name.lstrip("_")
        if bare[:1].isupper() and not bare.isupper() and isinstance(value, (ast.Subscript, ast.BinOp, ast.Name, ast.Attribute)):
            found[name] = value
    return found


def names_defined_twice(trees: Trees, aliases: bool) -> dict[str, list[Place]]:
    """Returns the names that several classes have; with `aliases`, classes and type aliases together."""
    places = defaultdict(list)
    for file, tree in trees.items():
        for each in definitions(tree):
            if each.kind == "class":
                places[each.name].append(Place(file, each.first_line, ""))
        if aliases:
            for name, value in module_aliases(tree).items():
                places[name].append(Place(file, value.lineno, f"= {ast.unparse(value)}"))
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}


def is_at_json_edge(tree: ast.Module) -> bool:
    """Whether a file parses or writes JSON itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(each.name in JSON_MODULES for each in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{each.name}" for each in node.names}
            if node.module in JSON_MODULES or names & set(JSON_MODULES):
                return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "msgspec.json":
            return True
    return False


def type_expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """Yields the outermost type expressions of a file but its aliases: annotations and base classes; quoted ones parsed."""
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            found = [node.annotation]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = [node.returns]
        elif isinstance(node, ast.ClassDef):
            found = list(node.bases)
        yield from (parsed(each) for each in found if each is not None)


def parsed(annotation: ast.expr) -> ast.expr:
    """Returns what a quoted annotation holds; any other as it is."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        inner = ast.parse(annotation.value, mode="eval").body
        for node in ast.walk(inner):
            ast.copy_location(node, annotation)
        return inner
    return annotation


def is_name(node: ast.expr, names: tuple[str, ...]) -> bool:
    """Whether an expression is one of `names`, alone or as an attribute (`typing.Any`)."""
    return (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr in names)


def uses_of_any(trees: Trees) -> tuple[list[Place], list[Place]]:
    """Returns the places of `Any` outside JSON's edge, and those at it."""
    outside: list[Place] = []
    at_edge: list[Place] = []
    for file, tree in trees.items():
        written = [(each, is_at_json_edge(tree)) for each in type_expressions(tree)]
        for annotation, edge in [*written, *((each, True) for each in module_aliases(tree).values())]:
            for node in ast.walk(annotation):
                if isinstance(node, ast.expr) and is_name(node, ("Any",)):
                    (at_edge if edge else outside).append(Place(file, node.lineno, ast.unparse(annotation)))
    return outside, at_edge


def open_dicts(annotation: ast.expr, aliases: frozenset[str] = frozenset()) -> list[str]:
    """Returns the dicts with open values in an annotation, and names out of `aliases`."""
    found = []
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and is_name(node.value, DICTS) and isinstance(node.slice, ast.Tuple):
            if is_name(node.slice.elts[-1], OPEN_VALUES):
                found.append(ast.unparse(node))
        elif isinstance(node, (ast.Name, ast.Attribute)) and is_name(node, tuple(aliases)):
            found.append(ast.unparse(node))
    return found


def open_aliases(trees: Trees) -> frozenset[str]:
    """Returns the names of aliases that are an open dict, anywhere."""
    aliases = [each for tree in trees.values() for each in module_aliases(tree).items()]
    return frozenset(name for name, value in aliases if open_dicts(value) == [ast.unparse(value)])


def names_used(tree: ast.Module) -> set[str]:
    """Returns the names that a file imports from others or reads as attributes."""
    imported = {each.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for each in node.names}
    return imported | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def crossing_dicts(trees: Trees) -> tuple[list[Place], list[Place]]:
    """Returns the open dicts in signatures of functions that other files call: those written out, and those by an alias."""
    used = {file: names_used(tree) for file, tree in trees.items()}
    users: defaultdict[str, set[str]] = defaultdict(set)
    for file, names in used.items():
        for name in names:
            users[name].add(file)
    aliases = open_aliases(trees)
    written, by_alias = [], []
    for file, tree in trees.items():
        for function, owner in called_functions(tree):
            name = owner if function.name == "__init__" else function.name
            if not users[name] - {file}:
                continue
            for annotation in signature(function):
                whole_name = f"{owner}.{function.name}" if owner else function.name
                found = Place(file, annotation.lineno, f"{whole_name}: {ast.unparse(annotation)}")
                if open_dicts(annotation):
                    written.append(found)
                elif open_dicts(annotation, aliases):
                    by_alias.append(found)
    return written, by_alias


def called_functions(tree: ast.Module) -> Iterator[tuple[Function, str]]:
    """Yields a file's public functions, and the public methods and constructors of its classes with the class's name."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node, ""
        elif isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
            yield from ((each, node.name) for each in methods if not each.name.startswith("_") or each.name == "__init__")


def signature(function: Function) -> Iterator[ast.expr]:
    """Yields the annotations of a function's arguments and result."""
    taken = function.args
    rest = [each for each in (taken.vararg, taken.kwarg) if each is not None]
    for argument in [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, *rest]:
        if argument.annotation is not None:
            yield parsed(argument.annotation)
    if function.returns is not None:
        yield parsed(function.returns)


def per_package(places: list[Place]) -> str:
    counted: defaultdict[str, int] = defaultdict(int)
    for place in places:
        counted[place.package] += 1
    return ", ".join(f"{package} {count}" for package, count in sorted(counted.items())) or "none"


def lines_of(trees: Trees) -> Iterator[str]:
    """Yields the report."""
    for what, aliases in (("class names defined more than once", False), ("the same, with type aliases", True)):
        twice = names_defined_twice(trees, aliases)
        yield f"{what}: {len(twice)}"
        yield from (f"  {name}: {'; '.join(str(place) for place in places)}" for name, places in twice.items())
    outside, at_edge = uses_of_any(trees)
    written, by_alias = crossing_dicts(trees)
    for what, places in (
        ("Any outside JSON's edge", outside),
        ("Any at JSON's edge", at_edge),
        ("untyped dicts in signatures that other files call, written out", written),
        ("untyped dicts in signatures that other files call, by an alias", by_alias),
    ):
        yield f"{what}: {len(places)} ({per_package(places)})"
        yield from (f"  {place}" for place in places)


def main() -> int:
    print("\n".join(lines_of(source_files())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
