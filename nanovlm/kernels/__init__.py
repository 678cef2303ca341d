"""Triton kernels for what models/ computes in plain PyTorch: the same numbers, faster on a GPU.

README.md is the lesson. dispatch.py decides which form runs. Then, from simple to hard:
rmsnorm_kernels.py, cross_entropy.py, decode_attention.py, attention_tiles.py, attention_forward.py,
attention_backward_dq.py, attention_backward_dkdv.py. rmsnorm.py and attention.py launch kernels for
PyTorch. Each file of kernels begins with its formula.
"""
