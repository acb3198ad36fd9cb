"""How products are cut into programs, on GPUs that need not be here."""

import pytest

from qtool.kernels.triton import tuning
from qtool.kernels.triton.tuning import TILES, Tile


def programs(tile: Tile, rows: int, outputs: int) -> int:
    return len(range(0, rows, tile.m)) * len(range(0, outputs, tile.n))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("generation, processors", [(8, 108), (8, 58), (9, 132), (10, 148), (12, 170)])
def test_no_multiprocessor_waits_where_a_smaller_tile_would_give_it_work(
    generation: int, processors: int, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "machine", lambda: (generation, processors))
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    for rows in (1, 7, 16, 17, 32, 64, 128, 129, 384, 1024, 16384):
        for outputs in (1, 384, 768, 1152, 3072, 30522):
            tile = tuning.tile(rows, outputs, twice=twice)
            tiles = TILES[min(generation, 10)][twice:]
            most = max(programs(other, rows, outputs) for other in tiles)
            assert programs(tile, rows, outputs) >= min(most, processors)
            larger = tiles[: tiles.index(tile)]
            assert all(t.m >= 2 * rows or programs(t, rows, outputs) < processors for t in larger)
