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
        gc.set_threshold(10_000)  # of the millions that tracing makes, 700 are few
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain at the end of what is left
