"""Talk to a model: let it answer in a chat, or continue a text.

python sample.py                          # the furthest model in out/: chats if it was tuned to, writes text if not
python sample.py --prompt "The parser"    # continue a text
python sample.py --chat                   # a conversation; an empty line or Ctrl-D ends it
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import parallel
from data import UserError, run_script
from data.chat import render_prompt
from data.tokenizer import END_OF_TEXT, IM_END, IM_START, get_tokenizer
from model import ATTENTION_IMPLS, GPT, Decoder
from train import check_kernel, choose_device, flag, load_checkpoint, load_weights, parse_flags, saved_config

STAGES = ("dpo", "sft", "pretrain")  # the furthest first
ENDS = (END_OF_TEXT, IM_START, IM_END)


@dataclass
class Settings:
    """What to say, to which model, and how it chooses its words."""

    prompt: str = flag("", "text to continue; with --chat, the first message")
    chat: bool = flag(False, "have a conversation; without --prompt, a model tuned to chat does so anyway")
    init_from: str = flag("", "checkpoint of the model; else the furthest best.pt of out/dpo, out/sft, out/pretrain")
    max_new_tokens: int = flag(256, "length of an answer, at most", least=1)
    temperature: float = flag(0.8, "0: always the likeliest token", least=0)
    top_k: int = flag(50, "choose among the k likeliest tokens; 0: among all", least=0)
    top_p: float = flag(1.0, "and among the likeliest whose probabilities sum to p", least=1e-6, most=1.0)
    seed: int = flag(1, "of the random choices", least=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    attn_impl: str = flag("auto", "attention kernel", choices=ATTENTION_IMPLS)
    compile: bool = flag(False, "compile the model first, which takes a while; then text comes faster")


def furthest_checkpoint():
    for stage in STAGES:
        if (path := Path("out") / stage / "best.pt").exists():
            return path
    raise UserError("there is no model in out/ yet; python train.py makes one, or name a checkpoint with --init_from")


class Speaker:
    """A model that is ready to produce text."""

    def __init__(self, settings):
        self.settings, self.device = settings, choose_device(settings.device)
        check_kernel(settings.attn_impl, self.device)
        path = settings.init_from or furthest_checkpoint()
        checkpoint = load_checkpoint(path)
        self.stage, self.config = checkpoint["stage"], saved_config(checkpoint, settings.attn_impl)
        self.encoding = get_tokenizer(checkpoint["data"].get("tokenizer"))
        self.ends = {self.encoding.encode_single_token(name) for name in ENDS}
        model = load_weights(GPT(self.config), checkpoint).to(self.device).freeze()
        options = dict(
            temperature=settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p if settings.top_p < 1 else None,
        )
        self.decoder = Decoder(
            model, 1, self.config.block_size, settings.compile, n_vocab=self.encoding.n_vocab, **options
        )
        self.about = f"model: {path}, {self.config.attn} after {self.stage}, step {checkpoint['step']}"

    def tokens(self, prompt, limit):
        """Yield at most `limit` ids with which the model continues a list of ids, up to an end token."""
        for token in self.decoder.stream(torch.tensor([prompt], device=self.device), limit):
            number = token.item()
            if number in self.ends:
                return
            yield number

    def say(self, prompt, limit):
        """Print the continuation of a list of ids while it comes; return its text."""
        said = []
        for piece in decode(self.tokens(prompt, limit), self.encoding):
            print(piece, end="", flush=True)
            said.append(piece)
        print()
        return "".join(said)

    def complete(self, text):
        """Continue a text from its beginning, which a document's end comes before."""
        prompt = [self.encoding.encode_single_token(END_OF_TEXT), *self.encoding.encode_ordinary(text)]
        if len(prompt) - 1 > self.config.block_size:
            raise UserError(f"the prompt's {len(prompt) - 1} tokens exceed the context of {self.config.block_size}")
        print(self.about, file=sys.stderr)
        print(text, end="", flush=True)
        self.say(prompt, self.settings.max_new_tokens)

    def answer(self, messages):
        """Print the answer to a conversation, [(role, text), ...], and add it. Of a long one, the oldest messages are
        forgotten, to leave a quarter of the context free; raises UserError if the last alone does not fit."""
        context = self.config.block_size
        if (alone := len(render_prompt(messages[-1:], self.encoding))) >= context:
            raise UserError(f"the message is too long: with its frame {alone} tokens, and the context has {context}")
        kept = len(messages)
        while len(prompt := render_prompt(messages, self.encoding)) > 0.75 * context and len(messages) > 1:
            del messages[:2]
        if len(messages) < kept:
            print(f"(the {kept - len(messages)} oldest messages no longer fit and are forgotten)", file=sys.stderr)
        limit = min(self.settings.max_new_tokens, context - len(prompt))
        messages.append(("assistant", self.say(prompt, limit)))


def decode(tokens, encoding):
    """Yield the text of a stream of ids. A character whose bytes are spread over tokens comes out when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def chat(speaker, message):
    """Answer `message`, if there is one, and then what is typed."""
    print(f"{speaker.about}\nan empty line or Ctrl-D ends the conversation", file=sys.stderr)
    messages = []
    while message := message or read_message():
        messages.append(("user", message))
        try:
            speaker.answer(messages)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
        message = ""


def read_message():
    try:
        return input("> ").strip()
    except (EOFError, RuntimeError):  # the latter where there is no stdin
        print()
        return ""


def main():
    parallel.refuse_several()
    settings = Settings(**parse_flags(Settings, __doc__, {}))
    speaker = Speaker(settings)
    torch.manual_seed(settings.seed)
    tuned = speaker.stage != "pretrain"
    if settings.chat and not tuned:
        raise UserError("this model has not learned to chat; python sft.py teaches it, and --prompt continues a text")
    if settings.chat or (tuned and not settings.prompt):
        chat(speaker, settings.prompt)
    else:
        speaker.complete(settings.prompt)


if __name__ == "__main__":
    # A character that the terminal's encoding lacks is no reason to fail.
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):  # one that is closed is None
        stream.reconfigure(errors="replace")
    run_script(main)
