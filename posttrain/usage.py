"""Help texts of the command line, in plain words."""

from __future__ import annotations

USAGE = """\
posttrain: post-training for language models, Mixture-of-Experts first.

  posttrain sft       train a model on conversations
  posttrain rl        train it on its own answers, judged by a reward
  posttrain mopd      distil one teacher per domain into one student
  posttrain pipeline  all of it: SFT, a teacher per domain, MOPD, a table of the result
  posttrain eval      accuracy of a checkpoint on held-out prompts
  posttrain sample    answers of a checkpoint to prompts, as conversations for SFT
  posttrain merge     one model out of several: their average, or task arithmetic
  posttrain doctor    what is installed, what a run would use, what is wrong
  posttrain doctor replay   whether routing replay works for a MoE checkpoint, in numbers
  posttrain doctor teachers whether these are the right teachers for this student, before a run asks them

Settings follow as key=value:
  posttrain sft model.path=DIR data.path=chats.jsonl name=first
  posttrain pipeline experiment=tiny name=tiny-seed0    (after `make demo`, which writes its model and data)
  posttrain mopd --config my.yaml learner.lr=2e-6

Options:
  --config FILE     a YAML file of settings; key=value on the command line wins over it
  --config-dir DIR  a folder of your own groups, such as DIR/experiment/mine.yaml for experiment=mine
  --cfg job         print the resolved settings and stop
  --debug           show the traceback of an error
  --help            this text; `posttrain rl --help` says more about one command
  --version

dry_run=true checks everything that can be checked without starting an engine and says what would run.
A run that was stopped goes on where it was when the same command is given again; fresh=true starts over.
"""

COMMANDS = {
    "sft": """\
posttrain sft: supervised fine-tuning on conversations; the loss counts assistant tokens only.

  model.path=DIR               Hugging Face checkpoint: safetensors, tokenizer, chat template
  data.path=FILE               JSONL or Parquet, one conversation a row: {"messages": [...]}
  name=first                   the run's folder, runs/first; the model ends up in runs/first/model
  algorithm.steps=200 algorithm.batch_size=64 learner.lr=1e-5

Examples:
  posttrain sft model.path=models/base data.path=chats.jsonl
  posttrain sft model.path=models/base data.sources.a.path=a.jsonl data.sources.b.path=b.parquet data.sources.b.weight=2
""",
    "rl": """\
posttrain rl: reinforcement learning (GRPO) on the model's own answers, judged by a reward.

  model.path=DIR data.path=FILE    one prompt a row: {"messages": [...], "domain": "math", "answer": "42"}
  domain=math                      train on this domain's prompts only; without it on all of them (Mix-RL)
  rewards._target_=my_module.MyReward   a class with score(rollout) -> (reward, breakdown)
  rewards.math._target_=...        or one for each domain
  environments.tool._target_=... rollout.max_turns=4    answers from an environment, for tool use
  algorithm.steps=100 algorithm.prompts_per_step=32 algorithm.group_size=8 learner.lr=1e-6
  algorithm=dapo|dr_grpo|gspo|cispo     published settings; algorithm.loss=... alone chooses the loss
  eval.every_steps=10 data.eval_path=FILE   accuracy on held-out prompts on the way

Examples:
  posttrain rl model.path=runs/first/model data.path=prompts.jsonl domain=math rewards._target_=my_module.MyReward
  posttrain rl --config my.yaml algorithm=dapo
""",
    "mopd": """\
posttrain mopd: multi-teacher on-policy distillation. The student samples its own answers; the teacher of each
prompt's domain scores every token of them.

  model.path=DIR                   the student
  data.path=FILE                   prompts of every domain, rows with "domain"; or data.sources.math.path=FILE for each
  teachers.math.path=DIR teachers.code.path=DIR   one teacher for each domain of the data
  domain=math                      train on this domain's prompts only
  algorithm.signal=sampled|top_k|full   what is asked of teachers: with few answers a step full, or top_k where the
                                   vocabulary is large, needs a fraction of the tokens (docs/concepts.md)
  rollout.max_model_len=2048 rollout.max_new_tokens=512    room for prompt and answer; at most the model's context
  algorithm.steps=60 algorithm.prompts_per_step=128 learner.lr=1e-6
  algorithm.alpha=0.2 algorithm.group_size=8 rewards._target_=...   outcome reward beside the teachers' signal
  algorithm.aggregation=token_mean_balanced     every domain gets its share of the gradient, however short its answers
  eval.every_steps=10 data.eval_path=FILE rewards._target_=...      accuracy on held-out prompts on the way

Example (`posttrain doctor teachers` with the same settings first proves the teachers):
  posttrain mopd model.path=runs/first/model data.path=prompts.jsonl teachers.math.path=runs/math/model teachers.code.path=runs/code/model
""",
    "pipeline": """\
posttrain pipeline: SFT, one teacher per domain, MOPD, evaluation, and a table of what the student took over.

  model.path=DIR sft_data.path=FILE    where it starts, and demonstrations for SFT
  data.path=FILE data.eval_path=FILE   prompts of every domain, and held-out ones
  teachers.math.train=rl|sft|none      how each domain's teacher is made; teachers.math.path=DIR gives one
  sft.* rl.* mopd.*                    algorithm and learner of each stage: rl.algorithm.steps=60 mopd.learner.lr=1e-6
  rounds=2                             the student starts new teachers, which teach the next student

Examples:
  posttrain pipeline experiment=tiny name=tiny-seed0    (after `make demo`, which writes its model and data)
  posttrain pipeline --config my.yaml name=mine
""",
    "eval": """\
posttrain eval: accuracy of one checkpoint on held-out prompts, sampled and greedy.

  model.path=DIR data.eval_path=FILE rewards._target_=my_module.MyReward
  eval.num_samples=4 eval.temperature=1.0 eval.num_prompts=500

Example:
  posttrain eval model.path=runs/first/model data.eval_path=heldout.jsonl rewards._target_=my_module.MyReward name=eval-first
""",
    "sample": """\
posttrain sample: answers of one checkpoint to prompts, written as conversations that `posttrain sft` trains on token by
token as they were sampled. With the teachers' answers that is off-policy distillation; with min_reward rejection sampling.

  model.path=DIR data.path=FILE        one prompt a row, as for rl
  domain=math                          this domain's prompts only
  sample.num_samples=4 sample.num_prompts=1000 sample.temperature=1.0
  rewards._target_=my_module.MyReward sample.min_reward=1    write only samples with this reward or more
  name=sample-math                     the samples end up in runs/sample-math/samples.jsonl

Examples:
  posttrain sample model.path=runs/math/model data.path=prompts.jsonl domain=math name=sample-math
  posttrain sft model.path=runs/first/model data.sources.math.path=runs/sample-math/samples.jsonl name=off-policy
""",
    "merge": """\
posttrain merge: one model out of several checkpoints of one architecture, without training.

  models=[DIR,DIR]                     what is merged
  method=average                       their mean; or
  method=task_arithmetic base=DIR coefficient=0.5    base + coefficient * sum of (model - base)
  coefficients=[0.3,0.6]               one for each of the models, in place of coefficient
  name=merge                           the run's folder; the model ends up in runs/merge/model

Examples:
  posttrain merge models=[runs/math/model,runs/code/model] name=average
  posttrain merge method=task_arithmetic base=runs/first/model models=[runs/math/model,runs/code/model] coefficient=0.4
  posttrain eval model.path=runs/merge/model data.eval_path=heldout.jsonl rewards._target_=my_module.MyReward
""",
    "doctor": """\
posttrain doctor: versions, devices, memory, disk, what each kind of run would use, and what is wrong. Exit code 1 if
something is wrong.

  posttrain doctor replay model.path=DIR    routing replay on a checkpoint; `posttrain doctor replay --help` says more
  posttrain doctor teachers ...             are these the right teachers? `posttrain doctor teachers --help` says more

Examples:
  posttrain doctor
  posttrain doctor model.path=models/base
  posttrain doctor model.path=models/base rollout.num_workers=4 learner.num_ranks=4
""",
}

