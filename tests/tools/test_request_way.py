"""What counts as a name on a request's way, from recordings made by hand."""

from __future__ import annotations

import ast
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tools.definitions import definitions
from tools.request_way import because_of_request, by_folder, has_text, names_until, way_of
from tools.traced_node import Call, Held, Recorder, Recording, code_of

SOURCE = """
class Row:
    @property
    def key(self):
        def inner(): ...
        return inner

def plan(): ...
"""
DEFINED = {"node/rows.py": list(definitions(ast.parse(SOURCE))), "mesh/ids.py": list(definitions(ast.parse("class Id: ...")))}


def test_functions_methods_and_classes_are_counted_once_each() -> None:
    source = """
class Entry:
    def take(self):
        def inner(): ...
        return [inner for _ in range(2)]
    class Part: ...
def lone(): ...
if True:
    async def late(): ...
"""
    names = [each.qualified_name for each in definitions(ast.parse(source))]
    assert names == ["Entry", "Entry.take", "Entry.take.<locals>.inner", "Entry.Part", "lone", "late"]


def test_definitions_have_the_names_and_lines_of_their_code_objects() -> None:
    scope: dict[str, Any] = {}
    exec(compile(SOURCE, "rows.py", "exec"), scope)
    plan, key = scope["plan"].__code__, scope["Row"].key.fget.__code__
    found = {(each.qualified_name, each.first_line) for each in DEFINED["node/rows.py"]}
    assert {(plan.co_qualname, plan.co_firstlineno), (key.co_qualname, key.co_firstlineno)} <= found
    assert {name for name, _ in found} == {"Row", "Row.key", "Row.key.<locals>.inner", "plan"}


def test_what_runs_at_rest_is_not_on_the_way() -> None:
    asked, ticked, rare = ("node/a.py", "ask", 1), ("node/a.py", "tick", 2), ("node/a.py", "rare", 3)
    requests = [{asked: 5, ticked: 1}, {asked: 6, ticked: 1, rare: 2}, {asked: 7, ticked: 1}]
    assert because_of_request(requests, [[ticked], [ticked], [asked]]) == [asked]


def test_names_come_in_the_order_of_their_median_times() -> None:
    first, second = ("node/a.py", "first", 9), ("node/a.py", "second", 1)
    requests = [{first: 1, second: 2}, {second: 1, first: 3}, {first: 1, second: 2}]
    assert because_of_request(requests, [[], [], []]) == [first, second]


def test_nothing_after_the_end_is_counted() -> None:
    recording = Recording(100, [Call("node/a.py", "early", 1, 110), Call("node/a.py", "late", 2, 190)], [], None)
    assert names_until(recording, 150) == {("node/a.py", "early", 1): 10}


def test_a_lambda_counts_to_its_file_and_a_method_to_its_class() -> None:
    way = way_of([("node/rows.py", "Row.key", 3)], DEFINED)
    assert [(each.file, each.ran, each.defined) for each in way.files] == [("node/rows.py", ("Row", "Row.key"), 4)]
    assert way_of([("node/rows.py", "<lambda>", 7)], DEFINED).files[0].ran == ()
    assert way_of([("node/rows.py", "<module>", 1)], DEFINED).files == ()


def test_a_held_instance_counts_its_class_where_the_file_runs_too() -> None:
    held = ("mesh/ids.py", "Id", 0)
    way = way_of([held, ("node/rows.py", "plan", 8), ("node/rows.py", "Row", 0)], DEFINED)
    assert [(each.file, each.ran) for each in way.files] == [("node/rows.py", ("plan", "Row"))]
    assert way.class_only_files == ("mesh/ids.py",)
    assert list(by_folder(way.files)) == ["node"]


def test_only_a_chunk_with_content_is_text() -> None:
    assert has_text(b'data: {"choices": [{"delta": {"content": "sea"}}]}\n')
    assert not has_text(b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n')
    assert not has_text(b"data: [DONE]\n") and not has_text(b": ping\n")


def test_the_recorder_sees_calls_and_held_classes_of_the_repository_alone(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "rows.py").write_text(SOURCE)
    scope: dict[str, Any] = {"__name__": "rows"}
    exec(compile(SOURCE, str(folder / "rows.py"), "exec"), scope)
    recorder = Recorder(tmp_path)
    earlier = sys.getprofile()
    recorder.begin()
    sys.setprofile(recorder)
    try:
        scope["plan"]()
        Path("elsewhere").as_posix()
    finally:
        sys.setprofile(earlier)
    recording = recorder.end()
    assert [(call.file, call.name) for call in recording.calls] == [("node/rows.py", "plan")]
    assert recording.held == [] and recording.token_handed_over_ns is None


def test_names_held_but_ended_before_are_kept_with_their_times() -> None:
    recording = Recording(100, [], [Held("mesh/ids.py", "Id", 120)], 130)
    assert names_until(recording, 130) == {("mesh/ids.py", "Id", 0): 20}


def test_the_code_of_a_partial_method_is_found() -> None:
    recorder = Recorder()
    assert code_of(partial(partial(recorder.begin))) is Recorder.begin.__code__
    assert code_of(len) is None
