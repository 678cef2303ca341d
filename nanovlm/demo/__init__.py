"""The demonstration, which `python train.py` runs: from scratch to sft in minutes on two cores.

Read run.py first: its steps are those of real training. fridge.py draws the images and writes the
texts. attention_score.py measures where the model looks. figures.py draws the figures of the
READMEs from a finished demonstration. experiments.py trains its parts in other ways and compares.
"""
