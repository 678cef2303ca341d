import numpy as np
from PIL import Image
from nanovlm import Mistake
def tokens_per_tile(policy): return (policy["tile"] // policy["patch"] // policy["shuffle"]) ** 2
def picture_tokens(tiles, policy): return tiles * tokens_per_tile(policy)
def load_tiles(path, policy):
    p = Image.open(path).convert("RGB").resize((policy["tile"],) * 2, Image.BICUBIC)
    return np.asarray(p).transpose(2, 0, 1)[None]
