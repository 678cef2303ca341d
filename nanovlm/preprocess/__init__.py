"""From any collection of images and conversations to a prepared dataset (`prepare.py data`).

Read records.py first (the fields of a record become a conversation), then readers.py (JSON, tar and
parquet become records) and build.py (records become the shards of a dataset, on all cores).
To add a source of data, add a function to readers.py.
"""
