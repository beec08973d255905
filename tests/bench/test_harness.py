"""bench/harness.py: the same scores as lm_eval's own backend `hf`, whatever the lengths and the batch size."""

import json
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

import convert
from bench import harness
from engine.generate import generate
from engine.settings import UserError
from tests.small import base_model, save_model

LONG = "The quick brown fox jumps over the lazy dog. " * 4  # the context has 96 tokens, which are bytes
NASTY = "naïve 東京 🙂 e\u0301\u200d\n\t\x00\r\n  \u2028ﬁ"
PAIRS = [
    ("", "a"), ("", LONG[:90]), ("", NASTY), ("Two", " words"), ("blank at the end ", "x"), (LONG, " end"),
    (LONG[:96], LONG[96:192]), (NASTY, NASTY[::-1]), ("same", " a"), ("same", " b"), ("same", " a b"),
]  # fmt: skip
TEXTS = ["", "a", NASTY, LONG, LONG[:95], LONG[:96], LONG[:97], LONG * 3]
PROMPTS = ["a", "b", "Two", LONG, NASTY, "six wo", "same", LONG[1:]]

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "write": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["b"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


def requests(kind, arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def scores(lm, pairs):
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


def generated(lm, prompts=PROMPTS, **options):
    # hf looks for stop strings in the names of control tokens, too. These are in none.
    options = {"until": ["b", "\n\n"], "max_gen_toks": 20} | options
    return lm.generate_until(requests("generate_until", [(prompt, options) for prompt in prompts]), disable_tqdm=True)


def rolling(lm):
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True)


def greedy_pairs(model):
    """Pairs of ids: contexts and their likeliest continuations, and the same with another token at the end."""
    for context in ([1], [2] * 40, list(range(3, 96))):
        continuation = generate(model, torch.tensor([context]), 3, temperature=0)[0, -3:].tolist()
        yield context, continuation
        yield context, [*continuation[:-1], (continuation[-1] + 1) % 256]


def assert_close(ours, reference):
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in reference], abs=1e-5, rel=1e-6)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in reference]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint of each attention and three tasks."""
    folder = tmp_path_factory.mktemp("harness")
    for attn, stage in (("vanilla", "pretrain"), ("v1", "sft"), ("v2", "pretrain")):
        model = base_model(attn)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        model.lm_head.weight.data[256:259] *= 2  # control tokens are likely,
        model.lm_head.weight.data[259:] = 0  # and never those that stand for nothing
        save_model(folder / f"{attn}.pt", model, stage=stage)
    rows = [dict(question=f"{text}{i}?", choices=["yes", "no", f"{i} {NASTY}"], label=i % 3)
            for i, text in enumerate(["Is it? ", LONG, NASTY, ""])]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder) + text)
    return folder


@pytest.fixture
def load(folder):
    return lambda attn, batch_size=3: harness.CheckpointLM(folder / f"{attn}.pt", batch_size, torch.device("cpu"))


@pytest.fixture(scope="module", params=["vanilla", "v1"])
def exported(request, folder):
    """An attention, and lm_eval's own LM of its model."""
    target = folder / f"hf-{request.param}"
    convert.export_model(folder / f"{request.param}.pt", target)
    return request.param, HFLM(pretrained=str(target), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture
def run(monkeypatch, folder, tmp_path):
    """Run bench.harness -> what is in its JSON file."""
    # lm_eval takes many seconds to list its own tasks.
    monkeypatch.setattr(harness, "TaskManager", partial(TaskManager, include_defaults=False))

    def main(*flags, checkpoint="v2.pt"):
        argv = ["harness.py", folder / checkpoint, "--device", "cpu", "--out", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        harness.main()
        return json.loads(next((tmp_path / "out").glob("harness-*.json")).read_text())

    return main


def test_scores_are_those_of_transformers(load, exported):
    attn, theirs = exported
    lm = load(attn)
    assert_close(scores(lm, PAIRS), scores(theirs, PAIRS))
    assert rolling(lm) == pytest.approx(rolling(theirs), abs=1e-5, rel=1e-6)
    pairs = [(None, *pair) for pair in greedy_pairs(lm.model)]
    ours = lm._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert_close(ours, theirs._loglikelihood_tokens(pairs, disable_tqdm=True))
    assert [is_greedy for _, is_greedy in ours] == [True, False] * 3


def test_texts_are_those_of_transformers(load, exported):
    attn, theirs = exported
    lm = load(attn)
    texts = generated(lm)
    assert texts == generated(theirs)
    assert len(set(map(len, texts))) > 3 and not any("b" in text for text in texts)
    options = dict(until=max(texts, key=len)[4:6], max_gen_toks=60)
    assert generated(lm, **options) == generated(theirs, **options)


def test_tasks_have_the_results_of_transformers(run, folder, exported, capsys):
    attn, theirs = exported
    ours = run("--tasks", *TASKS, "--include_path", folder, checkpoint=f"{attn}.pt")
    manager = TaskManager(include_path=folder, include_defaults=False)
    reference = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, log_samples=False)
    assert ours["results"].keys() == reference["results"].keys() == TASKS.keys()
    for name, metrics in reference["results"].items():
        assert ours["results"][name].keys() == metrics.keys()
        for metric, value in metrics.items():
            assert ours["results"][name][metric] == (pytest.approx(value) if isinstance(value, float) else value)
    assert make_table(reference).splitlines()[0] == capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("attn", ["vanilla", "v1", "v2"])
def test_scores_are_sums_over_the_continuation(load, attn):
    lm = load(attn)
    for context, continuation in [*greedy_pairs(lm.model), ([], [1, 2]), ([5] * 200, [6] * 96)]:
        ids = torch.tensor((context or [256]) + continuation)[-97:]
        logps = lm.model(ids[None, :-1])[0][0].log_softmax(-1)[-len(continuation) :]
        ours, is_greedy = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)[0]
        assert ours == pytest.approx(sum(logps[i, token].item() for i, token in enumerate(continuation)), rel=1e-6)
        assert is_greedy == (logps.argmax(-1).tolist() == continuation)


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_the_batch_size_changes_nothing(load, attn):
    one, many = load(attn, batch_size=1), load(attn, batch_size=100)
    assert_close(scores(one, PAIRS), scores(many, PAIRS))
    assert rolling(one) == pytest.approx(rolling(many), abs=1e-5, rel=1e-6)
    prompts = ["", " ", *PROMPTS]
    assert generated(one, prompts) == generated(many, prompts)


