"""Text to token shards on disk, and shards to batches that are a function of a seed and a step.

Import from the modules; this package imports none of them. prepare: text, JSONL, parquet and Hub datasets to a folder.
documents: sources by their paths; files, tables and hub have the kinds of them. dataset: an open folder, checked.
loader: batches for training, and a split once for evaluation. prefetch: the next batch on its device while this one is
trained on. sets: those that have a name. tokenizers: the one to prepare with.
"""
