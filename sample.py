"""Talk to a model: let it answer in a chat, or continue a text.

python sample.py                          # the furthest model in out/: chats if it was tuned to, writes text if not
python sample.py --prompt "The parser"    # continue a text
python sample.py --chat                   # a conversation; Ctrl-D or /exit ends it
"""

import codecs
import contextlib
import itertools
import sys
from dataclasses import dataclass

from engine.settings import UserError, flag, parse_flags, run_script  # before torch, for Ctrl-C; isort: skip
import torch

from data.chat import render_prompt
from data.tokenizer import END_OF_TEXT, IM_END, IM_START
from engine import parallel
from engine.attention import ATTENTION_IMPLS, check_impl
from engine.checkpoint import build_loaded, find_furthest, load_checkpoint
from engine.device import choose_device
from engine.generate import Decoder, prepare_for_inference
from engine.terminal import discard_input, printable, read_message
from model import GPT
from sft import load_config

ENDS = (END_OF_TEXT, IM_START, IM_END)
WELCOME = "Ctrl-D or /exit ends the conversation, /reset begins another, Ctrl-C stops an answer"


@dataclass
class Settings:
    """What to continue or answer, with which model, and how to sample."""

    prompt: str = flag("", "text to continue; with --chat, the first message")
    chat: bool = flag(False, "have a conversation; without --prompt, a model tuned to chat does so anyway")
    system: str = flag("", "what the model is told before a conversation, such as how to answer")
    init_from: str = flag("", "checkpoint of the model; else the furthest best.pt of out/dpo, out/sft, out/pretrain")
    max_new_tokens: int = flag(256, "length of an answer, at most", minimum=1)
    temperature: float = flag(0.8, "0: always the likeliest token", minimum=0)
    top_k: int = flag(50, "sample among the k likeliest tokens; 0: among all", minimum=0)
    top_p: float = flag(1.0, "of those, among the likeliest whose probabilities sum to p", minimum=1e-6, maximum=1.0)
    seed: int = flag(1, "of the sampling", minimum=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    attn_impl: str = flag("auto", "attention kernel", choices=ATTENTION_IMPLS)
    compile: bool = flag(False, "compile the model first, which takes a while; then text comes faster")


def load_model(path, device, attn_impl="auto"):
    """Load the model of a checkpoint for inference -> the model, its tokenizer, the checkpoint."""
    checkpoint = load_checkpoint(path)
    config, encoding = load_config(checkpoint, attn_impl)
    model = parallel.build_on_device(lambda: build_loaded(lambda: GPT(config), checkpoint), device)
    return prepare_for_inference(model), encoding, checkpoint


class Generator:
    """A model and its tokenizer, ready to print text."""

    def __init__(self, settings):
        self.settings, self.device = settings, choose_device(settings.device)
        check_impl(settings.attn_impl, self.device)
        path = settings.init_from or find_furthest()
        model, self.encoding, checkpoint = load_model(path, self.device, settings.attn_impl)
        self.stage, self.block_size = checkpoint["stage"], model.config.block_size
        self.ends = {self.encoding.encode_single_token(name) for name in ENDS}
        options = dict(temperature=settings.temperature, top_k=settings.top_k or None, n_vocab=self.encoding.n_vocab)
        options["top_p"] = settings.top_p if settings.top_p < 1 else None
        if settings.compile:
            print("compiling: about a minute before the first text", file=sys.stderr)
        self.decoder = Decoder(model, 1, self.block_size, settings.compile, **options)
        learned = f" after {self.stage}, step {checkpoint['step']}" if checkpoint["step"] else ", untrained or imported"
        self.about = f"model: {path}, {model.config.attn}{learned}"

    def continuation(self, prompt, max_new_tokens):
        """Continue a list of ids up to an end token. Yields the text, piece by piece."""
        idx = torch.tensor([prompt], device=self.device)
        ids = (token.item() for token in self.decoder.stream(idx, max_new_tokens))
        return decode(itertools.takewhile(lambda token: token not in self.ends, ids), self.encoding)

    def complete(self, text):
        """Continue a text, which begins a document: the end of the one before comes first."""
        prompt = [self.encoding.encode_single_token(END_OF_TEXT), *self.encoding.encode_ordinary(text)]
        if len(prompt) - 1 > self.block_size:
            raise UserError(f"the prompt's {len(prompt) - 1} tokens exceed the context of {self.block_size}")
        print(self.about, file=sys.stderr)
        for piece in itertools.chain([text], self.continuation(prompt, self.settings.max_new_tokens), "\n"):
            print(printable(piece), end="", flush=True)

    def answer(self, messages):
        """Print the answer to a conversation, [(role, text), ...], and append it.

        The oldest messages of a long conversation are forgotten, so that an answer or a quarter of the context stays
        free. Raises UserError if the last message alone does not fit.
        """
        context, first = self.block_size, int(messages[0][0] == "system")  # the system text is not forgotten
        if (length := len(render_prompt(messages[:first] + messages[-1:], self.encoding))) >= context:
            raise UserError(f"the message is too long: with its frame {length} tokens, and the context has {context}")
        count, limit = len(messages), context - min(self.settings.max_new_tokens, context // 4)
        while len(prompt := render_prompt(messages, self.encoding)) > limit and len(messages) > first + 1:
            del messages[first : first + 2]
        if forgotten := count - len(messages):
            why = f"the context of {context} tokens has no room for them and an answer"
            print(f"(the {forgotten} oldest messages are forgotten: {why})", file=sys.stderr)
        pieces = []
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C stops the answer, not the conversation
            for piece in self.continuation(prompt, min(self.settings.max_new_tokens, context - len(prompt))):
                pieces.append(piece)
                print(printable(piece), end="", flush=True)
        print()
        messages.append(("assistant", "".join(pieces)))

    def chat(self, message):
        """Answer `message`, if there is one, and then what is typed."""
        print(f"{self.about}\n{WELCOME}", file=sys.stderr)
        beginning = [("system", self.settings.system)] if self.settings.system else []
        messages, interrupted = list(beginning), False
        while message is not None and message != "/exit":
            if message == "/reset":
                messages = list(beginning)
            elif message:
                messages.append(("user", message))
                try:
                    self.answer(messages)
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
                    messages.pop()
            try:
                message, interrupted = read_message(), False
            except KeyboardInterrupt:  # what is being typed is dropped
                if interrupted:
                    raise
                print("\n(Ctrl-C once more ends the conversation)", file=sys.stderr)
                message, interrupted = "", True


def decode(tokens, encoding):
    """Yield the text of a stream of ids. A character whose bytes are spread over tokens comes out when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def main():
    parallel.refuse_torchrun()
    settings = Settings(**parse_flags(Settings, __doc__))
    generator = Generator(settings)
    torch.manual_seed(settings.seed)
    tuned = generator.stage != "pretrain"
    if settings.chat and not tuned:
        raise UserError("this model has not learned to chat; python sft.py teaches it, and --prompt continues a text")
    if settings.chat or (tuned and not settings.prompt):
        try:
            generator.chat(settings.prompt)
        finally:
            discard_input()
    elif settings.system:
        raise UserError("--system is for a conversation, which this is not; --chat begins one")
    else:
        generator.complete(settings.prompt)


if __name__ == "__main__":
    run_script(main)
