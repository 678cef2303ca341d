"""Evaluation: a model answers the questions of a benchmark, and the answers get scores.

Read benchmarks.py first: which questions, prompt and metric a benchmark has. Then formats.py (how
published files are parsed), runner.py (how answers are generated), metrics.py and cider.py (how
they are scored), report.py (the table and the HTML page).
"""
