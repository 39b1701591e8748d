"""What `python -m tools.type_names` finds in small files."""

from __future__ import annotations

import ast

from tools.definitions import source_files
from tools.type_names import crossing_dicts, lines_of, names_defined_twice, uses_of_any


def trees(**files: str) -> dict[str, ast.Module]:
    return {f"node/{name}.py": ast.parse(source) for name, source in files.items()}


def test_a_class_name_used_twice_is_listed_with_both_places() -> None:
    files = trees(a="class Row: ...", b="\nclass Row: ...\nclass Lane: ...", c="Lane = tuple[int]")
    found = names_defined_twice(files, aliases=False)
    assert {name: [str(place) for place in places] for name, places in found.items()} == {"Row": ["node/a.py:1", "node/b.py:2"]}


def test_an_alias_with_the_name_of_a_class_is_listed_where_asked_for() -> None:
    files = trees(a="class Lane: ...", b="Lane = tuple[int]\nLIMIT = other.LIMIT")
    assert list(names_defined_twice(files, aliases=True)) == ["Lane"]


def test_any_is_at_json_edge_in_an_alias_or_beside_json() -> None:
    plain = "from typing import Any\nJson = dict[str, Any]\ndef f(x: Any, y: 'list[Any]') -> None: ...\nclass C(Base[Any]): ..."
    outside, at_edge = uses_of_any(trees(plain=plain, parses=f"import json\n{plain}"))
    assert [place.file for place in outside] == ["node/plain.py"] * 3
    assert sorted(place.file for place in at_edge) == ["node/parses.py"] * 4 + ["node/plain.py"]


def test_any_of_typing_and_the_file_that_decodes_by_msgspec_are_seen() -> None:
    outside, at_edge = uses_of_any(trees(a="x: typing.Any = 1", b="y: Any = msgspec.json.decode(b'')"))
    assert [str(place) for place in outside] == ["node/a.py:1 typing.Any"] and len(at_edge) == 1


def test_an_untyped_dict_crosses_only_where_another_file_calls() -> None:
    source = "def told(x: dict[str, Any]) -> int: ...\ndef kept(x: dict[str, Any]) -> int: ...\nkept({})"
    method = "class Case:\n    def report(self) -> Mapping[str, object]: ...\n    def _own(self) -> dict[str, Any]: ..."
    files = trees(a=source, b=method, c="from node.a import told\ncase.report()\ncase._own()")
    written, by_alias = crossing_dicts(files)
    assert [place.text for place in written] == ["told: dict[str, Any]", "Case.report: Mapping[str, object]"]
    assert by_alias == []


def test_an_untyped_dict_behind_an_alias_is_told_apart() -> None:
    files = trees(a="Header = dict[str, Any]", b="def send(header: Header, size: dict[str, int]) -> None: ...", c="b.send({})")
    written, by_alias = crossing_dicts(files)
    assert written == [] and [place.text for place in by_alias] == ["send: Header"]


def test_the_report_counts_per_package() -> None:
    assert "Any outside JSON's edge: 1 (node 1)" in list(lines_of(trees(a="x: Any = 1")))


def test_each_type_of_the_product_has_one_meaning_and_few_types_are_open() -> None:
    files = source_files()
    assert names_defined_twice(files, aliases=True) == {}
    outside, _ = uses_of_any(files)
    assert len(outside) <= 60
