"""The demonstration, which `python train.py` runs: from nothing to sft in minutes on two cores.

Read run.py first: its steps are those of real training. fridge.py draws its images and writes its
texts.
"""
