"""Row format and bad input: every message names file, line and field, and nothing is lost silently."""

from __future__ import annotations

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from examples.tiny.tokenizer import build_tokenizer
from posttrain.config import BadRow, DataConfig, SourceConfig, UserError
from posttrain.data.sources import describe, load_conversations, load_prompts, source_weights

USER = {"role": "user", "content": "1+1=?"}
REPLY = {"role": "assistant", "content": "2"}
GOOD = {"messages": [USER], "domain": "math", "answer": "2"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path, *rows) -> str:
    """Rows as JSON lines; strings and bytes are written as they are."""
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return str(path)


def numbered(n: int) -> dict:
    return {**GOOD, "messages": [{"role": "user", "content": f"{n}+1=?"}]}


def test_prompt_of_a_full_row(tmp_path, tokenizer):
    row = {**GOOD, "id": 7, "system": "be brief", "tests": ["a"], "difficulty": 3}
    path = write(tmp_path / "p.jsonl", row)
    (prompt,) = load_prompts(DataConfig(path=path), tokenizer, 64)
    assert (prompt.prompt_id, prompt.domain, prompt.source, prompt.answer) == ("7", "math", "data", "2")
    assert prompt.metadata == {"tests": ["a"], "difficulty": 3}
    assert prompt.messages == [{"role": "system", "content": "be brief"}, USER]
    assert tokenizer.decode(prompt.token_ids) == "<|system|>be brief<|user|>1+1=?<|assistant|>"


def test_domain_defaults_and_override(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", {"messages": [USER]})
    assert load_prompts(DataConfig(path=path), tokenizer, 64)[0].domain == "default"
    named = DataConfig(sources={"one": SourceConfig(path=path, domain="code", weight=2.0)})
    (prompt,) = load_prompts(named, tokenizer, 64)
    assert (prompt.domain, prompt.source) == ("code", "one")
    assert source_weights(named) == {"one": 2.0}


def test_domain_filter(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "domain": "code"})
    assert [p.domain for p in load_prompts(DataConfig(path=path), tokenizer, 64, domain="code")] == ["code"]
    with pytest.raises(UserError, match=r"domain='law'.*code, math"):
        load_prompts(DataConfig(path=path), tokenizer, 64, domain="law")


def test_content_id_is_stable_and_unique(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", numbered(1), numbered(2))
    first, second = (load_prompts(DataConfig(path=path), tokenizer, 64) for _ in range(2))
    assert [p.prompt_id for p in first] == [p.prompt_id for p in second]
    assert first[0].prompt_id != first[1].prompt_id


def test_eval_sources_are_separate(tmp_path, tokenizer):
    data = DataConfig(
        path=write(tmp_path / "p.jsonl", numbered(1)), eval_path=write(tmp_path / "e.jsonl", numbered(2))
    )
    assert load_prompts(data, tokenizer, 64, eval=True)[0].messages[0]["content"] == "2+1=?"


BAD_ROWS = {
    "empty line": ("", "row: the line is empty"),
    "half-written": ('{"messages": [{"role": "user", "cont', "row: not valid JSON"),
    "not an object": ("[1, 2]", "row: expected a JSON object, found list"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "row: not UTF-8"),
    "no messages": ({"prompt": "x"}, "messages: the field is missing"),
    "empty messages": ({"messages": []}, "messages: expected a non-empty list"),
    "message not an object": ({"messages": ["hi"]}, r"messages\[0\]: expected an object, found str"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role: found 'bot'"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\].content: expected a string"),
    "content of parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        r"messages\[0\].content: expected a string, found list",
    ),
    "domain": ({"messages": [USER], "domain": 3}, "domain: expected a non-empty string, found 3"),
    "tools": ({"messages": [USER], "tools": "mul"}, "tools: expected a list"),
    "system twice": (
        {"messages": [{"role": "system", "content": "a"}, USER], "system": "b"},
        "system: messages begin with a system message as well",
    ),
    "id": ({"messages": [USER], "id": ["x"]}, "id: expected a string or an integer"),
    "character": (
        {"messages": [{"role": "user", "content": "\N{SNOWMAN}"}]},
        "messages: the tokenizer refuses",
    ),
    "prompt with reply": ({"messages": [USER, REPLY]}, "messages: a prompt must not end with an assistant"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_fails_with_line_and_field(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "p.jsonl", numbered(1), row, numbered(2))
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(DataConfig(path=path), tokenizer, 64)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ") and "data.on_bad_row=skip" in text and "\n" not in text


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_is_skipped_counted_and_named(tmp_path, tokenizer, caplog, row, message):
    path = write(tmp_path / "p.jsonl", numbered(1), row, numbered(2))
    skipped: list[str] = []
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(DataConfig(path=path, on_bad_row=BadRow.skip), tokenizer, 64, skipped=skipped)
    assert [p.messages[0]["content"] for p in prompts] == ["1+1=?", "2+1=?"]
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}:2: ")
    assert "dropped 1 of 3 rows" in caplog.text and f"{path}:2" in caplog.text


def test_last_line_cut_off(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(numbered(2))[:30])
    with pytest.raises(UserError, match=r"p\.jsonl:2: row: .*half-written"):
        load_prompts(DataConfig(path=str(path)), tokenizer, 64)


def test_a_blank_last_line_is_no_row(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    for ending in ("\n\n", "\n  "):
        path.write_text(json.dumps(GOOD) + ending)
        assert len(load_prompts(DataConfig(path=str(path)), tokenizer, 64)) == 1
    path.write_text(json.dumps(GOOD) + "\n\n\n")
    with pytest.raises(UserError, match=r"p\.jsonl:2: row: the line is empty"):
        load_prompts(DataConfig(path=str(path)), tokenizer, 64)


def test_duplicate_ids(tmp_path, tokenizer):
    path = write(
        tmp_path / "p.jsonl",
        {**numbered(1), "id": "a"},
        {**numbered(2), "id": "b"},
        {**numbered(3), "id": "a"},
    )
    with pytest.raises(
        UserError, match=r"p\.jsonl:3: id: the id occurs twice, first at .*p\.jsonl:1 \('a'\)"
    ):
        load_prompts(DataConfig(path=path), tokenizer, 64)
    assert len(load_prompts(DataConfig(path=path, on_bad_row=BadRow.skip), tokenizer, 64)) == 2


def test_duplicate_rows_across_sources(tmp_path, tokenizer):
    paths = [write(tmp_path / f"{name}.jsonl", GOOD) for name in "ab"]
    data = DataConfig(sources={f"s{i}": SourceConfig(path=path) for i, path in enumerate(paths)})
    with pytest.raises(UserError, match=r"b\.jsonl:1: id: the row occurs twice, first at .*a\.jsonl:1"):
        load_prompts(data, tokenizer, 64)


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}])
def test_answer_missing(tmp_path, tokenizer, answer):
    path = write(tmp_path / "p.jsonl", GOOD, {"messages": [USER], **answer})
    with pytest.raises(UserError, match=r"p\.jsonl:2: answer: the field is missing or empty"):
        load_prompts(DataConfig(path=path), tokenizer, 64, required_fields=("answer",))
    assert len(load_prompts(DataConfig(path=path), tokenizer, 64)) == 2


