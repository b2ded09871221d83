"""Indexing tars that others wrote: what their samples are, where they lie, and what is odd about them."""
