"""The record of a study, study.json: the options of its runs and analyses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ikun_hessian.experiments.study import preset
from ikun_hessian.experiments.study.preset import PresetError

STUDY_SCHEMA = "ikun-hessian/study/1"
IN_NAMES = {
    "final": "",
    "loss": r"\.loss[\d.e+-]+",
    "snapshots": r"\.epoch\d+",
}  # moments in names of results


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Compare the runs and analyses that two records share.

    Returns:
        One (part, name, key) per difference: "runs" or "analyses", name of the run or analysis, name of the option.
    """
    return [
        (part, name, key)
        for part in ("runs", "analyses")
        for name, options in new[part].items()
        if name in old[part]
        for key in {**options, **old[part][name]}
        if options.get(key) != old[part][name].get(key)
    ]


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the record of a study, or return None if there is none. Raise PresetError if the file is not a record."""
    from hessian_tools.io.json import MissingError, ResultError, parse_json, read_text

    try:
        found = parse_json(read_text(path))
    except MissingError:
        return None
    except ResultError:
        found = None
    parts = [found.get(part) for part in ("runs", "analyses")] if isinstance(found, dict) else []
    whole = len(parts) == 2 and all(
        isinstance(part, dict) and all(isinstance(v, dict) for v in part.values()) for part in parts
    )
    if not whole or found.get("schema") != STUDY_SCHEMA:
        raise PresetError(f"{path}: not the record of a study: choose another --out, or remove the file")
    return dict(found)


def others(record: Mapping[str, Any], out: Path) -> tuple[set[str], str]:
    """Find the runs in the folder `out` that were made with other settings.

    Args:
        record: The record of the study that is asked for.
        out: Folder of the study.

    Returns:
        The names of these runs, and the reason why the study is refused in this folder, or "".

    Raises:
        PresetError: If study.json in the folder is not a record.
    """
    path = out / "study.json"
    old = read_record(path) or {"runs": {}, "analyses": {}}
    found = changed(old, record)
    if not found:
        return set(), ""
    part, name, key = found[0]
    why = (
        f"{path}: {'run' if part == 'runs' else 'analysis'} {name} had another {key} "
        f"({_show(old[part][name].get(key))}, now {_show(record[part][name].get(key))}): "
        "choose another --out, or use --force to redo it"
    )
    if any(part == "analyses" for part, _, _ in found):
        return set(old["runs"]) & set(record["runs"]), why
    return {name for _, name, _ in found}, why


def settle(record: Mapping[str, Any], out: Path, force: bool) -> None:
    """Write OUT/study.json: the record, together with the existing runs and analyses that this study does not have.

    Args:
        record: The record of the study.
        out: Folder of the study.
        force: Whether to remove the files of runs and analyses that were made with other settings.

    Raises:
        PresetError: If there are such files and `force` is False.
    """
    from hessian_tools.io.files import write_atomically

    path = out / "study.json"
    _, refusal = others(record, out)
    if refusal and not force:
        raise PresetError(refusal)
    old = read_record(path) or {"runs": {}, "analyses": {}}
    for part, name, _ in changed(old, record):
        _remove(out / "runs", part, name)
    whole = {**record, **{part: {**old[part], **record[part]} for part in ("runs", "analyses")}}
    text = json.dumps(whole, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _show(value: Any) -> str:
    return "not given" if value is None else preset.text(value)


def _remove(runs: Path, part: str, name: str) -> None:
    if part == "runs":
        pattern = re.escape(name) + r"\..*"
    else:
        command, moment, *tag = name.split(" ")
        ending = "".join(rf"\.{re.escape(word)}" for word in (*tag, command))
        pattern = rf"[^.]+{IN_NAMES[moment]}{ending}\.(json|npz|resume.*)"
    for file in list(runs.iterdir()) if runs.is_dir() else []:
        if re.fullmatch(pattern, file.name):
            file.unlink()
