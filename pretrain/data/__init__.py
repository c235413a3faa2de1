"""Raw text to tokens to shards to batches. Modules in the order that a document passes them.

Text: sources (files of a root: records, chat; or embedded: docstrings, arithmetic) gives documents
in parts. Tokens: tokenizer, tokenizer_training, special_ids, encode.
Shards, written by build: parts (tokenize in parallel), pack (documents to rows), write (rows to
tars), manifest; finished (is what is there what is asked for?); verify, inspect, table, progress.
Batches: mixture and order (which row is next), store, shards and cache (where it is), loader.
"""
