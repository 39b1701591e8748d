"""BM25 over short texts: the trivial rule that the model is measured against, and the search in the evaluation. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tools.default_model.inquiries import stems

K1, B = 1.2, 0.75


class Bm25:
    """Scores for a fixed set of texts; the stems of telling words are the terms."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._terms = [Counter(stems(text)) for text in texts]
        self._sizes = [max(1, sum(terms.values())) for terms in self._terms]
        self._mean = sum(self._sizes) / max(1, len(self._sizes))
        self._having = Counter(term for terms in self._terms for term in terms)

    def scores(self, query: str) -> list[float]:
        found = []
        for terms, size in zip(self._terms, self._sizes):
            damping = K1 * (1 - B + B * size / self._mean)
            found.append(sum(self._weight(term) * terms[term] * (K1 + 1) / (terms[term] + damping) for term in stems(query)))
        return found

    def best(self, query: str, count: int) -> list[int]:
        """The numbers of the `count` best texts, best first; the earlier one where scores are equal."""
        scores = self.scores(query)
        return sorted(range(len(scores)), key=lambda number: -scores[number])[:count]

    def _weight(self, term: str) -> float:
        having = self._having[term]
        return math.log(1 + (len(self._terms) - having + 0.5) / (having + 0.5))
