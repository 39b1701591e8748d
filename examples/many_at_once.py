"""Many answers at once under trio, spread over all nodes: `python examples/many_at_once.py`."""

from __future__ import annotations

import trio

from mesh import AsyncClient

QUESTIONS = ["What is gossip?", "What is a quorum?", "What is a rendezvous hash?", "What is a tombstone?"]


async def main() -> None:
    async with AsyncClient(spread=True) as client, trio.open_nursery() as nursery:

        async def answer(question: str) -> None:
            reply = await client.chat(question, max_tokens=32)
            print(f"{question} {reply['choices'][0]['message']['content']}")

        for question in QUESTIONS:
            nursery.start_soon(answer, question)


if __name__ == "__main__":
    trio.run(main)