def test_either_field_satisfies_the_verifier(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", GOOD, {"messages": [USER], "tests": ["assert f(1) == 2"]})
    assert len(load_prompts(DataConfig(path=path), tokenizer, 64, required_fields=("answer|tests",))) == 2


def test_zero_is_an_answer(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", {"messages": [USER], "answer": 0})
    assert load_prompts(DataConfig(path=path), tokenizer, 64, required_fields=("answer",))[0].answer == 0


def test_prompt_longer_than_the_context(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", numbered(1), {"messages": [{"role": "user", "content": "x" * 40}]})
    with pytest.raises(
        UserError, match=r"p\.jsonl:2: messages: the prompt has 42 tokens, more than the 20 that the context"
    ):
        load_prompts(DataConfig(path=path), tokenizer, 20)
    assert len(load_prompts(DataConfig(path=path), tokenizer, 42)) == 2
    with pytest.raises(UserError, match=r"more than the 20 that data\.max_prompt_tokens allows"):
        load_prompts(DataConfig(path=path, max_prompt_tokens=20), tokenizer, 100)
    skip = DataConfig(path=path, max_prompt_tokens=20, on_bad_row=BadRow.skip)
    assert len(load_prompts(skip, tokenizer, 100)) == 1


@pytest.mark.parametrize("policy", list(BadRow))
def test_nothing_usable(tmp_path, tokenizer, policy):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"data\.path=.*empty\.jsonl.*no usable rows"):
        load_prompts(DataConfig(path=str(empty), on_bad_row=policy), tokenizer, 64)


def test_all_rows_skipped(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", {"messages": [USER, REPLY]})
    with pytest.raises(UserError, match="no usable row is left, 1 were dropped"):
        load_prompts(DataConfig(path=path, on_bad_row=BadRow.skip), tokenizer, 64)


def test_missing_files_and_keys(tmp_path, tokenizer):
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"data\.path=.*none\.jsonl.*no such file"):
        load_prompts(DataConfig(path=missing), tokenizer, 64)
    with pytest.raises(UserError, match=r"data\.sources\.math\.path=.*no such file"):
        load_prompts(DataConfig(sources={"math": SourceConfig(path=missing)}), tokenizer, 64)
    with pytest.raises(UserError, match=r"data\.eval_path=.*no such file"):
        load_prompts(DataConfig(eval_path=missing), tokenizer, 64, eval=True)
    with pytest.raises(UserError, match=r"data\.path=None"):
        load_prompts(DataConfig(), tokenizer, 64)
    with pytest.raises(UserError, match="give one of the two"):
        load_prompts(DataConfig(path=missing, sources={"m": SourceConfig(path=missing)}), tokenizer, 64)
    text = tmp_path / "rows.txt"
    text.write_text("x")
    with pytest.raises(UserError, match="unknown file type"):
        load_prompts(DataConfig(path=str(text)), tokenizer, 64)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"holds no \.jsonl or \.parquet"):
        load_prompts(DataConfig(path=str(tmp_path / "folder")), tokenizer, 64)


def test_parquet_and_directory_equal_jsonl(tmp_path, tokenizer):
    rows = [{**numbered(1), "system": "s"}, numbered(2)]  # the second has no system: null in Parquet
    jsonl = load_prompts(DataConfig(path=write(tmp_path / "p.jsonl", *rows)), tokenizer, 64)
    folder = tmp_path / "parquet"
    folder.mkdir()
    for number, row in enumerate(rows):
        table = pyarrow.Table.from_pylist([{"system": None, **row}])
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
    parquet = load_prompts(DataConfig(path=str(folder)), tokenizer, 64)
    assert [(p.prompt_id, p.messages, p.answer) for p in parquet] == [
        (p.prompt_id, p.messages, p.answer) for p in jsonl
    ]


def test_parquet_bad_row_and_bad_file(tmp_path, tokenizer):
    file = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, {"messages": None}]), file)
    with pytest.raises(UserError, match=r"p\.parquet:2: messages: the field is missing"):
        load_prompts(DataConfig(path=str(file)), tokenizer, 64)
    file.write_bytes(b"PAR1 half")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_prompts(DataConfig(path=str(file)), tokenizer, 64)


