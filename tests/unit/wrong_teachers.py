"""Wrong teachers, each a right one that was broken in one way, and the gate that must catch it from the files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny.domains import WORLDS, demonstrate
from posttrain.data.chat import encode_conversation
from tests.tiny_models import tiny_qwen3_moe

SHAPE = {"hidden": 64, "num_layers": 2, "num_experts": 4, "moe_width": 64, "max_positions": 128}


def fine_tune(start: Path, out: Path, domains: list[str], seed: int, lr: float, steps: int) -> Path:
    """Plain SFT of ``start`` on demonstrations of ``domains``, 16 a step."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rng = random.Random(seed)
    for _ in range(steps):
        rows = []
        for _ in range(16):
            world = WORLDS[rng.choice(domains)]
            task = world.sample(rng)
            reply = (task.careful if len(domains) == 1 else demonstrate(task, rng))[:1]
            rows.append(encode_conversation(tokenizer, [{"role": "user", "content": task.prompt}, *reply]))
        width = max(len(ids) for ids, _ in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (ids, marked) in enumerate(rows):
            tokens[i, : len(ids)], mask[i, : len(ids)] = (
                torch.from_numpy(ids).long(),
                torch.from_numpy(marked),
            )
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    for file in start.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, out / file.name)
    return out


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def longer_vocabulary(folder: Path, student: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda c: c["model"]["vocab"].update({"\u00e9": 101}))


def permuted_vocabulary(folder: Path, student: Path) -> None:
    edit_json(
        folder / "tokenizer.json",
        lambda c: c["model"]["vocab"].update(a=c["model"]["vocab"]["b"], b=c["model"]["vocab"]["a"]),
    )


def other_normalizer(folder: Path, student: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "tokenizer.json"))


def greedy_mark(folder: Path, student: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda c: c["added_tokens"][0].update(lstrip=True))


