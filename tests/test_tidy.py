"""The house's rules about code, run as tests: a rule that no test runs is a wish."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from typer.main import get_command

from cli.main import app

ROOT = Path(__file__).parent.parent
PACKAGES = ("mesh", "membership", "routing", "rag", "node", "cli", "bench", "tools")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES = 700  # a state machine is read in one go rather than cut
MAX_FUNCTION_LINES = 70
SUPERVISED = {
    "mesh/links/links.py",  # per peer call
    "node/http/app.py",  # per HTTP request
    "node/engine/worker.py",  # per engine step
    "rag/repair.py",  # per background job
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / each for each in listed if each and (ROOT / each).is_file()]


def test_a_file_holds_one_idea_and_says_which() -> None:
    long = {name(path): count for path in FILES if (count := len(path.read_text().splitlines())) > MAX_FILE_LINES}
    headless = [name(path) for path in FILES if not ast.get_docstring(TREES[path])]
    assert not long and not headless


def test_a_function_fits_on_a_screen_and_tells_its_types() -> None:
    functions = [(path, node) for path in FILES for node in ast.walk(TREES[path]) if isinstance(node, FUNCTIONS)]
    long = [
        f"{name(path)}: {each.name}" for path, each in functions if (each.end_lineno or 0) - each.lineno >= MAX_FUNCTION_LINES
    ]
    untyped = [f"{name(path)}: {each.name}" for path, each in functions if each.returns is None]
    assert not long and not untyped


def test_only_supervised_places_go_on_after_any_exception() -> None:
    """A handler that raises again is no such place."""
    found = []
    for path in FILES:
        lines = path.read_text().splitlines()
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                goes_on = not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if goes_on and ("# supervised:" not in lines[node.lineno - 1] or name(path) not in SUPERVISED):
                    found.append(f"{name(path)}:{node.lineno}")
    assert not found, "a new supervised place needs a decision, a mark and a counter"


def _is_broad(caught: ast.expr | None) -> bool:
    return caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException"))


def test_two_files_read_the_environment_and_no_other() -> None:
    """The node's and the client's configuration; `cli/` and `bench/` start processes and hand theirs on."""
    reads = {
        name(path)
        for path in FILES
        if path.relative_to(ROOT).parts[0] not in ("cli", "bench") and re.search(r"os\.environ|os\.getenv", path.read_text())
    }
    assert reads <= {"node/host/environment.py", "mesh/client/client.py"}


def test_nothing_unsafe_by_rule() -> None:
    unsafe = re.compile(r"\bpickle\b(?!d| )|torch\.load\(|trust_remote_code=True|shell=True|yaml\.load\(")
    found = [f"{name(path)}: {line}" for path in FILES for line in path.read_text().splitlines() if unsafe.search(line)]
    assert not [line for line in found if '"""' not in line and "#" not in line], found


def test_committed_files_carry_no_path_of_a_machine_and_no_local_index() -> None:
    local = re.compile(rb"(/work/|/root/|/home/[a-z]+/|file:/{2,}[a-z]|/opt/pypi)")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".sh", "") and path != Path(__file__):
            assert not local.search(path.read_bytes()), name(path)


def test_every_package_that_is_needed_is_pinned_and_torch_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    wanted = re.findall(r'^    "([A-Za-z0-9_.-]+)[=><]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {re.sub(r"[-_.]+", "-", each).lower() for each in wanted} <= pinned
    assert "torch==2.13.0" in lines


def test_a_decision_has_a_number_of_its_own() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [path.name[:4] for path in pages]
    assert len(set(numbers)) == len(numbers)
    assert all(path.read_text().startswith(f"# {int(number)}. ") for path, number in zip(pages, numbers))


# What comments, docstrings and documents speak of.
OURS = "mesh|membership|routing|rag|node|cli|bench|tools|tests"
NAMED_FILE = re.compile(r"(?<![\w/.<:*-])((?:[\w.-]+/)*[\w.-]+\.(?:md|py|toml|html|c|h|sh|js))(?![\w/])")
NAMED_FOLDER = re.compile(rf"(?<![\w/.-])((?:{OURS}|docs|examples)/[\w./-]*)")
NAMED_MODULE = re.compile(rf"`((?:{OURS})(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
NAMED_COMMAND = re.compile(r"`(?:\.venv/bin/)?mesh ([a-z-]+)(?: ([a-z]+))?")
NAMED_TARGET = re.compile(r"`make ([a-z-]+)")
# A user's files, fields of answers, kept figures.
NO_MODULES = {"mesh.toml", "mesh.key", "mesh.seq", "mesh.weights", "mesh.path", "membership.json"}
NO_COMMANDS = {"node"}  # `mesh node NAME up: …` is what a node prints


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a document, or of the comments and docstrings of a program."""
    if path.suffix not in (".md", ".py", ".c", ".h"):
        return
    text = path.read_text()
    if path.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
    elif path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                yield from enumerate(node.value.value.splitlines(), node.lineno)
    else:
        for comment in re.finditer(r"/\*.*?\*/", text, re.DOTALL):
            yield text.count("\n", 0, comment.start()) + 1, comment[0]


@cache
def all_prose() -> list[tuple[str, str]]:
    """Every line with its place, but of kept figures, which are as they were when they were measured."""
    paths = [path for path in tracked() if "results" not in path.parts]
    return [(f"{name(path)}:{number}", line) for path in paths for number, line in prose(path)]


def mentions(pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """Each place where `pattern` stands in our own prose."""
    for place, line in all_prose():
        for found in pattern.finditer(line):
            yield f"{place}: {found[0]}", found


def test_files_and_folders_that_are_spoken_of_exist() -> None:
    files = {name(path) for path in tracked()}
    ends = {"/".join(file.split("/")[depth:]) for file in files for depth in range(file.count("/") + 1)}  # also said in short
    missing = [place for place, found in mentions(NAMED_FILE) if found[1] not in ends]
    folders = [(place, found[1].rstrip("./")) for place, found in mentions(NAMED_FOLDER)]
    missing += [place for place, folder in folders if not any(file.startswith(folder) for file in files)]
    assert not [place for place in missing if not place.endswith(": mesh.toml")]


def test_modules_that_are_spoken_of_exist_with_what_is_named_in_them() -> None:
    kinds = {text for path in FILES for text in re.findall(rf'"((?:{OURS})(?:\.\w+)+)"', path.read_text())}
    told = [(place, found[1]) for place, found in mentions(NAMED_MODULE) if found[1] not in NO_MODULES | kinds]
    assert not [place for place, dotted in told if not _is_there(dotted.split("."))]


def _is_there(parts: list[str]) -> bool:
    """The longest beginning that is a module or package, and in it the rest."""
    for length in range(len(parts), 1, -1):
        module = ROOT.joinpath(*parts[:length])
        source = next((each for each in (module.with_suffix(".py"), module / "__init__.py") if each.is_file()), None)
        if source is not None:
            return all(re.search(rf"\b{part}\b", source.read_text()) for part in parts[length:])
        if module.is_dir():
            return length == len(parts)
    return False


def test_commands_and_targets_that_are_spoken_of_exist() -> None:
    commands: dict[str, Any] = vars(get_command(app))["commands"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = [place for place, found in mentions(NAMED_TARGET) if found[1] not in targets]
    for place, found in mentions(NAMED_COMMAND):
        command = commands.get(found[1])
        inner = getattr(command, "commands", None)
        if found[1] not in NO_COMMANDS and (command is None or (found[2] and inner is not None and found[2] not in inner)):
            wrong.append(place)
    assert not wrong
