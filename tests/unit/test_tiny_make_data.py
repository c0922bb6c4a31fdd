"""The tiny corpus: sizes, format, and no prompt in two places."""

from __future__ import annotations

import json

import pytest

from examples.tiny.domains import WORLDS
from examples.tiny.make_data import SPLITS, build, check_no_overlap, make, prompt_hash
from examples.tiny.tokenizer import build_tokenizer
from posttrain.config import DataConfig, SourceConfig
from posttrain.data.sources import describe, load_conversations, load_prompts

SIZES = {"num_sft": 320, "num_prompts": 60, "num_valid": 20, "num_heldout": 30}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make(tmp_path_factory.mktemp("corpus"), seed=0, **SIZES)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sizes_and_mixture(corpus):
    for domain in WORLDS:
        for split, size in zip(SPLITS, (60, 20, 30), strict=True):
            assert [row["domain"] for row in rows(corpus[f"{split}.{domain}.jsonl"])] == [domain] * size
    domains = [row["domain"] for row in rows(corpus["sft.jsonl"])]
    assert {d: domains.count(d) for d in WORLDS} == {"math": 100, "code": 100, "tool": 60, "instruct": 60}
    assert domains != sorted(domains)


def hashes(path):
    return [prompt_hash(row) for row in rows(path)]


def test_no_prompt_in_two_places(corpus):
    split = [h for name, path in corpus.items() if name != "sft.jsonl" for h in hashes(path)]
    assert len(split) == len(set(split)) == 4 * 110
    assert set(hashes(corpus["sft.jsonl"])).isdisjoint(split)


def test_default_sizes_fit_without_overlap():
    files = build(seed=1)
    assert all(len(files[f"heldout.{domain}.jsonl"]) >= 500 for domain in WORLDS)
    split = [prompt_hash(row) for name, part in files.items() if name != "sft.jsonl" for row in part]
    demonstrated = {prompt_hash(row) for row in files["sft.jsonl"]}
    assert len(split) == len(set(split)) and demonstrated.isdisjoint(split)
    assert check_no_overlap(files) == len(split) + len(demonstrated)


def test_overlap_is_found():
    row = {"messages": [{"role": "user", "content": "1+1=?"}], "domain": "math"}
    demonstration = {**row, "messages": [*row["messages"], {"role": "assistant", "content": "2"}]}
    with pytest.raises(ValueError, match=r"is in sft\.jsonl and again in heldout\.math\.jsonl"):
        check_no_overlap({"sft.jsonl": [demonstration], "heldout.math.jsonl": [row]})
    with pytest.raises(ValueError, match=r"is in heldout\.math\.jsonl and again in heldout\.math\.jsonl"):
        check_no_overlap({"heldout.math.jsonl": [row, row]})
    assert check_no_overlap({"sft.jsonl": [demonstration, demonstration]}) == 1


def test_too_large_a_corpus_is_refused():
    with pytest.raises(ValueError, match="domain math has only about"):
        build(seed=0, num_sft=16, num_prompts=8_101, num_valid=1, num_heldout=1)


def test_seed_decides_everything(corpus, tmp_path):
    again = make(tmp_path / "again", seed=0, **SIZES)
    assert all(again[name].read_bytes() == path.read_bytes() for name, path in corpus.items())
    other = make(tmp_path / "other", seed=1, **SIZES)
    assert other["sft.jsonl"].read_bytes() != corpus["sft.jsonl"].read_bytes()


def test_long_math_changes_demonstrations_of_math_alone(corpus, tmp_path):
    long = make(tmp_path / "long", seed=0, long_math=True, **SIZES)
    for name, path in corpus.items():
        if name != "sft.jsonl":
            assert long[name].read_bytes() == path.read_bytes()
    pairs = list(zip(rows(corpus["sft.jsonl"]), rows(long["sft.jsonl"]), strict=True))
    changed = [one for one, other in pairs if one != other]
    assert changed and {row["domain"] for row in changed} == {"math"}
    lengths = {
        d: max(len(o["messages"][-1]["content"]) for _, o in pairs if o["domain"] == d) for d in WORLDS
    }
    assert lengths["math"] + 1 >= 10 * (lengths["instruct"] + 1)


def test_corpus_loads_through_the_data_room(corpus):
    tokenizer = build_tokenizer()
    samples = load_conversations(DataConfig(path=str(corpus["sft.jsonl"])), tokenizer, 64)
    assert len(samples) == 320
    assert {d: n["num_rows"] for d, n in describe(samples).items()}["tool"] == 60
    sources = {d: SourceConfig(path=str(corpus[f"prompts.{d}.jsonl"])) for d in WORLDS}
    prompts = load_prompts(DataConfig(sources=sources), tokenizer, 40, required_fields=("answer",))
    assert len(prompts) == 240 and all(isinstance(prompt.answer, str) for prompt in prompts)
    tool = next(prompt for prompt in prompts if prompt.domain == "tool")
    assert tokenizer.decode(tool.token_ids).startswith("<|system|>mul add sub<|user|>")


def test_sft_mask_of_a_tool_conversation_leaves_the_result_out(corpus):
    tokenizer = build_tokenizer()
    samples = load_conversations(DataConfig(path=str(corpus["sft.jsonl"])), tokenizer, 64)
    with_call = [s for s in samples if "<|tool|>" in tokenizer.decode(s.token_ids)]
    assert with_call
    for sample in with_call:
        call, answer, rest = tokenizer.decode(sample.token_ids[sample.loss_mask]).split("<|end|>")
        text = tokenizer.decode(sample.token_ids)
        assert (
            f"<|assistant|>{call}<|end|><|tool|>{answer}<|assistant|>{answer}<|end|>" in text and rest == ""
        )
