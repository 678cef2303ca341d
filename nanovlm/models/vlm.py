"""A vision-language model: a vision encoder, a projector, and a decoder (the language model).

An image of 64 × 64 pixels, followed through the demonstration's model:

    tiles_NCYX      (1, 3, 64, 64)   uint8, normalized here
    features_NPD    (1, 64, 128)     vision encoder: one vector for each patch of 8 × 8 pixels
    shuffled        (1, 16, 512)     pixel shuffle by 2: 2 × 2 patches become one image feature
    features        (16, 128)        projector: as wide as the decoder's embeddings
    x_BTD           (1, T, 128)      embeddings of the text, features in place of image tokens
"""

import torch
import torch.nn as nn

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError
from .cross_entropy import linear_cross_entropy
from .decoder import Decoder
from .projector import Projector
from .vision_encoder import VisionEncoder


class VLM(nn.Module):
    """Returns a loss when called; for logits see inference/generate.py. vision, decoder: keyword
    arguments of VisionEncoder and Decoder. shuffle, newline, projector_mlp: see Projector.
    mean, std: of pixels between 0 and 1, three numbers each."""

    def __init__(
        self,
        *,
        vision,
        decoder,
        shuffle=1,
        projector_mlp=True,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        newline=False,
    ):
        super().__init__()
        self.vision = VisionEncoder(**vision)
        self.projector = Projector(
            vision_width=vision["width"],
            width=decoder["width"],
            shuffle=shuffle,
            newline=newline,
            mlp=projector_mlp,
        )
        self.decoder = Decoder(**decoder)
        self.tile = vision["tile"]
        # Not in a file of weights, so they get their numbers even under torch.device("meta").
        mean_C11 = torch.tensor(mean, device="cpu").view(3, 1, 1)
        std_C11 = torch.tensor(std, device="cpu").view(3, 1, 1)
        self.register_buffer("mean_C11", mean_C11, persistent=False)
        self.register_buffer("std_C11", std_C11, persistent=False)

    def encode_images(self, tiles_NCYX):
        """uint8 tiles -> image features (N · P, D), and the newline vector at the end if any."""
        pixels_NCYX = (tiles_NCYX.float() / 255 - self.mean_C11) / self.std_C11
        # pretrained parts may differ in dtype
        features_NPD = self.vision(pixels_NCYX.to(self.vision.patches.weight.dtype))
        return self.projector(features_NPD.to(self.projector.linear_1.weight.dtype))

    def embed(self, ids_BT, tiles_NCYX, image_feature_index=None):
        """Returns x_BTD: embeddings of the text, and image features in place of image tokens.

        The features are taken in order: all of them, or those at `image_feature_index` (one number
        for each image token; -1, the last feature, is the newline). Raises UserError unless there
        are as many image tokens as features.
        """
        # An image token's id is negative: clamp gives it an embedding, its feature replaces that.
        x_BTD = self.decoder.embed_tokens(ids_BT.clamp(min=0))
        is_image_BT = ids_BT == IMAGE_TOKEN_ID
        count = int(is_image_BT.sum())
        if len(tiles_NCYX):
            features = self.encode_images(tiles_NCYX)
            if image_feature_index is not None:
                features = features[image_feature_index.to(features.device)]
            if count != len(features):
                raise UserError(f"{count} image tokens in the ids, {len(features)} image features")
            # The places of image tokens take the features, one after another in reading order.
            return x_BTD.masked_scatter(is_image_BT[..., None], features.to(x_BTD.dtype))
        if count:
            raise UserError(f"{count} image tokens in the ids, but there is no image")
        if self.training:
            # Every rank must have a gradient for every trained parameter, or the others wait for
            # it. A blank tile, times 0, gives zeros.
            blank_1CYX = ids_BT.new_zeros((1, 3, self.tile, self.tile), dtype=torch.uint8)
            x_BTD = x_BTD + self.encode_images(blank_1CYX).sum().to(x_BTD.dtype) * 0
        return x_BTD

    def forward(
        self, ids_BT, targets_BT, positions_BT, documents_BT, tiles_NCYX, image_feature_index=None
    ):
        """Returns the cross-entropy loss, summed over all tokens that have a label: train.py
        divides by the number of labels of the whole step.

        targets_BT: a token's label: the next id, or IGNORE_INDEX where the loss mask is 0. They are
        shifted already (data/dataset.py), unlike the `labels` of Hugging Face's models.
        positions_BT: its position in its sample. documents_BT: the number of its sample.
        """
        x_BTD = self.embed(ids_BT, tiles_NCYX, image_feature_index)
        hidden_BTD = self.decoder(x_BTD, positions_BT, documents_BT)
        mask_BT = targets_BT != IGNORE_INDEX
        head_VD = self.decoder.lm_head.weight
        return linear_cross_entropy(hidden_BTD[mask_BT], head_VD, targets_BT[mask_BT])
