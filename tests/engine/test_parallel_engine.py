"""An engine whose span two worker processes compute, through the engine's protocol."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Span, is_exact
from node.engine.api import EngineOutput, SequenceLost, SpanLost, TokenOut
from tests.engine.test_prefix_cache import SplitPath, ask, bits, numbers
from tests.engine.test_worker import MODEL, WAIT_S, opening, running


def listening(pid: int) -> set[str]:
    return {each.laddr.ip for each in psutil.Process(pid).net_connections() if each.status == psutil.CONN_LISTEN}


@pytest.mark.timeout(300)  # the workers import torch and transformers, which takes a busy machine its time
def test_two_workers_answer_like_one_engine_and_the_loss_of_one_ends_the_span(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test, for each pair of workers costs seconds of imports."""
    directory = checkpoint_of("llama")
    with running((directory, 0, 4), tensor_parallel=2) as one:
        span = Span(MODEL, 0, 4)
        stage: Any = one.engine.stage(span)
        numerics = one.engine.statistics().numerics[span]
        assert numerics.endswith("-tp2") and is_exact(numerics)
        assert [listening(pid) for pid in stage.processes] == [{"127.0.0.1"}] * 2

        first = opening("first")
        one.engine.open(first)
        expected = one.tokens_of(first.key)
        again, company = opening("again"), opening("company", tokens=tuple(range(40, 95)))
        one.engine.open(company)
        one.engine.open(again)
        assert one.tokens_of(again.key) == expected
        one.tokens_of(company.key)

        prompt = numbers(1, 150)
        cold, warm = (SplitPath((one, 0, 4)).answer(name, prompt) for name in ("cold", "warm"))
        assert (cold[0].cached, warm[0].cached) == (0, 4 * PREFIX_PAGE_TOKENS)
        assert bits(cold) == bits(warm)

        forward = stage.forward

        def spoil(*args: Any, **named: Any) -> torch.Tensor:
            out: torch.Tensor = forward(*args, **named)
            return out.fill_(float("nan")) if len(named["ids"]) == 1 else out

        with monkeypatch.context() as patch:
            patch.setattr(stage, "forward", spoil)
            one.engine.open(ask("spoiled", numbers(2, 70)))
            while not isinstance(one.next(), SequenceLost):
                pass
        fresh = SplitPath((one, 0, 4)).answer("fresh", numbers(2, 70))
        assert fresh[0].cached == 0, "what a rank keeps of a sequence that ended in no numbers is not trusted"

        endless = opening("endless", max_tokens=900, ignore_eos=True)
        one.engine.open(endless)
        while not isinstance(one.next(), TokenOut):
            pass
        os.kill(stage.processes[1], signal.SIGKILL)
        told: list[EngineOutput] = []
        while len(told) < 2:
            out = one.next()
            told += [] if isinstance(out, TokenOut) else [out]
        assert told[0] == SpanLost(span, "rank 1 was killed by signal 9"), "before its sequences: nobody sends them here again"
        assert isinstance(told[1], SequenceLost) and told[1].key == endless.key and told[1].retryable
        assert span not in one.engine.statistics().numerics
        psutil.wait_procs([psutil.Process(pid) for pid in stage.processes if psutil.pid_exists(pid)], timeout=WAIT_S)
        assert not any(psutil.pid_exists(pid) for pid in stage.processes)
