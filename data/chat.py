"""ChatML: how a conversation becomes token ids, and which of them the model learns to say.

    <|im_start|>user        <|im_start|>assistant
    Hello<|im_end|>         Hi!<|im_end|>
                            ^^^^^^^^^^^^^ loss mask 1: the answer and its end token

Control tokens are put in by id and everything else is encoded as ordinary text, piece by piece. So nothing that a
message says can close it, open another, or take part in the loss.
"""

from data.tokenizer import IM_END, IM_START


def render(messages, encoding):
    """[(role, text), ...] -> token ids and loss mask, two lists of equal length. Roles: system, user, assistant."""
    ids, mask = [], []
    for role, text in messages:
        frame, body, newline = _header(role, encoding), render_answer(text, encoding), encoding.encode_ordinary("\n")
        ids += frame + body + newline
        mask += [0] * len(frame) + [int(role == "assistant")] * len(body) + [0] * len(newline)
    return ids, mask


def render_prompt(messages, encoding):
    """The token ids of a conversation so far and of the header of its answer, which the model continues."""
    return render(messages, encoding)[0] + _header("assistant", encoding)


def render_answer(text, encoding):
    """The token ids of an answer, its end token among them."""
    return [*encoding.encode_ordinary(text), encoding.encode_single_token(IM_END)]


def _header(role, encoding):
    return [encoding.encode_single_token(IM_START), *encoding.encode_ordinary(f"{role}\n")]
