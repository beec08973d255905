"""Direct preference optimization (DPO, arXiv 2305.18290) with LoRA: teach a tuned model which answers people prefer.

python dpo.py                                    # from out/sft/best.pt, on the data that fits its tokenizer
python dpo.py --dataset mine --source my.jsonl   # your own pairs; docs/data.md shows their form
python dpo.py --resume                           # go on after an interruption

Read sft.py first: DPO is the same tuning, on pairs of answers and with another loss.
"""

from dataclasses import dataclass

from engine.settings import flag, parse_flags, run_script  # before torch, for Ctrl-C; isort: skip
import torch
import torch.nn.functional as F

import sft
from engine import parallel
from engine.checkpoint import Checkpointer, run_folder
from engine.device import oom_advice
from engine.log import Log, describe, summarize
from lora import disable_lora
from train import fit, make_optimizer


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
    label_smoothing=0.0,
):
    """Compute every pair's loss and implicit rewards (arXiv 2305.18290, equation 7).

        reward(answer) = beta * (log p_policy(answer) - log p_reference(answer))
        loss = -log sigmoid(reward(chosen) - reward(rejected))

    All arguments and results are (B,), one number a pair; log-probabilities are sums over the answer's tokens.
    label_smoothing is the probability that a pair is labelled the wrong way round (conservative DPO). The rewards are
    for the log and carry no gradient. -> losses, chosen_rewards, rejected_rewards
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


@dataclass
class Settings(sft.TuningSettings):
    """DPO. The defaults are the preset ldiff."""

    dataset: str = flag("orca_dpo_pairs", "folder in data/, or a path with a slash")
    out_dir: str = flag("out/dpo", "where checkpoints and log.csv go")
    init_from: str = flag("out/sft/best.pt", "checkpoint of the model to tune, also the reference", fixed=True)
    max_steps: int = flag(625, "optimizer steps", minimum=1)
    batch_size: int = flag(16, "pairs a step", minimum=1, fixed=True)
    micro_batch_size: int = flag(16, "pairs in memory at once; gradients of several add up", minimum=1)
    learning_rate: float = flag(5e-6, "peak", minimum=0)
    beta: float = flag(0.1, "how strongly the model is held to the reference", minimum=0, fixed=True)
    label_smoothing: float = flag(0.0, "share of pairs with wrong labels", minimum=0, maximum=0.49, fixed=True)


PRESETS = {
    "ldiff": {},
    "tiny": dict(dataset="tiny", max_steps=150, learning_rate=5e-4, warmup_steps=20, eval_interval=50),
    "1b": dict(micro_batch_size=4),
    "10b": dict(micro_batch_size=1, activation_checkpointing=True),
}


class DPO(sft.SFT):
    """LoRA tuning on pairs of answers to the same prompt, of which one is preferred.

    The policy is the model with its adapters, the reference the same model with them switched off: the weights are in
    memory once.
    """

    stage, unit = "dpo", "pairs"
    metrics = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
    rows_per_example = 2

    def loss(self, idx, positions, targets, per_token, per_example):
        """Return a micro-batch's share of the mean loss and metrics over pairs.

        idx (2 * pairs, T) has the chosen answers with their prompts, then the rejected ones: one forward pass for both.
        """
        with torch.no_grad(), disable_lora(self.model):
            reference = self.logps(idx, positions, targets).sum(dim=-1)  # (2 * pairs,)
        policy = self.logps(idx, positions, targets).sum(dim=-1)
        chosen, rejected = policy.chunk(2)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, *reference.chunk(2), self.settings.beta, self.settings.label_smoothing
        )
        margins = chosen_rewards - rejected_rewards
        values = {
            "loss": losses, "accuracy": (margins > 0).float(), "margin": margins,
            "chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
            "chosen_logp": chosen, "rejected_logp": rejected,
        }  # fmt: skip
        return {name: value.sum() * per_example for name, value in values.items()}


def main():
    given = parse_flags(Settings, __doc__, tiny=PRESETS["tiny"])
    with parallel.process_group(), run_folder(given.get("out_dir", Settings.out_dir), given.get("resume")) as resume:
        settings, checkpoint = sft.choose_settings(given | {"resume": resume}, Settings, PRESETS, DPO.stage)
        task = DPO(settings, checkpoint)
        optimizer = make_optimizer(task.model, weight_decay=0.0)
        checkpointer = Checkpointer(task, optimizer)
        checkpointer.start(checkpoint)
        log = Log(task)
        describe(task)
        with oom_advice(settings):
            fit(task, optimizer, checkpointer, log)
        summarize(task, checkpointer, log)


if __name__ == "__main__":
    run_script(main)
