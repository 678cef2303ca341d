"""Output for people: attention_map.py shows where a model looks, sample_page.py and samples.py what
it is trained on, curves.py plots training runs."""
