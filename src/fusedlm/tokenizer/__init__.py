"""Text to token ids and back: byte-level BPE (Hugging Face files or GGUF metadata), characters, chats, streams.

Import from the modules; this package imports none of them, so that ids alone cost no tokenizer library.
"""
