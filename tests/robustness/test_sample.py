"""sample.py: what it prints, for which model, and when it stops."""

import io

import pytest
import torch
from small import save_model

import sample
from data.tokenizer import END_OF_TEXT, IM_END, get_tokenizer
from engine.generate import Decoder
from engine.settings import UserError
from model import GPT, GPTConfig

BYTES = get_tokenizer("bytes")
SHAPE = dict(block_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, head_dim=8, n_inner=16, vocab_size=320)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with out/pretrain and out/sft, in which sample.py runs."""
    monkeypatch.chdir(tmp_path)
    for stage in ("pretrain", "sft"):
        torch.manual_seed(0)
        (tmp_path / "out" / stage).mkdir(parents=True)
        save_model(tmp_path / "out" / stage / "best.pt", GPT(GPTConfig(**SHAPE)), stage=stage)
    return tmp_path


@pytest.fixture
def say(home, monkeypatch, capsys):
    """Calls sample.py with these flags, and this typed in -> what it prints on stdout and stderr, and the prompts.

    `says` are the ids that stand in for the model's.
    """

    def call(*flags, typed="", says=None):
        prompts = []

        def stream(decoder, idx, limit):
            prompts.append(BYTES.decode(idx[0].tolist()))
            yield from (torch.tensor([[token]]) for token in says[:limit])

        if says is not None:
            monkeypatch.setattr(Decoder, "stream", stream)
        monkeypatch.setattr("sys.argv", ["sample.py", "--device", "cpu", *map(str, flags)])
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        sample.main()
        output = capsys.readouterr()
        return output.out, output.err, prompts

    return call


def ids(text, *ends):
    return [*text.encode(), *(BYTES.encode_single_token(end) for end in ends), *b" and this is not said"]


def test_continues_a_text(say):
    out, err, prompts = say("--prompt", "Once", "--max_new_tokens", 5, says=ids(" upon a time"))
    assert out == "Once upon\n" and prompts == [f"{END_OF_TEXT}Once"]
    assert "model: out/sft/best.pt, v2 after sft, step 7" in err


def test_a_prompt_may_fill_the_context(say):
    assert say("--prompt", "a" * 64, "--max_new_tokens", 3, "--temperature", 0)[0].startswith("a" * 64)


def test_without_a_prompt_a_pretrained_model_writes(say):
    out, _, prompts = say("--init_from", "out/pretrain/best.pt", says=ids("Text.", END_OF_TEXT))
    assert out == "Text.\n" and prompts == [END_OF_TEXT]


def test_has_a_conversation(say):
    out, err, prompts = say(typed="Hi\n\nBye\n/exit\nnot this", says=ids("Hey", IM_END))
    assert out == "> Hey\n> > Hey\n> "  # a blank line does not end it
    first = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [first, f"{first}Hey<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"[-500:]]
    assert "Ctrl-D or /exit ends the conversation" in err


def test_reset_begins_another_conversation(say):
    _, _, prompts = say("--system", "Be kind.", typed="Hi\n/reset\nHi\n", says=ids("Hey", IM_END))
    assert len(prompts) == 2 and prompts[0] == prompts[1]


@pytest.mark.parametrize("system", ["Be kind.", "字", "a\nb", IM_END])
def test_a_system_text_comes_first(say, system):
    _, _, prompts = say("--system", system, typed="Hi\n", says=ids("Hey", IM_END))
    user = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [f"<|im_start|>system\n{system}<|im_end|>\n{user}"]


def test_a_system_text_is_not_forgotten(say):
    _, err, prompts = say("--system", "S", typed="aa\nbb\ncc\n", says=ids("x" * 9, IM_END))
    assert all(prompt.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n") for prompt in prompts)
    assert len(prompts) == 3 and "aa" not in prompts[2] and "cc" in prompts[2] and "forgotten" in err


@pytest.mark.parametrize("flags", [["--prompt", "a"], ["--init_from", "out/pretrain/best.pt"]])
def test_a_system_text_needs_a_conversation(say, flags):
    with pytest.raises(UserError, match="--system is for a conversation"):
        say("--system", "Be kind.", *flags)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ctrl_c_stops_the_answer_alone(home, say, count, monkeypatch):
    """What was said of it stays in the conversation."""
    prompts = []

    def stream(decoder, idx, limit):
        prompts.append(BYTES.decode(idx[0].tolist()))
        yield from (torch.tensor([[token]]) for token in b"abcdef"[:count])
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "stream", stream)
    out, _, _ = say(typed="Hi\nGo\n")
    assert out == f"> {'abc'[:count]}\n> {'abc'[:count]}\n> \n"
    assert f"assistant\n{'abc'[:count]}<|im_end|>\n" in prompts[1] and "Hi" in prompts[1]


def test_ctrl_c_ends_a_completion(say, monkeypatch):
    def stream(decoder, idx, limit):
        yield torch.tensor([[97]])
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "stream", stream)
    with pytest.raises(KeyboardInterrupt):
        say("--prompt", "a")


@pytest.mark.parametrize("typed, ends", [("^^", True), ("^a^^", True), ("^a^b", False), ("a^b^", False)])
def test_ctrl_c_at_the_prompt_keeps_the_conversation(say, typed, ends, monkeypatch):
    """Only twice in a row does it end; ^ is Ctrl-C here."""
    keys = iter(typed)

    def read(prompt=""):
        if (key := next(keys, None)) is None:
            raise EOFError
        if key == "^":
            raise KeyboardInterrupt
        return key

    monkeypatch.setattr("builtins.input", read)
    if ends:
        with pytest.raises(KeyboardInterrupt):
            say(says=ids("Hey", IM_END))
    else:
        prompts = say(says=ids("Hey", IM_END))[2]
        assert len(prompts) == 2 and "\na<|im_end|>" in prompts[1] and "\nb<|im_end|>" in prompts[1]


def test_a_message_keeps_its_indentation(say, monkeypatch):
    prompts = say(typed="    return a  \n", says=ids("Hey", IM_END))[2]
    assert "user\n    return a<|im_end|>" in prompts[0]


@pytest.mark.parametrize("flags, typed", [(["--prompt", "a\x07"], ""), (["--chat"], "Hi\n")])
def test_control_characters_are_not_sent(say, flags, typed):
    out, _, _ = say(*flags, typed=typed, says=ids("x\x1b[2J\x08\ty\n\x7f", END_OF_TEXT))
    assert "x\\x1b[2J\\x08\ty\n\\x7f\n" in out and not set(out) & {"\x1b", "\x08", "\x7f", "\x07"}


def test_first_message_from_the_command_line(say):
    out, _, prompts = say("--chat", "--prompt", "Hi", says=ids("Hey", IM_END))
    assert out == "Hey\n> \n" and len(prompts) == 1


def test_a_long_conversation_forgets_its_beginning(say):
    _, err, prompts = say(typed="aaaa\nbbbb\ncccc\n", says=ids("x" * 9, IM_END))
    frames = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("aaaa", "bbbb", "cccc")]
    assert prompts == frames
    assert err.count("(the 2 oldest messages are forgotten: the context of 64 tokens has no room for them and an") == 2


def test_nothing_is_forgotten_while_the_answer_has_room(say):
    _, err, prompts = say("--max_new_tokens", 3, typed="a\nb\n", says=ids("x", IM_END))
    assert "forgotten" not in err and "user\na<|im_end|>" in prompts[1]


def test_a_message_that_does_not_fit(say):
    out, err, prompts = say(typed="a" * 60 + "\nHi\n", says=ids("Hey", IM_END))
    assert "error: the message is too long: with its frame 79 tokens, and the context has 64" in err
    assert out == "> > Hey\n> \n" and len(prompts) == 1


def test_an_answer_ends_where_the_context_does(say):
    out, _, _ = say("--chat", "--prompt", "a" * 30, "--max_new_tokens", 1000, says=ids("x" * 1000))
    assert out.count("x") == 64 - 1 - 5 - 30 - 1 - 1 - 1 - 10


@pytest.mark.parametrize("text", ["ä", "€ 5", "👩‍👩‍👧 ok", "plain"])
def test_characters_are_printed_when_they_are_whole(text):
    tokens = BYTES.encode_ordinary(text)
    pieces = list(sample.decode(tokens, BYTES))
    assert "".join(pieces) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(pieces) == len(tokens) + 1  # as it comes, not in the end
    cut = "".join(sample.decode(tokens[:-1], BYTES))
    assert cut == text[:-1] + "\N{REPLACEMENT CHARACTER}" * (len(text[-1].encode()) > 1)


def test_seed_and_temperature(say):
    first, again, other = (say("--prompt", "a", "--seed", seed)[0] for seed in (1, 1, 2))
    assert first == again != other and len(first) > 20
    assert say("--prompt", "a", "--seed", 1, "--temperature", 0) == say(
        "--prompt", "a", "--seed", 2, "--temperature", 0
    )
    assert say("--prompt", "a", "--top_k", 1)[0] == say("--prompt", "a", "--top_p", 1e-6)[0]
    assert say("--prompt", "a", "--top_k", 1)[0] == say("--prompt", "a", "--temperature", 0)[0]


def test_the_furthest_stage_speaks(home, say):
    assert "model: out/sft/best.pt" in say("--prompt", "a")[1]
    (home / "out" / "sft").rename(home / "out" / "dpo")
    assert "model: out/dpo/best.pt" in say("--prompt", "a")[1]
    (home / "out" / "dpo" / "best.pt").unlink()
    assert "model: out/pretrain/best.pt, v2 after pretrain" in say("--prompt", "a")[1]
    (home / "out" / "pretrain" / "best.pt").unlink()
    with pytest.raises(UserError, match="there is no model in out/ yet; python train.py makes one"):
        say("--prompt", "a")
