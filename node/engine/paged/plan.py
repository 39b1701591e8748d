"""What a step looks like in numbers: which row goes into which slot, and which pages each row's attention meets. No torch.

Attention is computed in *tiles* of up to eight rows of one sequence, a decoding row being a tile with seven copies of
itself: one shape for decoding and prefilling, so that a row comes out with the same bits in both. All counts are padded
to few sizes, for a GPU chooses its kernels by shapes and a recorded step has fixed ones. What is padding writes into
page 0, which belongs to no sequence, and its answers are dropped.

A step's numbers make one flat array, for one copy to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

TILE_ROWS = 8
KV_PAGE_TOKENS = 256  # what the flash attention of torch takes pages of
PADDING_SLOT = 0  # of page 0, where the keys and values of padding go


@dataclass(frozen=True, slots=True)
class PagedSegment:
    """One sequence's rows in a step: `count` from `row` on, at `position …`, its keys and values in `pages`."""

    row: int
    count: int
    position: int
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What the shapes of a step's tensors depend on."""

    rows: int
    tiles: int
    columns: int  # pages of the longest table
    parts: int
    wanted: int  # rows of which logits are asked


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step's arrays, in the order in which they lie in the flat one."""

    ids: list[int]  # [rows]
    positions: list[int]  # [rows]
    slots: list[int]  # [rows]: page * KV_PAGE_TOKENS + place, where keys and values go
    places: list[int]  # [rows]: which row of the tiles, laid end to end, answers this one
    tile_rows: list[int]  # [tiles * TILE_ROWS]: the row that each takes its query from
    tile_positions: list[int]  # [tiles * TILE_ROWS]: -1 sees nothing
    tile_parts: list[int]  # [tiles]: whose table
    tables: list[int]  # [parts * columns]: pages
    starts: list[int]  # [parts + 1]: first row of each part, then the end
    lengths: list[int]  # [parts]: positions that count, the step's own included
    wanted: list[int]  # [wanted]

    def flat(self) -> list[int]:
        return [number for field in fields(self) for number in getattr(self, field.name)]


@dataclass(frozen=True, slots=True)
class PagedPlan:
    sizes: StepSizes
    numbers: StepArrays
    longest_part: int


def shapes(sizes: StepSizes) -> Mapping[str, tuple[int, ...]]:
    """The shape of each array of `StepArrays`, in its order."""
    rows, tiles = (sizes.rows,), (sizes.tiles, TILE_ROWS)
    return {
        "ids": rows,
        "positions": rows,
        "slots": rows,
        "places": rows,
        "tile_rows": tiles,
        "tile_positions": tiles,
        "tile_parts": (sizes.tiles,),
        "tables": (sizes.parts, sizes.columns),
        "starts": (sizes.parts + 1,),
        "lengths": (sizes.parts,),
        "wanted": (sizes.wanted,),
    }


def pages_for(tokens: int) -> int:
    return -(-tokens // KV_PAGE_TOKENS)


def power_of_two(count: int) -> int:
    """The least that holds `count`."""
    return 1 << max(count - 1, 0).bit_length()


def plan_step(parts: Sequence[PagedSegment], ids: Sequence[int], wanted: Sequence[int], rows: int, short: int) -> PagedPlan:
    """A step over `parts`, which stand one behind the other from row 0 on, in `rows` rows; `wanted` is padded to `short`.

    `ids`: a token for each row, or none. Tables and tiles are padded to powers of two.
    """
    count = sum(part.count for part in parts)
    padding = rows - count
    tiles = [tile for number, part in enumerate(parts) for tile in _tiles(number, part)]
    columns = power_of_two(max(len(part.pages) for part in parts))
    tile_rows, tile_positions = [row for _, taken, _ in tiles for row in taken], [at for _, _, where in tiles for at in where]
    sizes = StepSizes(rows, power_of_two(len(tiles)), columns, len(parts), short)
    idle = sizes.tiles - len(tiles)
    numbers = StepArrays(
        ids=[*ids, *[0] * (rows - len(ids))],
        positions=[*(at for part in parts for at in range(part.position, part.position + part.count)), *[0] * padding],
        slots=[*(slot for part in parts for slot in slots_of(part.pages, part.position, part.count)), *[PADDING_SLOT] * padding],
        places=[*_places(parts), *[0] * padding],
        tile_rows=tile_rows + [0] * (idle * TILE_ROWS),
        tile_positions=tile_positions + [-1] * (idle * TILE_ROWS),
        tile_parts=[*(number for number, _, _ in tiles), *[0] * idle],
        tables=[page for part in parts for page in _table(part.pages, columns)],
        starts=[*(part.row for part in parts), count],
        lengths=[part.position + part.count for part in parts],
        wanted=[*wanted, *[wanted[-1]] * (short - len(wanted))] if wanted else [],
    )
    return PagedPlan(sizes, numbers, max(part.count for part in parts))


def padded_decode(parts: Sequence[PagedSegment], rows: int) -> list[PagedSegment]:
    """`parts` of a row each, padded to `rows`: what a recorded step is run with."""
    return [*parts, *(PagedSegment(row, 1, 0, (0,)) for row in range(len(parts), rows))]


def slots_of(pages: Sequence[int], position: int, count: int) -> Iterator[int]:
    for at in range(position, position + count):
        yield pages[at // KV_PAGE_TOKENS] * KV_PAGE_TOKENS + at % KV_PAGE_TOKENS


def _table(pages: Sequence[int], columns: int) -> list[int]:
    return [*pages, *[0] * (columns - len(pages))]


def _tiles(number: int, part: PagedSegment) -> Iterator[tuple[int, list[int], list[int]]]:
    """(part, rows, positions) of each tile; rows that are missing in the last one copy its last."""
    for first in range(0, part.count, TILE_ROWS):
        taken = [min(first + offset, part.count - 1) for offset in range(TILE_ROWS)]
        yield number, [part.row + at for at in taken], [part.position + at for at in taken]


def _places(parts: Sequence[PagedSegment]) -> Iterator[int]:
    tile = 0
    for part in parts:
        for offset in range(part.count):
            yield (tile + offset // TILE_ROWS) * TILE_ROWS + offset % TILE_ROWS
        tile += -(-part.count // TILE_ROWS)
