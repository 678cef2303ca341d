"""The core in forty lines: build a VLM, overfit one batch, and let it answer about an image."""

import torch

from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID
from nanovlm.inference.generate import generate
from nanovlm.models.vlm import VLM

QUESTION, ANSWERS, END = [5, 6], {"dark": [7, 8], "bright": [9, 10, 11]}, 1


def test_a_vlm_learns_to_tell_two_images_apart():
    torch.manual_seed(0)
    vlm = VLM(
        vision=dict(tile=12, patch=3, width=16, layers=2, heads=2, intermediate_size=32),
        decoder=dict(vocab_size=13, width=24, layers=2, heads=4, kv_heads=2, intermediate_size=48),
        shuffle=2,
    )
    # Two images. 16 patches and pixel shuffle by 2 make 4 image tokens of each.
    dark, bright = torch.full((3, 12, 12), 40), torch.full((3, 12, 12), 200)
    tiles_NCYX = torch.stack([dark, bright]).to(torch.uint8)
    prompt = [IMAGE_TOKEN_ID] * 4 + QUESTION

    # Ids, and as labels the next ids, but only those of the answer: the loss mask.
    ids_BT = torch.zeros(2, 10, dtype=torch.long)
    targets_BT = torch.full((2, 10), IGNORE_INDEX)
    for b, answer in enumerate(ANSWERS.values()):
        ids = torch.tensor(prompt + answer + [END])
        ids_BT[b, : len(ids)] = ids
        targets_BT[b, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    positions_BT, documents_BT = torch.arange(10).expand(2, -1), torch.zeros_like(ids_BT)

    optimizer = torch.optim.AdamW(vlm.parameters(), lr=3e-3)
    labels = (targets_BT != IGNORE_INDEX).sum()
    for _ in range(60):
        loss = vlm(ids_BT, targets_BT, positions_BT, documents_BT, tiles_NCYX) / labels
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05

    vlm.eval()
    steps = generate(vlm, [prompt, prompt], tiles_NCYX, stop={END}, max_tokens=6)
    ids = [[i for i in sequence if i is not None] for sequence in zip(*steps, strict=True)]
    assert ids == [[*answer, END] for answer in ANSWERS.values()]
