"""convert.py: the logits of transformers' models and of ours are the same, and what it cannot translate it refuses."""

import dataclasses
import io
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from small import (
    examples,
    relative_error,
    run_main,
    same,
    save_model,
    tiny_model,
    weights_of,
    write_tokenizer,
)

import convert
import dpo
import sample
import sft
import train
from data.chat import default_system, render, render_prompt
from data.tokenizer import END_OF_TEXT, IM_END, get_tokenizer
from engine import checkpoint
from engine.checkpoint import load_checkpoint, load_weights
from engine.settings import run_script
from model import GPT

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
safetensors_torch = pytest.importorskip("safetensors.torch")
from hypothesis import given  # noqa: E402  (after what may skip the module)
from hypothesis import strategies as st  # noqa: E402

CHATML = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] }}"
CHATML += "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
IDX = torch.arange(48).view(2, 24) * 7 % 320

# ------------------------------------------------------------------------------------- models

MODELS = {"llama": "LlamaForCausalLM", "diffllama": "DiffLlamaForCausalLM", "mistral": "MistralForCausalLM"}
SHAPE = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=2)


def hf_model(kind="llama", **changes):
    """A model of transformers whose weights are large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[kind])
    model = model(model.config_class(**SHAPE | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hf_folder(folder, model=None, tokenizer="chatml", template=CHATML, **options):
    (model or hf_model()).save_pretrained(folder, **options)
    write_tokenizer(folder, tokenizer)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def run(command, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", command, *map(str, arguments)])
        convert.main()


def load(folder):
    """The model that convert.py wrote, and its tokenizer."""
    saved = load_checkpoint(folder / "best.pt")
    config, encoding = sft.load_config(saved, "auto")
    return load_weights(GPT(config), saved), encoding


def imported(folder, model=None, **options):
    """A model of transformers as one of ours."""
    run("import", hf_folder(folder / "hf", model, **options), folder / "ours")
    return load(folder / "ours")[0]


@torch.no_grad()
def logits(model, idx=IDX):
    output = model(idx)
    return output[0] if isinstance(output, tuple) else output.logits


def in_double(model):
    """The model in float64, also where transformers computes in float32."""

    class Norm(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    class Rotary(torch.nn.Module):
        def forward(self, x, position_ids):
            c = model.config
            frequency = c.rope_parameters["rope_theta"] ** -(torch.arange(0, c.head_dim, 2).double() / c.head_dim)
            angle = (position_ids[..., None] * frequency).repeat(1, 1, 2)
            return angle.cos(), angle.sin()

    model = model.double()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                setattr(module, name, Norm(child))
    model.model.rotary_emb = Rotary()
    return model


GROUPED = dict(num_attention_heads=8, num_key_value_heads=2)
VARIANTS = {
    "multi-head": {}, "grouped": GROUPED, "tied": dict(tie_word_embeddings=True), "head_dim": dict(head_dim=10),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 100000.0}), "eps": dict(rms_norm_eps=1e-6),
}  # fmt: skip
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())

# ------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("kind, tolerance", [("llama", 1e-12), ("diffllama", 1e-6)])  # its lambda is in float32
@variants
def test_imported_model_has_the_same_logits(tmp_path, kind, tolerance, changes):
    theirs = hf_model(kind, **changes)
    ours = imported(tmp_path, theirs)
    assert ours.config.attn == {"llama": "vanilla", "diffllama": "v1"}[kind]
    assert relative_error(logits(ours), logits(theirs)) < 1e-5
    torch.set_default_dtype(torch.float64)  # of RoPE's table
    try:
        precise = GPT(ours.config)
    finally:
        torch.set_default_dtype(torch.float32)
    precise.load_state_dict(ours.state_dict())
    assert relative_error(logits(precise), logits(in_double(theirs))) < tolerance


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    theirs = hf_model("mistral", sliding_window=None, **GROUPED)
    assert relative_error(logits(imported(tmp_path, theirs)), logits(theirs)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_imports_shards_of_bf16(tmp_path, tied):
    ours = imported(tmp_path, hf_model(tie_word_embeddings=tied).bfloat16(), max_shard_size="20KB")
    assert len([*(tmp_path / "hf").glob("model-*.safetensors")]) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert relative_error(logits(ours), logits(theirs)) < 1e-5


def test_imports_weights_of_older_versions_of_transformers(tmp_path):
    """They hold RoPE's frequencies, and an output layer beside the embedding that it is tied to."""
    theirs = hf_model(tie_word_embeddings=True)
    folder = hf_folder(tmp_path / "hf", theirs)
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors_torch.save_file(weights, folder / "model.safetensors")
    edit(folder, rope_parameters=None, rope_theta=10000.0)
    run("import", folder, tmp_path / "ours")
    assert relative_error(logits(load(tmp_path / "ours")[0]), logits(theirs)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_makes_room_for_control_tokens(tmp_path, tied):
    theirs = hf_model(tie_word_embeddings=tied)
    ours = imported(tmp_path, theirs, tokenizer="plain")
    assert ours.config.vocab_size == 384 and ours.lm_head.weight.shape == (384, 32)
    assert relative_error(logits(ours)[..., :320], logits(theirs)) < 1e-5
    saved = load_checkpoint(tmp_path / "ours" / "best.pt")["model"]
    shared = saved["lm_head.weight"].data_ptr() == saved["embed_tokens.weight"].data_ptr()
    assert shared == tied
    for rows in (ours.embed_tokens.weight, ours.lm_head.weight):
        torch.testing.assert_close(rows[320:], rows[:320].mean(0).expand(64, -1))


def test_keeps_the_room_that_there_is(tmp_path):
    assert imported(tmp_path, hf_model(vocab_size=330), tokenizer="plain").config.vocab_size == 330


def test_one_file_of_weights_counts_more_than_an_old_index(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "gone.safetensors"}}))
    run("import", folder, tmp_path / "ours")
    assert relative_error(logits(load(tmp_path / "ours")[0]), logits(hf_model())) < 1e-5


