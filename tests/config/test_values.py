"""What a value becomes: keys of type text take it as it is written, and nothing is dropped in silence."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from opo_megatron.config import Config, load_config, to_yaml
from opo_megatron.config.choices import Kl
from opo_megatron.config.entries import override_entries, recipe_entries
from opo_megatron.config.keys import inner_type, key_types, may_be_null
from opo_megatron.errors import UserError

AS_TYPED = [
    "#### (.*)", "a # b", "#", "a: b", "a:", "- a", "? a", "0123", "0x1F", "0b11", "1e3", "1_000", "1:30",
    "+5", "3.10", ".5", ".inf", "nan", "no", "yes", "on", "off", "true", "False", "~", "Null", "NULL",
    "None", "", " ", "2024-01-01", "2024-01-01 10:00:00", "[a, b]", "[a", "{a}", "{prompt}", "}", "*x", "&x",
    "!tag x", "@x", "%x", "`x", "|", "> x", "<<", "=", "a=b", r"\d+\.\d*", "\\n", "\\", "a\tb", "\ta", "a ",
    "  a", "a\nb", "a\n", "a\r", "'a'", '"a"', '"(.*)"', "'", '"', '"a', "it's", "$5", "$ {x}", "$x", "é",
    "→", "你好", "\U0001f600", "\ufeffa", "---", "...", "--- a", "null # a", "null ", "a, b", "%YAML 1.1",
    "??", ",",
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {dir: out}\n")
    return path


def value_of(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def refusal(*arguments: Any) -> str:
    """The one sentence of a recipe that is refused."""
    with pytest.raises(UserError) as error:
        load_config(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def parsed(*overrides: str) -> dict[str, Any]:
    """The value of every key that the overrides set, before it is stored; many times faster than a load."""
    return {entry.key: entry.value for entry in override_entries(overrides)}


def not_parsed(*overrides: str) -> str:
    """The one sentence of overrides that are refused as they are read."""
    with pytest.raises(UserError) as error:
        parsed(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text", AS_TYPED)
def test_an_override_of_a_text_key_is_the_text_as_typed(text: str) -> None:
    for key in ("task.system_prompt", "task.template", "run.dir", "task.answer_pattern"):
        assert parsed(f"{key}={text}") == {key: text}


UNCHECKED = [
    "task.system_prompt", "task.answer_pattern", "task.verifier_pattern", "task.prompt_field",
    "task.answer_field", "task.data", "task.held_out_data", "task.generator", "task.tokenizer",
    "task.verifier",
]  # fmt: skip
"""Keys of type text whose texts are not checked before a task reads them."""


@pytest.mark.parametrize("start", range(0, len(AS_TYPED) + 4, len(UNCHECKED)))
def test_any_text_survives_the_resolved_recipe(recipe: Path, tmp_path: Path, start: int) -> None:
    texts = [*AS_TYPED, r"\${x}", r"a\\\${x} \d", r"$\${x", r"\${"][start : start + len(UNCHECKED)]
    assigned = dict(zip(UNCHECKED, texts, strict=False))
    config = load_config(recipe, [f"{key}={text}" for key, text in assigned.items()])
    for key, text in assigned.items():
        assert value_of(config, key) == text or "${" in text
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(again) == config


TEXT_KEYS = [key for key, hint in key_types().items() if inner_type(hint) is str]


def test_there_are_text_keys_of_both_kinds() -> None:
    assert {"run.dir", "task.template", "rollout.sglang.python"} <= set(TEXT_KEYS)
    assert {key for key in TEXT_KEYS if may_be_null(key_types()[key])} >= {"task.system_prompt", "task.data"}


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_every_text_key_takes_null_only_where_it_may(key: str) -> None:
    null, quoted, number = (parsed(f"{key}={text}")[key] for text in ("null", '"null"', "0123"))
    assert number == "0123"
    if may_be_null(key_types()[key]):
        assert (null, quoted) == (None, "null")
    else:
        assert (null, quoted) == ("null", '"null"')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${run.seed}", "1"),
        ("a${run.seed}b # c", "a1b # c"),
        ("0${run.seed}", "01"),
        (r"\d ${run.seed}", r"\d 1"),
        (r"\${run.seed}", "${run.seed}"),
        (r"#\${x", "#${x"),
        ("${oc.env:OPO_A_WORD}", "no # word"),
    ],
)
def test_interpolations_work_in_text_and_can_be_escaped(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: str
) -> None:
    monkeypatch.setenv("OPO_A_WORD", "no # word")
    assert load_config(recipe, [f"task.system_prompt={text}"]).task.system_prompt == value


@pytest.mark.parametrize("text", ["${", "a ${b", "${}", "${a b c!}", "x${run.seed"])
def test_an_interpolation_that_cannot_be_read_names_its_escape(recipe: Path, text: str) -> None:
    message = refusal(recipe, [f"task.answer_pattern={text}"])
    assert message.startswith(
        f"task.answer_pattern is {text!r}, whose ${{…}} cannot be read; fix it, or write"
    )


@pytest.mark.parametrize(
    ("yaml", "value"),
    [
        ("0123", "0123"),
        ("no", "no"),
        ("0x1F", "0x1F"),
        ("1e3", "1e3"),
        ("3.10", "3.10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("true", "true"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        ("'0123'", "0123"),
        ('"a # b"', "a # b"),
        ("a # a comment", "a"),
        ("'null'", "null"),
        ("null", None),
        ("~", None),
        ("", None),
        ("|\n    two\n    lines", "two\nlines\n"),
        ("${run.seed}", "${run.seed}"),
    ],
)
def test_a_file_gives_a_text_key_the_scalar_as_written(tmp_path: Path, yaml: str, value: str | None) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"run: {{dir: 0123}}\ntask:\n  system_prompt: {yaml}\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: r.yaml\nrun: {seed: 3}")
    entries = {entry.key: entry.value for entry in recipe_entries(child)}
    assert entries == {"task.system_prompt": value, "run.dir": "0123", "run.seed": 3}


@pytest.mark.parametrize("yaml", ["[a]", "{a: b}", "!!int 3", "!!float 1", "!!bool no", "[]"])
def test_a_file_cannot_give_a_text_key_anything_but_text(tmp_path: Path, yaml: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"run: {{dir: x}}\ntask: {{system_prompt: {yaml}}}\n")
    message = refusal(path)
    assert message.startswith("task.system_prompt is ") and "it must be text or null (in " in message


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("task={system_prompt: 0123}", "0123"),
        ("task={system_prompt: no}", "no"),
        ("task={system_prompt: 'a # b'}", "a # b"),
        ("task={system_prompt: null}", None),
        ("task={system_prompt: 1e3, chat: false}", "1e3"),
    ],
)
def test_a_section_on_the_command_line_is_read_as_in_a_file(override: str, value: str | None) -> None:
    assert parsed(override)["task.system_prompt"] == value


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("[http://a:1, http://b:2]", ["http://a:1", "http://b:2"]),
        ("[0123, no, 1e3]", ["0123", "no", "1e3"]),
        ("['a b', \"c\"]", ["a b", "c"]),
        ("['null']", ["null"]),
        ("[]", []),
    ],
)
def test_texts_in_a_list_are_as_written(text: str, urls: list[str]) -> None:
    assert parsed(f"rollout.sglang.urls={text}") == {"rollout.sglang.urls": urls}


@pytest.mark.parametrize("text", ["http://a:1", "[null]", "[[a]]", "{a: b}", "0123"])
def test_what_is_not_a_list_of_texts_is_refused(recipe: Path, text: str) -> None:
    assert "it must be a list, each entry text" in refusal(recipe, [f"rollout.sglang.urls={text}"])


@pytest.mark.parametrize("text", ["off", "'off'", '"off"', " off", "off # a comment"])
def test_a_choice_is_the_word_as_written(tmp_path: Path, text: str) -> None:
    assert parsed(f"observe.kl={text}") == {"observe.kl": "off"}
    path = tmp_path / "choice.yaml"
    path.write_text(f"run: {{dir: x}}\nobserve:\n  kl: {text}\n")
    assert load_config(path).observe.kl is Kl.off


@pytest.mark.parametrize("text", ["no", "false", "on", "0", "1", "OFF", "[off]", "null"])
def test_what_is_not_a_choice_is_refused_as_written(recipe: Path, text: str) -> None:
    message = refusal(recipe, [f"observe.kl={text}"])
    assert message.startswith("observe.kl is ") and "must be one of off, eval" in message


@pytest.mark.parametrize(
    "key", ["rollout", "policy", "policy.model", "rollout.sglang", "policy.megatron", "run", "optimizer"]
)
@pytest.mark.parametrize("text", ["", " ", "null", "~", "{}", "# a comment", "3", "[a]"])
def test_a_section_is_never_set_to_nothing(key: str, text: str) -> None:
    assert f"but it is a section; set one of its keys, like {key}." in not_parsed(f"{key}={text}")


@pytest.mark.parametrize(
    "key",
    [
        "run.ranks", "train.steps", "optimizer.lr", "policy.fp8", "observe.audit", "optimizer.betas",
        "rollout.sglang.urls", "policy.model.kv_channels", "task.generator_options",
        "rollout.sglang.options.x", "policy.megatron.recompute_granularity",
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["", "  ", "#", "# 3"])
def test_no_value_is_not_null(key: str, text: str) -> None:
    message = not_parsed(f"{key}={text}")
    assert message.startswith(f"override '{key}={text}' has no value; write one after the =")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=010", "8"),
        ("train.steps=1:30", "90"),
        ("run.ranks=0017", "15"),
        ("optimizer.lr=1:30.5", "90.5"),
        ("run.seed=-012", "-10"),
        ("optimizer.betas=[0, 010]", "8"),
        ("train={steps: 010}", "8"),
    ],
)
def test_a_number_that_yaml_reads_in_another_base_is_refused(override: str, read: str) -> None:
    assert f"which YAML reads as {read}; write it as a decimal number" in not_parsed(override)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=10", 10),
        ("train.steps=0", 0),
        ("train.steps=0x10", 16),
        ("train.steps=1_000", 1000),
        ("run.ranks=null", None),
        ("run.ranks=~", None),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=0.010", 0.01),
        ("observe.audit=no", False),
        ("optimizer.betas=[0, 0.5]", [0.0, 0.5]),
    ],
)
def test_numbers_and_switches_are_read_as_yaml(override: str, value: Any) -> None:
    assert parsed(override) == {override.partition("=")[0]: value}


@pytest.mark.parametrize("override", ["run.dir=caf\udce9", "train.steps=\udc80", "\udcff=3"])
def test_an_argument_that_is_not_utf_8_is_refused(override: str) -> None:
    assert "is not UTF-8 text; convert it" in not_parsed(override)


# ---------------------------------------------------------------------- mappings without a schema


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["attention_backend=triton"], {"attention_backend": "triton"}),
        (["attention-backend=triton"], {"attention_backend": "triton"}),
        (["enable-metrics=true", "page_size=16"], {"enable_metrics": True, "page_size": 16}),
        (["x=no", "y='no'", "z=null"], {"x": False, "y": "no", "z": None}),
        (["cuda-graph-bs=[1, 2]"], {"cuda_graph_bs": [1, 2]}),
        (["json-args.a-b=1"], {"json_args": {"a-b": 1}}),
        (["x=1", "x=2"], {"x": 2}),
    ],
)
def test_any_option_of_the_server_can_be_set_with_a_dot(
    recipe: Path, overrides: list[str], options: dict[str, Any]
) -> None:
    config = load_config(recipe, [f"rollout.sglang.options.{one}" for one in overrides])
    assert config.rollout.sglang.options == options


@pytest.mark.parametrize("spelling", ["a-b", "a_b"])
def test_a_later_recipe_overrides_an_option_in_any_spelling(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "base.yaml").write_text("run: {dir: x}\nrollout: {sglang: {options: {a-b: 1, c: 2}}}")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml")
    config = load_config(child, [f"rollout.sglang.options.{spelling}=3"])
    assert config.rollout.sglang.options == {"a_b": 3, "c": 2}


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.sglang.options={a-b: 1, a_b: 2}"],
        ["rollout.sglang.options.a-b=1", "rollout.sglang.options.a_b=1"],
        ["rollout.sglang.options.a_b=1", "train.steps=1", "rollout.sglang.options.a-b=2"],
        ["rollout.sglang.options.a-b.c=1", "rollout.sglang.options.a_b.d=2"],
        ["rollout={sglang: {options: {a_b: 1, a-b: 1}}}"],
    ],
)
def test_one_option_in_two_spellings_is_refused(overrides: list[str]) -> None:
    assert "which are one option; remove one" in not_parsed(*overrides)


@pytest.mark.parametrize(
    ("override", "options"),
    [
        ("task.generator_options.min_terms=3", {"min_terms": 3}),
        ("task.generator_options.a.b=x", {"a": {"b": "x"}}),
        ("task.generator_options.a-b=true", {"a-b": True}),
        ("task.generator_options={a: 1, b: [2]}", {"a": 1, "b": [2]}),
        ("task.generator_options={}", {}),
    ],
)
def test_options_of_a_generator_can_be_set_one_by_one(
    recipe: Path, override: str, options: dict[str, Any]
) -> None:
    assert load_config(recipe, [override]).task.generator_options == options


@pytest.mark.parametrize(
    "key",
    ["rollout.sglang.options.", "rollout.sglang.optionsx", "rollout.sglang.options.a[0]", "run.seed.x",
     "task.generator_options.a..b", "task.generator_options..a"],
)  # fmt: skip
def test_a_key_beside_a_mapping_is_unknown(key: str) -> None:
    assert f"unknown key '{key}'" in not_parsed(f"{key}=1")
