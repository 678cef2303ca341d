"""What a person looks at: samples.py shows a prepared sample or summarizes a dataset; curves.py
plots the losses of training runs."""
