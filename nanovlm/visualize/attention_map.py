"""Where a model looks while it answers: a page with a heat map over the image for every token.

record_attention    the attention weights of each forward pass, from its own queries and keys
image_cells         where each image token lies on the tiles that the model gets
masked_patch_test   how far the probability of a token falls if its most attended patches are
                    covered: high attention does not prove influence
logit_lens          what each image token would say next, layer by layer (nostalgebraist 2020)
record_answer      all of these for one question; write_page and write_image show them
"""

import base64
import contextlib
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from .. import IMAGE_TOKEN_ID, UserError
from ..cli import CONTROL_CHARACTERS
from ..data.chat_template import encode_prompt, end_token_id
from ..data.image_processing import tile_count, tile_grid, tile_to_image, tokens_per_tile
from ..data.packing import collate_images
from ..evals.report import data_uri
from ..evals.runner import check_prompt_lengths
from ..inference.generate import generate
from .samples import GAP, token_as_text

MAX_BYTES = 150_000  # of attention weights on a page, as one byte each
MAX_MASKED = 64  # answer tokens with a masked-patch test, which takes two forward passes each
MASKED_SHARE = 8  # one image token in so many is masked
MAX_LENS_WORDS = 6000
MAX_WORD = 16  # tokens of an answer that was generated before
ATTENTION_PAGE = Path(__file__).with_name("attention_map.html")


class AnswerRecord(NamedTuple):
    """An answer, and what the model did for each of its T tokens."""

    question: str
    answer: str
    tokens: list  # the texts of the answer's tokens
    steps: list  # attention weights_LHS of each token, over the S tokens before it
    image_positions: torch.Tensor  # where the N image tokens stand in the prompt
    prompt_length: int
    images: list  # (grid of the tiles, its cells) of each image
    masked: list  # (probability, probability masked, the same elsewhere) of the first tokens
    lens: list  # (layer, the likeliest word of each image token); empty if not asked for


# ---- attention ----


