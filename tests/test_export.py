"""There and back: published weights are adopted, trained on, exported, read by transformers."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import run_cli
from pretrain.compose import thaw
from pretrain.config import ExportConfig, ExportDtype, ExportOptions, RunFolderConfig
from pretrain.data.encode import encode_documents
from pretrain.data.manifest import read_manifest
from pretrain.data.sources import find_parts, read_documents
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tokenizer_adopted import adopt_tokenizer
from pretrain.engine.checkpoint import load_weights, newest_checkpoint, read_state
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.export import main as export
from pretrain.loop.trained import load_trained
from pretrain.model.depth import Depth
from pretrain.model.huggingface import load_pretrained
from pretrain.model.huggingface.moments import read_moments

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests/golden/a_1_2_1_d96"
TRANSFORMERS_4 = REPOSITORY / ".venv-transformers-4/bin/python"
STEPS = 20
OPTIONS = [
    "data=files", "data.root=text", "data.name=mine", "data.build_workers=1",
    "data.loader_workers=0", "data.valid_fraction=0.1", "model.context=32",
    "batch.global_tokens=256", "batch.micro_rows=8", "logging=quiet", "validation.rows=8",
    "validation.depths=[1,4]", "validation.every_steps=20", "checkpoint.every_steps=10",
    "checkpoint.keep_last=3",
    '+data.sources={prose: {paths: ["prose/*"], weight: 3, licence: CC0-1.0,'
    ' provenance: "made | up"}, sums: {paths: ["sums/*"], weight: 1}}',
]  # fmt: skip


@pytest.fixture(scope="module")
def adopted(
    workspace: Path,
    published_tokenizer: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder in which published weights were adopted as R, and trained for 20 steps."""
    folder = tmp_path_factory.mktemp("adopted")
    shutil.copytree(workspace / "text", folder / "text")
    published_tokenizer(folder / "F", 384, splits_digits=True, frames=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / "F" / name)
    for command in (
        ["adopt", "hf=F", "run.dir=R", *OPTIONS],
        ["data", "build", "run.dir=R"],
        ["train", "run.dir=R", f"run.steps={STEPS}"],
        ["export", "run.dir=R", "export.to=G", "export.moments=true"],
    ):
        done = run_cli(folder, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def inside(adopted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(adopted)
    return adopted


def options(to: Path, **changes: object) -> ExportConfig:
    values = {"to": str(to), "dtype": ExportDtype.float32, "moments": False, "step": None}
    return ExportConfig(
        run=RunFolderConfig(dir="R"),
        export=ExportOptions(**(values | changes)),  # type: ignore[arg-type]
    )


def example(folder: Path) -> dict[str, torch.Tensor]:
    """Tokens, an initial state, and our logits for them at the run's newest weights."""
    trained = load_trained(folder / "R", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 384, (2, 24), generator=generator)
    state = torch.randn(2, 24, trained.config.model.width, generator=generator)
    with torch.no_grad():
        output = trained.model(
            tokens,
            depths=[Depth(no_grad=5, with_grad=0)] * 2,
            initial_state=state,
        )
    return {"tokens": tokens, "state": state, "logits": output.logits}


# What the published format promises in fp32. Both sides call the same kernels of torch here, and
# differ by 0; another order of the sums costs a few 1e-6.
TOLERANCE = 2e-5


def test_transformers_gives_our_logits_after_twenty_steps(inside: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = example(inside)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(inside / "G", trust_remote_code=True)
    with torch.no_grad():
        logits = theirs(ours["tokens"], num_steps=5, input_states=ours["state"]).logits
    torch.testing.assert_close(logits, ours["logits"], rtol=0, atol=TOLERANCE)
    before = load_file(inside / "F/model.safetensors")["transformer.wte.weight"]
    after = load_file(inside / "G/model.safetensors")["transformer.wte.weight"]
    assert (after - before).abs().max() > 1e-4


WITH_TRANSFORMERS_4 = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, __version__
assert __version__.startswith("4."), __version__
folder, example = sys.argv[1:]
ours = load_file(example)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(ours["tokens"], num_steps=5, input_states=ours["state"]).logits
torch.testing.assert_close(logits, ours["logits"], rtol=0, atol=2e-5)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("state core", add_special_tokens=False, return_tensors="pt").input_ids
settings = GenerationConfig(max_new_tokens=4)
assert model.generate(ids, settings, tokenizer=tokenizer, num_steps=4).shape[1] > ids.shape[1]
"""


@pytest.mark.slow
@pytest.mark.skipif(not TRANSFORMERS_4.is_file(), reason="needs .venv-transformers-4")
def test_transformers_4_gives_them_too(inside: Path, tmp_path: Path) -> None:
    save_file(example(inside), tmp_path / "example.safetensors")
    done = subprocess.run(
        [
            str(TRANSFORMERS_4), "-c", WITH_TRANSFORMERS_4,
            str(inside / "G"), str(tmp_path / "example.safetensors"),
        ],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("data tokenizer", "384 pieces, adopted with the weights"),
        ("data verify", "every byte is as the manifest says"),
        ("data inspect", "75.00%"),
        ("plan", "315,744"),
    ],
)
def test_commands_know_the_run_by_its_folder(adopted: Path, command: str, said: str) -> None:
    done = run_cli(adopted, *command.split(), "run.dir=R")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert "R/config.yaml exists: its settings count" in done.stderr


def test_flags_show_what_would_be_adopted(adopted: Path) -> None:
    done = run_cli(adopted, "adopt", "--cfg", "job", "hf=F", "run.dir=S")
    assert done.returncode == 0, done.stderr
    assert "width: 96" in done.stdout
    assert run_cli(adopted, "adopt", "--cfg", "job", "run.dir=S").returncode == 64
    assert run_cli(adopted, "adopt", "--help").returncode == 0
    assert not (adopted / "S").exists()


def test_an_export_says_what_it_is(inside: Path) -> None:
    card = (inside / "G/README.md").read_text()
    state = read_state(newest_checkpoint(inside / "R") or inside)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'license_name: "CC0-1.0"' in card
    assert state["data_fingerprint"] in card
    assert state["tokenizer_sha256"] in card
    assert "continued from the weights of `F`" in card
    assert "5,120 tokens in 20 steps of 256" in card
    shares = {"prose": "75.00%", "sums": "25.00%"}
    for name, share in shares.items():
        tokens = read_manifest(Path("out/data/mine-F")).source(name).totals("train").tokens
        assert f"| {name} | {share} | {tokens:,} |" in card
    assert "| CC0-1.0 | made \\| up |" in card
    config = json.loads((inside / "G/config.json").read_text())
    assert (config["mean_recurrence"], config["mean_backprop_depth"]) == (4, 2)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 4])


def test_the_card_shows_how_to_use_it_without_a_question(inside: Path) -> None:
    pytest.importorskip("transformers")
    card = (inside / "G/README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.M | re.S)
    # the model has a context of 32
    code = code.replace("(FOLDER,", "('G',").replace("max_new_tokens=64", "max_new_tokens=4")
    done = subprocess.run(
        [sys.executable, "-c", code + "print(logits.shape, len(text[0]) - len(input_ids[0]))"],
        cwd=inside, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "384])" in done.stdout
    assert "custom code" not in done.stdout + done.stderr


def test_a_card_of_a_run_whose_batch_was_changed_names_no_size(
    inside: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(inside / "R", tmp_path / "R")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("global_tokens: 256", "global_tokens: 512"))
    export(ExportConfig(run=RunFolderConfig(dir=str(copy)), export=options(tmp_path / "E").export))
    assert "5,120 tokens in 20 steps of several sizes" in (tmp_path / "E/README.md").read_text()


def test_the_shards_hold_the_ids_of_auto_tokenizer(inside: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(inside / "G")
    data = thaw(Path("R")).data
    documents = list(read_documents(find_parts(data)["prose"][0], data))
    encoded = encode_documents(Tokenizer.load("R/tokenizer"), documents)
    for document, ids in zip(documents, encoded, strict=True):
        assert theirs(document.text).input_ids == ids
    totals = read_manifest(Path(data.shards)).source("prose")
    tokens = sum(totals.totals(split).tokens for split in ("train", "valid"))
    assert tokens == sum(map(len, encoded))


def test_moments_and_weights_come_back_exactly(inside: Path) -> None:
    checkpoint = newest_checkpoint(inside / "R")
    assert checkpoint is not None
    found = dict(load_pretrained(inside / "G").named_parameters())
    moments, steps = read_moments(inside / "G") or ({}, 0)
    assert steps == STEPS
    sections = {name: load_weights(checkpoint, name) for name in ("exp_avg", "exp_avg_sq")}
    for name, weight in load_weights(checkpoint).items():
        assert torch.equal(found[name], weight)
        assert torch.equal(moments[name][0], sections["exp_avg"][name])
        assert torch.equal(moments[name][1], sections["exp_avg_sq"][name])


def test_an_earlier_step_and_another_precision_may_be_chosen(inside: Path, tmp_path: Path) -> None:
    export(options(tmp_path / "E", step=10, dtype=ExportDtype.bfloat16))
    expected = load_weights(inside / "R/checkpoints/step-0000000010")["embedding.weight"]
    found = load_file(tmp_path / "E/model.safetensors")["transformer.wte.weight"]
    assert torch.equal(found, expected.bfloat16())
    assert "2,560 tokens in 10 steps" in (tmp_path / "E/README.md").read_text()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has 20, 10, 0"):
        export(options(tmp_path / "H", step=3))


def test_a_run_that_has_not_trained_has_no_moments(inside: Path, tmp_path: Path) -> None:
    export(options(tmp_path / "E", step=0))
    assert "This run has read no data yet." in (tmp_path / "E/README.md").read_text()
    published, found = (load_file(f / "model.safetensors") for f in (inside / "F", tmp_path / "E"))
    # the table of angles has a row for each position of the context, which this run made shorter
    del published["freqs_cis"]
    assert all(torch.equal(found[name], published[name]) for name in published)
    with pytest.raises(ConfigError, match=r"export\.moments=true: .* holds no exp_avg"):
        export(options(tmp_path / "H", step=0, moments=True))


def test_a_folder_that_holds_something_is_left_alone(inside: Path) -> None:
    with pytest.raises(ConfigError, match="G already holds something"):
        export(options(inside / "G"))


def test_shards_that_are_gone_leave_a_card_with_their_fingerprint(
    inside: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (inside / "out").rename(inside / "moved")
    try:
        export(options(tmp_path / "E"))
    finally:
        (inside / "moved").rename(inside / "out")
    assert "the model card tells nothing of the sources: There are no shards" in caplog.text
    assert "Its manifest was not at hand" in (tmp_path / "E/README.md").read_text()


def test_weights_are_kept_from_ids_that_they_do_not_know(
    inside: Path,
    published_tokenizer: Callable[..., None],
    tmp_path: Path,
) -> None:
    published_tokenizer(tmp_path / "other", 380)
    other = adopt_tokenizer(tmp_path / "other", tmp_path / "T", vocabulary_size=384)
    own = Tokenizer.load("R/tokenizer")
    given = [f"tokenizer.path={tmp_path}/T", f"data.shards={tmp_path}/shards"]
    assert run_cli(inside, "data", "build", "run.dir=R", *given).returncode == 0
    done = run_cli(inside, "train", "run.dir=R", "run.steps=30", *given)
    assert done.returncode == DataError.exit_code
    assert f"know the ids of tokenizer {own.sha256[:12]}" in done.stderr
    assert f"holds {other.sha256[:12]}" in done.stderr
    done = run_cli(inside, "train", "run.dir=R", "run.steps=30", given[1])
    assert done.returncode == DataError.exit_code
    assert own.sha256[:16] in done.stderr
    assert other.sha256[:16] in done.stderr
