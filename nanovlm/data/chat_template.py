"""Conversations become token ids and their loss mask, made together in one pass.

`render_conversation` is the one place where ids and loss mask are made. Training, sampling and
evaluation call it. It writes a conversation segment by segment, and each segment says whether its
tokens have a loss. The loss mask is true on the assistant's answers and on the token that ends each
of them, so that the model learns to stop; it is false on everything else. Nothing is searched for
in finished ids.

From the loss mask, `PreparedDataset.read` in dataset.py makes the labels: the next token's id if
the mask is true there, and IGNORE_INDEX (ignore_index of the cross-entropy) otherwise.
"""

import itertools
import re

from .. import IMAGE_TOKEN_ID, UserError
from . import image_processing
from .dataset import expand_image_tokens
from .turns import CAPTION_PROMPT


def render_conversation(turns, tokenizer, template):
    """Returns (ids, loss_mask) of [(role, text)]: two lists of equal length, made in one pass.

    loss_mask is True where a token is a label, that is, has a loss: on the assistant's answers and
    on their end tokens. All other tokens get IGNORE_INDEX as label. ids hold one IMAGE_TOKEN_ID per
    image; dataset.expand_image_tokens repeats it. A conversation that ends in a user's turn is a
    prompt for generation.
    """
    message_tokens = {"<image>": IMAGE_TOKEN_ID}
    token_ids = {"template": tokenizer.special, "message": message_tokens, "answer": {}}
    parts = []  # (text or id, has_loss)
    for text, kind, has_loss in conversation_segments(turns, template):
        parts += [(part, has_loss) for part in split_at_tokens(text, token_ids[kind])]

    def text_and_loss(part):
        return isinstance(part[0], str), part[1]

    ids, loss_mask = [], []
    # Texts side by side are encoded as one, as the published templates do. None crosses a change of
    # the loss mask: no token is half prompt and half answer.
    for (is_text, has_loss), group in itertools.groupby(parts, text_and_loss):
        new = [part for part, _ in group]
        if is_text:
            space = prepend_space(ids, has_loss, tokenizer, TEMPLATES[template])
            new = tokenizer.encode("".join(new), space)
        ids += new
        loss_mask += [has_loss] * len(new)
    return ids, loss_mask


def conversation_segments(turns, template):
    """Yields (text, kind, has_loss) for each segment of a conversation, in order.

    kind: "template" for text of the template, in which names of special tokens become these tokens;
    "message" for a system or user message, in which <image> becomes an image token; "answer" for
    an answer, which is plain text. has_loss: the loss mask of the segment's tokens.
    """
    fields, turns = TEMPLATES[template], list(turns)
    if fields["default_system"] and turns[0][0] != "system":
        turns.insert(0, ("system", fields["default_system"]))
    if fields["system_inside"] and turns[0][0] == "system":
        system = fields["system"].replace("{}", turns.pop(0)[1])
        # Users and assistants alternate.
        i = 0 if fields["system_inside"] == "first" else (len(turns) - 1) // 2 * 2
        turns[i] = ("user", system + turns[i][1])
    yield fields["start"], "template", False
    for i, (role, text) in enumerate(turns):
        if fields["trim"] == "all":
            text = text.strip()
        if role == "assistant":
            text = text.rstrip(" ") if fields["trim"] == "answer" else text
            yield fields["answer"].replace("{}", text), "answer", True
            yield fields["end"], "template", True
            yield fields["after_end"], "template", False
            continue
        if fields["caption_only"] and "<image>" in text:
            text = keep_image_tags(text, is_prompt=i == len(turns) - 1)
        before, after = fields[role].split("{}")
        if not fields["image_space"]:
            text = text.replace("<image>\n", "<image>")
            before = before.rstrip(" ") if text.startswith("<image>") else before
        yield before, "template", False
        yield text, "message", False
        is_last = role == "user" and i >= len(turns) - 2
        yield after + fields["last_opening"] * is_last, "template", False


def keep_image_tags(text, is_prompt):
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