@contextlib.contextmanager
def record_attention(decoder):
    """Yields a list that grows by one weights_LHS with each forward pass of the decoder.

    They are the attention weights of the pass's last token, for a batch of one: the sequence's next
    token is predicted from there. They come from the very queries and keys of the pass.
    """
    steps, layers = [], []

    def record(attention, inputs):
        layers.append(last_query_weights(*inputs[:2], attention.window))
        if len(layers) == len(decoder.layers):
            steps.append(torch.stack(layers).cpu())
            layers.clear()

    handles = [layer.attention.register_forward_pre_hook(record) for layer in decoder.layers]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def last_query_weights(q_BTHK, k_BSGK, window=None):
    """Returns weights_HS of the last query: softmax(query · key / sqrt(K)), as in
    models/attention.py."""
    q_HK, k_SGK = q_BTHK[0, -1].float(), k_BSGK[0].float()
    k_SHK = k_SGK.repeat_interleave(len(q_HK) // k_SGK.shape[1], dim=1)
    scores_HS = torch.einsum("hk,shk->hs", q_HK, k_SHK) / math.sqrt(q_HK.shape[1])
    if window is not None:
        scores_HS[:, : max(scores_HS.shape[1] - window, 0)] = -math.inf
    return scores_HS.softmax(-1)


# ---- geometry ----


def image_cells(image, image_config):
    """Returns (grid, cells): a PIL image of all tiles, and each image token's (x, y, size) on it.

    The tiles lie in their grid; the overview, if there is one, stands left of it. The cell of a
    token that ends a row (LLaVA-NeXT's newline) is None.
    """
    tile, tokens, count = image_config["tile"], tokens_per_tile(image_config), len(image.tiles)
    rows, columns = 1, count  # with tags, each tile may be an image of its own
    for most in (count, count - 1):  # with and without an overview
        if most and tile_count(image.size, image_config, most) == count:
            rows, columns = tile_grid(image.size, image_config, most)
    origins = [(x * (tile + GAP), y * (tile + GAP)) for y in range(rows) for x in range(columns)]
    if count > len(origins):
        origins = [(x + tile + 4 * GAP, y) for x, y in origins]
        is_first = image_config["fit"] in ("anyres", "grid")
        origins = [(0, 0), *origins] if is_first else [*origins, (0, 0)]
    width, height = (max(edges) + tile for edges in zip(*origins, strict=True))
    grid = Image.new("RGB", (width, height), "white")
    for origin, tile_CYX in zip(origins, image.tiles, strict=True):
        grid.paste(tile_to_image(tile_CYX), origin)
    cells = []
    for feature in image.feature_index.tolist():
        number, place = divmod(feature, tokens)
        (left, top), (x, y, size) = origins[number], feature_cell(place, image_config)
        cells.append((left + x, top + y, size) if feature >= 0 else None)
    return grid, cells


def feature_cell(place, image_config):
    """Returns (x, y, size), in pixels, of the square of a tile that has image feature `place`."""
    size = image_config["patch"] * image_config["shuffle"]
    side = image_config["tile"] // size
    return place % side * size, place // side * size, size


# ---- tests of what the attention means ----


def masked_patch_test(checkpoint, prompt, answer, inputs, weights_TN):
    """Returns (probability, masked, elsewhere) of each of the first tokens of an answer.

    masked: the token's probability if the most attended image tokens' pixels are grey; elsewhere:
    if as many others' are. weights_TN: attention of each answer token to each image token.
    """
    N = weights_TN.shape[1]
    count, results = math.ceil(N / MASKED_SHARE), []
    generator = torch.Generator().manual_seed(0)
    for t, weights_N in enumerate(weights_TN[:MAX_MASKED]):
        most = weights_N.argsort(descending=True)
        others = most[count:][torch.randperm(N - count, generator=generator)]
        ids, probabilities = prompt + answer[:t], []
        for masked in (most[:0], most[:count], others[:count]):
            masked_inputs = mask_tokens(inputs, masked, checkpoint.image_config)
            logits_V = next_token_logits(checkpoint.model, ids, masked_inputs)
            probabilities.append(float(logits_V.softmax(-1)[answer[t]]))
        results.append(probabilities)
    return results


def mask_tokens(inputs, numbers, image_config):
    """Returns the inputs with the mean color in place of the pixels of some image tokens."""
    tiles_NCYX = inputs["tiles_NCYX"].clone()
    color_C11 = (torch.tensor(image_config["mean"]) * 255).to(torch.uint8).view(3, 1, 1)
    for feature in inputs["image_feature_index"][numbers].tolist():
        if feature >= 0:  # a newline has no pixels
            number, place = divmod(feature, tokens_per_tile(image_config))
            x, y, size = feature_cell(place, image_config)
            tiles_NCYX[number, :, y : y + size, x : x + size] = color_C11
    return inputs | {"tiles_NCYX": tiles_NCYX}


@torch.inference_mode()
def next_token_logits(model, ids, inputs):
    """Returns logits_V (float32) of the token after `ids`, by a forward pass without a cache."""
    device = model.decoder.embed_tokens.weight.device
    ids_1T = torch.tensor([ids], device=device)
    tiles_NCYX = inputs["tiles_NCYX"].to(device)
    x_1TD = model.embed(ids_1T, tiles_NCYX, inputs["image_feature_index"])
    hidden_1TD = model.decoder(x_1TD, torch.arange(len(ids), device=device)[None])
    return model.decoder.lm_head(hidden_1TD[0, -1]).float()


@torch.inference_mode()
def logit_lens(checkpoint, prompt, inputs):
    """Returns [(layer, words)]: of each image token the word that its vector stands for.

    A layer's output goes through the last norm and the head, as if the layers after it were not
    there. Of many layers, some are left out.
    """
    model, layers = checkpoint.model, checkpoint.model.decoder.layers
    is_image = torch.tensor(prompt) == IMAGE_TOKEN_ID
    hidden = []
    handles = [
        layer.register_forward_hook(lambda _, inputs, out: hidden.append(out[0]))
        for layer in layers
    ]
    next_token_logits(model, prompt, inputs)
    for handle in handles:
        handle.remove()
    step = math.ceil(len(layers) * int(is_image.sum()) / MAX_LENS_WORDS) or 1
    lens = []
    for number in range(len(layers) - 1, -1, -step):
        hidden_ND = hidden[number][is_image]
        ids = model.decoder.lm_head(model.decoder.norm(hidden_ND)).argmax(-1).tolist()
        lens.insert(0, (number + 1, [token_text(i, checkpoint.tokenizer) for i in ids]))
    return lens


# ---- one question ----


def record_answer(
    checkpoint, turns, images, with_lens=False, with_test=True, answer=(), first=0, **generation
):
    """Answers a conversation. Returns an AnswerRecord.

    with_lens, with_test: also run logit_lens and masked_patch_test. answer: the ids of an answer
    that was generated before; the record is that of answer[first:]. generation: options of
    `generate`. Raises UserError if the answer or the sequence is impossible.
    """
    prompt, question = encode_prompt(checkpoint, turns, images), turns[-1][1]
    end = end_token_id(checkpoint.tokenizer, checkpoint.chat_template)
    inputs = collate_images(images, checkpoint.image_config)
    with record_attention(checkpoint.model.decoder) as steps:
        if answer:
            check_answer(answer, first, checkpoint.shapes["decoder"]["vocab_size"])
            for t in range(first, len(answer)):
                next_token_logits(checkpoint.model, prompt + answer[:t], inputs)
        else:
            check_prompt_lengths(checkpoint, [len(prompt)], generation["max_tokens"])
            generated = generate(
                checkpoint.model, [prompt], **inputs, stop={end}, cuda_graph=(), **generation
            )
            answer = [next_id for (next_id,) in generated]
    positions = (torch.tensor(prompt) == IMAGE_TOKEN_ID).nonzero().flatten()
    before, tokens, masked = prompt + answer[:first], answer[first:], []
    if with_test and images:
        weights_TN = torch.stack([weights[..., positions].mean((0, 1)) for weights in steps])
        masked = masked_patch_test(checkpoint, before, tokens, inputs, weights_TN)
    return AnswerRecord(
        question=question.replace("<image>", "").strip(),
        answer=checkpoint.tokenizer.decode([i for i in tokens if i != end]),
        tokens=[token_text(i, checkpoint.tokenizer) for i in tokens],
        steps=steps,
        image_positions=positions,
        prompt_length=len(prompt),
        images=[image_cells(image, checkpoint.image_config) for image in images],
        masked=masked,
        lens=logit_lens(checkpoint, prompt, inputs) if with_lens and images else [],
    )


def check_answer(answer, first, vocab_size):
    """Raises UserError unless answer[first:] are 1 to MAX_WORD ids of a vocabulary."""
    is_known = all(type(i) is int and 0 <= i < vocab_size for i in answer)
    if not is_known or not 0 <= first < len(answer) <= first + MAX_WORD:
        raise UserError(f"{len(answer)} ids from {first} on: give 1 to {MAX_WORD} of the model's")


def token_text(token_id, tokenizer):
    return token_as_text(token_id, tokenizer).translate(CONTROL_CHARACTERS)


# ---- the page and the image ----


def attention_views(record):
    """Yields (layer, head, weights_TN, shares): the mean over all, each layer's mean, each head.

    Layers and heads count from 1; 0 is the mean. weights_TN: attention to the image tokens.
    shares: attention to the parts of ATTENDED_PARTS; they sum to one.
    """
    L, H = record.steps[0].shape[:2]
    yield 0, 0, *split_attention(record, slice(None), slice(None))
    for layer in range(L):
        yield layer + 1, 0, *split_attention(record, slice(layer, layer + 1), slice(None))
    for layer, head in itertools.product(range(L), range(H)):
        parts = slice(layer, layer + 1), slice(head, head + 1)
        yield layer + 1, head + 1, *split_attention(record, *parts)


ATTENDED_PARTS = ("first token", "image", "rest of the prompt", "answer so far")


def split_attention(record, layers, heads):
    """Returns (weights_TN, shares) of `attention_views`: the mean over some layers and heads."""
    prompt, positions = record.prompt_length, record.image_positions
    longest = record.steps[-1].shape[-1]
    part = torch.full((longest,), 3)  # of each token, a number of ATTENDED_PARTS
    part[:prompt], part[0], part[positions] = 2, 0, 1
    weights, shares = [], []
    for weights_LHS in record.steps:
        mean = weights_LHS[layers, heads].mean((0, 1))  # of each token before
        weights.append(mean[positions])
        of_parts = torch.zeros(len(ATTENDED_PARTS)).index_add(0, part[: len(mean)], mean)
        shares.append([round(share, 3) for share in of_parts.tolist()])
    return torch.stack(weights), shares


def encode_weights(weights_TN):
    """Returns base64 of one byte per weight: the root of its share of the token's largest one.

    The root shows weak weights too.
    """
    largest_T1 = weights_TN.amax(1, keepdim=True) if weights_TN.numel() else weights_TN
    bytes_TN = ((weights_TN / largest_T1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(bytes_TN.numpy().tobytes()).decode()


def page_data(record):
    """Returns what the page shows, as plain lists and texts. Heads that take more than MAX_BYTES
    are left out."""
    views, size = [], 0
    for layer, head, weights_TN, shares in attention_views(record):
        size += weights_TN.numel()
        if size > MAX_BYTES and views:
            break
        view = {"layer": layer, "head": head, "shares": shares}
        views.append(view | {"weights": encode_weights(weights_TN)})
    images, first = [], 0
    for grid, cells in record.images:
        image = {"src": data_uri(grid, quality=85), "width": grid.width, "height": grid.height}
        images.append(image | {"cells": cells, "first": first})
        first += len(cells)
    L, H = record.steps[0].shape[:2]
    return {
        "question": record.question,
        "tokens": record.tokens,
        "parts": ATTENDED_PARTS,
        "views": views,
        "images": images,
        "tests": record.masked,
        "masked": math.ceil(first / MASKED_SHARE),
        "lens": record.lens,
        "layers": L,
        "heads": H,
    }


def page_html(record):
    """Returns an HTML page that needs no other file."""
    # "<" would end the element that the data are in.
    data = json.dumps(page_data(record)).replace("<", "\\u003c")
    return ATTENTION_PAGE.read_text().replace("DATA", data, 1)


def write_page(record, path):
    Path(path).write_text(page_html(record))


def draw_heat(grid, cells, weights_N):
    """Returns the grid with dark cells; a cell is bright if its image token gets attention."""
    mask = Image.new("L", grid.size, 0)
    draw = ImageDraw.Draw(mask)
    heats = (weights_N / weights_N.max()).sqrt().tolist()
    for cell, heat in zip(cells, heats, strict=True):
        if cell:
            x, y, size = cell
            draw.rectangle((x, y, x + size - 1, y + size - 1), round(210 * (1 - heat)))
    return Image.composite(Image.new("RGB", grid.size, "black"), grid, mask)


def write_image(record, path, columns=6, width=150, line=22):
    """Writes a PNG: the tokens of the answer, each above the image and its heat map.

    It shows the mean over all layers and heads. columns: maps in a row; width, line: of a map and
    of a line of text, in pixels.
    """
    _, _, weights_TN, _ = next(attention_views(record))
    heights = [round(width * image.height / image.width) for image, _ in record.images]
    height, rows = line + sum(heights) + 2 * GAP, math.ceil(len(record.tokens) / columns)
    image = Image.new("RGB", (columns * (width + 2 * GAP), rows * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(line * 0.7)
    for t, text in enumerate(record.tokens):
        x, y, first = t % columns * (width + 2 * GAP), t // columns * height, 0
        draw.text((x, y), text.strip(), "black", font)
        for (grid, cells), map_height in zip(record.images, heights, strict=True):
            heat = draw_heat(grid, cells, weights_TN[t, first : first + len(cells)])
            image.paste(heat.resize((width, map_height), Image.Resampling.NEAREST), (x, y + line))
            y, first = y + map_height, first + len(cells)
    image.save(path)
