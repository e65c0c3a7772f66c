"""Python's garbage collector looks at what tests leave, not at torch and the tests themselves,
which stay to the end.
"""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest

gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(
            10_000
        )  # tracing makes millions of objects, and 700 is a small number of them
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain at the end of what is left