# Words that may follow a command, `posttrain doctor replay`, and the help of each.
TOPICS = {
    "doctor": {
        "replay": """\
posttrain doctor replay: does routing replay (R3) work for this MoE checkpoint? Starts one engine and one learner on it,
samples rollouts, and prints one line per check: the engine's routes, full coverage, the routes and logprobs of one
prefill, live routers against recorded routes, train/inference mismatch with and without replay, a control with wrong
routes that must be seen, the routers' gradient. Exit code 1 if something is wrong.

  model.path=DIR                   Hugging Face checkpoint; a dense one has nothing to replay
  data.path=FILE                   real prompts; without it they are random tokens
  replay.num_rollouts=48 replay.max_new_tokens=64
  rollout.dtype=bfloat16 learner.dtype=float32    the types of engine and learner; with float32 in both all must agree

Examples:
  posttrain doctor replay model.path=models/base
  posttrain doctor replay model.path=models/base data.path=prompts.jsonl replay.num_rollouts=256
""",
        "teachers": """\
posttrain doctor teachers: are these the right teachers for this student? Compares files, tokenizers and weights, then
starts one engine with the student and the teachers, lets every teacher score the student's own samples, and prints one
table: gates down, domains across, and what to do about every cell that is not ok. The same gates run before the first
update of every `posttrain mopd`. Exit code 1 if a red line is not accepted. Gates: docs/teachers.md

  model.path=DIR                   the student
  data.path=FILE                   prompts of every domain, rows with "domain"
  teachers.math.path=DIR teachers.code.path=DIR   one teacher for each domain of the data
  teachers.default.path=DIR teachers.code.adapter=DIR teachers.code.backend=vllm|server domain=math   as in mopd
  teachers.code.self=true          this one is the student itself, on purpose
  teacher_workers.accept=[foreign] red lines that you know of, by the name of their gate
  teacher_check.num_samples=32 teacher_check.max_new_tokens=256

Example:
  posttrain doctor teachers model.path=runs/first/model data.path=prompts.jsonl teachers.math.path=runs/math/model teachers.code.path=runs/code/model
""",
    },
}
