"""Bring a model in from Hugging Face's formats, take one of ours out, and make a plain Transformer a DIFF V2 model.

python convert.py import HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2   # a name on the hub, or a folder
python convert.py diff out/smollm2/best.pt out/smollm2-v2                  # DIFF V2 with the same outputs
python convert.py export out/smollm2/best.pt out/hf                        # a plain or V1 model, for transformers

A Llama becomes the plain Transformer (--attn vanilla), a DiffLlama becomes V1, and the other way round. This needs two
packages more: pip install safetensors tokenizers
"""

import shlex
from dataclasses import replace

from engine.settings import Parser, UserError, run_script  # before torch, for Ctrl-C; isort: skip
import torch

from data.chat import CHAT_TEMPLATE, default_system
from data.tokenizer import END_OF_TEXT, IM_END, IM_START, get_tokenizer
from engine import huggingface, parallel
from engine.checkpoint import BEST, build_loaded, load_checkpoint, save_model
from engine.terminal import printable
from model import GPT, GPTConfig, pad_vocab
from sft import load_config

# ---------------------------------------------------------------------------------------------------
# Configs: config.json and GPTConfig

MODEL_TYPES = {"llama": "vanilla", "mistral": "vanilla", "diffllama": "v1"}  # a Mistral without window is a Llama
CLASSES = {"vanilla": ("llama", "LlamaForCausalLM"), "v1": ("diffllama", "DiffLlamaForCausalLM")}

# Our fields -> their names in config.json
FIELDS = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_dim": "head_dim", "n_inner": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip

# Entries of config.json -> the values with which model.py computes the same. The first is assumed if there is no entry.
ALLOWED = {
    "attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",), "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None), "quantization_config": (None,),
}  # fmt: skip


