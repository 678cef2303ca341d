"""A prepared sample as an image of its tiles, or as a page of its tokens and labels."""

import html
from pathlib import Path

from PIL import Image

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..data.packing import collate
from ..evals.report import data_uri
from .attention_map import image_cells, token_text
from .samples import GAP

MIN_TILE = 256  # pixels across a tile on the image; smaller ones are enlarged
SAMPLE_PAGE = Path(__file__).with_name("sample_page.html")


def draw_tiles(images, image_config):
    """Returns one image: the tiles of each image in their grid, the images below one another."""
    grids = [image_cells(image, image_config)[0] for image in images]
    width, top = max(grid.width for grid in grids), 0
    height = sum(grid.height + GAP for grid in grids) - GAP
    drawing = Image.new("RGB", (width, height), "white")
    for grid in grids:
        drawing.paste(grid, (0, top))
        top += grid.height + GAP
    scale = -(-MIN_TILE // image_config["tile"])
    return drawing.resize((width * scale, height * scale), Image.Resampling.NEAREST)


def sample_page(samples, indices, tokenizer):
    """Returns HTML: some samples packed into one sequence, as the model gets it in training.

    A token with a loss is blue; an image token is the square of pixels that it stands for. Below
    the pointer a token shows its id, its position and the label that it predicts.
    """
    batch, _ = collate(samples, [indices])
    columns = (batch[name][0].tolist() for name in ("ids_BT", "targets_BT", "positions_BT"))
    names, crops = (samples.names[i] for i in indices), image_crops(samples, indices)
    parts, labels, has_loss = [], 0, False
    for token_id, target, position in zip(*columns, strict=True):
        if position == 0:  # a new document; nothing predicts its first token
            parts.append(f"</div><h2>{html.escape(next(names))}</h2><div class=tokens>")
        note = html.escape(token_note(token_id, target, position, tokenizer))
        if token_id == IMAGE_TOKEN_ID:
            uri = data_uri(next(crops), "png")
            parts.append(f'<img title="{note}" src="{uri}" alt="image token">')
        else:
            tag, text = "b" if has_loss else "span", token_text(token_id, tokenizer)
            parts.append(f'<{tag} title="{note}">{html.escape(text)}</{tag}>')
        labels += has_loss
        has_loss = target != IGNORE_INDEX
    images, tiles = [image for i in indices for image in samples.stored_sample(i)[2]], ""
    if images:
        uri = data_uri(draw_tiles(images, samples.image_config), "png")
        tiles = f'<img id="tiles" src="{uri}" alt="the tiles">'
    summary = (
        f"{len(indices)} samples, {batch['ids_BT'].shape[1]} tokens. The {labels} blue ones have a "
        "loss: the model learns to predict them. Samples do not attend to each other, and the "
        "positions of each begin at 0."
    )
    page = SAMPLE_PAGE.read_text().replace("SUMMARY", summary).replace("TILES", tiles)
    return page.replace("TOKENS", f"<div>{''.join(parts)}</div>")


def token_note(token_id, target, position, tokenizer):
    """Returns what a token shows below the pointer."""
    name = "image token" if token_id == IMAGE_TOKEN_ID else f"id {token_id}"
    label = "none" if target == IGNORE_INDEX else f"{target} “{token_text(target, tokenizer)}”"
    return f"{name}, position {position}, label: {label}"


def image_crops(samples, indices):
    """Yields the pixels that each image token of some samples stands for, as PIL images."""
    for i in indices:
        for image in samples.stored_sample(i)[2]:
            grid, cells = image_cells(image, samples.image_config)
            for cell in cells:
                x, y, size = cell or (0, 0, 1)  # a newline has no pixels
                yield grid.crop((x, y, x + size, y + size))
