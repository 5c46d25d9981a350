"""What `llava_sp.data.check` found, kept as JSON, so that a run says when its data has changed since.

python -m llava_sp.data.check --config C --manifest data.manifest.json
python -m llava_sp.train --config C --data_manifest data.manifest.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_sp.common import provenance
from llava_sp.common.files import read_json, write_json
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.fingerprint import FINGERPRINT, changes, fingerprint

MANIFEST = {
    "llava_sp_data": int,  # version of this format
    "checked": str,
    "records": [{"path": str, "bytes": int, "records": int}],
    "findings": dict,
    "fingerprint": FINGERPRINT,
}
VERSION = 1


def write_manifest(path: Path, dataset: ConversationDataset, findings: Mapping[str, Any]) -> None:
    """Files with their sizes, the figures found, and the fingerprint of annotations and images."""
    files = [
        {"path": str(file.path), "bytes": file.path.stat().st_size, "records": len(file)} for file in dataset.files
    ]
    content = {
        "llava_sp_data": VERSION,
        "checked": provenance.now(),
        "records": files,
        "findings": dict(findings),
        "fingerprint": fingerprint(dataset),
    }
    write_json(path, content)


def changes_since(path: str | Path, now: Mapping[str, Any]) -> list[str]:
    """How the fingerprint `now` differs from the manifest's, as text.

    Raises `ValueError` for a file that is no manifest, or one of another version.
    """
    manifest = read_json(Path(path), MANIFEST)
    if manifest["llava_sp_data"] != VERSION:
        raise ValueError(
            f"{path}: llava_sp_data is {manifest['llava_sp_data']}; this version reads {VERSION}: "
            "write it again (python -m llava_sp.data.check --manifest)"
        )
    return changes(manifest["fingerprint"], now)
