"""The demonstration, which `python train.py` runs: from nothing to sft in minutes on two cores.

Read run.py first: its steps are those of real training. fridge.py draws the images and writes the
texts. figures.py draws the figures of the READMEs from a finished demonstration.
"""
