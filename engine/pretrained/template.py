"""Chat templates: small programs in a model's folder, which turn messages into the text that the model was trained on.

A template is foreign code, so it runs in jinja2's sandbox. What differs from transformers: the date is always the same,
so that a prompt is the same every day, and a template that can ask the model to think is told to do so.
"""
import datetime
from pathlib import Path

from engine.pretrained.bpe import read_json

DATE = datetime.datetime(2025, 1, 1)
THINKING = dict.fromkeys(("enable_thinking", "open_thinking", "thinking"), True)  # what templates call their switch
PLAIN = "--template=plain does without it"


def read_template(folder: Path, tokenizer_config: dict) -> str | None:
    """The chat template, from chat_template.jinja, chat_template.json or tokenizer_config.json; None if there is none.
    Raises ValueError for several templates of which none is the default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        template = read_json(folder, "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"{folder}: none of the chat templates {', '.join(named)} is the default; {PLAIN}")
        template = named["default"]
    return template


def fill_template(template: str, messages: list[dict], names: dict[str, str]) -> str:
    """The text that a chat template makes of messages, up to the model's answer. `names` maps variables of the
    template, such as bos_token, to special tokens. Raises ValueError if the template fails."""
    from jinja2 import TemplateError  # installed with torch, which needs jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the model's texts for training, and changes nothing here."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", Generation])
    known = {"tools": None, "documents": None, "raise_exception": raise_exception, "strftime_now": DATE.strftime}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **THINKING,
                                                        **known, **names)
    except Exception as error:  # foreign code may raise anything
        raise ValueError(f"the chat template fails: {error}") from None
