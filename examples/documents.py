"""Questions about your own files: `python examples/documents.py FOLDER "your question"`."""

from __future__ import annotations

import sys

from mesh import Client
from mesh.client.api import citations

STORE = "notes"


def main(folder: str, question: str) -> None:
    with Client() as client:
        for added in client.docs.add(folder, STORE):
            print(f"{added.outcome:>9}  {added.name}")
        for passage in client.docs.search(STORE, question, top_k=3):
            print(f"{passage['score']:9.3f}  {passage['filename']}")
        reply = client.ask(question, STORE, top_k=3, max_tokens=64)
        print(reply["choices"][0]["message"]["content"])
        for citation in citations(reply):
            print(f"[{citation.get('number', '?')}] {citation['filename']}: {citation['quote']}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:3])
