"""The forms in which rows of conversations and preferences are read.

A form is known by the keys of a row. Its reader returns turns, each a dict of a role and a text; TURN_KEYS and ROLES
are the names that are read. A `system` text beside the other keys is the first turn.
"""

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TURN_KEYS = (("from", "value"), ("role", "content"))


class SkippedRow(ValueError):
    """A row that cannot become an example. The message is the reason; meta.json has a count for each reason."""


def _turns(role, value):
    """Return the turns that a list of turns, one turn, or the text of one stands for."""
    if isinstance(value, list):
        return value
    return [value if isinstance(value, dict) else {"role": role, "content": value or ""}]


def _question(value):
    return _turns("user", value)


def _answer(value):
    return _turns("assistant", value)


def _alpaca(row):
    instruction = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text and text.strip())
    return _question(instruction) + _answer(row["output"])


def _answers(row):
    return _answer(row["chosen"]), _answer(row["rejected"])


# Keys -> reader of a row with these keys, which returns its turns. The first form that fits is taken.
CONVERSATIONS = {
    "conversations": lambda row: row["conversations"],
    "messages": lambda row: row["messages"],
    "instruction, output": _alpaca,
    "prompt, completion": lambda row: _question(row["prompt"]) + _answer(row["completion"]),
}

# Keys -> reader of a row with these keys, which returns the turns of its prompt, of chosen and of rejected.
PREFERENCES = {
    "question, chosen, rejected": lambda row: (_question(row["question"]), *_answers(row)),
    "prompt, chosen, rejected": lambda row: (_question(row["prompt"]), *_answers(row)),
    "conversations, chosen, rejected": lambda row: (row["conversations"], *_answers(row)),
    "chosen, rejected": lambda row: ([], *_answers(row)),
}


def read_conversation(row):
    """Read a row -> [(role, text, whether an answer is to be learned), ...]. Raises SkippedRow if it has no form."""
    turns = _with_system(row, _parse(_read(row, CONVERSATIONS)))
    _require_texts(turns, "with an empty turn")
    if [role for role, *_ in turns if role != "system"][:1] == ["assistant"]:
        raise SkippedRow("that begin with an answer")
    return turns


def read_preference(row):
    """Read a row -> the prompt as [(role, text), ...], the chosen and the rejected answer. Raises SkippedRow.

    chosen and rejected are answers, or conversations that end with one and have the same turns before it. These turns
    follow the prompt, unless they repeat it.
    """
    prompt, chosen, rejected = map(_parse, _read(row, PREFERENCES))
    if not chosen or not rejected:
        raise SkippedRow("with an empty text")
    if chosen[:-1] != rejected[:-1]:
        raise SkippedRow("whose answers follow different prompts")
    shared = chosen[:-1]
    repeats = len(shared) >= len(prompt) and shared[len(shared) - len(prompt) :] == prompt
    prompt = _with_system(row, shared if repeats else prompt + shared)
    _require_texts([*prompt, chosen[-1], rejected[-1]], "with an empty text")
    if (chosen[-1][0], rejected[-1][0]) != ("assistant", "assistant") or [role for role, *_ in prompt[-1:]] != ["user"]:
        raise SkippedRow("that are no question and two answers")
    return [(role, text) for role, text, _ in prompt], chosen[-1][1], rejected[-1][1]


def _read(row, forms):
    try:
        read = next(read for keys, read in forms.items() if row.keys() >= {*keys.split(", ")})
        return read(row)
    except (AttributeError, StopIteration, TypeError) as error:
        raise SkippedRow("malformed") from error


def _parse(turns):
    if not isinstance(turns, list):
        raise SkippedRow("malformed")
    return [_turn(turn) for turn in turns]


def _turn(turn):
    try:
        role, text = next((ROLES[turn[role]], turn[text]) for role, text in TURN_KEYS if role in turn)
        weight = turn.get("weight")
    except (AttributeError, KeyError, StopIteration, TypeError) as error:
        raise SkippedRow("malformed") from error
    if not isinstance(text, str):
        raise SkippedRow("malformed")
    if weight not in (None, 0, 1):
        raise SkippedRow("with a weight other than 0 and 1")
    return role, text, weight != 0


def _with_system(row, turns):
    """Put a row's `system` text before its turns, unless they begin with it, and leave out empty system turns."""
    if row.get("system"):
        system = _turn({"role": "system", "content": row["system"]})
        turns = turns if turns[:1] == [system] else [system, *turns]
    return [turn for turn in turns if turn[0] != "system" or turn[1].strip()]


def _require_texts(turns, reason):
    if not all(text.strip() for _, text, _ in turns):
        raise SkippedRow(reason)