@pytest.mark.parametrize("eos, noted", [(2, False), ([5, 2], False), (5, True), (None, True)])
def test_an_end_token_of_another_name_is_noted(tmp_path, capsys, eos, noted):
    folder = hf_folder(tmp_path / "hf")
    edit(folder, eos_token_id=eos)
    run("import", folder, tmp_path / "ours")
    assert (f"its own end token, {eos}, has no part here" in capsys.readouterr().out) == noted


def test_the_default_of_several_chat_templates_counts(tmp_path):
    folder = hf_folder(tmp_path / "hf", template="")
    several = [{"name": "tools", "template": ""}, {"name": "default", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    run("import", folder, tmp_path / "ours")
    assert load_checkpoint(tmp_path / "ours" / "best.pt")["stage"] == "sft"


TEMPLATES = {
    "chatml": (CHATML, "sft"), "system": (SYSTEM, "sft"), "none": ("", "pretrain"),
    "llama": ("{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}", "pretrain"),
    "broken": ("{{ '<|im_start|>' ", "sft"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["jinja", "config"])
@pytest.mark.parametrize("template, stage", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_stage_is_that_of_the_chat_template(tmp_path, capsys, template, stage, place):
    folder = hf_folder(tmp_path / "hf", template=template if place == "jinja" else "")
    if place == "config":
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    run("import", folder, tmp_path / "ours")
    saved = load_checkpoint(tmp_path / "ours" / "best.pt")
    assert (saved["stage"], saved["step"]) == (stage, 0)
    assert ("--system 'Be kind.'" in capsys.readouterr().out) == (template == SYSTEM)


def test_a_system_text_may_not_control_the_terminal(tmp_path, capsys):
    run("import", hf_folder(tmp_path / "hf", template=SYSTEM.replace("kind", "\x1b[2J")), tmp_path / "ours")
    assert r"Be \x1b[2J." in capsys.readouterr().out


LINES = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
"""
TRIMMED = """{% if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}
{% endif %}
"""
LOOP = "{% for message in messages %}{% if not loop.first %}{% break %}{% endif %}" + SYSTEM + "{% endfor %}"
SYSTEMS = {
    "none": (CHATML, ""), "system": (SYSTEM, "Be kind."), "Qwen": (LINES, "You are Qwen."),
    "lines": ("{% if true %}\n" + SYSTEM + "{% endif %}\n", "Be kind."), "trimmed": (TRIMMED, "Be kind."),
    "break": (LOOP, "Be kind."), "raises": ("{{ raise_exception('no') }}", ""),
    "a division": ("{{ 1 / 0 }}<|im_start|>", ""), "a word as a number": ("{{ 'x'.index('y') }}<|im_start|>", ""),
    "a wrong type": ("{{ 1 + 'x' }}", ""), "a range": ("{{ range(10**9)|list }}", ""),
    "an unknown method": ("{{ messages.nosuch() }}", ""), "empty": ("", ""),
}  # fmt: skip


@pytest.mark.parametrize("template, system", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_default_system_text(template, system):
    assert default_system(template) == system


# ------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module", params=["bytes", "plain", "chatml", "llama3", "words"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return get_tokenizer("bytes")
    return get_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


def export(folder, model, encoding=None, stage="pretrain", **changes):
    """Export one of our models -> the folder."""
    encoding = encoding or get_tokenizer("bytes")
    folder.mkdir(exist_ok=True)
    save_model(folder / "best.pt", model, data={"tokenizer": encoding.name}, stage=stage, **changes)
    encoding.save(folder)
    run("export", folder / "best.pt", folder / "hf")
    return folder / "hf"


attentions = pytest.mark.parametrize("attn", ["vanilla", "v1"])
heads = pytest.mark.parametrize("heads", ["multi-head", "grouped"])
tied = pytest.mark.parametrize("tied", [False, True])
OTHER = dict(vocab_size=320, n_embd=48, norm_eps=1e-6, rope_theta=5000.0, head_dim=10)


@attentions
@heads
@tied
def test_exported_model_has_the_same_logits_and_comes_back(tmp_path, attn, heads, tied):
    """A plain Transformer bit for bit; the norm of V1 goes into the matrix after it."""
    ours = tiny_model(attn, heads, tie_embeddings=tied, **OTHER)
    folder = export(tmp_path, ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert relative_error(logits(theirs), logits(ours)) < 1e-5
    run("import", folder, tmp_path / "back")
    back, _ = load(tmp_path / "back")
    assert back.config == ours.config
    if attn == "vanilla":
        assert same(back.state_dict(), ours.state_dict())
    assert relative_error(logits(back), logits(ours)) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "diffllama"])
@variants
def test_imported_model_goes_back_bit_for_bit(tmp_path, kind, changes):
    theirs = hf_model(kind, **changes)
    imported(tmp_path, theirs)
    run("export", tmp_path / "ours" / "best.pt", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(theirs) and same(back.state_dict(), theirs.state_dict())
    for name in SHAPE.keys() - {"bos_token_id", "eos_token_id"} | {"rms_norm_eps", "tie_word_embeddings"}:
        assert getattr(back.config, name) == getattr(theirs.config, name)
    assert back.config.rope_parameters == theirs.config.rope_parameters


TALK = [("system", "Be kind."), ("user", "Hi <b>\n it's 12"), ("assistant", "Hey!\n\n"), ("user", "Bye?")]


def test_exported_chat_has_our_ids(tmp_path, tokenizer):
    folder = export(tmp_path, tiny_model("vanilla", vocab_size=384), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": text} for role, text in TALK]
    ids = partial(theirs.apply_chat_template, messages, return_dict=False)
    assert ids() == render(TALK, tokenizer)[0]
    assert ids(add_generation_prompt=True) == render_prompt(TALK, tokenizer)
    assert theirs(TALK[1][1])["input_ids"] == tokenizer.encode_ordinary(TALK[1][1])  # nothing is added
    assert theirs.model_max_length == 24


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_exported_model_stops_at_the_end_of_an_answer_or_a_text(tmp_path, tokenizer, stage):
    folder = export(tmp_path, tiny_model("v1", vocab_size=384), tokenizer, stage)
    end_of_text, im_end = map(tokenizer.encode_single_token, (END_OF_TEXT, IM_END))
    ends = [end_of_text] if stage == "pretrain" else [im_end, end_of_text]
    config = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert config.eos_token_id in (ends, ends[0]) and config.pad_token_id == config.bos_token_id == end_of_text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (ends[0], end_of_text, end_of_text)


# ------------------------------------------------------------------------------------- DIFF V2


@heads
@tied
def test_diff_model_has_the_same_logits(tmp_path, heads, tied):
    plain = tiny_model("vanilla", heads, tie_embeddings=tied, vocab_size=320)
    save_model(tmp_path / "plain.pt", plain, stage="dpo", step=3)
    run("diff", tmp_path / "plain.pt", tmp_path / "v2")
    model, _ = load(tmp_path / "v2")
    assert model.config == dataclasses.replace(plain.config, attn="v2")
    assert relative_error(logits(model), logits(plain)) < 1e-6
    saved = load_checkpoint(tmp_path / "v2" / "best.pt")
    assert (saved["stage"], saved["step"]) == ("dpo", 3)


def test_the_maps_of_a_diff_model_learn_to_differ(tmp_path):
    """The second one's gradient is -lambda = -1/2 times that of the first."""
    save_model(tmp_path / "plain.pt", tiny_model("vanilla", "grouped", vocab_size=320))
    run("diff", tmp_path / "plain.pt", tmp_path / "v2")
    model, _ = load(tmp_path / "v2")
    model(IDX, IDX.roll(-1, 1))[1].backward()
    for layer in model.layers:
        first, second = layer.attn.q_proj.weight.grad.unflatten(0, (-1, 2, model.config.head_dim)).unbind(1)
        assert torch.equal(second, -first / 2) and first.abs().max() > 1e-6
        assert layer.attn.lambda_proj.weight.grad.abs().max() > 1e-6


# ------------------------------------------------------------------------------------- the road


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """An imported model, and texts, conversations and pairs, not prepared."""
    road = tmp_path_factory.mktemp("road")
    imported(road, hf_model(**GROUPED, max_position_embeddings=96), tokenizer="chatml", template=SYSTEM)
    talks = [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "Hi"}]} for i in range(45)
    ]
    pairs = [dict(system="", question=f"{i}", chosen="yes", rejected="no") for i in range(45)]
    for name, rows in (("talks", talks), ("pairs", pairs)):
        (road / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (road / "text.txt").write_text("".join(f"The fox jumps over {i} dogs.\n\n" for i in range(99)))
    return road


STEPS = ["--device", "cpu", "--batch_size", 4, "--max_steps", 2, "--save_interval", 1]
TUNING = [*STEPS, "--lora_rank", 4, "--learning_rate", 1e-2, "--eval_examples", 5]
PRETRAINING = [*STEPS, "--preset", "tiny", "--eval_windows", 2]
STAGES = [(train, PRETRAINING, "text.txt"), (sft, TUNING, "talks.jsonl"), (dpo, TUNING, "pairs.jsonl")]


@pytest.mark.parametrize("script, flags, source", STAGES, ids=["train", "sft", "dpo"])
@pytest.mark.parametrize("attn", ["vanilla", "v2"])
def test_imported_model_goes_through_every_stage(road, tmp_path, script, flags, source, attn):
    """Its tokenizer stays beside it: when a run is resumed, when the next one archives it, when data are new."""
    start, folder = road / "ours" / "best.pt", tmp_path / "run"
    if attn == "v2":
        run("diff", start, tmp_path / "start")
        start = tmp_path / "start" / "best.pt"
    name = load_checkpoint(start)["data"]["tokenizer"]
    flags = [*flags, "--init_from", start, "--dataset", tmp_path / "set", "--source", road / source]
    done = run_main(script, *flags, "--out_dir", folder)
    assert done.task.encoding.name == name and done.task.model.config.attn == attn
    assert done.task.meta["tokenizer"] == name and {*tmp_path.glob(f"set/**/{name}")}
    assert run_main(script, "--resume", "--out_dir", folder, "--max_steps", 3).task.encoding.name == name
    with pytest.MonkeyPatch.context() as patch:  # makes one file of ckpt.pt, which is one already
        patch.setattr(sys, "argv", ["checkpoint.py", str(folder)])
        checkpoint.main()
    before = weights_of(folder, "best.pt")
    run_main(script, "--resume", "--out_dir", folder, "--max_steps", 4)
    shutil.rmtree(tmp_path / "set")
    run_main(script, *flags, "--init_from", folder / "best.pt", "--out_dir", folder)
    assert (folder / name).exists() and (folder / "earlier-1" / name).exists()
    for path in (folder, folder / "earlier-1"):
        model, encoding = load(path)
        assert encoding.name == name and before.keys() == model.state_dict().keys()
    again = run_main(script, *flags, "--init_from", folder / "earlier-1" / "best.pt", "--out_dir", tmp_path / "next")
    assert (again.folder / name).exists()


@pytest.mark.parametrize("flags", [["--prompt", "The fox"], ["--chat", "--prompt", "Hi"]])
def test_sample_says_what_transformers_does(road, tmp_path, monkeypatch, capsys, flags):
    """A completion after the end of a text, an answer to a chat, at temperature 0."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(road / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(road / "hf")
    path = road / "ours" / "best.pt"
    if "--chat" in flags:
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        flags = [*flags, "--system", "Be kind."]
    else:
        prompt = tokenizer.encode(f"{END_OF_TEXT}The fox")
        contents = torch.load(path, weights_only=True)
        torch.save(contents | {"stage": "pretrain"}, tmp_path / "best.pt")
        get_tokenizer(contents["data"]["tokenizer"], path.parent).save(tmp_path)
        path = tmp_path / "best.pt"
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=[0, 1, 2], pad_token_id=0)
    ids = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    answer = tokenizer.decode([index for index in ids if index > 2])
    monkeypatch.setattr(sys, "argv", ["sample.py", "--init_from", str(path), "--temperature", "0", *flags])
    sys.argv += ["--max_new_tokens", "8", "--device", "cpu"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    sample.main()
    expected = f"{answer}\n> " if "--chat" in flags else f"The fox{answer}\n"
    assert capsys.readouterr().out.rstrip("\n") == sample.printable(expected).rstrip("\n")


def test_a_second_import_moves_the_first_aside(tmp_path, capsys):
    names = []
    for kind in ("chatml", "plain"):
        run("import", hf_folder(tmp_path / kind, tokenizer=kind), tmp_path / "ours")
        names.append(get_tokenizer("tokenizer.json", tmp_path / kind).name)
    for folder, name in zip([tmp_path / "ours" / "earlier-1", tmp_path / "ours"], names):
        assert [path.name for path in folder.glob("tokenizer-*")] == [name] == [load(folder)[1].name]
    assert "is now in" in capsys.readouterr().out


def test_diff_in_place_moves_the_plain_model_aside(tmp_path):
    plain = imported(tmp_path)
    run("diff", tmp_path / "ours" / "best.pt", tmp_path / "ours")
    assert same(load(tmp_path / "ours" / "earlier-1")[0].state_dict(), plain.state_dict())
    assert relative_error(logits(load(tmp_path / "ours")[0]), logits(plain)) < 1e-6


@pytest.mark.parametrize(
    "size, tokenizer, preset",
    [(3e8, "gpt2", "ldiff"), (2e9, "tokenizer-01234567.json", "1b"), (8e9, "gpt2", "10b"), (8e9, "bytes", "tiny")],
)
def test_auto_chooses_the_preset_by_size(monkeypatch, capsys, size, tokenizer, preset):
    saved = dict(
        model={"w": torch.empty(int(size), device="meta")}, config={"attn": "v2"}, data={"tokenizer": tokenizer}
    )
    monkeypatch.setattr(sft, "load_init_from", lambda path, attn: saved)
    for script in (sft, dpo):
        given = {"init_from": "best.pt"}
        settings, _ = sft.choose_settings(given, script.Settings, script.PRESETS, "sft")
        assert settings.preset == preset and all(getattr(settings, k) == v for k, v in script.PRESETS[preset].items())
        assert f"preset: {preset}, since the checkpoint has the tokenizer {tokenizer} and" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- wrong input


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a Hugging Face folder, one of shards, and checkpoints."""
    home = tmp_path_factory.mktemp("home")
    hf_folder(home / "hf")
    hf_folder(home / "shards", max_shard_size="20KB")
    for attn in ("vanilla", "v1", "v2"):
        save_model(home / f"{attn}.pt", tiny_model(attn, vocab_size=320))
    save_model(home / "lost.pt", tiny_model("vanilla", vocab_size=320), data={"tokenizer": "tokenizer-01234567.json"})
    return home


def edit(folder, name="config.json", **changes):
    """Change entries of a JSON file, and remove those that are `...`."""
    path = folder / name
    contents = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in contents.items() if value is not ...}))


