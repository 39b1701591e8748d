"""A streamed answer that outlives the node it came from: `python examples/talk.py "your question"`.

The client is told one node (`$MESH_NODE`, else http://127.0.0.1:8000) and learns the others from it. Kill
that node in mid-answer: the text goes on from another one.
"""

from __future__ import annotations

import sys

from mesh import Client


def main(question: str) -> None:
    with Client() as client, client.chat(question, stream=True, max_tokens=64, seed=1) as answer:
        for text in answer.texts():
            print(text, end="", flush=True)
        print(f"\n\n{answer.seq} tokens over {len(answer.mesh['path'])} stages, {answer.progress.resumes} resumes")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is a mesh?")
