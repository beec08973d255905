"""Scores of any checkpoint in the tasks of lm_eval, EleutherAI's Language Model Evaluation Harness.

python -m bench.harness out/pretrain/best.pt --tasks lambada_openai hellaswag
python -m bench.harness out/dpo/best.pt --tasks my_task.yaml --limit 100

`lm-eval ls tasks` lists the tasks, whose data come from the hub. A task of your own is a YAML file, and its data can be
local files (dataset_path: json). The scores are those of lm_eval's backend `hf` for the model that convert.py exports,
but <|endoftext|> in a text stays text. Models tuned to chat get the task's text as it is, without a chat template.
"""

import itertools
import json
from collections import defaultdict
from pathlib import Path

from engine.settings import Parser, UserError, fail, run_script  # before torch, for Ctrl-C; isort: skip
import torch
from torch.nn.utils.rnn import pad_sequence

from bench import environment, positive_int
from data.tokenizer import CONTROL_TOKENS, END_OF_TEXT, IM_END
from engine import parallel
from engine.device import choose_device
from engine.generate import Decoder
from sample import load_model

try:
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
    from tqdm import tqdm  # which, like yaml, comes with lm_eval
except ImportError:
    fail("the tasks of lm_eval need it: pip install -r requirements-dev.txt")

MAX_GEN_TOKS, TOP_K = 256, 50  # of tasks that do not say, as in the backend hf
OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class CheckpointLM(TemplateLM):
    """The model and tokenizer of a checkpoint, as lm_eval asks for them."""

    def __init__(self, path, batch_size, device):
        super().__init__()
        self.model, self.encoding, checkpoint = load_model(path, device)
        self.max_length, self.batch_size, self._device = self.model.config.block_size, batch_size, device
        ends = [END_OF_TEXT] if checkpoint["stage"] == "pretrain" else [IM_END, END_OF_TEXT]  # as convert.py exports it
        self.ends = [self.encoding.encode_single_token(name) for name in ends]
        self.control = {self.encoding.encode_single_token(name) for name in CONTROL_TOKENS}

    @property
    def eot_token_id(self):
        """The id that stands before a text without context, too."""
        return self.encoding.encode_single_token(END_OF_TEXT)

    def tok_encode(self, string, add_special_tokens=None):
        return self.encoding.encode_ordinary(string)

    def decode(self, ids):
        return self.encoding.decode([token for token in ids if token not in self.control], errors="replace")

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """Score continuations: [(texts, context, continuation), ...] -> [(log-probability, is_greedy), ...].

        Contexts and continuations are lists of ids. A long context loses its beginning. A log-probability is a sum over
        tokens, in nats; is_greedy says whether each is the likeliest. Raises UserError if a continuation is too long.
        """
        rows, scores = [], [None] * len(requests)
        for index, (_, context, continuation) in enumerate(requests):
            if (count := len(continuation)) > self.max_length:
                raise UserError(f"the task scores {count} tokens at once, and the context has {self.max_length}")
            context = context or [self.prefix_token_id]  # lm_eval leaves nothing of a context of blanks
            rows.append((index, (context + continuation)[-self.max_length - 1 : -1], continuation))
        rows.sort(key=lambda row: len(row[1]), reverse=True)  # little padding, and the most memory at first
        for batch in tqdm(split(rows, self.batch_size), "loglikelihood", disable=disable_tqdm):
            # Attention is causal, so that padding on the right needs no mask.
            idx = pad_sequence([torch.tensor(ids) for _, ids, _ in batch], batch_first=True).to(self.device)
            for (index, ids, continuation), hidden in zip(batch, self.model.hidden(idx)):
                targets = torch.tensor(continuation, dtype=torch.int64, device=self.device)
                # One text at a time: logits take more memory than all else. The padded vocabulary is part of them.
                logits = self.model.lm_head(hidden[len(ids) - len(targets) : len(ids)]).float()
                logps = logits.log_softmax(-1).gather(-1, targets[:, None])
                scores[index] = logps.sum().item(), torch.equal(logits.argmax(-1), targets)
        return scores

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Score whole texts, each after <|endoftext|> -> their log-probabilities in nats."""
        shape = dict(prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
        texts = [get_rolling_token_windows(self.tok_encode(*request.args), **shape) for request in requests]
        windows = [[(None, *make_disjoint_window(window)) for window in text] for text in texts]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*windows)), disable_tqdm))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests, disable_tqdm=False):
        """Continue prompts up to a stop string, an end token or max_gen_toks -> the texts before the stop strings.

        A long prompt loses its beginning. Raises UserError if max_gen_toks leave no room for a prompt, or for options
        that Decoder does not have.
        """
        groups, texts = defaultdict(list), [None] * len(requests)
        for index, (context, options) in enumerate(request.args for request in requests):
            options = normalize_gen_kwargs(options, MAX_GEN_TOKS)
            if unknown := ", ".join(options.keys() - OPTIONS):
                raise UserError(f"the task generates with {unknown}, which this cannot; it can {', '.join(OPTIONS)}")
            count = options["max_gen_toks"]
            if (room := self.max_length - count) < 1:
                raise UserError(f"the task generates {count} tokens, and the context has {self.max_length}")
            prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            groups[str(options), len(prompt)].append((index, prompt, options))  # whose prompts can share a batch
        batches = [batch for group in groups.values() for batch in split(group, self.batch_size)]
        for batch in tqdm(batches, "generate_until", disable=disable_tqdm):
            indices, prompts, (options, *_) = zip(*batch)
            for index, text in zip(indices, self.continue_prompts(prompts, options)):
                texts[index] = text
        return texts

    def continue_prompts(self, prompts, options):
        """Continue prompts, lists of ids of one length -> the texts that come after them."""
        idx, count = torch.tensor(prompts, device=self.device), options["max_gen_toks"]
        sampling = dict(temperature=options.get("temperature", 0.0), top_p=options.get("top_p"))
        sampling["top_k"] = options.get("top_k", TOP_K) or None
        decoder = Decoder(self.model, len(idx), idx.size(1) + count, n_vocab=self.encoding.n_vocab, **sampling)
        until = handle_stop_sequences(options["until"], eos=self.encoding.decode(self.ends[:1]))
        tail = 4 * max(map(len, until)) + 1  # tokens that surely hold a stop string which ends in the last of them
        answers, running = [[] for _ in prompts], set(range(len(prompts)))
        for column in decoder.stream(idx, count):
            for row, token in enumerate(column.flatten().tolist()):
                if row in running:
                    answers[row].append(token)
                    text = self.decode(answers[row][-tail:])
                    if token in self.ends or any(stop in text for stop in until):
                        running.remove(row)
            if not running:
                break
        return [postprocess_generated_text(self.decode(answer), until, think_end_token=None) for answer in answers]


def split(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def main():
    parallel.refuse_torchrun()
    parser = Parser(__doc__, prog="python -m bench.harness")
    parser.add_argument("checkpoint", help="for example out/pretrain/best.pt")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of lm_eval's tasks, or YAML files")
    parser.add_argument("--include_path", help="folder with YAML files of more tasks, which can then be named")
    parser.add_argument("--num_fewshot", type=int, help="examples in a prompt (default: as the task says)")
    parser.add_argument("--limit", type=positive_int, help="examples of each task, at most (default: all)")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="sequences (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", default="out/bench", help="folder of the JSON file (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.num_fewshot or 0) < 0:
        raise UserError(f"--num_fewshot {arguments.num_fewshot} is less than 0")
    device = choose_device(arguments.device)
    lm = CheckpointLM(arguments.checkpoint, arguments.batch_size, device)
    manager = TaskManager(include_path=arguments.include_path)
    if unknown := [name for name in arguments.tasks if name not in manager.all_tasks and not Path(name).is_file()]:
        raise UserError(f"lm_eval has no task {unknown[0]}, nor is it a file; `lm-eval ls tasks` lists the tasks")
    chosen = {name: getattr(arguments, name) for name in ("tasks", "num_fewshot", "limit", "batch_size", "device")}
    try:
        results = simple_evaluate(lm, **chosen, task_manager=manager, log_samples=False)
    except yaml.YAMLError as error:
        raise UserError(f"a task's file is no YAML: {error}") from error
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    del results["pretty_env_info"]  # pages about the machine
    name = Path(arguments.checkpoint).with_suffix("").as_posix().strip("/").replace("/", "-")
    path = Path(arguments.out) / f"harness-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment(device) | results, indent=1, default=handle_non_serializable) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    run_script(main)