def config(**changes):
    """A function that changes entries of hf/config.json."""
    return lambda home: edit(home / "hf", **changes)


def write(name, content):
    """A function that writes text or bytes, or removes a file."""

    def setup(home):
        if content is None:
            (home / name).unlink()
        else:
            (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return setup


def weights(change):
    """A function that changes the tensors in hf/model.safetensors."""

    def setup(home):
        path = home / "hf" / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in safetensors_torch.load_file(path).items()}
        change(tensors)
        safetensors_torch.save_file(tensors, path)

    return setup


def index(files):
    """A function that makes hf's weights a set of shards, in these files."""

    def setup(home):
        (home / "hf" / "model.safetensors").rename(home / "hf" / "all.safetensors")
        write("hf/model.safetensors.index.json", json.dumps({"weight_map": files}))(home)

    return setup


def cut(home):
    path = home / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


Q = "model.layers.1.self_attn.q_proj.weight"
IMPORT, EXPORT, DIFF = "import hf out", "export v1.pt out", "diff vanilla.pt out"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
WRONG = [
    ("no config.json", write("hf/config.json", None), IMPORT, "cannot read .*config.json: No such file"),
    ("config that is no JSON", write("hf/config.json", "{"), IMPORT, "config.json is damaged: it is no JSON object"),
    ("config that is a list", write("hf/config.json", "[]"), IMPORT, "config.json is damaged: it is no JSON object"),
    ("config that is not UTF-8", write("hf/config.json", b"\xff"), IMPORT, "config.json is damaged"),
    ("config of a million lists", write("hf/config.json", "[" * 10**6), IMPORT, "config.json is damaged"),
    ("empty config", write("hf/config.json", "{}"), IMPORT, "the model_type None is not read; llama, mistral"),
    ("unknown type", config(model_type="gemma"), IMPORT, "the model_type gemma is not read; llama, mistral, diffllama"),
    ("type in a list", config(model_type=["llama"]), IMPORT, "the model_type .* is not read"),
    ("attention_bias", config(attention_bias=True), IMPORT, "config.json has attention_bias True, and this model does"),
    ("mlp_bias", config(mlp_bias=True), IMPORT, "config.json has mlp_bias True"),
    ("gelu", config(hidden_act="gelu"), IMPORT, "config.json has hidden_act gelu"),
    ("sliding_window", config(model_type="mistral", sliding_window=8), IMPORT, "config.json has sliding_window 8"),
    ("the window that Mistral has by itself", config(model_type="mistral"), IMPORT, "sliding_window"),
    ("rope_scaling", config(rope_scaling=LINEAR), IMPORT, "no RoPE scaling"),
    ("llama3's RoPE", config(rope_parameters=LLAMA3), IMPORT, "no RoPE scaling, and config.json has .*llama3"),
    ("linear RoPE", config(rope_parameters=LINEAR), IMPORT, "no RoPE scaling, and config.json has .*linear"),
    ("RoPE by its older name", config(rope_parameters={"type": "linear", "factor": 2.0}), IMPORT, "linear"),
    ("RoPE in a list", config(rope_parameters=[1]), IMPORT, "no RoPE scaling, and config.json has .1."),
    ("RoPE in words", config(rope_parameters="default"), IMPORT, "no RoPE scaling, and config.json has default"),
    ("part of RoPE", config(partial_rotary_factor=0.5), IMPORT, "config.json has partial_rotary_factor 0.5"),
    ("part of RoPE in its place", config(rope_parameters={"partial_rotary_factor": 0.5}), IMPORT, "partial_rotary"),
    ("quantized", config(quantization_config={"bits": 4}), IMPORT, "config.json has quantization_config"),
    ("odd head_dim", config(head_dim=7), IMPORT, "config.json cannot be used: RoPE rotates pairs"),
    ("no sizes", config(hidden_size=..., rms_norm_eps=...), IMPORT, "it lacks|hidden_size"),
    ("no layers", config(num_hidden_layers=...), IMPORT, "config.json lacks num_hidden_layers"),
    ("no norm_eps", config(rms_norm_eps=None), IMPORT, "config.json lacks rms_norm_eps"),
    ("size in words", config(hidden_size="32"), IMPORT, "config.json cannot be used: "),
    ("sizes in words", config(hidden_size="32", head_dim=None), IMPORT, "config.json cannot be used"),
    ("layers in words", config(num_hidden_layers="three"), IMPORT, "cannot be used: its num_hidden_layers is 'three'"),
    ("eps in words", config(rms_norm_eps="small"), IMPORT, "config.json cannot be used: its rms_norm_eps is"),
    ("no heads", config(num_attention_heads=0, head_dim=None), IMPORT, "config.json cannot be used"),
    ("tied in words", config(tie_word_embeddings="no"), IMPORT, "config.json .*tie"),
    ("context beyond all numbers", config(max_position_embeddings=10**30), IMPORT, ""),
    ("width beyond all numbers", config(hidden_size=10**18), IMPORT, ""),
    ("no tokenizer", write("hf/tokenizer.json", None), IMPORT, "cannot read .*tokenizer.json: No such file"),
    ("another tokenizer", write("hf/tokenizer.json", '{"model": {"type": "Unigram"}}'), IMPORT, "tokenizer.json is"),
    ("a vocabulary too large", config(vocab_size=64), IMPORT, "tokenizer.json has 320 tokens, and the embedding 64"),
    ("template that is not UTF-8", write("hf/chat_template.jinja", b"\xff"), IMPORT, "chat_template.jinja"),
    ("tokenizer_config that is no JSON", lambda home: (write("hf/chat_template.jinja", None)(home),
     write("hf/tokenizer_config.json", "{")(home)), IMPORT, "tokenizer_config.json is damaged"),
    ("no weights", write("hf/model.safetensors", None), IMPORT, "there is no hf/model.safetensors"),
    ("empty weights", write("hf/model.safetensors", ""), IMPORT, "hf/model.safetensors is damaged"),
    ("text as weights", write("hf/model.safetensors", "text" * 99), IMPORT, "hf/model.safetensors is damaged"),
    ("weights cut short", cut, IMPORT, "hf/model.safetensors is damaged"),
    ("weights of another shape", config(intermediate_size=64), IMPORT, r"has the shape \(48, 32\), by config.json it"),
    ("fewer layers", config(num_hidden_layers=2), IMPORT, "this model has no place for model.layers.2."),
    ("more layers", config(num_hidden_layers=4), IMPORT, "the weights lack model.layers.3."),
    ("a missing tensor", weights(lambda tensors: tensors.pop(Q)), IMPORT, f"the weights lack {Q}"),
    ("no output layer", weights(lambda tensors: tensors.pop("lm_head.weight")), IMPORT, "lack lm_head.weight"),
    ("an unknown tensor", weights(lambda tensors: tensors.update(x=torch.ones(2))), IMPORT, "has no place for x"),
    ("a bias", weights(lambda tensors: tensors.update({f"{Q}.bias": torch.ones(32)})), IMPORT, "no place for .*bias"),
    ("NaN", weights(lambda tensors: tensors[Q].fill_(float("nan"))), IMPORT, f"{Q} is not finite"),
    ("one infinity", weights(lambda tensors: tensors[Q][3].fill_(float("inf"))), IMPORT, f"{Q} is not finite"),
    ("missing shard", lambda home: min((home / "shards").glob("model-*")).unlink(), "import shards out", "there is no"),
    ("8-bit weights", weights(lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)})), IMPORT,
     "weights of another type than 16- and 32-bit floats, such as model.layers.1.self_attn.q_proj.weight"),
    ("another head than the tied one", config(tie_word_embeddings=True), IMPORT, "the weights have another lm_head"),
    ("shards elsewhere", index({Q: "../hf/all.safetensors"}), IMPORT, "index.json is damaged: its weight_map names"),
    ("shards at the root", index({Q: "/etc/passwd"}), IMPORT, "index.json is damaged: its weight_map names"),
    ("shards above", index({Q: ".."}), IMPORT, "is damaged"),
    ("shards without a name", index({Q: ""}), IMPORT, "is damaged"),
    ("shards that no file can be", index({Q: "a\0b"}), IMPORT, r"is damaged|there is no hf/a\\x00b"),
    ("shards by number", index({Q: 3}), IMPORT, "index.json is damaged: its weight_map names"),
    ("shards in lists", index({Q: ["a"]}), IMPORT, "index.json is damaged: its weight_map names"),
    ("a list of shards", index(["a"]), IMPORT, "index.json is damaged: its weight_map names"),
    ("no shards", index({}), IMPORT, "there are no weights for 3 layers"),
    ("a name on the hub", None, "import nobody/nothing out", "nothing is no folder, and the hub has no such model"),
    ("a name that is none", None, "import a/b/c/d out", "there is no folder a/b/c/d"),
    ("a file", None, "import vanilla.pt out", "there is no folder vanilla.pt"),
    ("export of V2", None, "export v2.pt out", "has no class for the attention v2; .*python -m bench.harness"),
    ("export of shared keys", lambda home: save_model(home / "v1.pt", tiny_model("v1", vocab_size=320, n_kv_layers=2)),
     EXPORT, "no class for layers that share keys and values"),
    ("export of heads that transformers refuses",
     lambda home: save_model(home / "v1.pt", tiny_model("vanilla", "grouped", vocab_size=320)), EXPORT, "multiple"),
    ("export of nothing", None, "export nosuch.pt out", "there is no checkpoint nosuch.pt"),
    ("export of text", write("bad.pt", "text"), "export bad.pt out", "bad.pt is damaged, or not a checkpoint"),
    ("export without its tokenizer", None, "export lost.pt out", "cannot read .*tokenizer-01234567.json: No such file"),
    ("export onto files", None, "export v1.pt hf", "hf exists already, and nothing there is overwritten; name another"),
    ("export onto a file", None, "export v1.pt vanilla.pt", "vanilla.pt exists already, and nothing there is"),
    ("export into a file", None, "export v1.pt vanilla.pt/out", "vanilla.pt"),
    ("export into a new folder that fails", None, "export v2.pt out/hf", "has no class for the attention v2"),
    ("diff of V1", None, "diff v1.pt out", "the model in v1.pt has the attention v1; only vanilla becomes DIFF V2"),
    ("diff of V2", None, "diff v2.pt out", "the model in v2.pt has the attention v2; only vanilla becomes DIFF V2"),
    ("diff without its tokenizer", None, "diff lost.pt out", "cannot read .*tokenizer-01234567.json: No such file"),
    ("diff onto a file", None, "diff vanilla.pt v1.pt", "cannot write to v1.pt: File exists"),
    ("no command", None, "import", "the following arguments are required: source, folder"),
    ("unknown command", None, "reverse a b", "invalid choice: 'reverse'"),
]  # fmt: skip


