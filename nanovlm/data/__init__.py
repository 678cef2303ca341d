"""From a conversation with images to the batch of a training step.

Read chat_template.py first (token ids and the loss mask, made in one pass), then
image_processing.py (an image becomes tiles and image tokens), dataset.py (prepared datasets on
disk; labels) and packing.py (samples become sequences and batches).
When they are needed: turns.py (conversations of a file), tokenizer.py (all tokenizer files),
image_files.py (opening untrusted images), image_refs.py (images in files, zips and tars),
jinja_template.py and jinja.py (which chat template is in a folder).
"""
