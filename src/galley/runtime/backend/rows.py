"""A matrix product in numpy whose rows do not depend on each other."""

import numpy as np
import numpy.typing as npt

__all__ = ["TILE", "Linear"]

Floats = npt.NDArray[np.float32]

TILE = 8
"""Rows of every matrix product, the last tile padded with zeros."""


class Linear:
    """``x @ weight.T + bias`` whose rows do not depend on each other, nor on how many there are.

    Products are made of exactly ``TILE`` rows. Whether this BLAS then treats all positions of the tile alike
    is tried out once per shape; where it does not, rows are multiplied one by one.
    """

    __slots__ = ("bias", "tiled", "weight")

    def __init__(self, weight: Floats, bias: Floats | None, proven: dict[tuple[int, ...], bool]) -> None:
        """``weight`` float32 [outputs, inputs]; ``proven`` remembers shapes already tried."""
        self.weight = weight
        self.bias = bias
        if weight.shape not in proven:
            proven[weight.shape] = self._proves_tiles()
        self.tiled = proven[weight.shape]

    def __call__(self, x: Floats) -> Floats:
        """float32 [rows, inputs] -> [rows, outputs]."""
        rows = len(x)
        out = np.empty((rows, len(self.weight)), dtype=np.float32)
        if self.tiled:
            for start in range(0, rows, TILE):
                tile = x[start : start + TILE]
                if len(tile) < TILE:
                    padded = np.zeros((TILE, x.shape[1]), dtype=np.float32)
                    padded[: len(tile)] = tile
                    tile = padded
                out[start : start + TILE] = self._product(tile)[: rows - start]
        else:
            for row in range(rows):
                out[row] = self.weight @ np.ascontiguousarray(x[row])
        if self.bias is not None:
            out += self.bias
        return out

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def _product(self, tile: Floats) -> Floats:
        """[TILE, inputs] -> [TILE, outputs]. Few columns on the right is the faster way round for BLAS."""
        product: Floats = (self.weight @ np.ascontiguousarray(tile.T)).T
        return product

    def _proves_tiles(self) -> bool:
        """One row at each position of tiles of other neighbours gives the same bits."""
        rng = np.random.default_rng(0)
        row: Floats = rng.standard_normal((self.weight.shape[1],), dtype=np.float32)
        first: Floats | None = None
        for position in range(TILE):
            tile = rng.standard_normal((TILE, self.weight.shape[1]), dtype=np.float32)
            tile[position] = row
            found = self._product(tile)[position]
            if first is None:
                first = found
            elif not np.array_equal(first, found):
                return False
        return True