def test_many_rows_keep_their_order_around_a_bad_one(tmp_path, tokenizer):
    rows = [numbered(n) for n in range(2500)]
    rows[1500] = {"messages": [{"role": "user", "content": "\N{SNOWMAN}"}]}
    path = write(tmp_path / "p.jsonl", *rows)
    skipped: list[str] = []
    prompts = load_prompts(DataConfig(path=path, on_bad_row=BadRow.skip), tokenizer, 64, skipped=skipped)
    expected = [f"{n}+1=?" for n in range(2500) if n != 1500]
    assert [p.messages[0]["content"] for p in prompts] == expected
    assert [line.split(": ")[0] for line in skipped] == [f"{path}:1501"]


# -- conversations for SFT ---------------------------------------------------------------------------------------


def test_conversation_sample(tmp_path, tokenizer):
    row = {"messages": [USER, REPLY], "domain": "math", "reasoning": "one and one"}
    (sample,) = load_conversations(DataConfig(path=write(tmp_path / "c.jsonl", row)), tokenizer, 64)
    assert tokenizer.decode(sample.token_ids[sample.loss_mask]) == "<think>one and one</think>2<|end|>"
    assert (
        sample.domain == "math"
        and (sample.weights == 1).all()
        and sample.weights.shape == sample.token_ids.shape
    )


def test_conversation_errors(tmp_path, tokenizer):
    def load(row, max_tokens=64):
        return load_conversations(DataConfig(path=write(tmp_path / "c.jsonl", row)), tokenizer, max_tokens)

    with pytest.raises(UserError, match=r"c\.jsonl:1: messages: a conversation to train on must end"):
        load({"messages": [USER]})
    with pytest.raises(
        UserError, match=r"c\.jsonl:1: messages: the conversation has 9 tokens, more than algorithm"
    ):
        load({"messages": [USER, REPLY]}, max_tokens=8)
    with pytest.raises(UserError, match=r"c\.jsonl:1: reasoning: expected a string"):
        load({"messages": [USER, REPLY], "reasoning": 3})


def test_what_the_template_leaves_out_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    path = write(tmp_path / "c.jsonl", {"messages": [USER, REPLY], "reasoning": "think hard"})
    with pytest.raises(UserError, match="the chat template leaves the reasoning out of message 1"):
        load_conversations(DataConfig(path=path), tokenizer, 64)
    tools = [{"type": "function", "function": {"name": "mul"}}]
    path = write(tmp_path / "p.jsonl", {"messages": [USER], "tools": tools})
    with pytest.raises(UserError, match="tools: the chat template leaves tools out"):
        load_prompts(DataConfig(path=path), tokenizer, 64)


def test_describe(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", numbered(1), numbered(20), {**GOOD, "domain": "code"})
    assert describe(load_prompts(DataConfig(path=path), tokenizer, 64)) == {
        "code": {"num_rows": 1, "mean_tokens": 7.0, "max_tokens": 7},
        "math": {"num_rows": 2, "mean_tokens": 7.5, "max_tokens": 8},
    }


# -- `datasets` --------------------------------------------------------------------------------------------------


def test_dataset_rows_and_split(tmp_path, tokenizer, monkeypatch):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{**GOOD, "system": None}, {**numbered(2), "system": "s"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = DataConfig(sources={"hub": SourceConfig(path="someone/sums", split="dev")})
    prompts = load_prompts(data, tokenizer, 64)
    assert asked == [("someone/sums", "dev")]
    assert [len(prompt.messages) for prompt in prompts] == [1, 2]


def test_dataset_that_cannot_be_loaded(tokenizer, monkeypatch):
    import datasets

    def load(name, split):
        raise ConnectionError("no route to host\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = DataConfig(path="someone/sums")
    with pytest.raises(UserError, match=r"data\.path='someone/sums'.*no route to host\)$"):
        load_prompts(data, tokenizer, 64)
