"""Generating text: caches, sampling, decoders and the loop around them."""
