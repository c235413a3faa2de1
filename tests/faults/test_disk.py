"""Full disks, damaged files, and files that would run code if they were unpickled."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from lives import Life, check_same, finish, read_steps, row, some

from conftest import SMALL, run_cli
from pretrain.engine import commit
from pretrain.testing import start_commands

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(workspace: Path) -> Iterator[Path]:
    """A run folder on a disk of its own of 16 MB."""
    folder = workspace / "out/runs/full-disk"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@row(
    "the disk fills up in mid-run, and has room again later",
    "saves fail with one ERROR each, training goes on, the next save with room is good",
)
def test_a_full_disk_costs_saves_and_nothing_else(
    workspace: Path, whole: Callable[[int], Path], small_disk: Path
) -> None:
    with Life(workspace, "full-disk", "checkpoint.keep_last=1") as life:
        life.until(lambda: life.has_step(6))
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        life.until(lambda: "training goes on without this save" in life.said())
        assert life.processes[0].is_alive()
        filler.unlink()
        assert life.wait() == [0], life.said()
    check_same(small_disk, whole(1))
    assert "checkpoint.keep_last" in life.said()


def killed_copy(workspace: Path, name: str) -> Path:
    """A run that was killed after some checkpoints."""
    with Life(workspace, name, "checkpoint.keep_last=3") as life:
        life.until(lambda: life.has_step(9))
        life.processes[0].kill()
    return life.run_dir


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHECKPOINT_DAMAGE = {
    "a flipped bit in the weights": lambda d: flip(next(d.glob("rank-*"))),
    "truncated weights": lambda d: os.truncate(next(d.glob("rank-*")), 1000),
    "weights missing": lambda d: next(d.glob("rank-*")).unlink(),
    "a flipped bit in the state": lambda d: flip(d / "state.json"),
    "a flipped bit in the manifest": lambda d: flip(d / "manifest.json"),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "an empty manifest": lambda d: (d / "manifest.json").write_bytes(b""),
}


@pytest.mark.parametrize(
    "damage", some(CHECKPOINT_DAMAGE, ["a flipped bit in the weights", "no manifest"])
)
@row(
    "a file of the newest checkpoint is flipped, cut, emptied or removed (seven ways)",
    "said at ERROR, set aside in checkpoints/damaged, the run goes on from the one before",
    "nothing: the steps between are taken again",
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    workspace: Path, whole: Callable[[int], Path], damage: str
) -> None:
    name = "damaged-" + damage.replace(" ", "-")
    run_dir = killed_copy(workspace, name)
    newest = commit.committed(run_dir)[0]
    CHECKPOINT_DAMAGE[damage](newest)
    finish(workspace, name, "checkpoint.keep_last=3")
    check_same(run_dir, whole(1))
    (aside,) = (run_dir / "checkpoints/damaged").iterdir()
    assert aside.name.startswith(newest.name)
    assert "is damaged: it is now" in (run_dir / "logs/rank-00000.log").read_text()


REPAIRED = {
    "latest names nothing": lambda d: (d / "checkpoints/latest").write_text("nonsense\n"),
    "no latest": lambda d: (d / "checkpoints/latest").unlink(),
    "a damaged lock": lambda d: (d / "lock.json").write_text("{"),
    "a torn line in the record": lambda d: (d / "metrics.jsonl").write_bytes(
        (d / "metrics.jsonl").read_bytes()[:-20]
    ),
    "temporary files of the dead": lambda d: (d / "checkpoints/step-0000000099.tmp-x").mkdir(),
}


@pytest.mark.parametrize("damage", some(REPAIRED, ["a torn line in the record", "no latest"]))
@row(
    "`latest`, the lock, the end of metrics.jsonl damaged; temporary files left behind",
    "repaired or swept with a WARNING",
)
def test_small_damage_in_the_run_folder_is_repaired(
    workspace: Path, whole: Callable[[int], Path], damage: str
) -> None:
    name = "repaired-" + damage.replace(" ", "-")
    run_dir = killed_copy(workspace, name)
    REPAIRED[damage](run_dir)
    finish(workspace, name, "checkpoint.keep_last=3")
    check_same(run_dir, whole(1))


@pytest.fixture
def broken(workspace: Path, whole: Callable[[int], Path], tmp_path: Path) -> Path:
    """A workspace of one's own with a finished run."""
    shutil.copytree(workspace / "out/tokenizer", tmp_path / "out/tokenizer")
    shutil.copytree(workspace / "out/data", tmp_path / "out/data")
    shutil.copytree(whole(1), tmp_path / "out/runs/run")
    return tmp_path


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but the one that says which life came last."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != "lock.last"}


REFUSED = {
    "tokenizer": ("out/tokenizer", "tokenizer.model", 65),
    "tokenizer's description": ("out/tokenizer", "tokenizer_info.json", 65),
    "manifest of the shards": ("out/data", "manifest.json", 65),
    "configuration": ("out/runs/run", "config.yaml", 64),
}


@pytest.mark.parametrize("what", some(REFUSED, ["manifest of the shards", "configuration"]))
@row(
    "tokenizer, shards' manifest or config.yaml overwritten with noise",
    "refused with the file's name, exit 64 or 65, no file changed",
)
def test_damaged_inputs_are_refused_by_name(broken: Path, what: str) -> None:
    folder, name, code = REFUSED[what]
    path = only(broken / folder, name)
    path.write_bytes(bytes(range(256)) * (len(path.read_bytes()) // 256 + 1))
    before = contents(broken)
    done = run_cli(broken, "train", "run.dir=out/runs/run", "run.steps=40")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert name in done.stderr or path.parent.name in done.stderr
    assert contents(broken) == before


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))


