"""Matrices and vectors that pydensecrf returns: float32, in the order of Eigen, columns one after the other."""

from typing import Any

import numpy as np

from pwcrf_jax.pydensecrf import buffers


class _Shared:
    """What np.array copies and np.asarray shares; a memoryview too, from Python 3.12 on."""

    values: np.ndarray

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values themselves, or a copy where one is asked for or another dtype needs it."""
        if dtype is not None and self.values.dtype != dtype:
            if copy is False:
                raise ValueError(f"expected dtype float32, as there is; got {np.dtype(dtype)} with copy=False")
            return self.values.astype(dtype)
        return self.values.copy(order="K") if copy else self.values

    def __buffer__(self, flags: int) -> memoryview:
        """The values, for `memoryview`."""
        return self.values.data


class VectorXf(_Shared):
    """float32 [n]; empty as it is made."""

    def __init__(self) -> None:
        """No values."""
        self.values = np.zeros(0, np.float32)


class MatrixXf(_Shared):
    """float32 [rows, columns], a column's values side by side; empty as it is made."""

    def __init__(self) -> None:
        """No values."""
        self.values = np.zeros((0, 0), np.float32, order="F")

    def fill(self, values: Any) -> None:
        """Takes values over: into the same memory where the shape is the same, so that who shares it sees them."""
        if self.values.shape == values.shape:
            self.values[...] = values
        else:
            self.values = np.array(values, np.float32, order="F")


def vectorXf(arr: Any) -> VectorXf:
    """A copy of float32 [n]; other arrays raise ValueError, None TypeError."""
    made = VectorXf()
    made.values = buffers.typed("arr", arr, np.float32, "n").copy()
    return made


def matrixXf(arr: Any) -> MatrixXf:
    """A copy of float32 [rows, columns], C-contiguous; other arrays raise ValueError, None TypeError."""
    made = MatrixXf()
    made.fill(buffers.typed("arr", arr, np.float32, "rows, columns"))
    return made
