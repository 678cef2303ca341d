"""What the training loop in train.py uses.

Read recipes.py first: the stages' settings and their rules. Then validation.py; resume.py, the
checkpoints of a run; logger.py, the fields of log.jsonl; signals.py, Ctrl-C. memory.py and flops.py
estimate the cost of a step, profiler.py measures it.
"""