def torch_file(marker: Path) -> bytes:
    """As torch.save writes it: a zip with a pickle inside."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(marker))
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def object_array(marker: Path) -> bytes:
    """As numpy writes an array of objects: a pickle behind a header."""
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def plant(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    # a checkpoint's hashes are made to fit, so that the content itself is looked at
    manifest = path.parent / "manifest.json"
    if path.suffix == ".safetensors" or path.name == "state.json":
        values = json.loads(manifest.read_text())
        del values["sha256"]
        digest = hashlib.sha256(content).hexdigest()
        values["files"][path.name] = {"bytes": len(content), "sha256": digest}
        manifest.unlink()
        commit.write_manifest(path.parent, values)


BOMBS = {
    "weights": ("out/runs/run/checkpoints/step-0000000030", "rank-*.safetensors"),
    "state": ("out/runs/run/checkpoints/step-0000000030", "state.json"),
    "manifest": ("out/runs/run/checkpoints/step-0000000030", "manifest.json"),
    "latest": ("out/runs/run/checkpoints", "latest"),
    "configuration": ("out/runs/run", "config.yaml"),
    "lock": ("out/runs/run", "lock.last"),
    "record": ("out/runs/run", "metrics.jsonl"),
    "tokenizer": ("out/tokenizer", "tokenizer.model"),
    "tokenizer's description": ("out/tokenizer", "tokenizer_info.json"),
    "manifest of the shards": ("out/data", "manifest.json"),
    "shard": ("out/data", "prose/train-000000.tar"),
}


@pytest.mark.parametrize("what", some(BOMBS, ["weights", "state", "shard", "tokenizer"]))
@row(
    "a pickle, a torch file and an array of objects in place of every kind of file",
    "refused or ignored; none is unpickled",
)
def test_no_file_is_ever_unpickled(broken: Path, tmp_path: Path, what: str) -> None:
    folder, pattern = BOMBS[what]
    marker = broken / "exploded"
    for make in (pickled, torch_file, object_array):
        copy = tmp_path / make.__name__
        shutil.copytree(broken / "out", copy / "out")
        plant(next((copy / folder).rglob(pattern)), make(marker))
        for command in (["train", "run.steps=33"], ["evaluate", "evaluate.rows=8"]):
            (process,) = start_commands(
                1, [*command, "run.dir=out/runs/run"], cwd=copy, output=copy / "said"
            )
            process.join(240)
            assert process.exitcode in (0, 64, 65), (copy / "said/0.txt").read_text()
            assert not marker.exists(), f"{what}: {make.__name__} was executed by {command[0]}"
    # the bombs are live
    pickle.loads(pickled(marker))
    assert marker.exists()


@row("YAML that would call a function, in config.yaml", "refused, exit 64; nothing is called")
def test_no_yaml_calls_anything(broken: Path) -> None:
    path = only(broken / "out/runs/run", "config.yaml")
    marker = broken / "exploded"
    path.write_text(
        path.read_text() + f"evil: !!python/object/apply:os.system ['touch {marker}']\n"
    )
    done = run_cli(broken, "train", "run.dir=out/runs/run", "run.steps=33")
    assert done.returncode == 64, done.stderr
    assert not marker.exists()


@row(
    "a shard with members named ../x, absolute, links and devices",
    "nothing is ever unpacked: rows are read by offset; refused by size or checksum",
)
def test_a_hostile_tar_is_not_unpacked(broken: Path) -> None:
    path = next((broken / "out/data").rglob("prose/train-000000.tar"))
    size = path.stat().st_size
    outside = broken.parent / "outside"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("../../escaped", tarfile.REGTYPE),
            (f"{outside}/escaped", tarfile.REGTYPE),
            (f"{outside}/link", tarfile.SYMTYPE),
            ("device", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with path.open("ab") as file:
        file.truncate(size)
    done = run_cli(broken, "train", "run.dir=out/runs/run", "run.steps=40")
    assert done.returncode == 65, done.stderr
    assert "damaged" in done.stderr
    assert not list(broken.rglob("escaped"))
    assert not outside.exists()


@row(
    "a resume with another model, other shards, another tokenizer",
    "refused with the difference, exit 64 or 65, no file changed",
)
def test_a_run_is_not_continued_with_anything_else(broken: Path) -> None:
    run = ["train", "run.dir=out/runs/run", "run.steps=40"]
    done = run_cli(broken, *run, "model.width=64")
    assert (done.returncode, "model.width: 32 in the run folder" in done.stderr) == (64, True)
    manifest = only(broken / "out/data", "manifest.json")
    before = manifest.read_text()
    manifest.write_text(before + "\n")
    done = run_cli(broken, *run)
    assert (done.returncode, "The run has trained on data" in done.stderr) == (65, True)
    manifest.write_text(before)
    model = only(broken / "out/tokenizer", "tokenizer.model")
    shutil.rmtree(model.parent)
    (broken / "text").mkdir()
    letters = random.Random(1).choices("abcdefghij ", k=60_000)
    (broken / "text/part.txt").write_text("".join(letters))
    files = [setting for setting in SMALL if not setting.startswith("data.root")]
    made = run_cli(broken, "data", "tokenizer", *files, "data.root=text")
    assert made.returncode == 0, made.stderr
    done = run_cli(broken, *run)
    assert (done.returncode, "tokenizer" in done.stderr) == (65, True)
    assert max(read_steps(broken / "out/runs/run")) == 30
