"""Hooks of schemathesis for `spec_answers.py`: ask for what is there, not only for strangers."""

import json
import os
import random
from typing import Any

import schemathesis

_KNOWN: dict[str, list[str]] = json.loads(os.environ["KNOWN_IDS"])
_PARAMETERS = {"file_id": "files", "job_id": "jobs", "model_id": "models"}
_HYPERPARAMETERS = (
    "training_steps",
    "learning_rate",
    "weight_decay",
    "warmup_fraction",
    "seq_len",
    "fim_ratio",
)
_random = random.Random(1)


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> Any:
    """Name something that exists, seven times out of ten; never delete it."""
    operation = context.operation
    deletes = operation.method.lower() == "delete" and not operation.path.endswith("/archive")
    if not path_parameters or deletes or _random.random() > 0.7:
        return path_parameters
    return {
        name: _random.choice(_KNOWN[_PARAMETERS[name]]) if name in _PARAMETERS else value
        for name, value in path_parameters.items()
    }


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Turn most generated jobs into ones that can be created."""
    if not (isinstance(body, dict) and "hyperparameters" in body) or _random.random() > 0.7:
        return body
    given = body["hyperparameters"] if isinstance(body["hyperparameters"], dict) else {}
    return {
        "model": "tiny-mistral",
        "training_files": [{"file_id": _KNOWN["files"][0]}],
        "suffix": f"s{_random.randint(0, 10**6)}",
        "hyperparameters": {name: given[name] for name in _HYPERPARAMETERS if name in given},
    }