def test_a_context_of_blanks_is_part_of_the_continuation(load):
    assert_close(scores(load("v2"), [(" ", "a")]), scores(load("v2"), [("", " a")]))


def test_control_tokens_in_a_text_are_text(load):
    assert load("v2").tok_encode("<|endoftext|>") == list(b"<|endoftext|>")


def test_sampling(load):
    lm = load("v2")
    greedy = generated(lm)
    for options in (dict(do_sample=False, temperature=5.0), dict(do_sample=True, temperature=5.0, top_k=1)):
        assert generated(lm, **options) == greedy
    assert generated(lm, temperature=5.0, top_p=0.9) != greedy


def test_a_file_of_a_task(run, folder):
    results = run("--tasks", folder / "choice.yaml", "--limit", 2, "--num_fewshot", 0)
    assert results["n-samples"]["choice"]["effective"] == 2
    assert results["n-shot"]["choice"] == 0


def test_mistakes_are_one_line(run, load, folder, tmp_path):
    with pytest.raises(UserError, match="no task nothing, nor is it a file"):
        run("--tasks", folder / "choice.yaml", "nothing")
    (tmp_path / "no.yaml").write_text("[1")
    with pytest.raises(UserError, match="no YAML"):
        run("--tasks", tmp_path / "no.yaml")
    with pytest.raises(UserError, match="--num_fewshot -1"):
        run("--tasks", folder / "choice.yaml", "--num_fewshot", -1)
    with pytest.raises(UserError, match="there is no checkpoint"):
        run("--tasks", folder / "choice.yaml", checkpoint="none.pt")
    with pytest.raises(UserError, match="scores 97 tokens at once, and the context has 96"):
        scores(load("v2"), [("a", "b" * 97)])
    with pytest.raises(UserError, match="generates 96 tokens, and the context has 96"):
        generated(load("v2"), max_gen_toks=96)
    with pytest.raises(UserError, match="generates with num_beams, which this cannot"):
        generated(load("v2"), num_beams=2)
