"""Measures a model directory: `python -m tools.default_model.evaluate --json`. Greedy, through the model's own chat template.

Beside each figure stands that of a trivial rule, the sentence with the best BM25 score: what can be had without a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.default_model import export, tasks
from tools.default_model.prompts import REFUSAL
from tools.default_model.prose import Prose
from tools.default_model.tasks import Task

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED = PROJECT / "node" / "engine" / "mesh_demo"
XQUAD = PROJECT.parent / "shared" / "data" / "xquad.en.json"
SEED = 1
MAX_NEW_TOKENS = 160
BATCH = 16


class Answerer:
    """A model directory, asked greedily in batches."""

    def __init__(self, directory: Path, device: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._tokenizer.padding_side = "left"
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        self._model = model.to(device).eval()
        self._context = int(model.config.max_position_embeddings)

    def answer(self, prompts: Sequence[str]) -> list[str]:
        """Outputs without special tokens, in the order of `prompts`; empty where a prompt exceeds the context."""
        rows = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": each}], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            for each in prompts
        ]
        outputs = [""] * len(rows)
        fitting = sorted(
            (n for n in range(len(rows)) if len(rows[n]) < self._context - MAX_NEW_TOKENS), key=lambda n: len(rows[n])
        )
        for start in range(0, len(fitting), BATCH):
            numbers = fitting[start : start + BATCH]
            padded = self._tokenizer.pad({"input_ids": [rows[number] for number in numbers]}, return_tensors="pt")
            padded = padded.to(self._model.device)
            with torch.inference_mode():
                produced = self._model.generate(**padded, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            for number, ids in zip(numbers, produced[:, padded["input_ids"].shape[1] :]):
                outputs[number] = self._tokenizer.decode(ids, skip_special_tokens=True)
        return outputs


def figures(asked: Sequence[Task], outputs: Sequence[str]) -> dict[str, float | None]:
    """Shares of right answers; None where nothing was asked."""
    said = list(zip(asked, outputs))
    of_worlds = [(task, *tasks.quoted(output)) for task, output in said if task.kind == "world"]
    return {
        "world_exact": _share([text == task.answers[0] for task, text, _ in of_worlds]),
        "world_cited": _share([number == task.number for task, _, number in of_worlds]),
        "unanswerable_refused": _share([output.strip() == REFUSAL for task, output in said if task.kind == "unanswerable"]),
        "xquad_sentence": _share([tasks.holds(output, task.answers) for task, output in said if task.kind == "xquad"]),
        "docs_sentence": _share([tasks.holds(output, task.answers) for task, output in said if task.kind == "docs"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    directory: Path = given.model
    if not (directory / "training.json").is_file():
        print(f"{directory} holds no exported model; make one: python -m tools.default_model.train", file=sys.stderr)
        return 2
    if given.threads:
        torch.set_num_threads(given.threads)
    asked, notes = _asked(given)
    outputs = Answerer(directory, given.device).answer([tasks.prompt(task) for task in asked])
    baseline = figures(asked, [tasks.best_sentence(task) for task in asked])
    facts = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        **figures(asked, outputs),
        "parameters": facts["parameters"],
        "bytes": export.size_bytes(directory),
        "train_tokens": facts["train_tokens"],
        "train_seconds": facts["train_seconds"],
        "device": facts["device"],
        "baseline": baseline,
        "asked": {kind: sum(task.kind == kind for task in asked) for kind in ("world", "unanswerable", "xquad", "docs")},
        "docs_found": _share([tasks.holds(" ".join(t.passages), t.answers) for t in asked if t.kind == "docs"]),
        "notes": notes,
    }
    if given.card:
        export.write_card(directory, found)
    if given.show:
        _show(asked, outputs, given.show)
    print(json.dumps(found, indent=2) if given.json else _table(found))
    return 0


def _asked(given: argparse.Namespace) -> tuple[list[Task], list[str]]:
    notes: list[str] = []
    asked = list(tasks.worlds(given.count, SEED))
    prose = Path(given.prose) if given.prose else None
    if prose is not None and prose.is_file():
        asked += tasks.unanswerable_prose(Prose.load(prose), given.count // 8, SEED)
    if given.xquad.is_file():
        asked += tasks.xquad(given.xquad, given.count, SEED)
    else:
        notes.append(f"xquad_sentence not measured: no {given.xquad.name} at the path that --xquad names")
    return [*asked, *tasks.documents(PROJECT)], notes


def _share(right: Sequence[bool]) -> float | None:
    return round(sum(right) / len(right), 4) if right else None


def _table(found: dict[str, Any]) -> str:
    lines = [f"{'':24}{'model':>10}{'best BM25':>12}"]
    for key, rule in found["baseline"].items():
        shown = ["-" if value is None else f"{value:.3f}" for value in (found[key], rule)]
        lines.append(f"{key:24}{shown[0]:>10}{shown[1]:>12}")
    lines += [f"{key:24}{found[key]}" for key in ("parameters", "bytes", "train_tokens", "train_seconds", "device")]
    return "\n".join([*lines, *found["notes"]])


def _show(asked: Sequence[Task], outputs: Sequence[str], count: int) -> None:
    """Some answers of each kind, to standard error."""
    for kind in ("world", "unanswerable", "xquad", "docs"):
        for task, output in [pair for pair in zip(asked, outputs) if pair[0].kind == kind][:count]:
            wanted = task.answers[0] if task.answers else REFUSAL
            print(f"{kind}: {task.question}\n  wanted: {wanted}\n  said:   {output}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.default_model.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=SHIPPED, help="model directory (default: the one that is shipped)")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--card", action="store_true", help="write the figures into the model card")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N answers of each kind")
    parser.add_argument("--count", type=int, default=400, help="questions about worlds, and from XQuAD")
    parser.add_argument("--xquad", type=Path, default=XQUAD, help="xquad.en.json; skipped where it is absent")
    parser.add_argument("--prose", type=Path, help="prose.json of a run: adds unanswerable questions over real prose")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    return parser


if __name__ == "__main__":
    sys.exit(main())
