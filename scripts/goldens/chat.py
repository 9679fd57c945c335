"""Renders the chat templates in tests/goldens/chat/*.jinja with transformers and writes cases.json beside them."""

import datetime
from unittest import mock

import jinja2
from transformers.utils import chat_template_utils

from common import GOLDENS, write_json

OUT = GOLDENS / "chat"
NOW = datetime.datetime(2025, 2, 3, 4, 5, 6)

SPECIAL = {
    "chatml-default-system": ("<|im_start|>", "<|im_end|>"),
    "llama3-headers": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral-inst": ("<s>", "</s>"),
    "llama2-inst": ("<s>", "</s>"),
    "qwen2.5": (None, "<|im_end|>"),
    "qwen3-think": (None, "<|im_end|>"),
    "zephyr": ("<s>", "</s>"),
    "constructs": ("<s>", "</s>"),
}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# Every template meets every one of these, with and without the generation prompt.
CONVERSATIONS = [
    [user("Hello!")],
    [system("  Be brief.\n"), user(" What is 2 + 2? \n")],
    [user("Hi"), assistant("  Hello, <b>you</b> & \"them\" \n"), user("naïve café 你好 🙂 'quoted' \\n {{ x }} {% y %}")],
    [system("S"), user("One"), assistant("<think>\nhm\n</think>\n\nTwo"), user("Three?"), assistant("Four")],
]

# Particular to one template: (template, conversation, generation prompt, further variables).
PARTICULAR = [
    ("llama3-headers", CONVERSATIONS[0], True, {"date_string": "26 Jul 2024"}),
    (
        "llama3-headers",
        [user("Weather?"), {"role": "tool", "content": {"city": "Zürich", "degrees": [1, 2.5, None, True]}}],
        True,
        {},
    ),
    ("mistral-inst", [user("a"), user("b")], False, {}),
    ("mistral-inst", [assistant("a"), user("b")], False, {}),
    ("mistral-inst", [user("a"), system("b")], False, {}),
    ("llama2-inst", [user("a"), user("b")], False, {}),
    (
        "qwen2.5",
        [
            user("Time in Oslo and Rome?"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "time", "arguments": {"city": "Oslo"}}}],
            },
            {"role": "tool", "content": "12:00"},
            {"role": "tool", "content": "12:00"},
        ],
        True,
        {},
    ),
    ("qwen3-think", CONVERSATIONS[0], True, {"enable_thinking": False}),
    ("qwen3-think", [user("a"), assistant("<think>\nb\n</think>\n\nc")], False, {}),
    ("constructs", [user("one two"), user("SKIP"), assistant("three"), user("STOP"), user("what?")], False, {}),
]


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def render(template, messages, add_generation_prompt, variables):
    bos_token, eos_token = SPECIAL[template]
    case = {
        "template": f"{template}.jinja",
        "bos_token": bos_token,
        "eos_token": eos_token,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
    }
    if variables:
        case["variables"] = variables
    # A token that the tokenizer lacks is no variable at all, rather than one that is none.
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    known = {name: token for name, token in tokens.items() if token is not None}
    source = (OUT / case["template"]).read_text(encoding="utf-8")
    try:
        with mock.patch.object(chat_template_utils, "datetime", FixedClock):
            rendered, _ = chat_template_utils.render_jinja_template(
                [messages],
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                **known,
                **variables,
            )
        case["expected"] = rendered[0]
    except jinja2.exceptions.TemplateError as error:
        case["error"] = str(error)
    if "strftime_now" in source and "date_string" not in variables:
        case["now"] = NOW.isoformat()
    return case


def main():
    found = {path.stem for path in OUT.glob("*.jinja")}
    assert found == set(SPECIAL), f"templates without special tokens or the reverse: {found ^ set(SPECIAL)}"
    cases = [
        render(template, messages, prompt, {})
        for template in SPECIAL
        for messages in CONVERSATIONS
        for prompt in (False, True)
    ]
    cases += [render(*particular) for particular in PARTICULAR]
    write_json(OUT / "cases.json", cases)
    errors = sum("error" in case for case in cases)
    print(f"{len(cases)} cases, {errors} of them errors")


if __name__ == "__main__":
    main()
