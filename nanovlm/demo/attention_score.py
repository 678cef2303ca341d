"""Does the model look where the food is? The fridges know: every food has a square of its own.

For each food word of an answer: is the image token with the largest attention weight the one of the
food's square? And the logit lens: does this image token's vector say the food?
"""

from typing import NamedTuple

import torch

from ..checkpoints.checkpoint import load_checkpoint
from ..data.image_processing import load_image
from ..visualize.attention_map import record_answer, split_attention
from .fridge import SHELVES, describe_scene, held_out_scene

READING = "What is in the fridge?"
SQUARES = 16  # of a fridge, and image tokens: four rows of four


class AttentionScore(NamedTuple):
    words: int  # food words in correct answers
    mean: float  # share of words with the right square, for the mean over all layers and heads
    by_head: torch.Tensor  # (L, H): the same for each head
    by_lens: list  # (layer, share of the squares that say their food)


def attention_score(model, images, fridges=80, seed=0):
    """Returns an AttentionScore over held-out fridges whose answer is right; None if none is.

    images: the folder of the demonstration's images, drawn with `seed`.
    """
    checkpoint = load_checkpoint(model)
    hits_mean, hits_heads, hits_lens = [], [], []
    for number in range(fridges):
        _, scene, _ = held_out_scene(number, seed)
        image = load_image(f"{images}/eval-{number:05d}.jpg", checkpoint.image_config)
        turns = [("user", f"<image>\n{READING}")]
        found = record_answer(checkpoint, turns, [image], True, False, max_tokens=64)
        if "".join(found.tokens[:-1]) != describe_scene(scene):
            continue
        mean_weights, _ = split_attention(found, slice(None), slice(None))
        for t, square in food_words(scene, found.tokens):
            hits_mean.append(mean_weights[t].argmax() == square)
            by_head = found.steps[t][..., found.image_positions].argmax(-1)
            hits_heads.append(by_head == square)
            hits_lens.append([words[square] == found.tokens[t] for _, words in found.lens])
    if not hits_mean:
        return None
    layers = [layer for layer, _ in found.lens]
    shares = torch.tensor(hits_lens).float().mean(0).tolist()
    return AttentionScore(
        words=len(hits_mean),
        mean=torch.stack(hits_mean).float().mean().item(),
        by_head=torch.stack(hits_heads).float().mean(0),
        by_lens=list(zip(layers, shares, strict=True)),
    )


def food_words(scene, tokens):
    """Yields (t, square) for each food of an answer: the number of its first token, its square."""
    starts = {}  # place in the text: the number of the token that begins there
    for t in range(len(tokens)):
        text = "".join(tokens[:t])
        starts[len(text) + tokens[t].startswith(" ")] = t
    place, text = 0, "".join(tokens)
    for row, shelf in enumerate(SHELVES):
        place = text.index(shelf, place)
        for i, food in enumerate(scene[shelf]):
            if food:
                place = text.index(food, place)
                yield starts[place], 4 * row + 1 + i
                place += len(food)


def format_attention_score(score):
    """Returns the score as text, against chance."""
    if score is None:
        return "no fridge is read without an error, so there is no attention score"
    best = int(score.by_head.argmax())
    layer, head = divmod(best, score.by_head.shape[1])
    lens = ", ".join(f"layer {layer} {share:.1%}" for layer, share in score.by_lens)
    return (
        f"the most attended image token is the food's own square for {score.mean:.1%} of "
        f"{score.words} food words (mean over all heads; chance {1 / SQUARES:.1%}), "
        f"{score.by_head.max():.1%} for head {head + 1} of layer {layer + 1}\n"
        f"the square's image token says its food (logit lens): {lens}"
    )
