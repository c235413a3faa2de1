"""However often a run restarted, its W&B run has every step once, as it was taken last."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from full_disk import small_files
from pretrain.compose import write_frozen
from pretrain.config import RunFolderConfig, SyncConfig
from pretrain.errors import CheckpointError, DataError
from pretrain.loop.curve import clean_curve
from pretrain.loop.metrics import encode_record
from pretrain.loop.wandb_sink import stored_run_id
from pretrain.sync import main
from pretrain.testing import tiny_config
from wandb_files import history, values, wandb_records


def step(number: int, life: int) -> dict[str, Any]:
    return {"step": number, "tokens": number * 128, "loss/nats": 8.0 / number, "life": life}


def validation(number: int, life: int) -> dict[str, Any]:
    return {
        "step": number, "tokens": number * 128, "validation/depths": [1, 4],
        "validation/loss_nats": [3.0, 2.0 + life], "life": life,
        "validation/samples": [{"prompt": "a", "depth": 4, "seed": 1, "text": f" life {life}"}],
    }  # fmt: skip


def save(number: int, life: int) -> dict[str, Any]:
    return {"step": number, "tokens": number * 128, "checkpoint/step": number, "life": life}


def test_a_step_that_is_taken_again_takes_back_what_followed() -> None:
    first = [step(1, 1), step(2, 1), validation(2, 1), save(2, 1), step(3, 1), validation(3, 1)]
    again = [step(3, 2), save(2, 2), step(4, 2)]
    assert clean_curve(first + again) == [
        step(1, 1), step(2, 1), validation(2, 1), step(3, 2), save(2, 2), step(4, 2),
    ]  # fmt: skip
    assert clean_curve([*first, validation(3, 2)])[-1] == validation(3, 2)
    assert len(clean_curve([*first, validation(3, 2)])) == len(first)


def test_any_number_of_lives_leaves_each_step_of_the_last_that_took_it() -> None:
    draw = random.Random(0)
    for _ in range(50):
        records, newest, at = [], {}, 0
        for life in range(draw.randint(1, 5)):
            at = draw.randint(0, at)
            newest = {number: of for number, of in newest.items() if number <= at}
            for _ in range(draw.randint(1, 9)):
                at += 1
                records.append(step(at, life))
                newest[at] = life
        found = clean_curve(records)
        assert {record["step"]: record["life"] for record in found} == newest
        assert [record["step"] for record in found] == list(newest)


def write_run(run_dir: Path, records: list[dict[str, Any]]) -> None:
    config = tiny_config()
    config.run.dir, config.run.name = str(run_dir), "often"
    config.logging.project = "shelf"
    run_dir.mkdir()
    write_frozen(config, run_dir)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_record, records)))


def test_the_offline_file_has_one_curve_under_the_runs_own_id(tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "often"
    first = [step(number, 1) for number in range(1, 301)] + [validation(300, 1)]
    again = [step(number, 2) for number in range(200, 401)] + [validation(400, 2)]
    write_run(run_dir, first + again)
    (run_dir / "wandb").mkdir()
    known = stored_run_id(run_dir, "often")
    # twice: the second replaces what the first has written
    for _ in range(2):
        main(SyncConfig(run=RunFolderConfig(dir=str(run_dir))))
    folder = run_dir / "sync"
    rows = history(folder)
    assert [row["step"] for row in rows] == [*range(1, 401), 400]
    assert [row["life"] for row in rows] == [1] * 199 + [2] * 202
    assert [row["tokens"] for row in rows] == [row["step"] * 128 for row in rows]
    assert rows[-1]["validation/loss_nats_depth_4"] == 4.0
    (samples,) = folder.glob("wandb/offline-run-*/files/" + rows[-1]["validation/samples.path"])
    assert json.loads(samples.read_text())["data"] == [["a", 4, 1, " life 2"]]
    messages = list(wandb_records(folder))
    (run,) = [message.run for message in messages if message.HasField("run")]
    assert (run.run_id, run.project, run.display_name) == (known, "shelf", "often")
    assert values(run.config.update)["batch"]["global_tokens"] == 128
    assert [m.metric.step_metric for m in messages if m.HasField("metric")] == ["tokens"]
    (path,) = folder.glob("wandb/offline-run-*")
    assert f"wandb sync {path}" in capsys.readouterr().out
    assert not list(run_dir.glob("wandb/offline-run-*"))


def test_a_folder_without_a_record_or_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        main(SyncConfig(run=RunFolderConfig(dir=str(tmp_path))))
    run_dir = tmp_path / "often"
    records = [step(number, 1) for number in range(1, 401)]
    write_run(run_dir, records)
    # W&B itself does not notice
    with small_files(1 << 14), pytest.raises(DataError, match=r"of the 400 records .* disk full"):
        main(SyncConfig(run=RunFolderConfig(dir=str(run_dir))))
    shutil.rmtree(run_dir)
    write_run(run_dir, records[:1])
    (run_dir / "sync").write_text("in the way")
    with pytest.raises(DataError, match="W&B has 0 of the 1 records"):
        main(SyncConfig(run=RunFolderConfig(dir=str(run_dir))))
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"There is no .*metrics\.jsonl"):
        main(SyncConfig(run=RunFolderConfig(dir=str(run_dir))))
