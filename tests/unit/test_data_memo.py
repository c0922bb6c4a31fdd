"""A file is loaded once per process, and again as soon as it has changed."""

from types import SimpleNamespace

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.memo import remembered

TOKENIZER = SimpleNamespace(name_or_path="t", chat_template="c")


def counting_loader():
    calls = []

    @remembered
    def load(data, tokenizer, max_tokens, *, domain=None, skipped=None):
        calls.append(data)
        return [domain, max_tokens]

    return load, calls


def test_second_load_is_remembered_until_the_file_changes(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("1\n")
    load, calls = counting_loader()
    data = DataConfig(sources={"a": SourceConfig(path=str(file))})
    assert load(data, TOKENIZER, 10, domain="x") == load(data, TOKENIZER, 10, domain="x") == ["x", 10]
    assert len(calls) == 1
    load(data, TOKENIZER, 10, domain="y")
    load(data, TOKENIZER, 11, domain="x")
    assert len(calls) == 3
    file.write_text("12\n")
    load(data, TOKENIZER, 10, domain="x")
    assert len(calls) == 4


def test_returned_lists_are_independent(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("1\n")
    load, _ = counting_loader()
    data = DataConfig(path=str(file))
    load(data, TOKENIZER, 10).append("mine")
    assert load(data, TOKENIZER, 10) == [None, 10]


def test_hub_names_and_skip_reports_are_always_loaded(tmp_path):
    load, calls = counting_loader()
    for _ in range(2):
        load(DataConfig(path="someone/dataset"), TOKENIZER, 10)
        load(DataConfig(path=str(tmp_path)), TOKENIZER, 10, skipped=[])
    assert len(calls) == 4