def import_config(given):
    """Translate the contents of a config.json to a GPTConfig. Raises UserError if model.py cannot express it."""
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UserError(f"the model_type {kind} is not read; {', '.join(MODEL_TYPES)} are")
    window = 4096 if kind == "mistral" else None  # Mistral's, where none is given
    given = {"sliding_window": window, "tie_word_embeddings": False, "rope_theta": 10000.0, **given}
    fields = huggingface.read_fields(given, FIELDS, ALLOWED, optional=("n_kv_head", "head_dim"))
    try:  # a head_dim that is not given is the width over the heads
        return GPTConfig(attn=MODEL_TYPES[kind], **{"head_dim": fields["n_embd"] // fields["n_head"], **fields})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json cannot be used: {error}") from error


def export_config(config, end_of_text, ends):
    """Return the contents of a config.json. `ends` are the ids that end a text or an answer."""
    kind, architecture = CLASSES[config.attn]
    return {
        "architectures": [architecture], "model_type": kind, "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_bias": False,
        "bos_token_id": end_of_text, "eos_token_id": ends, "pad_token_id": end_of_text,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Weights: names, order of heads, and the norm's weight that DiffLlama does not have


def to_hf_name(name):
    """Return Llama's name of a weight: model.layers.0.self_attn.q_proj.weight for layers.0.attn.q_proj.weight."""
    for ours, theirs in ((".attn.", ".self_attn."), ("attn_norm", "input_layernorm"),
                         ("mlp_norm", "post_attention_layernorm")):  # fmt: skip
        name = name.replace(ours, theirs)
    return name if name == "lm_head.weight" else f"model.{name}"


def is_paired(name, config):
    """Return whether the rows of a weight are heads that V1 pairs: those of q, k and v."""
    return config.attn == "v1" and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))


def import_weights(theirs, config):
    """Translate {name: tensor} of a Llama or DiffLlama to the state_dict of GPT(config).

    Raises UserError if a tensor is missing, unknown, of another shape or not finite.
    """
    if config.n_layer > len(theirs):
        raise UserError(f"config.json cannot be used: there are no weights for {config.n_layer} layers")
    expected = huggingface.shapes(lambda: GPT(config))
    if config.tie_embeddings:
        theirs = huggingface.tie(theirs, "lm_head.weight", to_hf_name("embed_tokens.weight"))
    has_weight = {name: shape for name, shape in expected.items() if not name.endswith("subln.weight")}
    huggingface.check_tensors(theirs, {to_hf_name(name): shape for name, shape in has_weight.items()})
    state = {name: torch.ones(shape) for name, shape in expected.items()}  # subln's, in the end
    for name in has_weight:
        state[name] = tensor = theirs[to_hf_name(name)]
        if is_paired(name, config):  # theirs: the first heads of all pairs, a1 b1 c1 a2 b2 c2; ours: a1 a2 b1 b2 c1 c2
            state[name] = tensor.unflatten(0, (2, -1, config.head_dim)).transpose(0, 1).flatten(0, 2)
    return state


def export_weights(state, config):
    """Translate the state_dict of GPT(config) to {name: tensor} of a Llama or DiffLlama."""
    theirs = {}
    for name, tensor in state.items():
        if name.endswith("subln.weight") or (config.tie_embeddings and name == "lm_head.weight"):
            continue
        if is_paired(name, config):
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim)).transpose(0, 1).flatten(0, 2)
        if config.attn == "v1" and name.endswith("o_proj.weight"):  # its columns take in the norm's weight
            tensor = tensor * state[name.replace("o_proj", "subln")].repeat(config.n_head // 2)
        theirs[to_hf_name(name)] = tensor.contiguous()
    return theirs


def diff_weights(state, config):
    """Translate the state_dict of a plain Transformer to that of a DIFF V2 model that computes the same.

    Both maps of a head are those of the plain head, and lambda is 0: A V - sigmoid(0) A V = A V / 2, which o_proj
    doubles. Where both run the same kernel, this is exact in floating point, too.
    """
    state = dict(state)
    for attn in (f"layers.{layer}.attn" for layer in range(config.n_layer)):
        heads = state[f"{attn}.q_proj.weight"].unflatten(0, (config.n_head, config.head_dim))
        state[f"{attn}.q_proj.weight"] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
        state[f"{attn}.o_proj.weight"] = 2 * state[f"{attn}.o_proj.weight"]
        state[f"{attn}.lambda_proj.weight"] = torch.zeros(config.n_head, config.n_embd)
    return state


# ---------------------------------------------------------------------------------------------------
# The three commands


def import_model(source, folder):
    """Write the model in a Hugging Face folder, or of a name on the hub, to folder/best.pt."""
    theirs = huggingface.find_folder(source, huggingface.SMALL_FILES)  # refused files cost no gigabytes
    given, template = huggingface.read_json(theirs / "config.json"), huggingface.read_chat_template(theirs)
    config, encoding = import_config(given), get_tokenizer("tokenizer.json", theirs)
    if encoding.n_base > config.vocab_size:  # without the control tokens that it lacks, which n_vocab counts
        raise UserError(f"tokenizer.json has {encoding.n_base} tokens, and the embedding {config.vocab_size}")
    theirs = huggingface.find_folder(source, huggingface.WEIGHTS)
    state = import_weights(huggingface.read_safetensors(theirs), config)
    if encoding.n_vocab > config.vocab_size:  # no room for the control tokens: new rows, the mean of the others
        config = replace(config, vocab_size=pad_vocab(encoding.n_vocab))
        for name in ("embed_tokens.weight", "lm_head.weight"):
            rows = state[name].mean(0, keepdim=True).expand(config.vocab_size - len(state[name]), -1)
            state[name] = torch.cat((state[name], rows))
        if config.tie_embeddings:  # one tensor, as before
            state["lm_head.weight"] = state["embed_tokens.weight"]
    stage = "sft" if IM_START in template else "pretrain"  # tuned to chat in ChatML, or not
    save_model(folder, state, config, encoding, settings={}, stage=stage, step=0)
    ends = given.get("eos_token_id")
    if not {*encoding.control.values()} & {*(ends if isinstance(ends, list) else [ends])}:
        print(f"its own end token, {ends}, has no part here: {END_OF_TEXT} and {IM_END} end texts and answers")
    if system := default_system(template):
        command = f"python sample.py --init_from {folder}/{BEST} --system {shlex.quote(printable(system))}"
        print(f"its chat template begins with a system text, which is not used by default; to use it:\n{command}")


def diff_model(path, folder):
    """Write the plain Transformer in a checkpoint to folder/best.pt as DIFF V2."""
    checkpoint = load_checkpoint(path)
    config, encoding = load_config(checkpoint, "auto")
    if config.attn != "vanilla":
        raise UserError(f"the model in {path} has the attention {config.attn}; only vanilla becomes DIFF V2")
    state = diff_weights(build_loaded(lambda: GPT(config), checkpoint).state_dict(), config)
    kept = {name: checkpoint[name] for name in ("settings", "stage", "step")}
    save_model(folder, state, replace(config, attn="v2"), encoding, **kept)


def export_model(path, folder):
    """Write the model in a checkpoint to a folder that AutoModelForCausalLM and AutoTokenizer load."""
    checkpoint = load_checkpoint(path)
    config, encoding = load_config(checkpoint, "auto")
    if config.attn not in CLASSES:
        raise UserError(
            f"transformers has no class for the attention {config.attn}; sample.py talks to this model, and "
            "python -m bench.harness evaluates it"
        )
    if config.n_kv_layers < config.n_layer:
        raise UserError("transformers has no class for layers that share keys and values (n_kv_layers)")
    if config.attn == "vanilla" and config.n_embd % config.n_head:
        raise UserError(f"Llama's width is a multiple of its heads, and {config.n_embd} is not one of {config.n_head}")
    weights = export_weights(build_loaded(lambda: GPT(config), checkpoint).state_dict(), config)
    end_of_text, im_end = (encoding.encode_single_token(name) for name in (END_OF_TEXT, IM_END))
    # A tuned model ends its answers with <|im_end|>, the first of the two.
    ends = [end_of_text] if checkpoint["stage"] == "pretrain" else [im_end, end_of_text]
    bos, eos = encoding.decode([end_of_text]), encoding.decode(ends[:1])
    huggingface.write_folder(folder, weights, {
        "config.json": export_config(config, end_of_text, ends),
        "tokenizer.json": encoding.tokenizer_json(),
        "tokenizer_config.json": huggingface.tokenizer_config(bos, eos, config.block_size, CHAT_TEMPLATE),
    })  # fmt: skip
    print(f"{folder}: {CLASSES[config.attn][1]}, {config.n_layer} layers, {config.n_embd} wide")


COMMANDS = {"import": import_model, "diff": diff_model, "export": export_model}


def main():
    parallel.refuse_torchrun()
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("source", help="import: a name on the hub, or a folder; diff, export: a checkpoint")
    parser.add_argument("folder", help="where to write; for export, a new folder")
    arguments = parser.parse_args()
    COMMANDS[arguments.command](arguments.source, arguments.folder)


if __name__ == "__main__":
    run_script(main)
