"""The core: a whole vision-language model, forward pass and loss, in plain PyTorch.

Read vlm.py, projector.py, vision_encoder.py, decoder.py, attention.py, rmsnorm.py and
cross_entropy.py. They know no files or tokenizers. On a GPU, kernels/ may replace a formula."""
