"""The figures of the READMEs, drawn from a finished demonstration:

answers.png   the image of a fridge, and the model's answers to questions about it
losses.png    the validation loss of each stage, with the images and with blank ones
attention.png which image tokens each food word of an answer attends to
sequence.png  a packed sequence: its image tokens, its text, its loss mask

Positions and sizes are in pixels of a web page. A figure has DENSITY² pixels for each of them, for
sharp text on screens of double density.
"""

import math
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError, files
from ..checkpoints.checkpoint import load_checkpoint
from ..data.dataset import PreparedDataset
from ..data.image_processing import load_image, tile_to_image
from ..data.packing import PackedDataLoader
from ..data.tokenizer import Tokenizer
from ..evals.runner import generate_answers
from ..visualize.attention_map import draw_heat, record_answer, split_attention
from ..visualize.samples import token_as_text
from .fridge import FOODS

PHOTO = "data/demo/fridge/fridge.jpg"
WIDTH, MARGIN, DENSITY = 840, 20, 2
SMOOTHING = 2  # a figure is drawn so many times larger, then reduced: its edges are smooth
BLACK, GREY, LIGHT, WHITE = "#1f2328", "#59636e", "#e8ebef", "#ffffff"
BLUE, ORANGE = "#0a62c9", "#c4510a"
QUESTIONS = (
    "What is in the fridge?",
    "How many fish are there?",
    "Is there any milk?",
    "What is next to the carrot?",
    "What is missing for an omelette?",
)
TRAINED_PARTS = {  # of each stage of the demonstration
    "decoder": "language model, text only",
    "vision": "vision encoder, projector",
    "pretrain": "new projector",
    "sft": "projector, language model",
}
LOSS_CURVES = {
    "blank_image_loss": (ORANGE, "with a blank image"),
    "val_loss": (BLUE, "with the image"),
}


class Canvas:
    """A white image to draw on."""

    def __init__(self, height):
        self.scale = DENSITY * SMOOTHING
        self.image = Image.new("RGB", (WIDTH * self.scale, height * self.scale), WHITE)
        self.draw = ImageDraw.Draw(self.image)
        self.line([(0, 0), (WIDTH, 0), (WIDTH, height), (0, height), (0, 0)], LIGHT, 3)

    def font(self, size):
        return ImageFont.load_default(size * self.scale)

    def text(self, x, y, text, color=BLACK, size=16, align="l"):
        """y is the middle of the line; x is its left end (align l) or its right end (r)."""
        position = x * self.scale, y * self.scale
        self.draw.text(position, text, color, self.font(size), f"{align}m")

    def box_width(self, text):
        return self.font(15).getlength(text) / self.scale + 12

    def text_box(self, x, y, text, is_label):
        """Text in a box, blue if it is a label; y is the middle of the box."""
        corners = x, y - 13, x + self.box_width(text), y + 13
        corners = [corner * self.scale for corner in corners]
        self.draw.rounded_rectangle(corners, 5 * self.scale, BLUE if is_label else LIGHT)
        self.text(x + 6, y, text, WHITE if is_label else BLACK, 15)

    def line(self, points, color, width=1.0):
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, color, round(width * self.scale), joint="curve")

    def dot(self, x, y, color):
        self.draw.circle((x * self.scale, y * self.scale), 4 * self.scale, color)

    def paste(self, image, x, y, width, resample=Image.Resampling.NEAREST):
        """A square image."""
        resized = image.resize((width * self.scale, width * self.scale), resample)
        self.image.paste(resized, (round(x * self.scale), round(y * self.scale)))

    def save(self, path):
        """Write a PNG of 256 colors, which takes a third of the bytes of all colors."""
        image = self.image.reduce(SMOOTHING)
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=0)
        image.save(path, optimize=True)


def check_finished():
    """Raises UserError unless there is a finished demonstration."""
    for path in ("out/demo/scores.json", "data/demo/chats", PHOTO):
        if not Path(path).exists():
            raise UserError(f"{path} is missing: run `python train.py`, the demonstration, first")


