"""What the training loop in train.py uses.

Read recipes.py first: the stages' settings and their rules. Then validation.py; memory.py and
flops.py, which estimate the cost of a step; resume.py, the checkpoints of a run; logger.py, the
fields of log.jsonl; profiler.py, which measures a step; signals.py, Ctrl-C.
"""
