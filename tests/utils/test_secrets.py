"""Processes that run users' code get no key with their environment, and everything else."""

from __future__ import annotations

import pytest

from opo_megatron.utils.secrets import is_secret_name, without_secrets

KEYS = [
    "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "GITHUB_TOKEN", "GITHUB_PAT",
    "GOOGLE_APPLICATION_CREDENTIALS", "SLURM_JWT", "PGPASSWORD", "MYSQL_PWD", "DB_PASSWD",
    "my_secret_thing", "SECRET_OF_MINE", "OPO_SGLANG_KEY", "REWARD_APIKEY", "SSH_AUTH_SOCK",
    "GPG_PASSPHRASE", "SESSION_COOKIE", "KEY", "API_KEYS",
]  # fmt: skip
OTHERS = [
    "PATH", "HOME", "PWD", "OLDPWD", "USER", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK", "TOKENIZERS_PARALLELISM", "MAX_TOKENS",
    "KEYBOARD", "MONKEY", "TURKEY", "PATIENCE", "AUTHOR", "HF_HOME", "WANDB_PROJECT", "XAUTHORITY",
    "SLURM_JOB_ID", "OPO_TEST_DATA", "http_proxy",
]  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_a_variable_that_holds_a_key_is_left_out(name: str) -> None:
    assert is_secret_name(name) and without_secrets({name: "x", "HOME": "/h"}) == {"HOME": "/h"}


@pytest.mark.parametrize("name", OTHERS)
def test_other_variables_stay(name: str) -> None:
    assert not is_secret_name(name) and without_secrets({name: "http://proxy:3128/a@b"}) != {}


@pytest.mark.parametrize(
    ("value", "stays"),
    [
        ("http://me:hunter2@proxy:3128", False),
        ("postgresql://me:hunter2@host/db", False),
        ("https://:hunter2@host", False),
        ("http://proxy:3128", True),
        ("https://me@host/path", True),
        ("a: b@c", True),
    ],
)
def test_a_password_in_an_address_is_left_out(value: str, stays: bool) -> None:
    assert (without_secrets({"ADDRESS": value}) != {}) == stays


def test_named_variables_are_left_out_and_the_environment_is_not_changed() -> None:
    environment = {"REWARD_SERVICE": "x", "HF_TOKEN": "y", "LANG": "C"}
    assert without_secrets(environment, ["REWARD_SERVICE"]) == {"LANG": "C"}
    assert len(environment) == 3