def draw_figures(out):
    """Write the figures into a folder. Raises UserError if there is no finished demonstration."""
    check_finished()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint("out/demo/sft")
    draw_answers(PHOTO, checkpoint, out / "answers.png")
    draw_attention(PHOTO, checkpoint, out / "attention.png")
    draw_losses("out/demo", out / "losses.png")
    draw_sequence("data/demo/chats", out / "sequence.png")


def draw_answers(photo, checkpoint, path):
    image = load_image(photo, checkpoint.image_config)
    prompts = [(f"<image>\n{question}", [image]) for question in QUESTIONS]
    outputs = generate_answers(checkpoint, prompts, max_tokens=64)
    canvas = Canvas(height=368)
    canvas.paste(Image.open(photo), MARGIN, MARGIN, 328, Image.Resampling.LANCZOS)
    for i, (question, output) in enumerate(zip(QUESTIONS, outputs, strict=True)):
        canvas.text(376, 34 + 68 * i, question)
        canvas.text_box(376, 64 + 68 * i, output.answer, is_label=True)
    canvas.save(path)


def draw_attention(photo, checkpoint, path):
    """A heat map for each food word of the answer: the mean over all layers and heads."""
    image, turns = (
        load_image(photo, checkpoint.image_config),
        [("user", f"<image>\n{QUESTIONS[0]}")],
    )
    found = record_answer(checkpoint, turns, [image], with_test=False, max_tokens=64)
    weights, _ = split_attention(found, slice(None), slice(None))
    words = [t for t, token in enumerate(found.tokens) if token.strip() in FOODS]
    canvas, width = Canvas(height=196), 126
    for n, t in enumerate(words[:6]):
        left = MARGIN + n * (width + 8.8)
        canvas.paste(draw_heat(*found.images[0], weights[t]), left, MARGIN, width)
        canvas.text(left, MARGIN + width + 24, found.tokens[t].strip())
    canvas.save(path)


def read_validations(run):
    """Returns the lines of a run's log that have a val_loss."""
    return [line for line in files.read_log(f"{run}/log.jsonl") if "val_loss" in line]


def draw_losses(run, path):
    panels = {}
    for stage, parts in TRAINED_PARTS.items():
        panels[stage] = parts, read_validations(f"{run}/{stage}")
    draw_loss_panels(panels, path)


def draw_loss_panels(panels, path):
    """Validation losses of up to four runs. panels: {title: (a note, lines of the log)}."""
    losses = [line[name] for _, log in panels.values() for line in log for name in LOSS_CURVES]
    canvas = Canvas(height=404)
    canvas.text(MARGIN, 30, "Validation loss", size=18)
    for x, (color, name) in zip((494, 688), LOSS_CURVES.values(), strict=True):
        canvas.dot(x, 30, color)
        canvas.text(x + 12, 30, name, color)
    for n, (title, (note, log)) in enumerate(panels.items()):
        draw_loss_curves(canvas, 44 + 200 * n, title, note, log, highest=math.ceil(max(losses)))
    canvas.save(path)


def draw_loss_curves(canvas, left, title, note, log, highest):
    """The curves of one run. highest: the loss at the upper end."""
    right, bottom, height = left + 170, 360, 232
    canvas.text(left, 70, title)
    canvas.text(left, 92, note, GREY, 14)
    for loss in range(highest + 1):
        y = bottom - height * loss / highest
        canvas.line([(left, y), (right, y)], LIGHT)
        canvas.text(left - 8, y, str(loss), GREY, 14, "r")
    last = log[-1]
    canvas.text(left, bottom + 20, "0", GREY, 14)
    canvas.text(right, bottom + 20, f"{last['step']} steps", GREY, 14, "r")
    y = 0
    for name, (color, _) in LOSS_CURVES.items():
        points, above = [], y
        for line in log:
            x = left + (right - left) * line["step"] / last["step"]
            points.append((x, bottom - height * line[name] / highest))
            canvas.dot(*points[-1], color)
        canvas.line(points, color, 2.5)
        # Below the curve if this is just below another one: labels must not lie on each other.
        y = points[-1][1]
        shift = 15 if 0 < y - above < 30 else -15
        canvas.text(right, y + shift, f"{last[name]:#.2g}", color, 15, "r")