def refusal(command, capsys):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_script(lambda: run(*command.split()))
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("setup, command, message", [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input(home, tmp_path, monkeypatch, capsys, setup, command, message):
    """And nothing is written."""
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if setup:
        setup(Path())
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    line = refusal(command, capsys)
    assert re.search(message, line), line
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()} == before
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "command, package", [("import hf", "safetensors"), ("import hf", "tokenizers"), ("export v1.pt", "safetensors")]
)
def test_without_a_package(home, tmp_path, monkeypatch, capsys, command, package):
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "home"))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    line = refusal(f"{command} out", capsys)
    assert re.search("needs two packages: pip install safetensors tokenizers", line), line
    assert not Path("out").exists()


KEYS = [*convert.FIELDS.values(), *convert.ALLOWED, "model_type", "rope_parameters", "architectures", "dtype"]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text(max_size=3), st.just(2**70))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=2))
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES | st.just(...), min_size=1, max_size=3)


@given(changes=CHANGES.filter(lambda changes: changes.get("num_hidden_layers") != 2**70))  # it would take for ever
@examples(30)
def test_any_config_is_imported_or_refused(home, changes):
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as line,
    ):
        folder = Path(shutil.copytree(home / "hf", Path(folder) / "hf"))
        edit(folder, **changes)
        try:
            run_script(lambda: run("import", folder, folder / "out"))
        except SystemExit as exit:
            assert exit.code == 2 and len(line.getvalue().splitlines()) == 1 and not (folder / "out").exists()
        else:
            assert load(folder / "out")[0](IDX[:, :1])[0].isfinite().all()


