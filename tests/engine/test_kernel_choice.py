"""Which kernel a node takes: the portable one, whatever else the machine does meanwhile; others only by a clear margin."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest
from node.config import KERNEL_NAMES, NodeConfig
from node.engine.kernels import kernel_choice, kernel_record, kernel_timing, machine
from node.engine.kernels.kernel_choice import MARGIN, PORTABLE_MARGIN, KernelChoice, decided
from node.engine.kernels.kernel_probe import refusal
from node.engine.kernels.kernel_timing import MAX_ROUNDS, MIN_ROUNDS, ROWS, Timings, rounds
from node.engine.model.linear import KERNELS
from node.engine.native.library import native
from node.host.uncompiled import BY_NAME

NAMES = ("mesh-bf16", "mesh-fp32", "fbgemm-fp16", "onednn-fp32")
ORDER = tuple(KERNELS[name] for name in NAMES)
WITHOUT_COMPILER = ("fbgemm-fp16", "onednn-bf16", "onednn-fp32", "aten-fp32")
KEY = {"cpu": "a", "shape": "2048 x 8192"}


def first(times_s: dict[str, float], steady: bool = True) -> str:
    timings = Timings({name: (time_s,) * len(ROWS) for name, time_s in times_s.items()}, steady)
    return decided([KERNELS[name] for name in times_s], timings).kernels[0].name


seconds = st.floats(1e-5, 1.0)


@given(st.tuples(*[seconds] * 4), st.data())
def test_noise_in_single_measurements_never_changes_the_choice(true_s: tuple[float, ...], data: st.DataObject) -> None:
    """A measurement may take 1.5 to 9 times its time; two of each kernel's with each row count are undisturbed."""
    times_s = dict(zip(NAMES, true_s, strict=True))
    noise = {
        (name, count): [1.0, 1.0, *data.draw(st.lists(st.floats(1.5, 9.0), min_size=MIN_ROUNDS - 2, max_size=MIN_ROUNDS - 2))]
        for name in NAMES
        for count in ROWS
    }
    mixed = {which: data.draw(st.permutations(factors)) for which, factors in noise.items()}
    timings = rounds(NAMES, lambda name, count: times_s[name] * mixed[name, count].pop())
    assert timings.steady
    assert decided(ORDER, timings).kernels[0].name == first(times_s)


@pytest.mark.parametrize("faster", [1.0, 1.5])
def test_noise_in_every_measurement_does_not_displace_the_portable_kernel(faster: float) -> None:
    for seed in range(200):
        draw = random.Random(seed).uniform

        def noise(name: str, count: int, draw: Callable[[float, float], float] = draw) -> float:
            return draw(1.5, 9.0) / (1.0 if "mesh" in name else faster)

        timings = rounds(NAMES, noise)
        assert decided(ORDER, timings).kernels[0].name == "mesh-bf16", f"seed {seed}"


def test_a_portable_kernel_gives_way_only_where_another_is_four_times_as_fast() -> None:
    assert first({"mesh-bf16": 3.9, "fbgemm-fp16": 1.0}) == "mesh-bf16"
    assert first({"mesh-bf16": 4.1, "fbgemm-fp16": 1.0}) == "fbgemm-fp16"
    assert first({"mesh-bf16": 4.1, "mesh-fp32": 3.0, "fbgemm-fp16": 1.0}) == "mesh-fp32", "the other portable one is near"


def test_among_the_others_the_first_within_the_margin_of_the_fastest_is_taken() -> None:
    assert first({"fbgemm-fp16": 1.9, "onednn-fp32": 1.0}) == "fbgemm-fp16"
    assert first({"fbgemm-fp16": 2.1, "onednn-fp32": 1.0, "aten-fp32": 0.9}) == "onednn-fp32"


@given(st.permutations(WITHOUT_COMPILER), st.lists(seconds, min_size=4, max_size=4))
def test_what_is_taken_is_beaten_by_no_other_and_nothing_is_lost(order: list[str], times_s: list[float]) -> None:
    times = dict(zip(order, times_s, strict=True))
    timings = Timings({name: (time_s,) * len(ROWS) for name, time_s in times.items()}, True)
    kernels = decided([KERNELS[name] for name in order], timings).kernels
    assert times[kernels[0].name] < MARGIN * min(times_s) * (1 + 1e-6)
    assert sorted(kernel.name for kernel in kernels) == sorted(order)


def test_a_machine_too_busy_to_tell_keeps_the_preferred_kernel() -> None:
    assert first({"mesh-bf16": 9.0, "fbgemm-fp16": 1.0}, steady=False) == "mesh-bf16"
    grows = iter(range(1, 10_000))
    restless = rounds(NAMES, lambda name, count: 2.0 ** next(grows))
    assert not restless.steady


