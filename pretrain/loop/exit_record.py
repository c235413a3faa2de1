"""How each rank ended, for the batch script: srun gives one code for all of them.

srun ends the remaining ranks as soon as one has failed, and then says 143 or 137, so the code of
the rank that failed first, and the error behind it, would be lost.
"""

import json
import os
from pathlib import Path

FOLDER_VARIABLE = "PRETRAIN_EXIT_FOLDER"


def note_exit(code: int, error: BaseException | None = None, *, is_final: bool = False) -> None:
    """Leave this rank's code in the folder that PRETRAIN_EXIT_FOLDER names; nothing without one.

    `is_final`: another life would end in the same way until somebody mends the cause.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    rank = os.environ.get("SLURM_PROCID") or os.environ.get("RANK") or "0"
    record = {
        "code": code,
        "error": "" if error is None else type(error).__name__,
        "is_final": is_final,
    }
    path = Path(folder) / f"{rank}.json"
    draft = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(record) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError:
        # the batch script then sees a rank that ended without a word, and srun's own code
        return
