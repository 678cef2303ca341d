"""Conversations to token ids and the mask of those that are trained, made together in one pass.

Nothing is ever searched for in finished ids: each piece of a template knows as it is written whether it is the assistant's. Trained are the
assistant's words and the token that ends its turn, so that it learns to stop; nothing else is.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from .. import IMAGE_TOKEN_ID, UserError
from . import image_processing

# {} is what was said. Only names outside {} become special tokens: a user who types "</s>" has typed four characters.
# The end of a user's piece opens the assistant's turn, so a prompt is the same pieces, left off after the user.
# A SentencePiece tokenizer puts a space before every text, so that "[INST]{}" is the "[INST] Hello" of Mistral v2 and v3, "[INST]Hello" of Tekken.
# inside: the system's words stand in front of the user's "first" or "last"; default: what the system says where a conversation leaves it out.
# trim: the white space that a published template takes off: "all" around what is said, or the spaces that end an "answer".
# glued: an answer follows its opening without a space; apart: a turn follows the end token before it with one (`space_before`).
CHATML = {
    "start": "",
    "system": "<|im_start|>system\n{}<|im_end|>\n",
    "user": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "end": "<|im_end|>",
    "after": "\n",
}
VICUNA = {
    "start": "<s>",
    "system": "{} ",
    "user": "USER: {} ASSISTANT:",
    "end": "</s>",
    "after": "",
}
TEMPLATES = {
    "mistral": {
        "start": "<s>",
        "system": "{}\n\n",
        "inside": "last",
        "user": "[INST]{}[/INST]",
        "end": "</s>",
        "after": "",
        "trim": "answer",
    },
    "mistral-v1": {
        "start": "<s>",
        "system": "{}\n\n",
        "inside": "first",
        "user": "[INST] {} [/INST]",
        "end": "</s>",
        "after": "",
        "apart": True,
    },
    "mistral-v7": {
        "start": "<s>",
        "system": "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
        "user": "[INST]{}[/INST]",
        "end": "</s>",
        "after": "",
        "trim": "answer",
    },
    "chatml": CHATML,
    "smollm2": CHATML
    | {"default": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
    "llama2": {
        "start": "",
        "system": "<<SYS>>\n{}\n<</SYS>>\n\n",
        "inside": "first",
        "user": "<s>[INST] {} [/INST]",
        "answer": "{} ",
        "end": "</s>",
        "after": "",
        "trim": "all",
    },
    "llama3": {
        "start": "<|begin_of_text|>",
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "end": "<|eot_id|>",
        "after": "",
        "trim": "all",
    },
    "vicuna": VICUNA
    | {
        "default": "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    },
    "llava": VICUNA,  # as llava-hf publishes LLaVA-1.5; its end token stands where LLaVA was trained with it, after every answer
    "zephyr": {
        "start": "",
        "system": "<|system|>\n{}</s>\n",
        "user": "<|user|>\n{}</s>\n<|assistant|>\n",
        "end": "</s>",
        "after": "\n",
        "glued": True,
    },
    # LLaVA's for pretraining: a picture, then its caption; mute: words beside a picture are left out (`shown`), text without one is kept. Where LLaVA
    # ends a caption by a line break, here is the token that ends every answer. For tokenizers with <s> and </s>: SentencePiece and Tekken.
    "plain": {
        "start": "<s>",
        "system": "{}\n\n",
        "user": "{}",
        "end": "</s>",
        "after": "",
        "mute": True,
    },
}
JINJA_SECONDS, JINJA_BYTES = (
    10,
    1 << 30,
)  # of a core, and bytes, that a stranger's template may take over all probes; published ones take hundredths of a second
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one half of a UTF-16 pair, UTF-8 cannot
CAPTION_PROMPT = "Give a brief description of this image in one sentence."  # where a caption's data asks nothing; Megatron's COCO prompt
SHORT_PROMPT = "Answer the question using a single word or phrase."  # after a question: VQAv2, ChartQA, POPE, MME
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."  # after a question and its choices: AI2D, MMMU, MMStar


def read_turns(record, name):
    """A LLaVA `conversations` or an OpenAI-style `messages` list as [(role, text)], roles "system", "user", "assistant" in order."""
    roles = {
        "human": "user",
        "gpt": "assistant",
        "user": "user",
        "assistant": "assistant",
        "system": "system",
    }
    raw = isinstance(record, dict) and (record.get("conversations") or record.get("messages"))
    if not raw or not isinstance(raw, list) or not all(isinstance(turn, dict) for turn in raw):
        raise UserError(
            f"{name}: neither `conversations` nor `messages` is a list of turns in {record!r:.80}",
            "no conversation",
        )
    turns = []
    for turn in raw:
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in roles or not isinstance(text, str):
            raise UserError(
                f"{name}: a turn is said by one of {', '.join(roles)}, and is a text, not {str(turn)[:80]}",
                "no conversation",
            )
        if LONE_SURROGATE.search(text):
            raise UserError(
                f"{name}: a turn has half a character (a lone surrogate): {text!a:.80}",
                "half a character",
            )
        turns.append(
            (roles[role], text.strip() if roles[role] == "assistant" else text)
        )  # nobody should learn to end in white space
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first is not None and turns[first][1].strip() == "<image>":
        turns[first] = ("user", f"<image>\n{CAPTION_PROMPT}")
    return turns


def check_turns(turns, pictures, name):
    """Raise UserError unless users and assistants alternate, every answer says something and there is one <image> a picture."""
    spoken = [role for role, _ in turns if role != "system"]
    if (
        spoken != ["user", "assistant"] * (len(spoken) // 2)
        or not spoken
        or "system" in [role for role, _ in turns[1:]]
    ):
        raise UserError(
            f"{name}: turns must go (system,) user, assistant, user, assistant …, not {', '.join(role for role, _ in turns)}",
            "turns out of order",
        )
    tags = sum(text.count("<image>") for role, text in turns if role != "assistant")
    if tags != pictures:
        raise UserError(
            f"{name}: {tags} <image> in its text but {pictures} pictures", "wrong number of <image>"
        )
    for number, (role, text) in enumerate(turns):
        if role == "assistant" and not text.strip():
            raise UserError(
                f"{name}: turn {number + 1}, the assistant's, is empty: there is nothing to learn",
                "empty answer",
            )


def drop_caption_prompt(text, is_asked):
    """The pictures of what a user says, without the words: in captions' data these only ask for a caption, each time in others, and LLaVA leaves them
    out. But a question that waits for its answer (is_asked) was meant: UserError."""
    words = text.replace("<image>", "").strip()
    if is_asked and words not in ("", CAPTION_PROMPT):
        raise UserError(
            f"the template plain shows a picture and asks nothing: it cannot ask {words[:80]!r}, only {CAPTION_PROMPT!r}"
        )
    return "<image>" * text.count("<image>")


def trim_text(text, role, form):
    if form.get("trim") == "all":
        return text.strip()
    return text.rstrip(" ") if form.get("trim") == "answer" and role == "assistant" else text


def conversation_segments(turns, template):
    """(text, how, trained) in order; how: "special" for template text in which names are special tokens, "said" for what somebody said."""
    form, system = TEMPLATES[template], ""
    if "default" in form and turns[0][0] != "system":
        turns = [("system", form["default"]), *turns]
    yield form["start"], "special", False
    last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=None)
    for i, (role, text) in enumerate(turns):
        if role == "assistant":
            yield form.get("answer", "{}").replace("{}", trim_text(text, role, form)), "said", True
            yield form["end"], "special", True
            yield form["after"], "special", False
            continue
        before, after = form[role].split("{}")
        if role == "system" and form.get("inside"):
            system = before + text + after
            continue
        yield before, "special", False
        if form.get("mute") and "<image>" in text:
            text = drop_caption_prompt(text, is_asked=i == len(turns) - 1)
        if role == "user" and (i == last or form.get("inside") == "first"):
            text, system = system + text, ""
        yield trim_text(text, role, form), "said", False
        yield after, "special", False


def render_conversation(turns, tokenizer, template):
    """[(role, text)] -> (ids, trained), lists of equal length; ids hold IMAGE once a picture. Ends in a user's turn: a prompt to be answered."""
    written = list(conversation_segments(turns, template))
    names = [
        name
        for name in tokenizer.special
        if any(name in text for text, how, _ in written if how == "special")
    ]
    special = (
        "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    )  # the longest first, as Hugging Face finds them
    runs = []  # [text or id, trained]: texts side by side are encoded as one, as the reference templates do
    for text, how, trained in written:
        pattern = special if how == "special" else "<image>" if not trained else "(?!)"
        for part in re.split(f"({pattern})", text):
            if part and re.fullmatch(pattern, part):
                runs.append([IMAGE_TOKEN_ID if how == "said" else tokenizer.special[part], trained])
            elif part and runs and isinstance(runs[-1][0], str) and runs[-1][1] == trained:
                runs[-1][0] += part
            elif part:
                runs.append([part, trained])
    ids, mask = [], []
    for content, trained in runs:
        is_text = isinstance(content, str)
        new = (
            tokenizer.encode(content, prepend_space(ids, trained, tokenizer, TEMPLATES[template]))
            if is_text
            else [content]
        )
        ids += new
        mask += [trained] * len(new)
    return ids, mask


def prepend_space(ids, is_answer, tokenizer, form):
    """Whether SentencePiece's space stands before the text that comes after `ids`; None: as the tokenizer does by itself.

    One that puts it first in a conversation alone (Metaspace's "first": Mistral v0.3, LLaVA-1.5) leaves the others to the template, and published
    ones write it before whatever is said, but not after a picture or, mostly, an ended turn.
    """
    if is_answer and form.get("glued"):
        return False
    if tokenizer.prefix_space != "first" or not ids:
        return None
    return ids[-1] != IMAGE_TOKEN_ID and (
        form.get("apart", False) or ids[-1] != tokenizer.special.get(form["end"])
    )


def end_token_id(tokenizer, template):
    """The id that ends the assistant's turn; UserError if the tokenizer does not know the special tokens that the template begins and ends with."""
    start, end = (TEMPLATES[template][name] for name in ("start", "end"))
    for name in filter(None, (start, end)):
        if name not in tokenizer.special:
            raise UserError(
                f"the template {template} writes {name}, which is no special token of this tokenizer"
            )
    return tokenizer.special[end]


def special_token_names(template):
    """The special tokens a template needs, for a tokenizer that is learnt for it."""
    parts = [TEMPLATES[template][name] for name in ("start", "system", "user", "end", "after")]
    return list(dict.fromkeys(re.findall(r"<\|\w+\|>|</?s>|\[/?\w+\]", "".join(parts))))


PROBES = [  # conversations that any two templates write differently; the first must be known to a template, the others may be
    [("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")],
    [("user", "Hello")],
    [("system", "Be kind."), ("user", "Hello")],
    [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")],
]


def identify_template(jinja, tokens, tokenizer, where):
    """The name of the template that writes what a published one in Jinja writes, over every probe that it accepts; UserError if there is none.

    Templates of LLaVA folders want what is said in parts, and are compared by a first question alone: they leave the start token to the tokenizer,
    and llava-hf's leave out or misspell ("<\\s>") the end token after an answer, with which LLaVA was trained.
    tokens: its bos_token and eos_token. A SentencePiece tokenizer puts a space before each text: of those spaces some published templates write
    every one, some only a few, so they are not compared.
    """
    choices = f"say which it is by --template of prepare.py, stitch for a brain, export for a whole LLaVA: {', '.join(TEMPLATES)}"
    if not isinstance(jinja, str):
        raise UserError(f"{where} states no chat template; {choices}")
    own_space = tokenizer.bytes_of[tokenizer.encode("a")[0]].startswith(b" ")
    optional = f"({'|'.join(map(re.escape, tokenizer.special))}) " if own_space else "()(?!)"
    *written, asked = render_jinja(
        jinja, tokens, [*((turns, False) for turns in PROBES), (PROBES[1], True)], where
    )
    wanted = {
        i: re.sub(optional, r"\1", text) for i, text in enumerate(written) if text is not None
    }
    for name, space in itertools.product(TEMPLATES, ["", " "] if own_space else [""]):
        if 0 in wanted and wanted == {
            i: re.sub(optional, r"\1", render_text(PROBES[i], tokenizer, name, space)) for i in wanted
        }:
            return name
    if asked is not None:
        for name in TEMPLATES:
            ours = re.sub(optional, r"\1", render_text(PROBES[1], tokenizer, name)).removeprefix(
                TEMPLATES[name]["start"]
            )
            if ours == re.sub(optional, r"\1", asked).removeprefix(TEMPLATES[name]["start"]):
                return name
    raise UserError(
        f"{where}: its chat template writes {wanted.get(0)!r:.1000}, as none of ours does; {choices}"
    )


def render_text(turns, tokenizer, template, space=""):
    """A conversation as one text, with `space` before every part that is tokenised by itself."""
    stub = SimpleNamespace(
        special={name: (name,) for name in tokenizer.special},
        encode=lambda text, _: [space + text],
        front=None,
    )
    return "".join("".join(piece) for piece in render_conversation(turns, stub, template)[0])


def render_jinja(jinja, tokens, asked, where):
    """What a template in Jinja writes of each of `asked`, (turns, parts) as jinja.py has them; None for what it refuses. UserError if it takes more
    than it may."""
    given = json.dumps({"jinja": jinja, "tokens": tokens, "asked": asked})
    command = [
        sys.executable,
        "-P",
        str(Path(__file__).with_name("jinja.py")),
        str(JINJA_SECONDS),
        str(JINJA_BYTES),
    ]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{where}: its chat template could not be tried within {JINJA_SECONDS} s and {JINJA_BYTES >> 20} MiB: "
            f"{(done.stderr.strip().splitlines() or ['it was stopped'])[-1]:.200}"
        )
    return json.loads(done.stdout)


def add_tile_tags(ids, trained, pictures, tokenizer, policy):
    """What render gave and the images.Picture each that its IMAGE stand for, as NVLM shows them (Dai et al. 2024) where the policy has tags: before
    each tile a text that numbers it, which nobody trains, and each tile a picture of its own. Else as they are."""
    if not policy.get("tags"):
        return ids, trained, pictures
    if ids.count(IMAGE_TOKEN_ID) != len(pictures):
        raise UserError(
            f"{ids.count(IMAGE_TOKEN_ID)} places for pictures but {len(pictures)} pictures"
        )
    tagged, mask, tiles, remaining = [], [], [], iter(pictures)
    for i, is_trained in zip(ids, trained, strict=True):
        new = [i]
        if i == IMAGE_TOKEN_ID:
            picture = next(remaining)
            new = [
                x
                for text in image_processing.tile_tags(len(picture.tiles), policy)
                for x in (*tokenizer.encode(text), IMAGE_TOKEN_ID)
            ]
            one = image_processing.image_feature_index(picture.size, policy, 1)
            tiles += [
                picture._replace(tiles=picture.tiles[n : n + 1], feature_index=one)
                for n in range(len(picture.tiles))
            ]
        tagged += new
        mask += [is_trained] * len(new)
    return tagged, mask, tiles
