"""`python -m patchmine` is the program `patchmine`."""

from __future__ import annotations

from patchmine.cli.app import main

if __name__ == "__main__":
    main()
