"""nanovlm: a vision-language model in a few files.

The letters that names carry (`q_BTHK` is four-dimensional: rows, tokens, query heads, size of a head):

    B rows   T tokens in a row   S cached tokens   N tiles   P patches of a tile   D width
    H query heads   G key/value heads   K size of a head   F feed-forward width   V vocabulary
    C channels   Y X pixels (or patches) down and across

A lower-case letter is a part of what its capital counts (n of N trained tokens in a chunk), a 1 a dimension kept for broadcasting.
"""

IMAGE_TOKEN_ID = -1  # stands for an image among token ids; no vocabulary has it, so it needs no embedding
IGNORE_INDEX = -100  # label of a token that has no loss, as in PyTorch's cross_entropy


class UserError(Exception):
    """A user's mistake or a broken file, told in one line that names the thing; the doors print it and exit with 1.

    reason: a few words that a table of such mistakes is grouped by.
    """

    def __init__(self, text, reason=None):
        super().__init__(text)
        self.reason = reason
