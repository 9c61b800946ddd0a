"""A notebook that trains, in a real kernel.

Run by test_orchestrators.py, in an environment of Jupyter's; prints what the notebook shows, and
how often it was updated, as JSON.
"""

import json
from collections import Counter
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = """\
from training_backends import AsyncTrainingClient, TrainingClient
with TrainingClient() as client:
    run = client.run("run.yaml", backend="local", run_id="nb")
---
async with AsyncTrainingClient() as client:
    await client.run("run.yaml", backend="local", run_id="nb")
---
with TrainingClient() as client:
    client.run("run.yaml", backend="local", run_id="nb", progress=False)
---
run
"""
messages: Counter[str] = Counter()


class Counting(NotebookClient):  # type: ignore[misc]  # of the environment
    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        messages[f"{cell_index} {msg['msg_type']}"] += 1
        return super().process_message(msg, cell, cell_index)


if __name__ == "__main__":
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(it) for it in NOTEBOOK.split("---\n")]
    )
    Counting(notebook, timeout=600).execute()
    shown = [
        [output.get("data") for output in cell.outputs if "data" in output]
        for cell in notebook.cells
    ]
    print(json.dumps({"shown": shown, "messages": messages}))
