"""The same endpoint through the official `openai` package: `python examples/official_client.py`."""

from __future__ import annotations

from mesh import Client


def main() -> None:
    with Client() as client, client.openai() as official:
        model = official.models.list().data[0].id
        reply = official.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=32)
        print(reply.choices[0].message.content)


if __name__ == "__main__":
    main()
