"""Where the model looked: the weights are those of the forward pass, and each image token's cell is
the square of pixels that it stands for."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import DECODER, VISION, make_vlm
from PIL import Image

import sample
from nanovlm import IMAGE_TOKEN_ID
from nanovlm.checkpoints.checkpoint import Checkpoint, save_checkpoint
from nanovlm.data import image_processing, tokenizer
from nanovlm.data.chat_template import encode_prompt
from nanovlm.data.packing import collate_images
from nanovlm.demo.attention_score import food_words
from nanovlm.inference.generate import generate
from nanovlm.inference.optimize import optimize
from nanovlm.visualize import attention_map

WORDS = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
CONFIG = {"tile": 12, "patch": 3, "shuffle": 2, "resample": "bicubic", "fit": "squash"}
CONFIG |= {"mean": [0.5] * 3, "std": [0.5] * 3}
TILES = CONFIG | {"fit": "tiles", "tiles": 4, "choice": "aspect", "thumbnail": True, "tags": False}
ANYRES = CONFIG | {"fit": "anyres", "pinpoints": [[12, 24], [24, 12], [24, 24]]}
QUESTION = [("user", "<image>\nWhat is this?")]


def make_checkpoint(image_config=CONFIG, **decoder):
    decoder |= {"vocab_size": WORDS.vocab_size}
    model = make_vlm(decoder=decoder, newline=image_config["fit"] == "anyres")
    shapes = {"vision": VISION, "decoder": DECODER | decoder, "shuffle": 2}
    return Checkpoint(model, WORDS, shapes, image_config, "mistral", {"folder": "nowhere"})


def random_image(image_config, size, seed=0):
    """An image of `size` (width, height), as tiles."""
    pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    return image_processing.process_image(Image.fromarray(pixels), size, image_config)


def explain(checkpoint, images, turns=QUESTION, **options):
    return attention_map.record_answer(checkpoint, turns, images, max_tokens=7, **options)


# ---- the weights ----


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("joined", [False, True], ids=["plain", "joined q/k/v"])
def test_weights_are_the_softmax_of_the_pass_itself(window, joined):
    """Those of generation, with its KV cache, equal a float64 softmax over one pass without it."""
    checkpoint = make_checkpoint(sliding_window=window)
    model, image = checkpoint.model, random_image(CONFIG, (12, 12))
    inputs, prompt = collate_images([image], CONFIG), encode_prompt(checkpoint, QUESTION, [image])
    expected, queries = [], []
    for layer in model.decoder.layers:
        layer.attention.register_forward_pre_hook(lambda _, qk: queries.append(qk[:2]))
    answer = [
        i for (i,) in generate(model, [prompt], **inputs, stop=(), max_tokens=7, cuda_graph=())
    ]
    queries.clear()
    attention_map.next_token_logits(model, prompt + answer[:-1], inputs)
    for q_BTHK, k_BSGK in queries:
        k_SHK = k_BSGK[0].double().repeat_interleave(3, dim=1)
        scores_HTS = torch.einsum("thk,shk->hts", q_BTHK[0].double(), k_SHK) / 8**0.5
        distance_TS = torch.arange(len(k_SHK))[:, None] - torch.arange(len(k_SHK))
        hidden_TS = (distance_TS < 0) | (distance_TS >= (window or 1000))
        expected.append(scores_HTS.masked_fill(hidden_TS, -torch.inf).softmax(-1))
    if joined:
        optimize(model)
    steps = explain(checkpoint, [image]).steps
    assert len(steps) == 7
    for t, weights_LHS in enumerate(steps):
        place = len(prompt) - 1 + t
        assert weights_LHS.shape == (3, 6, place + 1)
        torch.testing.assert_close(weights_LHS.sum(-1), torch.ones(3, 6))
        for layer, weights_HTS in enumerate(expected):
            exact_HS = weights_HTS[:, place, : place + 1].float()
            torch.testing.assert_close(weights_LHS[layer], exact_HS, atol=1e-4, rtol=1e-3)


def test_the_weighted_mean_of_the_values_is_what_attention_returns():
    checkpoint, seen = make_checkpoint(), []
    image = random_image(CONFIG, (12, 12))
    for layer in checkpoint.model.decoder.layers:
        layer.attention.register_forward_hook(lambda _, qkv, out: seen.append((qkv[2], out)))
    steps = explain(checkpoint, [image], with_test=False).steps
    for n, (v_BSGK, out_BTHK) in enumerate(seen):
        weights_HS = steps[n // 3][n % 3]
        v_SHK = v_BSGK[0].repeat_interleave(3, dim=1)
        mean_HK = torch.einsum("hs,shk->hk", weights_HS, v_SHK)
        torch.testing.assert_close(mean_HK, out_BTHK[0, -1], atol=1e-5, rtol=1e-4)


def test_the_shares_of_a_token_sum_to_one():
    found = explain(make_checkpoint(), [random_image(CONFIG, (12, 12))])
    views = list(attention_map.attention_views(found))
    for _, _, weights_TN, shares in views:
        torch.testing.assert_close(torch.tensor(shares).sum(1), torch.ones(7), atol=3e-3, rtol=0)
        image_share_T = torch.tensor(shares)[:, 1]
        torch.testing.assert_close(weights_TN.sum(1), image_share_T, atol=1e-3, rtol=0)
    assert views[0][:2] == (0, 0) and views[-1][:2] == (3, 6)


def test_the_record_of_an_answer_that_was_generated_before_is_that_of_its_generation():
    """By a pass without a KV cache for each token: the last five of seven."""
    checkpoint, images = make_checkpoint(), [random_image(CONFIG, (12, 12))]
    ids, prompt = [], encode_prompt(checkpoint, QUESTION, images)
    inputs = collate_images(images, CONFIG)
    for (next_id,) in generate(checkpoint.model, [prompt], **inputs, stop=(), max_tokens=7):
        ids.append(next_id)
    whole = explain(checkpoint, images)
    assert len(whole.tokens) == 7, "no end token"
    late = attention_map.record_answer(checkpoint, QUESTION, images, answer=ids, first=2)
    assert late.tokens == whole.tokens[2:]
    for step, expected in zip(late.steps, whole.steps[2:], strict=True):
        torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-4)
    # the last column covers other image tokens at random
    found, expected = np.array(late.masked)[:, :2], np.array(whole.masked)[2:, :2]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (_, _, weights_TN, shares), *_ = attention_map.attention_views(late)
    (_, _, expected_TN, expected_shares), *_ = attention_map.attention_views(whole)
    torch.testing.assert_close(weights_TN, expected_TN[2:], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(shares, expected_shares[2:], atol=2e-3)


# ---- the cells ----


def painted_tiles(image):
    """The same image with tiles in which each image token's square has a color of its own."""
    tiles_NCYX = np.empty_like(image.tiles)
    for n, y, x in np.ndindex(len(image.tiles), 2, 2):
        square = tiles_NCYX[n, :, 6 * y : 6 * y + 6, 6 * x : 6 * x + 6]
        square[:] = np.array([40 * n, 100 * y, 100 * x])[:, None, None]
    return image._replace(tiles=tiles_NCYX)