def draw_sequence(data, path):
    samples = PreparedDataset(data)
    loader = PackedDataLoader(samples, seq_len=320, global_batch_size=1, micro_batch_size=1, seed=0)
    batch, _ = next(loader)[0]
    tiles = [tile_to_image(tile) for tile in batch["tiles_NCYX"].numpy()]
    tile, patch, shuffle = (samples.image_config[name] for name in ("tile", "patch", "shuffle"))
    canvas = Canvas(height=590)
    for n, image in enumerate(tiles[:2]):
        draw_tile(canvas, image, MARGIN + 220 * n, tile // patch, shuffle)
    lines = (
        f"A tile has {tile} by {tile} pixels. It is cut into",
        f"{(tile // patch) ** 2} patches of {patch} by {patch} pixels (thin lines).",
        f"{shuffle} by {shuffle} of them give the feature of one",
        "image token (thick lines).",
    )
    for i, line in enumerate(lines):
        canvas.text(470, 30 + 23 * i, line)
    crops, size = [], patch * shuffle  # crops: the part of a tile for each image token
    for image, y, x in product(tiles, range(0, tile, size), range(0, tile, size)):
        crops.append(image.crop((x, y, x + size, y + size)))
    canvas.paste(crops[1], 470, 123, 26)
    canvas.text(530, 136, "image token: no loss")
    canvas.text_box(470, 170, "text", is_label=False)
    canvas.text(530, 170, "prompt: no loss")
    canvas.text_box(470, 204, "text", is_label=True)
    canvas.text(530, 204, "answer: a label, in the loss")
    draw_tokens(canvas, batch, iter(crops), Tokenizer.load(data))
    canvas.save(path)


def draw_tile(canvas, image, left, patches, shuffle):
    """A tile with thin lines between patches, and thick lines between image tokens."""
    top, width = MARGIN, 200
    canvas.paste(image, left, top, width)
    for step, color, line_width in ((1, GREY, 0.5), (shuffle, BLACK, 1.5)):
        for i in range(0, patches + 1, step):
            at = width * i / patches
            canvas.line([(left + at, top), (left + at, top + width)], color, line_width)
            canvas.line([(left, top + at), (left + width, top + at)], color, line_width)


def draw_tokens(canvas, batch, crops, tokenizer):
    """The tokens of a packed sequence; crops: the part of a tile for each image token."""
    names = ("ids_BT", "targets_BT", "documents_BT")
    ids, targets, documents = (batch[name][0].tolist() for name in names)
    x, y = MARGIN, 200
    for t, token_id in enumerate(ids):
        if t == 0 or documents[t] != documents[t - 1]:
            length = documents.count(documents[t])
            x, y = MARGIN, y + 82
            note = f"Sample {documents[t] + 1}: {length} tokens, positions 0 to {length - 1}"
            canvas.text(x, y - 28, note, GREY, 15)
        crop = next(crops) if token_id == IMAGE_TOKEN_ID else None
        text = "" if crop else token_as_text(token_id, tokenizer).strip()
        width = 26 if crop else canvas.box_width(text)
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 32
        if y > 550:
            canvas.text(x, y, f"… and {len(ids) - t} more tokens", GREY, 15)
            return
        if crop:
            canvas.paste(crop, x, y - 13, width)
        else:
            canvas.text_box(x, y, text, is_label=t > 0 and targets[t - 1] != IGNORE_INDEX)
        x += width + 4
