"""Log rows of figures: as CSV, JSON lines, to TensorBoard, or by any function that takes a dict."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from lgd_kernels.runtime import files_atomic

Row = dict[str, float]  # "step" is an int, the rest figures


class JsonLines:
    """Append one JSON object a line. A run that resumes at step n first drops the rows after n.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
    >>> log = JsonLines(path)
    >>> log({"step": 10, "loss": 0.5}), log({"step": 20, "loss": 0.25})
    (None, None)
    >>> log.rewind(10)
    >>> path.read_text()
    '{"step": 10, "loss": 0.5}\\n'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __call__(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Keep the rows up to a step, and drop a line that is incomplete."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            files_atomic.write(self.path, "".join(kept).encode())


class Csv:
    """Append rows to a table with the columns of the first row. A run that resumes first drops the rows after its step.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
    >>> Csv(path)({"step": 10, "loss": 0.5})
    >>> path.read_text()
    'step,loss\\n10,0.5\\n'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __call__(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists() or self.path.stat().st_size == 0
        with open(self.path, "a", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            if new:
                table.writerow(row)
            table.writerow(row.values())

    def rewind(self, step: int) -> None:
        """Keep the rows up to a step."""
        if self.path.exists():
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            at = whole[0].rstrip("\n").split(",").index("step") if whole else 0
            kept = [line for line in whole[1:] if int(line.split(",")[at]) <= step]
            files_atomic.write(self.path, "".join(whole[:1] + kept).encode())


class TensorBoard:
    """Write scalars for TensorBoard, which has to be installed (`pip install tensorboard`)."""

    def __init__(self, folder: Path | str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoard: {error}; pip install tensorboard, or log to JsonLines or Csv") from error
        self.folder, self.open = str(folder), SummaryWriter
        self.writer: SummaryWriter | None = None

    def __call__(self, row: Row) -> None:
        self.writer = self.writer or self.open(self.folder)
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def rewind(self, step: int) -> None:
        """Start a new file with a purge step: TensorBoard hides the rows after it."""
        self.writer = self.writer or self.open(self.folder, purge_step=step + 1)
