"""Plans a step over paged keys and values: into which slot each row is stored, and which pages its attention reads. No torch.

Attention is computed in *tiles* of up to eight rows of one sequence; a decoding row is a tile with seven copies of itself.
Decoding and prefilling thus have one shape, and a row has the same bits in both. All counts are padded to few sizes, for
a GPU chooses its kernels by shapes and a recorded step has fixed ones. Padding writes into page 0, which belongs to no
sequence, and its results are dropped.

A step's arrays form one flat array, for one copy to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

TILE_ROWS = 8
KV_PAGE_TOKENS = 256  # the page size that torch's flash attention requires
PADDING_SLOT = 0  # of page 0, where the keys and values of padding are written


@dataclass(frozen=True, slots=True)
class PagedSegment:
    """One sequence's rows in a step: `count` from `row` on, at `position …`, its keys and values in `pages`."""

    row: int
    count: int
    position: int
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The counts that determine the shapes of a step's tensors."""

    rows: int
    tiles: int
    table_pages: int  # pages of the longest table
    segments: int
    logit_rows: int


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step's arrays, in the order in which they lie in the flat array."""

    ids: list[int]  # [rows]
    positions: list[int]  # [rows]
    slots: list[int]  # [rows]: page * KV_PAGE_TOKENS + offset, where keys and values are stored
    answer_rows: list[int]  # [rows]: the row of the concatenated tiles that holds its result
    tile_rows: list[int]  # [tiles * TILE_ROWS]: the row whose query each row of a tile has
    tile_positions: list[int]  # [tiles * TILE_ROWS]; -1: reads no key
    tile_segments: list[int]  # [tiles]: the segment whose table it reads
    tables: list[int]  # [segments * table_pages]: pages
    starts: list[int]  # [segments + 1]: first row of each segment, then the end
    lengths: list[int]  # [segments]: positions stored after this step
    logit_rows: list[int]  # [logit_rows]

    def flat(self) -> list[int]:
        """Returns all arrays as one."""
        return [number for field in fields(self) for number in getattr(self, field.name)]


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """The arrays of a step, and their sizes."""

    sizes: StepSizes
    arrays: StepArrays
    longest_segment: int


def shapes(sizes: StepSizes) -> Mapping[str, tuple[int, ...]]:
    """Returns the shape of each array of `StepArrays`, in their order."""
    rows, tiles = (sizes.rows,), (sizes.tiles, TILE_ROWS)
    return {
        "ids": rows,
        "positions": rows,
        "slots": rows,
        "answer_rows": rows,
        "tile_rows": tiles,
        "tile_positions": tiles,
        "tile_segments": (sizes.tiles,),
        "tables": (sizes.segments, sizes.table_pages),
        "starts": (sizes.segments + 1,),
        "lengths": (sizes.segments,),
        "logit_rows": (sizes.logit_rows,),
    }


def pages_for(tokens: int) -> int:
    """Returns the number of pages that hold `tokens`."""
    return -(-tokens // KV_PAGE_TOKENS)


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def plan_step(
    segments: Sequence[PagedSegment], ids: Sequence[int], logit_rows: Sequence[int], rows: int, logit_count: int
) -> PagedPlan:
    """Plans a step over `segments`, consecutive from row 0 on, padded to `rows` rows.

    `ids`: a token for each row, or none; `logit_rows` is padded to `logit_count`. Tables and tiles are padded to powers of two.
    """
    count = sum(segment.count for segment in segments)
    assert count <= rows and len(logit_rows) <= logit_count
    padding = rows - count
    tiles = [tile for number, segment in enumerate(segments) for tile in _tiles(number, segment)]
    table_pages = power_of_two(max(len(segment.pages) for segment in segments))
    tile_rows, tile_positions = [row for _, taken, _ in tiles for row in taken], [at for _, _, where in tiles for at in where]
    sizes = StepSizes(rows, power_of_two(len(tiles)), table_pages, len(segments), logit_count)
    idle = sizes.tiles - len(tiles)
    arrays = StepArrays(
        ids=[*ids, *[0] * (rows - len(ids))],
        positions=[
            *(at for segment in segments for at in range(segment.position, segment.position + segment.count)),
            *[0] * padding,
        ],
        slots=[
            *(slot for segment in segments for slot in slots_of(segment.pages, segment.position, segment.count)),
            *[PADDING_SLOT] * padding,
        ],
        answer_rows=[*_answer_rows(segments), *[0] * padding],
        tile_rows=tile_rows + [0] * (idle * TILE_ROWS),
        tile_positions=tile_positions + [-1] * (idle * TILE_ROWS),
        tile_segments=[*(number for number, _, _ in tiles), *[0] * idle],
        tables=[page for segment in segments for page in _table(segment.pages, table_pages)],
        starts=[*(segment.row for segment in segments), count],
        lengths=[segment.position + segment.count for segment in segments],
        logit_rows=[*logit_rows, *[logit_rows[-1]] * (logit_count - len(logit_rows))] if logit_rows else [],
    )
    return PagedPlan(sizes, arrays, max(segment.count for segment in segments))


def padded_decode(segments: Sequence[PagedSegment], rows: int) -> list[PagedSegment]:
    """Pads `segments` of one row each to `rows` segments, which a recorded step computes."""
    return [*segments, *(PagedSegment(row, 1, 0, (0,)) for row in range(len(segments), rows))]


def slots_of(pages: Sequence[int], position: int, count: int) -> Iterator[int]:
    """Yields the slots of the positions `position … position + count - 1` of a sequence with these pages."""
    for at in range(position, position + count):
        yield pages[at // KV_PAGE_TOKENS] * KV_PAGE_TOKENS + at % KV_PAGE_TOKENS


def _table(pages: Sequence[int], table_pages: int) -> list[int]:
    return [*pages, *[0] * (table_pages - len(pages))]


def _tiles(number: int, segment: PagedSegment) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yields (segment, rows, positions) of each tile; the last tile is padded with copies of its last row."""
    for first in range(0, segment.count, TILE_ROWS):
        taken = [min(first + offset, segment.count - 1) for offset in range(TILE_ROWS)]
        yield number, [segment.row + at for at in taken], [segment.position + at for at in taken]


def _answer_rows(segments: Sequence[PagedSegment]) -> Iterator[int]:
    tile = 0
    for segment in segments:
        for offset in range(segment.count):
            yield (tile + offset // TILE_ROWS) * TILE_ROWS + offset % TILE_ROWS
        tile += -(-segment.count // TILE_ROWS)
