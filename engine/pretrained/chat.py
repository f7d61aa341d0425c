"""The prompts of a pretrained model: an instruction, solved examples and the question, in the model's chat template.

    --instruction=TEXT   the text before the questions; by default R1-Zero's
    --shots=N            the number of solved examples, each a training problem with its chain of thought and answer

A chat template is a small program in the model's folder that turns messages into text. It is foreign code, so it runs
in jinja2's sandbox. Without a template, the prompt is that of the built-in tasks, "User: ..." and "Assistant:". The
rewards see only the completion.

No text can inject a special token. First the template is filled with one placeholder character for each text, and its
special tokens are found. Then the texts replace the placeholders, so "<|im_end|>" in a text is ten plain characters.
"""
import re
from pathlib import Path

import numpy as np

from data.arithmetic import Problem
from data.own import OwnProblems
from data.tokenizer import END_OF_TEXT
from engine.pretrained.bpe import Encoding, read_json
from engine.pretrained.template import PLAIN, fill_template, read_template

# DeepSeek-R1 (arXiv 2501.12948v2), table 1, without the question.
R1_ZERO = ("A conversation between User and Assistant. The User asks a question and the Assistant solves it. The "
           "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
           "The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, "
           "respectively, that is, <think>reasoning process here </think> <answer> answer here </answer>.")
SLOT = 0xE000  # the first placeholder character; Unicode reserves these characters for private use


class Pretrained:
    """A task with the prompts and the tokenizer of the model in `folder`. Everything else is the wrapped task's. Raises
    ValueError for a tokenizer or a template that cannot be used."""

    def __init__(self, task, folder: str, instruction: str, template: str = "auto"):
        self.task, self.instruction, path, config = task, instruction, Path(folder), {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):  # a later file wins
            if (path / name).exists():
                config |= {key: value for key, value in read_json(path, name).items() if value is not None}
        self.template = read_template(path, config) if template == "auto" else None
        self.encoding = Encoding(path, self.template or "")
        self.names = {key: token if isinstance(token, str) else token["content"] for key, token in config.items()
                      if key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        eos = self.names.get("eos_token")
        end_of_text = [self.encoding.specials[eos]] if eos in self.encoding.specials else []  # by the tokenizer's files
        stop = config.get("eos_token_id", end_of_text)
        ends = stop if isinstance(stop, list) else [stop]
        if not self.template:  # the two may differ, and a model may end with either
            ends = [*ends, *end_of_text]
        if self.template:  # the token that the template puts after an answer ends one, too
            text = fill_template(self.template, [{"role": "user", "content": "?"},
                                                 {"role": "assistant", "content": chr(SLOT)}], self.names)
            end = re.match(rf"\s*({self.encoding.special_pattern})", text.partition(chr(SLOT))[2])
            if end:
                ends = [*ends, self.encoding.specials[end[1]]]
        if not ends or not all(isinstance(i, int) and 0 <= i < self.encoding.n_tokens for i in ends):
            raise ValueError(f"{folder}: eos_token_id {stop!r} names no token that ends an answer")
        self.stop_ids = tuple(dict.fromkeys(ends))
        self.show([])

    __getattr__ = OwnProblems.__getattr__

    def show(self, examples: list) -> None:
        """Put these problems before every question from now on, each with its chain of thought and its answer."""
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
                raise ValueError("the chat template leaves out or repeats a text: try an empty --instruction=")
            self.check_header(text.partition(slots[-1])[2])
            # Some templates end in <think>. Here the model writes this tag, because the rewards ask for both tags.
            text = re.sub(r"<think>\s*$", "", text)
        else:
            end = self.encoding.decode(self.stop_ids[:1])
            turns = [f"User: {q}\nAssistant: {a}{end}\n" for q, a in zip(slots[1::2], slots[2::2])]
            start = self.encoding.prefix
            if self.instruction:
                start += f"{slots[0]}\n"
            text = start + "".join(turns) + f"User: {slots[-1]}\nAssistant:"
        self.texts = [self.instruction, *texts]  # the texts that replace the slots, without the question
        self.prompt = re.split(f"({self.encoding.special_pattern})", text)  # special tokens are at odd indices

    def check_header(self, header: str) -> None:
        """Raises ValueError unless the model can begin its answer with <think> after `header`, which is what the
        template writes after the question."""
        if re.search(r"<think>\s*</think>\s*$", header):
            raise ValueError("the chat template closes the thought itself (<think></think>), so no answer can earn the "
                             f"format reward; {PLAIN}")
        ends = [self.encoding.decode([i]) for i in self.stop_ids]
        if not re.sub("|".join(map(re.escape, ends)), "", header).strip():
            raise ValueError(f"the chat template begins no answer (it ignores add_generation_prompt); {PLAIN}")

    def encode_prompt(self, problem) -> list[int]:
        """The token ids of a problem's prompt."""
        texts, ids = [*self.texts, problem.question], []
        for i, span in enumerate(self.prompt):
            if i % 2:
                ids.append(self.encoding.specials[span])
            else:
                span = re.sub(r"[\ue000-\uf8ff]", lambda slot: texts[ord(slot[0]) - SLOT], span)
                ids += self.encoding.encode_ordinary(span)
        return ids

    @property
    def max_prompt_tokens(self) -> int:
        """An upper bound of a prompt's tokens. A token has one byte or more, and the wrapped task counts bytes."""
        return len(self.encode_prompt(Problem("", ""))) + self.task.max_prompt_tokens

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """The wrapped task's corpus in this model's tokens, at least n_tokens of them, int32 (n,)."""
        ids, n_source = [], n_tokens
        while len(ids) < n_tokens:
            corpus = self.task.encoding.decode(self.task.make_corpus(n_source, seed, heldout).tolist())
            ids = [i for document in corpus.split(END_OF_TEXT)[:-1]
                   for i in (*self.encoding.encode_ordinary(document), self.stop_ids[0])]
            n_source *= 2  # one tokenizer may need several tokens for what is one token of the other
        return np.array(ids, dtype=np.int32)
