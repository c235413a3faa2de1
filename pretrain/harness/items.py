"""The records of a task as lm-evaluation-harness reads them: as they are written."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(*, records: str, **_: Any) -> dict[str, Dataset]:
    """The one split of a task that `pretrain harness tasks` wrote.

    The reader of JSON lines that datasets has takes an answer such as 2020-01-02 for a time.
    lm-evaluation-harness passes its --model_args and --metadata too.
    """
    lines = Path(records).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
