"""Names of prompt beginnings: equal as far as the tokens are, and only there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.prefix import NAME_BYTES, PREFIX_PAGE_TOKENS, further_names, prefix_salt

SALT = prefix_salt(b"s" * 32, "tenant", "weights")
TOKENS = st.lists(st.integers(0, 9), max_size=4 * PREFIX_PAGE_TOKENS)


@given(TOKENS, TOKENS)
def test_two_prompts_share_names_exactly_as_far_as_they_share_whole_pages(one: list[int], other: list[int]) -> None:
    other = one[: len(one) * 2 // 3] + other
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    names, others = further_names(SALT, [], one), further_names(SALT, [], other)
    shared = common // PREFIX_PAGE_TOKENS
    assert names[:shared] == others[:shared]
    assert not set(names[shared:]) & set(others)
    assert len(names) == len(one) // PREFIX_PAGE_TOKENS and all(len(name) == NAME_BYTES for name in names)


@given(TOKENS, st.integers(0, 4))
def test_names_may_be_made_page_by_page(tokens: list[int], first: int) -> None:
    names = further_names(SALT, [], tokens[: first * PREFIX_PAGE_TOKENS])
    assert names + further_names(SALT, names, tokens) == further_names(SALT, [], tokens)


@pytest.mark.parametrize(
    "salt",
    [
        prefix_salt(b"t" * 32, "tenant", "weights"),
        prefix_salt(b"s" * 32, "tenant2", "weights"),
        prefix_salt(b"s" * 32, "tenant", "weights2"),
        prefix_salt(b"s" * 32, "tenantw", "eights"),
        prefix_salt(b"", "tenant", "weights"),
    ],
)
def test_another_mesh_tenant_or_model_has_other_names(salt: bytes) -> None:
    tokens = list(range(PREFIX_PAGE_TOKENS))
    assert further_names(salt, [], tokens) != further_names(SALT, [], tokens)
