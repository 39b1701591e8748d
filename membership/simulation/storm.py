"""One small mesh through a storm drawn from a seed, and the checks afterwards: cheap enough for thousands of runs.

Three to eight nodes are killed, crashed, stopped, starved, restarted, cut off and sent away while datagrams are lost. Then the
faults end, and all running nodes must soon see one mesh in which no live node stays dead.
"""

from __future__ import annotations

from random import Random

from membership.simulation.checkers import (
    converged,
    nobody_raises_anothers_incarnation,
    overridden_goodbyes,
    queues_are_bounded,
)
from membership.simulation.network import Network

BLOWS = (2, 8)
MAX_LOSS = 0.1
CLEARS_WITHIN_S = 25.0
LOSSES = (0.0, 0.0, 0.02, 0.05, MAX_LOSS)


class FaultStorm:
    def __init__(self, seed: int) -> None:
        self._draw = Random(seed)
        self.network = Network(seed, loss=self._draw.choice(LOSSES), encoded=False)
        self.ids = self.network.grow(self._draw.randint(3, 8), settle_s=1.0)
        self.blows: list[str] = []

    def faults(self) -> list[str]:
        """Runs the storm; returns a description of each failed check."""
        found: list[str] = []
        for _ in range(self._draw.randint(*BLOWS)):
            self._blow()
            self.network.run(self._draw.uniform(0.05, 2.0))
            if not nobody_raises_anothers_incarnation(self.network):
                found.append("an incarnation that its node did not give itself")
            if not queues_are_bounded(self.network):
                found.append("more rumours than members")
        self._clear()
        try:
            self.network.run_until(lambda: converged(self.network), within_s=CLEARS_WITHIN_S, step_s=0.2)
        except AssertionError:
            found.append(f"no one view {CLEARS_WITHIN_S:g} s after the storm")
        return found + [f"{node} left, {by} saw it, and took it for dead" for by, node in overridden_goodbyes(self.network)]

    def _blow(self) -> None:
        draw, network = self._draw, self.network
        node = draw.choice(self.ids[1:])
        it = network.nodes[node]
        blow = draw.choice(("kill", "crash", "leave", "stop", "starve", "cut", "cut one way", "heal", "break links"))
        if not it.running:
            blow = "start"
        elif it.paused:
            blow = "resume"
        self.blows.append(f"{network.now:.2f} {blow} {int(node, 16)}")
        match blow:
            case "start":
                epoch = max(it.epoch, it.core.swim.myself.epoch) + 1
                network.add([self.ids[0]], number=int(node, 16), epoch=epoch)
            case "kill":
                network.kill(node)
            case "crash":
                network.crash(node)
            case "leave":
                network.leave(node)
            case "stop":
                network.pause(node)
            case "resume":
                network.resume(node)
            case "starve":
                network.starve(node, (0.1, draw.uniform(0.2, 2.0)))
            case "cut" | "cut one way":
                some = set(draw.sample(self.ids, draw.randint(1, len(self.ids) - 1)))
                network.cut(some, [other for other in self.ids if other not in some], one_way=blow != "cut")
            case "heal":
                network.heal()
            case "break links":
                network.break_links(node)

    def _clear(self) -> None:
        self.network.heal()
        for it in self.network.nodes.values():
            it.starved_s = None
            if it.running and it.paused:
                self.network.resume(it.id)
