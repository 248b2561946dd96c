"""The options of a run as its folder keeps them: ``train_config.yaml``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

CONFIG_FILE = "train_config.yaml"


def resolved_config(*groups: Any) -> dict[str, object]:
    """All options of the argument dataclasses as plain values, without secrets, as ``--config`` reads them."""
    values: dict[str, object] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            secret = field.name == "token" or field.name.endswith("_token")
            if field.init and not secret:
                values[field.name] = getattr(group, field.name)
    values.pop("resume_from_checkpoint", None)
    # An empty list is the default of every option that takes one, but for this one's.
    values["report_to"] = values.get("report_to") or "none"
    return {name: _plain(value) for name, value in values.items() if value != []}


def _plain(value: object) -> object:
    return json.loads(json.dumps(value, default=lambda v: v.to_dict() if hasattr(v, "to_dict") else str(v)))
