"""One mesh of unlike machines: a CPU that has AVX2 alone is exact with any other, one without a compiler is told of."""

from typing import Any

import pytest

from cli.local_mesh import LocalMesh, LocalNode
from tests.e2e.meshes import answer, get, ready, tokens_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
AVX2 = {"MESH_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
NO_COMPILER = {"MESH_CPU_ISA": "none"}


def uncompiled(node: LocalNode) -> Any:
    return get(node, "/mesh/status").json()["self"]["uncompiled"]


def findings(node: LocalNode) -> list[dict[str, Any]]:
    return [told for told in get(node, "/mesh/doctor").json()["findings"] if "compiled kernel" in told["what"]]


def test_unlike_cpus_are_exact_together_and_a_node_without_the_compiled_kernel_is_named_with_what_to_do() -> None:
    with LocalMesh() as here, LocalMesh(environment=AVX2) as older, LocalMesh(environment=NO_COMPILER) as bare:
        a = here.start("a", "--layers", "0:3")
        if told := uncompiled(a):
            pytest.skip(f"the compiled kernel: {told['why']}")
        b = older.start("b", "--layers", "3:6", join=[a])
        ready([a, b])
        exact = answer(a, seed=3, max_tokens=20)
        assert exact["mesh"]["numerics"] == "exact" and len(exact["mesh"]["path"]) == 2
        assert not findings(a)

        c = bare.start("c", "--layers", "3:6", join=[a])
        ready([a, b, c])
        (finding,) = findings(a)
        assert finding["severity"] == "note" and finding["what"].startswith(
            "without the compiled kernel: c (MESH_CPU_ISA is none)"
        )
        assert finding["do"] == "start the node without MESH_CPU_ISA=none"
        assert findings(c) == findings(a), "every node knows of every other"
        assert uncompiled(c)["why"] == "MESH_CPU_ISA is none" and uncompiled(b) is None
        again = answer(a, seed=3, max_tokens=20)
        assert again["mesh"]["numerics"] == "exact" and tokens_of(again) == tokens_of(exact), "exact paths come first"

        older.kill(b)
        assert answer(a, seed=3, max_tokens=5)["mesh"]["numerics"] == "approximate"
