"""The core: a whole vision-language model, forward pass and loss, in plain PyTorch.

Read it in this order: vlm.py, projector.py, vision_encoder.py, decoder.py, attention.py,
rmsnorm.py, cross_entropy.py. Nothing here knows of files, tokenizers, GPUs or other processes.
"""