@pytest.mark.parametrize(
    "image_config, size",
    [(CONFIG, (20, 9)), (TILES, (25, 11)), (TILES, (11, 12)), (ANYRES, (31, 9)), (ANYRES, (9, 40))],
)
def test_a_cell_shows_the_square_of_its_image_token(image_config, size):
    image = painted_tiles(random_image(image_config, size))
    grid, cells = attention_map.image_cells(image, image_config)
    assert len(cells) == len(image.feature_index)
    for feature, cell in zip(image.feature_index.tolist(), cells, strict=True):
        if feature < 0:  # a newline
            assert cell is None
            continue
        number, place = divmod(feature, 4)
        x, y, edge = cell
        colors = np.asarray(grid)[y : y + edge, x : x + edge].reshape(-1, 3)
        assert np.unique(colors, axis=0).tolist() == [
            [40 * number, 100 * (place // 2), 100 * (place % 2)]
        ]


def test_covering_changes_the_squares_of_the_chosen_tokens_alone():
    inputs = collate_images([random_image(ANYRES, (31, 9))], ANYRES)
    index = inputs["image_feature_index"]
    newline = int((index < 0).nonzero()[0])
    masked = attention_map.mask_tokens(inputs, torch.tensor([1, newline, 5]), ANYRES)
    tiles_NCYX = masked["tiles_NCYX"]
    changed = (tiles_NCYX != inputs["tiles_NCYX"]).any(1)
    expected = torch.zeros_like(changed)
    for feature in (int(index[1]), int(index[5])):
        number, place = divmod(feature, 4)
        y, x = 6 * (place // 2), 6 * (place % 2)
        expected[number, y : y + 6, x : x + 6] = True
    assert (tiles_NCYX[:, 0][expected] == 127).all()
    assert (changed <= expected).all() and changed.sum() > 0.9 * expected.sum()


def test_a_model_that_ignores_the_image_loses_nothing_when_it_is_covered():
    checkpoint = make_checkpoint()
    with torch.no_grad():
        checkpoint.model.projector.linear_2.weight.zero_()
    for probability, masked, elsewhere in explain(
        checkpoint, [random_image(CONFIG, (9, 12))]
    ).masked:
        assert 0 < probability == masked == elsewhere


# ---- the logit lens ----


def test_the_last_layer_of_the_lens_is_the_models_next_token():
    checkpoint, image = make_checkpoint(), random_image(CONFIG, (12, 12))
    inputs, prompt = collate_images([image], CONFIG), encode_prompt(checkpoint, QUESTION, [image])
    lens = attention_map.logit_lens(checkpoint, prompt, inputs)
    assert [layer for layer, _ in lens] == [1, 2, 3]
    end = max(t for t, token_id in enumerate(prompt) if token_id == IMAGE_TOKEN_ID) + 1
    logits_V = attention_map.next_token_logits(checkpoint.model, prompt[:end], inputs)
    assert lens[-1][1][-1] == attention_map.token_text(int(logits_V.argmax()), WORDS)


# ---- the page and the command ----


def read_page(path):
    text = path.read_text()
    assert not re.search(r"(src|href)=|https?:", text)  # nothing is fetched
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))


@pytest.mark.parametrize("image_config, count", [(CONFIG, 2), (ANYRES, 1), (CONFIG, 0)])
def test_a_page_holds_all_that_it_shows(image_config, count, tmp_path):
    images = [random_image(image_config, (31, 9), seed) for seed in range(count)]
    turns = [("user", "<image>" * count + "Is </script> <b>bold</b>?")]
    found = explain(make_checkpoint(image_config), images, turns, with_lens=True)
    attention_map.write_page(found, tmp_path / "page.html")
    data = read_page(tmp_path / "page.html")
    assert data["question"] == "Is </script> <b>bold</b>?" and data["tokens"] == found.tokens
    assert len(data["views"]) == 1 + 3 + 3 * 6 and len(data["images"]) == count
    assert sum(len(image["cells"]) for image in data["images"]) == len(found.image_positions)
    assert len(data["lens"]) == (3 if count else 0)
    assert (tmp_path / "page.html").stat().st_size < 300_000
    attention_map.write_image(found, tmp_path / "image.png")
    Image.open(tmp_path / "image.png").verify()


def test_heads_that_make_the_page_too_large_are_left_out(monkeypatch):
    found = explain(make_checkpoint(), [random_image(CONFIG, (12, 12))])
    monkeypatch.setattr(attention_map, "MAX_BYTES", 6 * 7 * 4)  # tokens · image tokens
    views = attention_map.page_data(found)["views"]
    kinds = [(view["layer"], view["head"]) for view in views]
    assert kinds == [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (1, 2)]


def test_sample_writes_the_page_and_prints_the_same_answer(tmp_path, capsys):
    save_checkpoint(make_checkpoint(), tmp_path / "model")
    random_pixels = np.random.default_rng(3).integers(256, size=(12, 12, 3), dtype=np.uint8)
    Image.fromarray(random_pixels).save(tmp_path / "a.png")
    options = dict(model=f"{tmp_path}/model", image=[f"{tmp_path}/a.png"], prompt="x", max_tokens=5)
    sample.sample(**options)
    plain = capsys.readouterr().out
    sample.sample(**options, attention_map=f"{tmp_path}/page.html", logit_lens=True)
    assert capsys.readouterr().out == plain
    assert len(read_page(tmp_path / "page.html")["tokens"]) == 5


def test_each_food_word_has_the_square_of_its_slot():
    scene = {
        "top": (None, None, "cheese"),
        "middle": (None, "fish", "fish"),
        "bottom": (None, None, None),
        "drawer": ("egg", None, "cake"),
    }
    tokens = ["top", " ch", "eese", ",", " middle", " fish", " fish", ",", " bottom", " nothing"]
    tokens += [",", " drawer", " egg", " cake", "</s>"]
    assert list(food_words(scene, tokens)) == [(1, 3), (5, 6), (6, 7), (12, 13), (13, 15)]
