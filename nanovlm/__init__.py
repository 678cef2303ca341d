"""nanovlm: a vision-language model that a person can read.

Read models/ first, then inference/generate.py, data/chat_template.py, data/packing.py, train.py.

A name carries the shape of its tensor: `q_BTHK` has four dimensions. The letters are

    B batch   T tokens   S cached and new tokens   N tiles   P patches of a tile   D width
    H query heads   G key/value heads   K head_dim   F width of the MLP   V vocabulary
    C channels   Y X pixels (or patches) down and across   L layers

D is the width of the part that a tensor is in. After pixel shuffle, P counts image features. In the
loss, N counts labelled tokens; in attention maps, image tokens. A lower-case letter is a part of
its capital (n of N tokens in a chunk); 1 is a dimension of size 1.
"""

IMAGE_TOKEN_ID = -1  # the id of an image token; no vocabulary has it, so it needs no embedding
IGNORE_INDEX = -100  # label of a token that has no loss, as in PyTorch's cross_entropy


class UserError(Exception):
    """A user's mistake or a broken file: one line that names the thing and says what to do.

    The scripts print it and exit with code 1. reason: a short text under which `prepare.py data`
    counts the samples that it skips.
    """

    def __init__(self, text, reason=None):
        super().__init__(text)
        self.reason = reason
