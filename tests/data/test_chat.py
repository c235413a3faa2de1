"""Chats from records: roles are renamed, other shapes are refused by name."""

import pytest

from pretrain.data.chat import ROLES, Message, parse_messages
from pretrain.errors import DataError


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("system", "system"), ("user", "user"), ("human", "user"),
        ("Huginn", "Huginn"), ("assistant", "Huginn"), ("gpt", "Huginn"),
    ],
)  # fmt: skip
def test_roles_are_renamed(given: str, ours: str) -> None:
    assert parse_messages([{"role": given, "content": "a"}], "w") == (Message(ours, "a"),)
    assert parse_messages([{"from": given, "value": "a"}], "w") == (Message(ours, "a"),)


def test_every_known_role_is_tested_above() -> None:
    assert len(ROLES) == 6


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "here: the chat has no messages; remove"),
        (["hi"], "here, message 0: is a str"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "here, message 1: needs text under"),
        ([{"role": "user", "content": 3}], r"message 0: .*keys \['content', 'role'\]"),
        ([{"role": "tool", "content": "a"}], "role 'tool' is unknown; use one of system, user"),
    ],
)
def test_other_shapes_are_refused(raw: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_messages(raw, "here")
