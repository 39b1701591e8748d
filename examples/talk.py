"""A streamed answer: `python examples/talk.py "your question"`.

The client calls one node (`$MESH_NODE`, else http://127.0.0.1:8000), which sends it the addresses of the others. Kill a node that
computes a part of the answer: after a short pause the text continues, with the same tokens. The exception today is the called
node (the entry): when it dies, its answers are lost, and the example ends with the reason.
"""

from __future__ import annotations

import sys

from mesh import Client
from mesh.errors import MeshError


def main(question: str) -> None:
    with Client() as client, client.chat(question, stream=True, max_tokens=64, seed=1) as answer:
        try:
            for text in answer.texts():
                print(text, end="", flush=True)
        except MeshError as error:
            sys.exit(f"\n\n{error}")
        print(f"\n\n{answer.seq} tokens over {len(answer.mesh['path'])} stages, {answer.mesh['attempts']} attempts")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is a mesh?")