# ------------------------------------------------------------------------------------- SmolLM2

QUESTIONS = ["What is the capital of France?", "Write one sentence about the sea.", "What is 2 + 2?"]
QUESTIONS += ["Name a color.", "  Why is the sky blue?\n"]


@pytest.mark.skipif("LDIFF_SMOLLM2" not in os.environ, reason="LDIFF_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
def test_smollm2(tmp_path, capsys):
    """Its logits, and its answers token by token, also as DIFF V2."""
    source = os.environ["LDIFF_SMOLLM2"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    run("import", source, tmp_path / "plain")
    assert "You are a helpful AI assistant named SmolLM, trained by Hugging Face" in capsys.readouterr().out
    run("diff", tmp_path / "plain" / "best.pt", tmp_path / "v2")
    for name in ("plain", "v2"):
        model, encoding = load(tmp_path / name)
        for question in QUESTIONS:
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            idx = torch.tensor([prompt])
            assert relative_error(logits(model, idx), logits(theirs, idx)) < 1e-5
            ids = theirs.generate(idx, max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
            ours = model.generate(idx, 20, temperature=0, n_vocab=encoding.n_vocab)[0, len(prompt) :].tolist()
            assert ours[: len(ids)] == ids
            if question == question.strip():
                assert render_prompt([("system", "Be brief."), ("user", question)], encoding) == prompt