def test_rounds_go_on_until_each_least_time_was_met_twice_and_kernels_take_turns() -> None:
    asked: list[tuple[str, int]] = []

    def take(name: str, count: int) -> float:
        asked.append((name, count))
        disturbed = name == "mesh-bf16" and len(asked) < 6 * len(NAMES) * len(ROWS)
        return float(len(asked)) if disturbed else 0.5

    timings = rounds(NAMES, take)
    turn = [(name, count) for name in NAMES for count in ROWS]
    assert timings.steady and timings.times_s["mesh-bf16"] == (0.5, 0.5)
    assert len(asked) == 8 * len(turn) and asked == 8 * turn
    assert MIN_ROUNDS < 8 < MAX_ROUNDS


def test_a_kernel_that_cannot_compute_is_tried_last_and_the_reason_says_so() -> None:
    timings = Timings({"onednn-bf16": (), "onednn-fp32": (1.0, 1.0)}, True)
    choice = decided([KERNELS["onednn-bf16"], KERNELS["onednn-fp32"]], timings)
    assert [kernel.name for kernel in choice.kernels] == ["onednn-fp32", "onednn-bf16"]
    assert choice.reason.startswith("onednn-bf16 cannot compute such layers here")
    nothing = decided([KERNELS["onednn-bf16"]], Timings({"onednn-bf16": ()}, True))
    assert [kernel.name for kernel in nothing.kernels] == ["onednn-bf16"]


def test_the_reason_says_what_giving_way_costs() -> None:
    times: dict[str, tuple[float, ...]] = {"mesh-bf16": (5.0, 5.0), "fbgemm-fp16": (1.0, 1.0)}
    choice = decided([KERNELS[name] for name in times], Timings(times, True), remembered=True)
    assert choice.reason == "mesh-bf16 takes 5.0 times as long; exact only with nodes of this kind of CPU"
    assert choice.times_us == {"mesh-bf16": 5e6, "fbgemm-fp16": 1e6} and choice.remembered
    kept = decided([KERNELS[name] for name in times], Timings({**times, "mesh-bf16": (2.0, 2.0)}, True))
    assert kept.reason == f"its bits are the same on every CPU; no other is {PORTABLE_MARGIN:g} times as fast"


