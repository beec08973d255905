"""ChatML: render a conversation as token ids, with a loss mask for those that the model learns.

    <|im_start|>user        <|im_start|>assistant
    Hello<|im_end|>         Hi!<|im_end|>
                            ^^^^^^^^^^^^^ loss mask 1: the answer and its end token

Control tokens are inserted by id, and everything else is encoded as ordinary text, piece by piece. So no text in a
message can end the message, begin another, or change the loss mask.
"""

from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.tokenizer import IM_END, IM_START

# The same for Hugging Face's tokenizers. They encode a header and its text at once, so a text that begins with white
# space can have other ids there.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def render(messages, encoding):
    """Render [(role, text), ...] -> token ids and loss mask, two lists of one length.

    Roles: system, user, assistant.
    """
    ids, mask = [], []
    for role, text in messages:
        frame, body, newline = _header(role, encoding), render_answer(text, encoding), encoding.encode_ordinary("\n")
        ids += frame + body + newline
        mask += [0] * len(frame) + [int(role == "assistant")] * len(body) + [0] * len(newline)
    return ids, mask


def render_prompt(messages, encoding):
    """Render a conversation so far, and the header of the answer that the model is to write -> token ids."""
    return render(messages, encoding)[0] + _header("assistant", encoding)


def render_answer(text, encoding):
    """Render an answer and its end token -> token ids."""
    return [*encoding.encode_ordinary(text), encoding.encode_single_token(IM_END)]


def _header(role, encoding):
    return [encoding.encode_single_token(IM_START), *encoding.encode_ordinary(f"{role}\n")]


def default_system(template):
    """Return the system text that a Hugging Face chat template in ChatML begins with if none is given, else ""."""
    options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])  # as in transformers
    try:
        environment = ImmutableSandboxedEnvironment(**options)
        text = environment.from_string(template).render(messages=[{"role": "user", "content": ""}])
    except Exception:  # a template is a program, which may want more than messages
        return ""
    frame = f"{IM_START}system\n"
    return text.removeprefix(frame).split(IM_END)[0] if text.startswith(frame) else ""
