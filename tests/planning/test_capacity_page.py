"""docs/capacity.md has the numbers that the code gives."""

from pathlib import Path

import pytest

from tests.planning.test_capacity import MODELS, SIZES, TABLE_2, TABLE_3, TABLE_8, paper_capacity
from triptych.planning.costs.capacity import Limit

PAGE = Path("docs/capacity.md").read_text(encoding="utf-8")


def shown(found: object, published: object) -> str:
    """Ours, and the paper's in brackets."""
    return f"{text(found)} ({text(published)})"


def text(cell: object) -> str:
    if isinstance(cell, Limit):
        return {Limit.MEMORY: "OOM", Limit.CONTEXT: "OOCL"}[cell]
    return "OOM" if cell == 0 else f"{cell:.0f}" if isinstance(cell, float) else str(cell)


def line_of_tables_2_and_3(name: str, size: tuple[int, int]) -> str:
    row = SIZES.index(size)
    apart = min(paper_capacity(name, size, role).most_images().number for role in "epd")
    cells = [shown(paper_capacity(name, size, "ep").most_images().number, TABLE_2[name][row][0])]
    cells.append(shown(apart, TABLE_2[name][row][1]))
    for role, published in zip(("ep", "e", "p"), TABLE_3[name][row], strict=True):
        cells.append(shown(paper_capacity(name, size, role).most_requests().number, published))
    return f"| {name} | {size[0]}x{size[1]} | {' | '.join(cells)} |"


def line_of_table_8(name: str, images: int) -> str:
    cells = []
    for role, published in zip(("ep", "p"), TABLE_8[name][images], strict=True):
        found = paper_capacity(name, (4032, 3024), role).most_kv(images)
        cells.append(shown(found if isinstance(found, Limit) else 100 * found, published))
    return f"| {name} | {images} | {' | '.join(cells)} |"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_page_has_tables_2_and_3(name: str, size: tuple[int, int]) -> None:
    assert line_of_tables_2_and_3(name, size) in PAGE


@pytest.mark.parametrize("name", MODELS)
def test_page_has_table_8(name: str) -> None:
    for images in TABLE_8[name]:
        assert line_of_table_8(name, images) in PAGE
