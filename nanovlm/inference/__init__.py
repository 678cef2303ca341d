"""Generating text with a model of models/.

Read generate.py first: prefill, the decoding loop, sampling. Then optimize.py, which makes the same
steps faster: joined and packed linear layers on a CPU, CUDA graphs on a GPU.
"""