def split_at_tokens(text, token_ids):
    """Returns the parts of a text, with the ids of the tokens that it names in their places."""
    # the longest name first, as Hugging Face finds special tokens
    names = sorted((name for name in token_ids if name in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [token_ids.get(part, part) for part in parts if part]


def prepend_space(ids, is_answer, tokenizer, fields):
    """Returns whether SentencePiece's space stands before the text that follows `ids`.

    None leaves it to the tokenizer. A tokenizer that adds the space only at the start of a
    conversation (Metaspace's "first": Mistral v0.3, LLaVA-1.5) leaves the other spaces to the
    template. Published templates write one before each message, but not after an image and, mostly,
    not after an end token.
    """
    if is_answer and not fields["space_before_answer"]:
        return False
    if tokenizer.prefix_space != "first" or not ids:
        return None
    if ids[-1] == tokenizer.special.get(fields["end"]):
        return fields["space_after_end"]
    return ids[-1] != IMAGE_TOKEN_ID


def end_token_id(tokenizer, template):
    """Returns the id that ends the assistant's turn.

    Raises UserError if the tokenizer lacks the template's start or end token.
    """
    fields = TEMPLATES[template]
    for name in (fields["start"], fields["end"]):
        if name and name not in tokenizer.special:
            raise UserError(
                f"the template {template} writes {name}, "
                "which is not a special token of this tokenizer"
            )
    return tokenizer.special[fields["end"]]


def special_token_names(template):
    """Returns the special tokens of a template, for a tokenizer that is trained for it."""
    text = " ".join(map(str, TEMPLATES[template].values()))
    return list(dict.fromkeys(re.findall(r"<\|\w+\|>|</?s>|\[/?\w+\]|<end_\w+>", text)))


def add_tile_tags(ids, loss_mask, images, tokenizer, image_config):
    """Returns (ids, loss_mask, images) with the texts of image_processing.tile_tags.

    ids, loss_mask: of render_conversation; images: a ProcessedImage per IMAGE_TOKEN_ID. Each tile
    becomes an image of its own, with a text before it that has no loss. In these texts names of
    special tokens become these tokens. If there are none, the arguments are returned unchanged.
    """
    fit = image_config["fit"]
    if not image_config.get("tags") and fit not in ("split", "grid"):
        return ids, loss_mask, images
    tagged_ids, tagged_mask, tile_images, remaining = [], [], [], enumerate(images)
    for token_id, has_loss in zip(ids, loss_mask, strict=True):
        new = [token_id]
        if token_id == IMAGE_TOKEN_ID:
            (number, image), new = next(remaining), []
            index = image_processing.image_feature_index(image.size, image_config, 1)
            tags = image_processing.tile_tags(len(image.tiles), image_config, image.size)
            if fit == "grid" and len(images) > 1:  # as in nanoVLM's training
                tags[0] = f"<image: {number}>{tags[0]}"
            for n, tag in enumerate(tags):
                for part in split_at_tokens(tag, tokenizer.special):
                    new += tokenizer.encode(part) if isinstance(part, str) else [part]
                if n < len(image.tiles):
                    new.append(IMAGE_TOKEN_ID)
                    tile = image.tiles[n : n + 1]
                    tile_images.append(image._replace(tiles=tile, feature_index=index))
        tagged_ids += new
        tagged_mask += [has_loss] * len(new)
    return tagged_ids, tagged_mask, tile_images


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


def place_images(text, image_count, where="the question"):
    """Returns a question with one <image> per image; they come first if the text has none.

    Raises UserError, which begins with `where`, if the text has another number of them.
    """
    placed = text.count("<image>")
    if placed not in (0, image_count):
        raise UserError(f"{where}: {placed} <image> in its text, but {image_count} images")
    return text if placed else "<image>\n" * image_count + text


# ---- templates ----

# What a template writes. {} stands for the message. Names of special tokens count only outside {}:
# a user who types "</s>" types four characters.
TEMPLATE_DEFAULTS = {
    "start": "<s>",  # first token of a conversation
    "system": "{}\n\n",  # a system message
    # None: the system message is a turn. "first", "last": it begins the first or last user message.
    "system_inside": None,
    "default_system": None,  # system message of a conversation that has none
    # A question, and the opening of its answer: a prompt for generation ends after it.
    "user": "[INST]{}[/INST]",
    "last_opening": "",  # what follows the opening of the last answer only
    "answer": "{}",
    "end": "</s>",  # token that ends an answer
    "after_end": "",  # what follows it
    # White space that the published template removes: "all": around each message; "answer": spaces
    # at the end of an answer.
    "trim": None,
    # Where SentencePiece's space stands (prepend_space). A SentencePiece tokenizer adds a space
    # before each text, so "[INST]{}" gives the "[INST] Hello" of Mistral v2 and v3, and the
    # "[INST]Hello" of Tekken.
    "space_before_answer": True,
    "space_after_end": False,
    "caption_only": False,  # the words of a message with an image are left out
    # False: a line break after <image> is left out, and a space before an <image> that begins a
    # message
    "image_space": True,
}
CHATML = {
    "start": "",
    "system": "<|im_start|>system\n{}<|im_end|>\n",
    "user": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "end": "<|im_end|>",
    "after_end": "\n",
}
VICUNA = {"system": "{} ", "user": "USER: {} ASSISTANT:"}
IDEFICS3 = {
    "start": "<|begin_of_text|>",
    "system": "System: {}<end_of_utterance>\n",
    "user": "User: {}<end_of_utterance>\nAssistant:",
    "answer": " {}",
    "end": "<end_of_utterance>",
    "after_end": "\n",
    "image_space": False,
}
TEMPLATE_FIELDS = {  # of each template, where it differs from TEMPLATE_DEFAULTS
    "mistral": {"system_inside": "last", "trim": "answer"},
    "mistral-v1": {"system_inside": "first", "user": "[INST] {} [/INST]", "space_after_end": True},
    "mistral-v7": {"system": "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", "trim": "answer"},
    "chatml": CHATML,
    "smollm2": CHATML
    | {"default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
    # Without thinking. The published one writes today's date; here it is that of jinja.TODAY, as a
    # prompt must not change from day to day.
    "smollm3": CHATML
    | {
        "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
        "system": "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
        "Today Date: 08 July 2025\nReasoning Mode: /no_think\n\n"
        "## Custom Instructions\n\n{}\n\n",
        "user": CHATML["user"] + "<think>\n\n</think>\n",
    },
    "qwen2": CHATML | {"default_system": "You are a helpful assistant."},
    "qwen2.5": CHATML
    | {"default_system": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    # without thinking: the last answer, and no other, begins with an empty block of thoughts
    "qwen3": CHATML | {"last_opening": "<think>\n\n</think>\n\n"},
    "llama2": {
        "start": "",
        "system": "<<SYS>>\n{}\n<</SYS>>\n\n",
        "system_inside": "first",
        "user": "<s>[INST] {} [/INST]",
        "answer": "{} ",
        "trim": "all",
    },
    "llama3": {
        "start": "<|begin_of_text|>",
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "end": "<|eot_id|>",
        "trim": "all",
    },
    "vicuna": VICUNA
    | {
        "default_system": "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    },
    # as llava-hf publishes LLaVA-1.5, but with an end token after each answer, as in LLaVA's
    # training
    "llava": VICUNA,
    "idefics3": IDEFICS3,
    "nanovlm": CHATML | {"image_space": False},
    "smolvlm": IDEFICS3 | {"start": "<|im_start|>"},
    "zephyr": {
        "start": "",
        "system": "<|system|>\n{}</s>\n",
        "user": "<|user|>\n{}</s>\n<|assistant|>\n",
        "after_end": "\n",
        "space_before_answer": False,
    },
    # LLaVA's for pretraining: an image, then its caption. Text without an image is kept. LLaVA ends
    # a caption by a line break; here the token that ends each answer does. For tokenizers with <s>
    # and </s>: SentencePiece and Tekken.
    "plain": {"user": "{}", "caption_only": True},
}
TEMPLATES = {name: TEMPLATE_DEFAULTS | fields for name, fields in TEMPLATE_FIELDS.items()}
