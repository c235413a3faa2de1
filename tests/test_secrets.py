"""No secret reaches a file of the run folder, whichever way it tries."""

import logging
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
from pretrain.secrets import Redacting, redact, secret_values

KEY = "k3y-0f-a-s3rvice-1234567890"
ENVIRONMENT = {
    "WANDB_API_KEY": KEY,
    "AWS_SECRET_ACCESS_KEY": "aws/secret+1234567890",
    "SSH_KEY_FILE": "/home/user/.ssh/key",
    "NUM_TOKENS": "123456789012",
    "MY_KEYS": str(Path(__file__).parent),
    "HF_TOKEN": "short",
    "PLAIN": "a plain value of some length",
}


def test_secrets_are_known_by_the_names_of_their_variables() -> None:
    assert secret_values(ENVIRONMENT) == [
        KEY, "aws%2Fsecret%2B1234567890", "aws/secret+1234567890",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # one AWS key in 64 begins like a path
        ("AWS_SECRET_ACCESS_KEY", "/starts/like+a+path/1234"),
        ("DB_PASSWORD", "1234567890"),
    ],
)
def test_a_secret_may_look_like_a_path_or_a_number(name: str, value: str) -> None:
    assert redact(f"refused {value}!", secret_values({name: value})) == "refused ***!"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"login with {KEY} failed", "login with *** failed"),
        ("https://user:pass@host/x", "https://***@host/x"),
        ("s3://bucket/x?X-Amz-Signature=abc123&y=1", "s3://bucket/x?X-Amz-Signature=***&y=1"),
        ("https://h/x?a=1&sig=abc%2F', next", "https://h/x?a=1&sig=***', next"),
        ("https://ghp_abc@host/x", "https://***@host/x"),
        ("redis://:pass@host/1", "redis://***@host/1"),
        ("sftp://user@host/x", "sftp://user@host/x"),
        ("GET /x?a=1&access_token=abc HTTP", "GET /x?a=1&access_token=*** HTTP"),
        ("/x?key=aws%2Fsecret%2B1234567890", "/x?key=***"),
        (
            "https://host/x?max_tokens=5&page_token_size=2",
            "https://host/x?max_tokens=5&page_token_size=2",
        ),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("step 3: 12 tokens=5", "step 3: 12 tokens=5"),
    ],
)
def test_values_passwords_and_signatures_are_masked(text: str, masked: str) -> None:
    assert redact(text, secret_values(ENVIRONMENT)) == masked


def test_tracebacks_are_masked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    formatter = Redacting("%(message)s")
    try:
        raise ValueError(f"the server refused {KEY}")
    except ValueError as error:
        record = logging.LogRecord("x", 40, "x", 1, "failed", None, (ValueError, error, None))
    said = formatter.format(record)
    assert KEY not in said
    assert "the server refused ***" in said


def files_with(folder: Path, secret: str) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_run_with_secrets_around_it_keeps_them_out_of_its_folder(workspace: Path) -> None:
    quiet = [setting for setting in SMALL if setting != "logging=quiet"]
    secret = {"WANDB_API_KEY": KEY, "MY_PASSWORD": "correct-horse-battery"}
    done = run_cli(workspace, "train", *quiet, "logging=offline", "run.name=secret", **secret)
    assert done.returncode == 0, done.stderr
    run_dir = workspace / "out/runs/secret"
    assert list(run_dir.glob("wandb/**/*.wandb"))
    for value in secret.values():
        assert files_with(run_dir, value) == []


# W&B gives up the network after a quarter of a minute
@pytest.mark.slow
def test_an_address_with_a_password_stays_out_of_what_the_upload_says(workspace: Path) -> None:
    """W&B is asked to go online; nothing listens there, which its files and ours tell."""
    settings = [setting for setting in SMALL if setting != "logging=quiet"]
    secret = {
        "WANDB_API_KEY": "0123456789abcdefghij" * 2,
        "WANDB_BASE_URL": "https://somebody:urlhunter33@localhost:9",
        "HTTPS_PROXY": "http://somebody:proxyhunter22@127.0.0.1:9",
    }
    done = run_cli(workspace, "train", *settings, "logging=wandb", "run.name=online", **secret)
    assert done.returncode == 0, done.stderr
    run_dir = workspace / "out/runs/online"
    for value in (secret["WANDB_API_KEY"], "urlhunter33", "proxyhunter22"):
        assert files_with(run_dir, value) == []
        assert value not in done.stderr
    log = (run_dir / "logs/rank-00000.log").read_text()
    assert 'Post "https://***@localhost:9/graphql"' in log
    assert "https://***@localhost:9" in (run_dir / "wandb/sink.log").read_text()


@pytest.mark.parametrize(
    "override",
    [
        "data.shards=https://user:pass@localhost/shards",
        "data.shards='https://localhost/shards?X-Amz-Signature=abcdef'",
        f"logging.project={KEY}",
    ],
)
def test_a_secret_in_the_configuration_is_refused_unsaid(workspace: Path, override: str) -> None:
    done = run_cli(
        workspace, "train", *SMALL, override, "data.cache=out/cache", "run.name=leaky",
        WANDB_API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == 64, done.stderr
    assert override.split("=")[0] + " holds a secret" in done.stderr
    for part in ("user:pass", "abcdef", KEY):
        assert part not in done.stderr
    assert not (workspace / "out/runs/leaky").exists()


def test_an_error_message_with_a_secret_is_logged_masked(workspace: Path) -> None:
    """The path of the shards is the secret's value: the message that names it masks it."""
    done = run_cli(workspace, "data", "verify", *SMALL, f"data.shards=out/{KEY}", WANDB_API_KEY=KEY)
    assert done.returncode == 65
    assert "There are no shards at out/***" in done.stderr
    assert KEY not in done.stderr
