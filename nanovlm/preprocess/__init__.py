"""From any collection of images and conversations to a prepared dataset (`prepare.py data`).

Read readers.py first (JSON, tar and parquet become records), then records.py (the fields of a
record become a conversation) and build.py (records become the shards of a dataset, on all cores).
To add a source of data, add a function to readers.py.
"""
