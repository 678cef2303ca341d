"""The whole model: an eye, a projector that turns what it sees into something a brain can read, and the brain.

A picture of 64 × 64 pixels, followed through the demonstration's model:

    tiles_NCYX      (1, 3, 64, 64)   uint8, normalised here
    features_NPD    (1, 64, 128)     one vector for each 8 × 8 patch, from the eye
    features_NPD    (1, 16, 512)     pixel shuffle by 2: every 2 × 2 patches become one token four times as wide
    features_NPD    (1, 16, 128)     through the projector, as wide as the brain's own embeddings
    x_BTD           (1, T, 128)      put where the ids say IMAGE, among the embeddings of the words
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from . import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError
from .decoder import Cache, Decoder
from .generate import Steps, choose
from .loss import linear_cross_entropy
from .vision import Vision


def pixel_shuffle(features_NPD, factor):
    """(N, P, D) -> (N, P / factor², D · factor²): a square of patches becomes one, row by row (InternVL, Chen et al. 2024)."""
    side = int(features_NPD.shape[1] ** 0.5) // factor
    blocks_NYyXxD = features_NPD.unflatten(1, (side, factor, side, factor))
    return blocks_NYyXxD.transpose(2, 3).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """Two layers with a GELU between (LLaVA-1.5), after an optional pixel shuffle: features_NPD of all tiles -> a vector a token, (N · P, D).
    newline: one more comes last, the vector that is learnt for the end of a picture's row (LLaVA-NeXT)."""

    def __init__(self, *, vision_width, width, shuffle=1, newline=False):
        super().__init__()
        self.shuffle = shuffle
        self.up, self.down = nn.Linear(vision_width * shuffle**2, width), nn.Linear(width, width)
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5) if newline else None

    def forward(self, features_NPD):
        features = self.down(F.gelu(self.up(pixel_shuffle(features_NPD, self.shuffle)))).flatten(0, 1)
        return features if self.newline is None else torch.cat([features, self.newline[None].to(features)])


class VLM(nn.Module):
    """vision, decoder: the keyword arguments of Vision and Decoder; mean, std: three numbers each, of pixels between 0 and 1; newline: whether
    a vector is learnt for the end of a picture's row (LLaVA-NeXT)."""

    def __init__(self, *, vision, decoder, shuffle=1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), newline=False):
        super().__init__()
        self.vision = Vision(**vision)
        self.projector = Projector(vision_width=vision["width"], width=decoder["width"], shuffle=shuffle, newline=newline)
        self.decoder = Decoder(**decoder)
        self.tile = vision["tile"]
        self.register_buffer("mean_C11", torch.tensor(mean, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(std, device="cpu").view(3, 1, 1), persistent=False)

    def see(self, tiles_NCYX):
        """uint8 (N, C, Y, X) -> what the brain reads of all tiles, as the projector gives it."""
        eye, projector = self.vision.patches.weight.dtype, self.projector.up.weight.dtype  # public parts come in dtypes of their own
        return self.projector(self.vision(((tiles_NCYX.float() / 255 - self.mean_C11) / self.std_C11).to(eye)).to(projector))

    def embed(self, ids_BT, tiles_NCYX, places=None):
        """Embeddings of the words with the pictures' features spliced in where the ids say IMAGE, in order: all of them, or those at `places`
        among the features of all tiles, −1 (the last) for a newline."""
        x_BTD = self.decoder.embed(ids_BT.clamp(min=0))
        place_BT = ids_BT == IMAGE_TOKEN_ID
        wanted = int(place_BT.sum())
        if len(tiles_NCYX):
            features = self.see(tiles_NCYX)
            if places is not None:
                features = features[places.to(features.device)]
            if wanted != len(features):
                raise UserError(f"the ids hold {wanted} places for picture tokens, the pictures make {len(features)}")
            return x_BTD.masked_scatter(place_BT[..., None], features.to(x_BTD.dtype))
        if wanted:
            raise UserError(f"the ids hold {wanted} places for picture tokens, but there is no picture")
        if self.training:  # the other ranks may have pictures and wait for this one's gradients: look at nothing, and add nothing
            blank_1CYX = torch.zeros(1, 3, self.tile, self.tile, dtype=torch.uint8, device=ids_BT.device)
            x_BTD = x_BTD + self.see(blank_1CYX).sum().to(x_BTD.dtype) * 0
        return x_BTD

    def forward(self, ids_BT, targets_BT, positions_BT, documents_BT, tiles_NCYX, places=None):
        """The loss summed over all trained tokens, a float32 scalar; targets_BT holds the next id, or UNTRAINED."""
        hidden_BTD = self.decoder(self.embed(ids_BT, tiles_NCYX, places), positions_BT, documents_BT)
        trained_BT = targets_BT != IGNORE_INDEX
        return linear_cross_entropy(hidden_BTD[trained_BT], self.decoder.head.weight, targets_BT[trained_BT])

    def generate(self, prompts, tiles_NCYX, *, stop, places=None, max_tokens=256, temperature=0.0, top_k=0, top_p=1.0, seed=0,
                 record=("cuda",)):
        """Continue every prompt (a list of ids, IMAGE once for each picture token); yields a list a step: a row's next id, None once it ended.

        A row ends after an id of `stop`, which is yielded, or max_tokens. Rows of unequal length are padded on the left, where documents_BS
        hides the padding; each row draws from a generator of its own, so that it says what it would say alone.
        record: the kinds of devices on which the step of a long answer is recorded and played again (see `Steps`); not amid training, where a
        thread that pins the next batch's memory would spoil a recording.
        """
        device = self.decoder.embed.weight.device
        B, T = len(prompts), max(map(len, prompts))
        pad_B = torch.tensor([T - len(p) for p in prompts], device=device)
        ids_BT = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
        slot_BS = torch.arange(T + max_tokens, device=device).expand(B, -1)
        positions_BS = (slot_BS - pad_B[:, None]).clamp(min=0)
        documents_BS = None if not pad_B.any() else (slot_BS >= pad_B[:, None]).int()
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        cache, ended = Cache(self.decoder, B, T + max_tokens), [False] * B
        step = Steps(self.decoder, cache, positions_BS, documents_BS, record=device.type in record and not self.training)
        ungraded = torch.no_grad if self.training else torch.inference_mode  # notes nothing down, not even what FSDP2 counts on

        with ungraded():
            logits_BV = step(self.embed(ids_BT, tiles_NCYX.to(device), places))
        for said in range(1, max_tokens + 1):
            next_B = choose(logits_BV.float(), temperature, top_k, top_p, generators)
            yield [None if over else i for i, over in zip(next_B, ended, strict=True)]
            ended = [over or i in stop for i, over in zip(next_B, ended, strict=True)]
            if all(ended) or said == max_tokens:
                return
            with ungraded():
                logits_BV = step.one(torch.tensor(next_B, device=device))
