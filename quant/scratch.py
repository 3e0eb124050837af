"""Arrays that are allocated once per thread and used again: fresh megabytes cost more than the arithmetic on them."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """An array with arbitrary contents, the thread's only one of this name until the next call with it.

    Names begin with their module's or their function's name, so that no two modules share one (a test looks).
    """
    arrays: dict[str, NDArray[Any]] = _kept.__dict__
    size, dtype = math.prod(shape), np.dtype(dtype)
    kept = arrays.get(name)
    if kept is None or kept.size < size or kept.dtype != dtype:
        kept = arrays[name] = np.empty(size, dtype)
    return kept[:size].reshape(shape)