@pytest.mark.parametrize("isa", ["AVX2", "AVX512", "AVX512+bf16+vnni", "AVX512+bf16+vnni+amx"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_with_the_compiled_kernel_all_cpus_choose_alike(
    stored: torch.dtype, quantize: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_existing", lambda names: [KERNELS[name] for name in names])
    monkeypatch.setattr(machine, "isa", lambda: isa)
    chosen = machine.candidates("auto", stored, quantize)[0]
    ending = "" if stored is torch.bfloat16 else "-fp32"
    assert chosen.name == (f"mesh-{quantize}{ending}" if quantize != "none" else f"mesh{ending or '-bf16'}")


def test_without_the_compiled_kernel_bf16_instructions_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_existing", lambda names: [each for name in names if not (each := KERNELS[name]).compiled])
    for isa, name in (("AVX512+bf16", "onednn-bf16"), ("AVX2", "fbgemm-fp16")):
        monkeypatch.setattr(machine, "isa", lambda isa=isa: isa)
        assert machine.candidates("auto", torch.bfloat16)[0].name == name


def test_the_names_that_a_user_may_give_are_those_of_the_kernels() -> None:
    assert sorted(KERNEL_NAMES) == sorted(KERNELS)
    assert NodeConfig(dtype="fbgemm-fp16").dtype == "fbgemm-fp16"
    with pytest.raises(BadRequest, match=r"--dtype: expected auto, float32, bfloat16 or a kernel \(mesh-bf16, .*got 'fp8'"):
        NodeConfig(dtype="fp8")


def test_a_kernel_asked_for_by_name_does_not_pass_over_what_else_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_existing", lambda names: [KERNELS[name] for name in names])
    assert machine.candidates("mesh-int8", torch.bfloat16, "int8") == [KERNELS["mesh-int8"]]
    for name, quantize in (("mesh-bf16", "int8"), ("mesh-int8", "int4")):
        with pytest.raises(ValueError, match=f"{name} does not hold weights as {quantize}"):
            machine.candidates(name, torch.bfloat16, quantize)


# ---- what is remembered


class Measuring:
    """Stands for the timing of a layer; counts how often it is asked."""

    def __init__(self, timings: Timings) -> None:
        self.timings, self.count = timings, 0

    def __call__(self, *given: Any) -> Timings:
        self.count += 1
        return self.timings


GIVEN = Timings({"mesh-bf16": (0.25, 0.5), "fbgemm-fp16": ()}, True)
KNOWN = list(GIVEN.times_s)


def the_file(directory: Path) -> Path:
    (found,) = directory.glob("*.json")
    return found


def test_timings_are_measured_once_and_then_remembered(tmp_path: Path) -> None:
    measure = Measuring(GIVEN)
    assert kernel_record.timings(tmp_path, KEY, KNOWN, measure) == (GIVEN, False)
    assert kernel_record.timings(tmp_path, KEY, KNOWN, measure) == (GIVEN, True)
    assert measure.count == 1
    assert the_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_another_key_or_other_kernels_are_measured_anew(tmp_path: Path) -> None:
    measure = Measuring(GIVEN)
    kernel_record.timings(tmp_path, KEY, KNOWN, measure)
    for changed in (KEY | {"cpu": "b"}, KEY | {"shape": "1 x 1"}, KEY | {"torch": "3"}, {"cpu": "a"}):
        assert kernel_record.timings(tmp_path, changed, KNOWN, measure)[1] is False
    assert kernel_record.timings(tmp_path, KEY, ["mesh-bf16"], measure)[1] is False


def test_what_a_restless_machine_measured_is_not_kept(tmp_path: Path) -> None:
    measure = Measuring(Timings(GIVEN.times_s, steady=False))
    for _ in range(2):
        assert kernel_record.timings(tmp_path, KEY, KNOWN, measure)[1] is False
    assert measure.count == 2 and not list(tmp_path.glob("*.json"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def become_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no JSON": lambda path: path.write_bytes(b"\xff\x00"),
    "nested without end": lambda path: path.write_text("[" * 12_000),
    "a list": lambda path: path.write_text("[]"),
    "too long": lambda path: path.write_text(path.read_text() + " " * kernel_record.MAX_FILE_BYTES + "x"),
    "another key": lambda path: change(path, key=KEY | {"cpu": "b"}),
    "no times": lambda path: change(path, times_s=None),
    "another kernel": lambda path: change(path, times_s={"mesh-bf16": [0.1, 0.1], "onednn-fp32": [0.1, 0.1]}),
    "a kernel left out": lambda path: change(path, times_s={"mesh-bf16": [0.1, 0.1]}),
    "zero": lambda path: change(path, times_s={"mesh-bf16": [0.0, 0.1], "fbgemm-fp16": []}),
    "negative": lambda path: change(path, times_s={"mesh-bf16": [-1.0, 0.1], "fbgemm-fp16": []}),
    "infinite": lambda path: change(path, times_s={"mesh-bf16": [math.inf, 0.1], "fbgemm-fp16": []}),
    "not a number": lambda path: change(path, times_s={"mesh-bf16": [math.nan, 0.1], "fbgemm-fp16": []}),
    "words": lambda path: change(path, times_s={"mesh-bf16": ["0.1", "0.1"], "fbgemm-fp16": []}),
    "too few": lambda path: change(path, times_s={"mesh-bf16": [0.1], "fbgemm-fp16": []}),
    "others may write": lambda path: path.chmod(0o662),
    "a link": become_a_link,
    "a directory": become_a_directory,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_cannot_be_trusted_is_measured_anew(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    measure = Measuring(GIVEN)
    kernel_record.timings(tmp_path, KEY, KNOWN, measure)
    damage(the_file(tmp_path))
    assert kernel_record.timings(tmp_path, KEY, KNOWN, measure) == (GIVEN, False)
    assert measure.count == 2


def test_a_file_of_another_user_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measuring(GIVEN)
    kernel_record.timings(tmp_path, KEY, KNOWN, measure)
    path = the_file(tmp_path)
    assert kernel_record.read(path, KEY, KNOWN) == GIVEN
    mine = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: mine + 1)
    assert kernel_record.read(path, KEY, KNOWN) is None


def test_a_directory_that_others_may_write_to_is_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    measure = Measuring(GIVEN)
    for _ in range(2):
        assert kernel_record.timings(directory, KEY, KNOWN, measure) == (GIVEN, False)
    assert measure.count == 2 and not list(directory.iterdir())


def test_where_nothing_can_be_written_the_timings_count_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError("no space left on device")

    measure = Measuring(GIVEN)
    monkeypatch.setattr(kernel_record, "write", full)
    assert kernel_record.timings(tmp_path, KEY, KNOWN, measure) == (GIVEN, False)
    assert measure.count == 1


# ---- put together


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., kernel_choice.KernelChoice]:
    """`choose` as a process that starts would call it, with a cache directory of its own."""
    monkeypatch.setattr(kernel_choice, "cache_home", lambda: tmp_path)
    return kernel_choice.choose.__wrapped__


def fast_fbgemm(kernels: Any, *given: Any) -> Timings:
    return Timings({kernel.name: (0.1, 0.1) if kernel.name == "fbgemm-fp16" else (1.0, 1.0) for kernel in kernels}, True)


def test_a_remembered_choice_is_the_same_choice(
    chosen: Callable[..., kernel_choice.KernelChoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "candidates", lambda *given: list(ORDER))
    monkeypatch.setattr(kernel_timing, "of_layer", fast_fbgemm)
    once = chosen("auto", torch.bfloat16, 2048, 8192)
    monkeypatch.setattr(kernel_timing, "of_layer", None)
    again = chosen("auto", torch.bfloat16, 2048, 8192)
    assert once.kernels == again.kernels and once.kernels[0].name == "fbgemm-fp16"
    assert (once.remembered, again.remembered) == (False, True)
    assert once.reason == again.reason and once.times_us == again.times_us


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (machine, "cpu", lambda: "another CPU"),
        (machine, "isa", lambda: "AVX"),
        (kernel_choice, "onednn_cap", lambda: "another cap"),
        (kernel_choice, "RULES_VERSION", 2),
        (torch, "__version__", "9.9"),
        (kernel_choice, "native", lambda: None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_timing_depends_on_makes_it_be_measured_anew(
    owner: Any, name: str, value: Any, chosen: Callable[..., kernel_choice.KernelChoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "native" and native() is None:
        pytest.skip("there is no compiled kernel here")
    monkeypatch.setattr(machine, "candidates", lambda *given: list(ORDER))
    monkeypatch.setattr(kernel_timing, "of_layer", fast_fbgemm)
    chosen("auto", torch.bfloat16, 2048, 8192)
    assert chosen("auto", torch.bfloat16, 2048, 8192).remembered
    assert not chosen("auto", torch.bfloat16, 4096, 8192).remembered, "another shape"
    monkeypatch.setattr(owner, name, value)
    assert not chosen("auto", torch.bfloat16, 2048, 8192).remembered


@pytest.mark.skipif(native() is None, reason="there is no compiled kernel here")
def test_other_sources_of_the_compiled_kernel_are_measured_anew(
    chosen: Callable[..., kernel_choice.KernelChoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "candidates", lambda *given: list(ORDER))
    monkeypatch.setattr(kernel_timing, "of_layer", fast_fbgemm)
    chosen("auto", torch.bfloat16, 2048, 8192)
    monkeypatch.setattr(kernel_choice, "sources_digest", lambda: "changed")
    assert not chosen("auto", torch.bfloat16, 2048, 8192).remembered


def test_what_is_asked_for_by_name_and_what_is_small_is_not_timed(
    chosen: Callable[..., kernel_choice.KernelChoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_timing, "of_layer", None)
    named = chosen("onednn-fp32", torch.bfloat16, 2048, 8192)
    assert [kernel.name for kernel in named.kernels] == ["onednn-fp32"] and named.reason == "asked for by its name"
    small = chosen("auto", torch.bfloat16, 256, 704)
    assert small.reason.endswith("layers this small are not timed") and not small.times_us


def test_a_layer_is_timed_with_one_thread_which_is_taken_back() -> None:
    before = torch.get_num_threads()
    kernels = [KERNELS[name] for name in NAMES if not refusal(KERNELS[name])]
    timings = kernel_timing.of_layer(kernels, torch.bfloat16, 64, 96)
    assert torch.get_num_threads() == before
    assert list(timings.times_s) == [kernel.name for kernel in kernels]
    assert all(len(times) == len(ROWS) and min(times) > 0 for times in timings.times_s.values())


def test_why_a_span_is_computed_without_the_compiled_kernel_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {name: KernelChoice((KERNELS[name],), BY_NAME) for name in ("mesh-bf16", "cuda-bf16", "fbgemm-fp16")}
    monkeypatch.setattr(kernel_choice, "absence", lambda: "")
    assert kernel_choice.uncompiled([choices["mesh-bf16"], choices["cuda-bf16"]]) == ""
    assert kernel_choice.uncompiled(choices.values()) == BY_NAME
    monkeypatch.setattr(kernel_choice, "absence", lambda: "no C compiler")
    assert kernel_choice.uncompiled(choices.values()) == "no C compiler"
