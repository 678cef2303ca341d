"""Output for people: samples.py prints a prepared sample or a summary of a dataset; curves.py plots
training runs."""
