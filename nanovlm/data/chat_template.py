"""Conversations become token ids and their loss mask, made together in one pass.

`render_conversation` is the one place where ids and loss mask are made. Training, sampling and
evaluation call it. It writes a conversation segment by segment, and each segment states if it has a
loss. The loss mask is true on the assistant's answers and on the token that ends its turn, so that
the model learns to stop; it is false on everything else. Nothing is searched for in finished ids.

From the loss mask, `PreparedDataset.read` in dataset.py makes the labels: the next token's id if
the mask is true there, and IGNORE_INDEX (ignore_index of the cross-entropy) otherwise.
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
from .dataset import expand_image_tokens

# A template has one text per role; {} stands for the message. Names of special tokens count only
# outside {}: a user who types "</s>" types four characters.
#     start    the first token of a conversation
#     system   a system message
#     user     a question, and the opening of the answer
#     answer   the answer; default: {}
#     end      the token that ends an answer
#     after    what follows an ended answer
# Optional keys:
#     inside   the system message stands inside the "first" or the "last" user's message
#     default  the system message of a conversation that has none
#     trim     white space that the published template removes: "all" around each message, or the
#              spaces that end an "answer"
#     glued    no space between the opening of a turn and its answer
#     apart    a space between an end token and the next turn (`prepend_space`)
#     mute     words beside an image are left out (`drop_caption_prompt`)
# The user's text includes the opening of the assistant's turn, so a prompt for generation is the
# same segments, cut after the last user.
# A SentencePiece tokenizer adds a space before each text. So "[INST]{}" gives the "[INST] Hello" of
# Mistral v2 and v3, and the "[INST]Hello" of Tekken.
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
        "user": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "end": "<|eot_id|>",
        "after": "",
        "trim": "all",
    },
    "vicuna": VICUNA
    | {
        "default": "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    },
    # as llava-hf publishes LLaVA-1.5, but with an end token after each answer, as in LLaVA's
    # training
    "llava": VICUNA,
    "zephyr": {
        "start": "",
        "system": "<|system|>\n{}</s>\n",
        "user": "<|user|>\n{}</s>\n<|assistant|>\n",
        "end": "</s>",
        "after": "\n",
        "glued": True,
    },
    # LLaVA's for pretraining: an image, then its caption. Text without an image is kept. LLaVA ends
    # a caption by a line break; here the token that ends each answer does. For tokenizers with <s>
    # and </s>: SentencePiece and Tekken.
    "plain": {
        "start": "<s>",
        "system": "{}\n\n",
        "user": "{}",
        "end": "</s>",
        "after": "",
        "mute": True,
    },
}
# Limits for all probes of an unknown template: seconds of CPU time, and bytes of memory. Published
# templates take hundredths of a second.
JINJA_SECONDS, JINJA_BYTES = 10, 1 << 30
# JSON can hold one half of a UTF-16 pair; UTF-8 cannot.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Megatron's COCO prompt, for captions that come without a question
CAPTION_PROMPT = "Give a brief description of this image in one sentence."
# follows a question of VQAv2, ChartQA, POPE and MME
SHORT_PROMPT = "Answer the question using a single word or phrase."
# follows a question and its choices in AI2D, MMMU and MMStar
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}


def read_turns(record, name):
    """Returns a LLaVA `conversations` or an OpenAI `messages` list as [(role, text)].

    Roles are "system", "user" and "assistant". Raises UserError, which begins with `name`, if it is
    no conversation.
    """
    raw = isinstance(record, dict) and (record.get("conversations") or record.get("messages"))
    if not raw or not isinstance(raw, list) or not all(isinstance(turn, dict) for turn in raw):
        raise UserError(
            f"{name}: neither `conversations` nor `messages` is a list of turns in {record!r:.80}",
            "no conversation",
        )
    turns = []
    for turn in raw:
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise UserError(
                f"{name}: a turn needs a text and a role, one of {', '.join(ROLES)}, "
                f"not {str(turn)[:80]}",
                "no conversation",
            )
        if LONE_SURROGATE.search(text):
            raise UserError(
                f"{name}: a turn has half a character (a lone surrogate): {text!a:.80}",
                "half a character",
            )
        # The model must not learn to end an answer in white space.
        turns.append((ROLES[role], text.strip() if ROLES[role] == "assistant" else text))
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first is not None and turns[first][1].strip() == "<image>":
        turns[first] = ("user", f"<image>\n{CAPTION_PROMPT}")
    return turns


def check_turns(turns, image_count, name):
    """Raises UserError if a conversation cannot be a sample.

    Users and assistants must alternate, each answer must have a text, and there must be one <image>
    per image.
    """
    roles = [role for role, _ in turns if role != "system"]
    if (
        roles != ["user", "assistant"] * (len(roles) // 2)
        or not roles
        or "system" in [role for role, _ in turns[1:]]
    ):
        raise UserError(
            f"{name}: turns must go (system,) user, assistant, user, assistant …, "
            f"not {', '.join(role for role, _ in turns)}",
            "turns out of order",
        )
    tag_count = sum(text.count("<image>") for role, text in turns if role != "assistant")
    if tag_count != image_count:
        raise UserError(
            f"{name}: {tag_count} <image> in its text but {image_count} images",
            "wrong number of <image>",
        )
    for number, (role, text) in enumerate(turns):
        if role == "assistant" and not text.strip():
            raise UserError(
                f"{name}: turn {number + 1}, the assistant's, is empty: there is nothing to learn",
                "empty answer",
            )


def drop_caption_prompt(text, is_prompt):
    """Returns only the <image> tags of a user's message.

    In data of captions the words ask for a caption, each time in other words; LLaVA leaves them
    out. is_prompt: the message waits for an answer, so its words matter. Raises UserError if they
    ask for anything but a caption.
    """
    words = text.replace("<image>", "").strip()
    if is_prompt and words not in ("", CAPTION_PROMPT):
        raise UserError(
            "the template plain takes an image and no question: "
            f"not {words[:80]!r}, only {CAPTION_PROMPT!r}"
        )
    return "<image>" * text.count("<image>")


def trim_text(text, role, form):
    if form.get("trim") == "all":
        return text.strip()
    return text.rstrip(" ") if form.get("trim") == "answer" and role == "assistant" else text


def conversation_segments(turns, template):
    """Yields (text, kind, has_loss) for each segment of a conversation, in order.

    kind: "template" for text of the template, in which names of special tokens become these tokens;
    "message" for the text of a turn. has_loss: the loss mask of the segment's tokens.
    """
    form, system = TEMPLATES[template], ""
    if "default" in form and turns[0][0] != "system":
        turns = [("system", form["default"]), *turns]
    yield form["start"], "template", False
    last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=None)
    for i, (role, text) in enumerate(turns):
        if role == "assistant":
            answer = form.get("answer", "{}").replace("{}", trim_text(text, role, form))
            yield answer, "message", True
            yield form["end"], "template", True
            yield form["after"], "template", False
            continue
        before, after = form[role].split("{}")
        if role == "system" and form.get("inside"):
            system = before + text + after
            continue
        yield before, "template", False
        if form.get("mute") and "<image>" in text:
            text = drop_caption_prompt(text, is_prompt=i == len(turns) - 1)
        if role == "user" and (i == last or form.get("inside") == "first"):
            text, system = system + text, ""
        yield trim_text(text, role, form), "message", False
        yield after, "template", False


def render_conversation(turns, tokenizer, template):
    """Returns (ids, loss_mask) of [(role, text)]: two lists of equal length, made in one pass.

    loss_mask is True where a token is a label, that is, has a loss: on the assistant's answers and
    on their end tokens. All other tokens get IGNORE_INDEX as label. ids hold one IMAGE_TOKEN_ID per
    image; dataset.expand_image_tokens repeats it. A conversation that ends in a user's turn is a
    prompt for generation.
    """
    segments = list(conversation_segments(turns, template))
    template_texts = [text for text, kind, _ in segments if kind == "template"]
    names = [name for name in tokenizer.special if any(name in text for text in template_texts)]
    # the longest name first, as Hugging Face finds special tokens
    names = map(re.escape, sorted(names, key=len, reverse=True))
    special = "|".join(names) or "(?!)"
    # Texts side by side are encoded as one, as the published templates do.
    merged = []  # [text or id, has_loss]
    for text, kind, has_loss in segments:
        pattern = special if kind == "template" else "<image>" if not has_loss else "(?!)"
        for part in re.split(f"({pattern})", text):
            if part and re.fullmatch(pattern, part):
                token_id = IMAGE_TOKEN_ID if kind == "message" else tokenizer.special[part]
                merged.append([token_id, has_loss])
            elif part and merged and isinstance(merged[-1][0], str) and merged[-1][1] == has_loss:
                merged[-1][0] += part
            elif part:
                merged.append([part, has_loss])
    ids, loss_mask = [], []
    for content, has_loss in merged:
        new = [content]
        if isinstance(content, str):
            space = prepend_space(ids, has_loss, tokenizer, TEMPLATES[template])
            new = tokenizer.encode(content, space)
        ids += new
        loss_mask += [has_loss] * len(new)
    return ids, loss_mask


def prepend_space(ids, is_answer, tokenizer, form):
    """Returns whether SentencePiece's space stands before the text that follows `ids`.

    None leaves it to the tokenizer. A tokenizer that adds the space only at the start of a
    conversation (Metaspace's "first": Mistral v0.3, LLaVA-1.5) leaves the other spaces to the
    template. Published templates write one before each message, but not after an image and, mostly,
    not after an ended turn.
    """
    if is_answer and form.get("glued"):
        return False
    if tokenizer.prefix_space != "first" or not ids:
        return None
    return ids[-1] != IMAGE_TOKEN_ID and (
        form.get("apart", False) or ids[-1] != tokenizer.special.get(form["end"])
    )


def end_token_id(tokenizer, template):
    """Returns the id that ends the assistant's turn.

    Raises UserError if the tokenizer lacks the template's start or end token.
    """
    start, end = (TEMPLATES[template][name] for name in ("start", "end"))
    for name in filter(None, (start, end)):
        if name not in tokenizer.special:
            raise UserError(
                f"the template {template} writes {name}, "
                "which is no special token of this tokenizer"
            )
    return tokenizer.special[end]


def special_token_names(template):
    """Returns the special tokens of a template, for a tokenizer that is trained for it."""
    parts = [TEMPLATES[template][name] for name in ("start", "system", "user", "end", "after")]
    return list(dict.fromkeys(re.findall(r"<\|\w+\|>|</?s>|\[/?\w+\]", "".join(parts))))


# Conversations that any two templates write differently. A template must accept the first; it may
# refuse the others.
PROBES = [
    [("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")],
    [("user", "Hello")],
    [("system", "Be kind."), ("user", "Hello")],
    [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")],
]


def identify_template(jinja, tokens, tokenizer, where):
    """Returns the name of the template that writes the same text as a published Jinja template.

    jinja: the template's text, or None. tokens: its bos_token and eos_token. They are compared on
    each probe that the Jinja template accepts. Raises UserError if none of TEMPLATES is equal.

    Templates of LLaVA folders take each message as a list of parts, and are compared on one
    question alone: they leave the start token to the tokenizer, and llava-hf's omit or misspell
    ("<\\s>") the end token after an answer, with which LLaVA was trained. Spaces that a
    SentencePiece tokenizer adds before a text are not compared, because some published templates
    write all of them and some only a few.
    """
    choices = (
        "name it by --template of `prepare.py stitch` (a language model) or `prepare.py export` "
        "(a whole LLaVA): " + ", ".join(TEMPLATES)
    )
    if not isinstance(jinja, str):
        raise UserError(f"{where} has no chat template; {choices}")
    adds_space = tokenizer.bytes_of[tokenizer.encode("a")[0]].startswith(b" ")
    optional = f"({'|'.join(map(re.escape, tokenizer.special))}) " if adds_space else "()(?!)"

    def normalize(text):
        return re.sub(optional, r"\1", text)

    conversations = [*((turns, False) for turns in PROBES), (PROBES[1], True)]
    *rendered, rendered_parts = render_jinja(jinja, tokens, conversations, where)
    expected = {i: normalize(text) for i, text in enumerate(rendered) if text is not None}
    for name, space in itertools.product(TEMPLATES, ["", " "] if adds_space else [""]):
        if 0 in expected and expected == {
            i: normalize(render_text(PROBES[i], tokenizer, name, space)) for i in expected
        }:
            return name
    if rendered_parts is not None:
        for name in TEMPLATES:
            start = TEMPLATES[name]["start"]
            ours = normalize(render_text(PROBES[1], tokenizer, name)).removeprefix(start)
            if ours == normalize(rendered_parts).removeprefix(start):
                return name
    raise UserError(
        f"{where}: its chat template writes {expected.get(0)!r:.1000}, as none of ours does; "
        f"{choices}"
    )


def render_text(turns, tokenizer, template, space=""):
    """Returns a conversation as one text, with `space` before each text that is encoded alone."""
    stub = SimpleNamespace(
        special={name: (name,) for name in tokenizer.special},
        encode=lambda text, _: [space + text],
        prefix_space=None,
    )
    return "".join("".join(part) for part in render_conversation(turns, stub, template)[0])


def render_jinja(jinja, tokens, conversations, where):
    """Returns what a Jinja template writes for each conversation, and None for what it refuses.

    conversations: (turns, parts) each, as in jinja.py. Raises UserError if the template takes more
    time or memory than is allowed.
    """
    request = json.dumps({"jinja": jinja, "tokens": tokens, "conversations": conversations})
    script = Path(__file__).with_name("jinja.py")
    command = [sys.executable, "-P", str(script), str(JINJA_SECONDS), str(JINJA_BYTES)]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
        raise UserError(
            f"{where}: its chat template did not finish within {JINJA_SECONDS} s and "
            f"{JINJA_BYTES >> 20} MiB: {error:.200}"
        )
    return json.loads(done.stdout)


def add_tile_tags(ids, loss_mask, images, tokenizer, image_config):
    """Returns (ids, loss_mask, images) with a text before each tile, as NVLM (Dai et al. 2024).

    ids, loss_mask: of render_conversation; images: a ProcessedImage per IMAGE_TOKEN_ID. If the
    image config has `tags`, each tile becomes an image of its own, after a text with its number
    that has no loss. Otherwise the arguments are returned unchanged.
    """
    if not image_config.get("tags"):
        return ids, loss_mask, images
    if ids.count(IMAGE_TOKEN_ID) != len(images):
        raise UserError(f"{ids.count(IMAGE_TOKEN_ID)} image tokens but {len(images)} images")
    tagged_ids, tagged_mask, tile_images, remaining = [], [], [], iter(images)
    for token_id, has_loss in zip(ids, loss_mask, strict=True):
        new = [token_id]
        if token_id == IMAGE_TOKEN_ID:
            image = next(remaining)
            new = []
            for text in image_processing.tile_tags(len(image.tiles), image_config):
                new += [*tokenizer.encode(text), IMAGE_TOKEN_ID]
            index = image_processing.image_feature_index(image.size, image_config, 1)
            for n in range(len(image.tiles)):
                tile_images.append(
                    image._replace(tiles=image.tiles[n : n + 1], feature_index=index)
                )
        tagged_ids += new
        tagged_mask += [has_loss] * len(new)
    return tagged_ids, tagged_mask, tile_images


# ---- prompts ----


def place_images(text, image_count, where="the question"):
    """Returns a question with one <image> per image; they come first if the text has none.

    Raises UserError, which begins with `where`, if the text has another number of them.
    """
    placed = text.count("<image>")
    if placed not in (0, image_count):
        raise UserError(f"{where}: {placed} <image> in its text, but {image_count} images")
    return text if placed else "<image>\n" * image_count + text


def encode_prompt(checkpoint, turns, images):
    """Returns the prompt's ids for `generate`: a conversation that ends before an answer.

    Each image is as many IMAGE_TOKEN_IDs as it has tokens. turns: [(role, text)]; images: a
    ProcessedImage per <image>.
    """
    ids, loss_mask = render_conversation(turns, checkpoint.tokenizer, checkpoint.chat_template)
    ids, _, images = add_tile_tags(
        ids, loss_mask, images, checkpoint.tokenizer, checkpoint.image_config
    )
    return expand_image_tokens(ids, [len(image.feature_index) for image in images]).tolist()