def other_end_mark(folder: Path, student: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<|user|>"))


def plain_mark(folder: Path, student: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda c: c["added_tokens"][4].update(special=False))


def other_template(folder: Path, student: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|assistant|>", "<|assistant|> "))


def truncated_shard(folder: Path, student: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def the_student(folder: Path, student: Path) -> None:
    shutil.copy(student / "model.safetensors", folder / "model.safetensors")


def the_student_in_bfloat16(folder: Path, student: Path) -> None:
    the_student(folder, student)
    edit(folder, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})


def nan_layer(folder: Path, student: Path) -> None:
    edit(folder, lambda t: t["model.layers.1.self_attn.q_proj.weight"].fill_(torch.nan) is None or None)


def zeroed_layer(folder: Path, student: Path) -> None:
    edit(folder, lambda t: t["model.layers.1.self_attn.o_proj.weight"].zero_() is None or None)


def constant_layer(folder: Path, student: Path) -> None:
    edit(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(0.01) is None or None)


def zeroed_rows(folder: Path, student: Path) -> None:
    edit(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"][:10].zero_() is None or None)


def missing_tensor(folder: Path, student: Path) -> None:
    edit(folder, lambda t: {n: v for n, v in t.items() if n != "model.layers.1.self_attn.v_proj.weight"})


def permuted_head(folder: Path, student: Path) -> None:
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    edit(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"][order]})


def two_swapped_head_rows(folder: Path, student: Path) -> None:
    order = torch.arange(101)
    order[[26, 71]] = order[[71, 26]]  # "4" and "a"
    edit(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"][order]})


def new_head(folder: Path, student: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    edit(folder, lambda t: t | {"lm_head.weight": 0.05 * torch.randn(101, 64, generator=generator)})


def temperature_in_the_head(folder: Path, student: Path) -> None:
    edit(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"] / 0.7})


def temperature_in_the_norm(folder: Path, student: Path) -> None:
    edit(folder, lambda t: t | {"model.norm.weight": t["model.norm.weight"] / 2})


def float8_underflow(folder: Path, student: Path) -> None:
    edit(
        folder, lambda t: {n: (v.to(torch.float8_e4m3fn).float() if v.dim() > 1 else v) for n, v in t.items()}
    )


def float16_underflow(folder: Path, student: Path) -> None:
    """What a cast to float16 leaves of values of 1e-7, which this student would need in one matrix."""
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, lambda t: t | {name: (t[name] * 2e-6).half().float() / 2e-6})


def float16_overflow(folder: Path, student: Path) -> None:
    edit(folder, lambda t: {n: (v * 1e6 if "up_proj" in n else v).half() for n, v in t.items()})


def clipped(folder: Path, student: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, lambda t: t | {name: t[name].clamp(-0.05, 0.05)})


def foreign_init(folder: Path, student: Path) -> None:
    other = fine_tune(
        tiny_qwen3_moe(folder.parent / "other_init", seed=7, **SHAPE), folder.parent / "other", list(WORLDS),
        seed=0, lr=3e-3, steps=30,
    )  # fmt: skip
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")


def setting(**values: Any) -> Callable[[Path, Path], None]:
    """config.json lost and written anew: whole weights, another function."""

    def other_setting(folder: Path, student: Path) -> None:
        edit_json(folder / "config.json", lambda c: c.update(values))

    return other_setting


def stale_single_file(folder: Path, student: Path) -> None:
    """Right shards with their index, beside what was there before: Transformers loads the one and vLLM the other."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    the_student(folder, student)


def index_without_map(folder: Path, student: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model.safetensors").unlink()


def cut_tokenizer(folder: Path, student: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:500])


def no_vocabulary_size(folder: Path, student: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.pop("vocab_size") and None)


def config_is_a_list(folder: Path, student: Path) -> None:
    (folder / "config.json").write_text("[]")


def the_student_rounded(folder: Path, student: Path) -> None:
    the_student(folder, student)
    edit(folder, lambda tensors: {name: t.bfloat16().float() for name, t in tensors.items()})


def rank_written_twice(folder: Path, student: Path) -> None:
    """Tensor parallelism over four: the last rank's part is a copy of the first's, in every matrix of one kind."""
    edit(folder, lambda t: [v[:, 48:].copy_(v[:, :16]) for n, v in t.items() if "o_proj" in n] and None)


def swapped_experts(folder: Path, student: Path) -> None:
    one, two = (f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in (0, 1))
    edit(folder, lambda t: t | {one: t[two], two: t[one]})


def random_norm(folder: Path, student: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    edit(folder, lambda t: t | {"model.norm.weight": torch.randn(64, generator=generator)})


def negated_norm(folder: Path, student: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    edit(folder, lambda t: t | {name: -t[name]})


def norm_of_another_layer(folder: Path, student: Path) -> None:
    one, two = ("model.layers.0.input_layernorm.weight", "model.norm.weight")
    edit(folder, lambda t: t | {one: t[two]})


def temperature_in_two_parts(folder: Path, student: Path) -> None:
    edit(
        folder,
        lambda t: {n: 0.81 * v if n in ("lm_head.weight", "model.norm.weight") else v for n, v in t.items()},
    )


def random_rows(folder: Path, student: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    edit(
        folder,
        lambda t: (
            t["model.embed_tokens.weight"][20:40].copy_(0.05 * torch.randn(20, 64, generator=generator))
            is None
            or None
        ),
    )


def padded(folder: Path, change: Callable[[torch.Tensor], torch.Tensor] = lambda head: head) -> None:
    """27 rows of zeros more in embedding and head, which hide both from a comparison of shapes."""
    edit_json(folder / "config.json", lambda c: c.update(vocab_size=128))
    names = ("lm_head.weight", "model.embed_tokens.weight")

    def pad(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {n: change(tensors[n]) if n.startswith("lm_head") else tensors[n] for n in names}
        return tensors | {n: torch.cat([v, torch.zeros(27, 64)]) for n, v in rows.items()}

    edit(folder, pad)


def stack_experts(folder: Path) -> None:
    """The experts of a layer in one tensor each for gate and up, and for down, as Transformers holds them in memory."""

    def stack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {n: t for n, t in tensors.items() if ".experts." not in n}
        for place in sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n}):
            own = {
                k: [tensors[f"{place}.experts.{e}.{k}_proj.weight"] for e in range(4)]
                for k in ("gate", "up", "down")
            }
            kept[f"{place}.experts.gate_up_proj"] = torch.cat(
                [torch.stack(own["gate"]), torch.stack(own["up"])], 1
            )
            kept[f"{place}.experts.down_proj"] = torch.stack(own["down"])
        return kept

    edit(folder, stack)


def padded_and_permuted(folder: Path, student: Path) -> None:
    padded(folder, lambda head: head[torch.randperm(101, generator=torch.Generator().manual_seed(5))])


def padded_and_hot(folder: Path, student: Path) -> None:
    padded(folder, lambda head: head / 2)


def tied_without_head(folder: Path, student: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    edit(folder, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})


def stale_revision(folder: Path, student: Path) -> None:
    record = folder / ".cache/huggingface/download/config.json.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{'a' * 40}\netag\n1.0\n")


WRONG: list[tuple[Callable[[Path, Path], None], str, str]] = [
    (longer_vocabulary, "vocabulary", "102 tokens against 101"),
    (permuted_vocabulary, "vocabulary", "'a' has id"),
    (other_normalizer, "tokenizer", "files differ in normalizer"),
    (greedy_mark, "tokenizer", "files differ in added_tokens"),
    (other_end_mark, "special_tokens", "its eos_token is '<|user|>'"),
    (plain_mark, "special_tokens", "token ids [4] are special in only one"),
    (other_template, "chat_template", "a format that it never saw"),
    (truncated_shard, "files", "truncated or damaged"),
    (the_student, "self_teacher", "byte for byte"),
    (the_student_in_bfloat16, "self_teacher", "saved in another type"),
    (nan_layer, "weights", "q_proj.weight holds NaN or infinite values"),
    (zeroed_layer, "weights", "o_proj.weight is all zero"),
    (constant_layer, "weights", "up_proj.weight is constant"),
    (zeroed_rows, "weights", "zeroed in part"),
    (missing_tensor, "tensors", "1 of the student's tensors are missing (first: model.layers.1.self_attn.v_proj"),
    (permuted_head, "weights", "lm_head.weight is permuted"),
    (two_swapped_head_rows, "weights", "token id 26 has the student's row 71"),
    (new_head, "weights", "lm_head.weight is not the student's"),
    (temperature_in_the_head, "weights", "a temperature of 0.7 in the weights"),
    (temperature_in_the_norm, "weights", "a temperature of 2 in the weights"),
    (float8_underflow, "weights", "a cast to a narrow type"),
    (float16_underflow, "weights", "flushed small values"),
    (float16_overflow, "weights", "holds NaN or infinite values"),
    (clipped, "weights", "clipped it"),
    (foreign_init, "foreign", "of another origin"),
    (setting(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}), "config", "rope.rope_theta=1000000.0 (student 10000"),
    (setting(num_experts_per_tok=1), "config", "num_experts_per_tok=1 (student 2)"),
    (setting(norm_topk_prob=False), "config", "norm_topk_prob=False (student True)"),
    (setting(hidden_act="gelu"), "config", "hidden_act=gelu (student silu)"),
    (setting(rms_norm_eps=0.1), "config", "rms_norm_eps=0.1"),
    (setting(num_hidden_layers=1), "config", "num_hidden_layers=1 (student 2)"),
    (setting(use_sliding_window=True, sliding_window=4, max_window_layers=0), "config", "use_sliding_window=True (student False)"),
    (setting(num_attention_heads=1, head_dim=64), "config", "num_attention_heads=1"),
    (stale_single_file, "files", "remove the stale one"),
    (index_without_map, "files", "has no weight_map"),
    (cut_tokenizer, "files", "tokenizer.json is not JSON"),
    (no_vocabulary_size, "files", "config.json has no vocab_size"),
    (config_is_a_list, "files", "config.json holds no JSON object"),
    (the_student_rounded, "self_teacher", "saved in another type"),
    (rank_written_twice, "weights", "o_proj.weight is not the student's (cosine 0.7"),
    (swapped_experts, "weights", "experts.0.up_proj.weight is not the student's"),
    (random_norm, "weights", "model.norm.weight is not the student's"),
    (negated_norm, "weights", "input_layernorm.weight is not the student's (moved by 2.0"),
    (norm_of_another_layer, "weights", "layers.0.input_layernorm.weight is not the student's (moved by 0."),
    (temperature_in_two_parts, "weights", "together are the student's times 0.6"),
    (random_rows, "weights", "of the rows of model.embed_tokens.weight are not the student's"),
    (padded_and_permuted, "weights", "lm_head.weight is permuted"),
    (padded_and_hot, "weights", "a temperature of 2 in the weights"),
    (tied_without_head, "tensors", "(first: lm_head.weight)"),
    (stale_revision, "revision", f"revision {'b' * 40} was asked for and the folder holds {'a' * 40}"),
]  # fmt: skip
