"""The count of what a request crosses: its pure parts."""

from __future__ import annotations

from tools.request_way import definitions, way

SOURCE = """
class Entry:
    def take(self):
        def inner(): ...
        return [inner for _ in range(2)]
    class Part: ...
def lone(): ...
if True:
    async def late(): ...
"""


def test_functions_methods_and_classes_are_counted_once_each() -> None:
    assert definitions(SOURCE) == ["Entry", "Entry.take", "Entry.take.<locals>.inner", "Entry.Part", "lone", "late"]


def test_what_runs_at_rest_is_not_on_the_way() -> None:
    request = [("a.py", "Entry.take"), ("a.py", "tick"), ("b.py", "<module>"), ("a.py", "Entry.take.<locals>.<listcomp>")]
    assert way(request, [("a.py", "tick")]) == {"a.py": ["Entry", "Entry.take"]}


def test_a_lambda_counts_to_the_function_in_which_it_stands() -> None:
    assert way([("a.py", "lone.<locals>.<lambda>"), ("a.py", "Entry.take.<locals>.inner")], []) == {
        "a.py": ["lone", "Entry.take.<locals>.inner"]
    }
