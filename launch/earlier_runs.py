"""Earlier runs that a method is built from: there, finished, and of the same data."""

import json
from pathlib import Path

from evaluation.run_folders import Run, load_run

from .setting import Setting


def require_run(path: Path, flag: str, setting: Setting) -> Run:
    """Return the run in a folder that --method.`flag` names.

    Raises ValueError where it is gone, unfinished, or of another split or catalogue than the run that is built.
    """
    run = load_run(path)
    if not (path / "model" / "model.safetensors").is_file() or not run.complete:
        of = f" of {setting.saved.parent}" if setting.saved is not None else ""
        raise ValueError(
            f"--method.{flag}{of} names {path} (seen from {Path.cwd()}), where there is no finished run: bring it "
            "back there, or train anew with the folder where it is now"
        )
    if setting.saved is None and run.split_hash != setting.split.hash:
        raise ValueError(
            f"--method.{flag} {path} was trained on split {run.split_hash[:12]}, and --data.* gives "
            f"{setting.split.hash[:12]}: both runs need the same data and split"
        )
    if json.loads((path / "model" / "catalog.json").read_text())["raw_ids"] != [*setting.catalog.raw_ids]:
        raise ValueError(
            f"--method.{flag} {path} has learned another catalogue than these {setting.catalog.num_items:,} items: "
            "both runs need the same --data.item_core and files"
        )
    return run
