"""The table of tiles: one row for every point, an error for every other, programs that fit their registers."""

from dataclasses import replace
from itertools import product

import pytest

from gdn2_ops.kernels import tiles

KERNELS = sorted({row.kernel for row in tiles.ROWS})
POINTS = list(product(tiles.ANY_DTYPE, tiles.HEAD_SIZES, tiles.HEAD_SIZES, tiles.ARCHS))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_point_has_two_rows(kernel):
    counts = {point: len(tiles.rows(kernel, *point)) for point in POINTS}
    assert max(counts.values()) == 1, [point for point, count in counts.items() if count > 1]
    for point in (point for point, count in counts.items() if not count):
        with pytest.raises(NotImplementedError, match=f"got '{kernel}' for"):
            tiles.tile(kernel, *point)


def test_a_row_that_covers_a_point_again_is_seen(monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", (*tiles.ROWS, replace(tiles.ROWS[0], dtypes=("bf16",))))
    assert len(tiles.rows("step", "bf16", 32, 32, 90)) == 2


def test_every_row_is_of_the_table():
    for row in tiles.ROWS:
        assert row.dtypes and set(row.dtypes) <= set(tiles.ANY_DTYPE)
        assert row.K and row.V and set(row.K) | set(row.V) <= set(tiles.HEAD_SIZES)
        assert row.archs and set(row.archs) <= set(tiles.ARCHS)
        assert row.tile.num_warps in (1, 2, 4, 8, 16) and 1 <= row.tile.num_stages <= 4
        assert all(size & (size - 1) == 0 for size in row.tile.constexprs.values())


@pytest.mark.parametrize("kernel", ["step", "step_bf16_state", "step_layer", "step_layer_masked"])
@pytest.mark.parametrize("K", tiles.HEAD_SIZES)
@pytest.mark.parametrize("V", tiles.HEAD_SIZES)
def test_a_thread_of_a_step_owns_its_numbers_alone(kernel, K, V):
    # The state may be overwritten in place: were a number in two threads, one could read what the other wrote.
    tile = tiles.tile(kernel, "fp32", K, V, 90)
    assert tile.constexprs["BV"] <= V
    numbers = K * tile.constexprs["BV"] // (32 * tile.num_warps)
    assert 16 <= numbers <= 64


@pytest.mark.parametrize("size, compiled", [(1, 32), (32, 32), (33, 64), (65, 128), (128, 128), (129, 256), (256, 256)])
def test_a_head_is_served_by_the_next_size(size, compiled):
    assert tiles.head_size(size) == compiled
    assert tiles.tile("step", "bf16", size, 64, 90) == tiles.tile("step", "bf16", compiled, 64, 90)


@pytest.mark.parametrize("size", [0, 257])
def test_other_sizes_are_refused(size):
    with pytest.raises(NotImplementedError, match=f"expected a head size in 1..256, got {size}"):
        tiles.head_size(size)


@pytest.mark.parametrize(
    "capability, arch", [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)]
)
def test_a_device_is_served_by_its_major_version(capability, arch):
    assert tiles.table_arch(*capability) == arch


@pytest.mark.parametrize("capability", [(7, 5), (11, 0), (13, 0)])
def test_other_devices_are_refused(capability):
    with pytest.raises(NotImplementedError, match=f"got {capability[0]}.{capability[1]}"):
        tiles.table_arch(*capability)
