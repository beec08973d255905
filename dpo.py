"""Direct preference optimization (DPO, arXiv 2305.18290) with LoRA: teach a tuned model which answers people prefer.

python dpo.py                                    # from out/sft/best.pt, on the data that fits its tokenizer
python dpo.py --dataset mine --source my.jsonl   # your own pairs; data/orca_dpo_pairs/prepare.py shows their form
python dpo.py --resume                           # go on after an interruption
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import parallel
import sft
from data import run_script
from lora import disable_lora
from train import carry_out, flag, locked, parse_flags


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
    label_smoothing=0.0,
):
    """The loss of every pair, and its implicit rewards (arXiv 2305.18290, equation 7).

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
    """DPO. The defaults are the ldiff preset."""

    dataset: str = flag("orca_dpo_pairs", "folder in data/, or a path with a slash")
    out_dir: str = flag("out/dpo", "where checkpoints and log.csv go")
    init_from: str = flag("out/sft/best.pt", "checkpoint of the model to tune, which is also the reference")
    max_steps: int = flag(625, "optimizer steps", least=1)
    batch_size: int = flag(16, "pairs a step", least=1)
    micro_batch_size: int = flag(16, "pairs in memory at once; gradients of several add up", least=1)
    learning_rate: float = flag(5e-6, "peak", least=0)
    beta: float = flag(0.1, "how strongly the model is held to the reference", least=0)
    label_smoothing: float = flag(
        0.0, "the share of pairs that may be labelled the wrong way round", least=0, most=0.49
    )


PRESETS = {
    "ldiff": {},
    "tiny": dict(dataset="tiny", max_steps=150, learning_rate=5e-4, warmup_steps=20, eval_interval=50),
    "1b": dict(micro_batch_size=4),
    "10b": dict(micro_batch_size=1, activation_checkpointing=True),
}


class DPO(sft.FineTuning):
    """The policy is the model with its adapters, the reference the same model with them switched off: the weights are
    in memory once."""

    stage = "dpo"
    unit = "pairs"
    metrics = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
    rows_per_example = 2

    def work(self, numbers):
        return len(numbers)

    def denominator(self, parts):
        return sum(len(idx) // 2 for idx, _, _ in parts)

    def loss_of(self, idx, positions, targets, scale):
        """idx (2 * pairs, T): the chosen answers with their prompts, then the rejected ones, in one forward pass."""
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
        return {name: value.sum() * scale for name, value in values.items()}


def main():
    given = parse_flags(Settings, __doc__, PRESETS["tiny"])
    with parallel.started(), locked(given.get("out_dir", Settings.out_dir), make=not given.get("resume")):
        carry_out(DPO(*sft.choose_settings(given, Settings, PRESETS, DPO.stage)))


if __name__ == "__main__":
    run_script(main)
