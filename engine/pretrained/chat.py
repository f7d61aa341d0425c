"""How a model from elsewhere is asked a problem: by its own chat template, after an instruction and worked examples.

    --instruction=TEXT   what stands before the questions, by default what R1-Zero was told
    --shots=N            how many worked examples come first, each a training problem with its answer

A chat template is a small program in the model's folder that turns messages into text. It is foreign code, so it runs
in jinja2's sandbox. Without one, the prompt is that of the built-in world, "User: ..." and "Assistant:". The rewards
see the completion alone.

No text can inject a special token. The template is filled with one character for each text, its special tokens are
found, and only then do the texts take their places, where "<|im_end|>" is ten plain characters.
"""
import re
from pathlib import Path

import numpy as np

from data.arithmetic import Problem
from data.own import OwnProblems
from data.tokenizer import END_OF_TEXT
from engine.pretrained.bpe import Encoding, read_json

# DeepSeek-R1 (arXiv 2501.12948v2), table 1, without the question.
R1_ZERO = ("A conversation between User and Assistant. The User asks a question and the Assistant solves it. The "
           "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
           "The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, "
           "respectively, that is, <think>reasoning process here </think> <answer> answer here </answer>.")
SLOT = 0xE000  # the first of the characters that stand for texts; Unicode leaves them to private use


def read_template(folder: Path, tokenizer_config: dict) -> str | None:
    """The chat template, from its own file or from tokenizer_config.json; None if there is none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def fill_template(template: str, messages: list[dict], names: dict[str, str]) -> str:
    """The text that a chat template makes of messages, up to where the model goes on. `names` are its special tokens,
    such as bos_token. Raises ValueError if the template fails."""
    from jinja2 import TemplateError  # torch needs jinja2, so it is there
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, tools=None,
                                                        documents=None, raise_exception=raise_exception, **names)
    except Exception as error:  # whatever foreign code raises
        raise ValueError(f"the chat template fails: {error}") from None


class Pretrained:
    """A task as the model of a folder is asked it. Everything that is not here is the wrapped task's. Raises ValueError
    for a tokenizer or a template that cannot be used."""

    def __init__(self, task, folder: str, instruction: str):
        self.task, self.instruction, path, config = task, instruction, Path(folder), {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):  # what is read later rules
            if (path / name).exists():
                config |= {key: value for key, value in read_json(path, name).items() if value is not None}
        self.template = read_template(path, config)
        self.encoding = Encoding(path, self.template or "")
        self.names = {key: token if isinstance(token, str) else token["content"] for key, token in config.items()
                      if key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        stop = config.get("eos_token_id", self.encoding.specials.get(self.names.get("eos_token"), []))
        self.stop_ids = tuple(stop if isinstance(stop, list) else [stop])
        if self.template:  # also the token that the template puts after an answer
            text = fill_template(self.template, [{"role": "user", "content": "?"},
                                                 {"role": "assistant", "content": chr(SLOT)}], self.names)
            end = re.match(rf"\s*({self.encoding.special_pattern})", text.partition(chr(SLOT))[2])
            if end:
                self.stop_ids = tuple(dict.fromkeys([*self.stop_ids, self.encoding.specials[end[1]]]))
        if not self.stop_ids or not all(isinstance(i, int) and 0 <= i < self.encoding.n_tokens for i in self.stop_ids):
            raise ValueError(f"{folder}: eos_token_id {stop!r} names no token that ends an answer")
        self.show([])

    __getattr__ = OwnProblems.__getattr__

    def show(self, examples: list) -> None:
        """Put these problems before every question from now on, each with its working and its answer."""
        texts = [text for problem in examples for text in (
            problem.question, f"<think>{problem.working}</think><answer>{problem.answer}</answer>")]
        slots = [chr(SLOT + i) for i in range(len(texts) + 2)]
        if self.template:
            roles = ["user", "assistant"] * len(examples) + ["user"]
            messages = [{"role": role, "content": slot} for role, slot in zip(roles, slots[1:])]
            if self.instruction:
                messages.insert(0, {"role": "system", "content": slots[0]})
            text = fill_template(self.template, messages, self.names)
            used = slots if self.instruction else slots[1:]
            if any(text.count(slot) != 1 for slot in used):
                raise ValueError("the chat template leaves a text out, perhaps the --instruction, or repeats one")
            # Some templates begin the thought. Here the model does, as the rewards ask for both of its tags.
            text = re.sub(r"<think>\s*$", "", text)
        else:
            end = self.encoding.decode(self.stop_ids[:1])
            turns = [f"User: {q}\nAssistant: {a}{end}\n" for q, a in zip(slots[1::2], slots[2::2])]
            start = self.encoding.prefix
            if self.instruction:
                start += f"{slots[0]}\n"
            text = start + "".join(turns) + f"User: {slots[-1]}\nAssistant:"
        self.texts = [self.instruction, *texts]  # what takes the places of the slots, before the question
        self.prompt = re.split(f"({self.encoding.special_pattern})", text)  # at odd indices stand special tokens

    def encode_prompt(self, problem) -> list[int]:
        """The token ids of a problem's prompt."""
        texts, ids = [*self.texts, problem.question], []
        for i, part in enumerate(self.prompt):
            if i % 2:
                ids.append(self.encoding.specials[part])
            else:
                part = re.sub(r"[\ue000-\uf8ff]", lambda slot: texts[ord(slot[0]) - SLOT], part)
                ids += self.encoding.encode_ordinary(part)
        return ids

    @property
    def max_prompt_tokens(self) -> int:
        """A bound on the tokens of a prompt. A token is a byte or more, and the wrapped task counts bytes."""
        return len(self.encode_prompt(Problem("", ""))) + self.task.max_prompt_tokens

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """The wrapped task's corpus in this model's tokens, at least n_tokens of them, int32 (n,)."""
        ids, size = [], n_tokens
        while len(ids) < n_tokens:
            corpus = self.task.encoding.decode(self.task.make_corpus(size, seed, heldout).tolist())
            ids = [i for document in corpus.split(END_OF_TEXT)[:-1]
                   for i in (*self.encoding.encode_ordinary(document), self.stop_ids[0])]
            size *= 2  # a word that is one token there may be several here, or the other way round
        return np.array(ids, dtype=np.int32)
