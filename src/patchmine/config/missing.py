"""Files that settings name and that are not there."""

from __future__ import annotations

from pathlib import Path

from patchmine.config.explain import nearest
from patchmine.config.overrides import exists
from patchmine.config.schema import RunConfig
from patchmine.errors import shown_name
from patchmine.strict import SettingError


def missing_files(config: RunConfig) -> list[SettingError]:
    """Files that the settings name and that are not there, for `parse`: it needs no torch."""
    found = []
    settings = ("data", "eval_data", "eval_test", "monitor_data", "labels", "annotations")
    for setting in (*settings, "val", "test"):
        given = getattr(config, setting, None)
        for name in given if isinstance(given, list) else [given]:
            # A pattern or a scheme such as embedded:photos only opening can judge
            if name is not None and not exists(name) and not set(name) & set("*?[{:"):
                text = f"there is no such file or folder{_neighbour(name)}"
                found.append(SettingError(setting, f"given '{shown_name(name)}'; {text}"))
    if config.init is not None and not exists(config.init):
        text = "there is no such run, export or file"
        found.append(SettingError("init", f"given '{shown_name(config.init)}'; {text}"))
    return found


def _neighbour(name: str) -> str:
    """What lies beside a missing file under a similar name, or what may be given."""
    path = Path(name)
    beside = [other.name for other in path.parent.iterdir()] if exists(str(path.parent)) else []
    if near := nearest(path.name, beside, 1):
        return f"; did you mean {shown_name(path.parent / near[0])}?"
    return ": give a folder, a list file, tar shards, Parquet files or embedded:photos"
