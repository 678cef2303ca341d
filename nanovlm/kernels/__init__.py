"""Triton kernels for what models/ computes in plain PyTorch: the same numbers, faster on a GPU.

Read dispatch.py first: it decides which form runs. Then, from simple to hard: rmsnorm.py,
cross_entropy.py, decode_attention.py, attention_forward.py, attention_backward.py.
Each begins with its formula and with what it moves through memory.
"""
