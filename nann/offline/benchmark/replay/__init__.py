"""Replay of searches over scores computed once: how many items a search would score, and what it would find.

`scores` writes the exhaustive scores of some users; `walks` holds the searches, `measure` their cost at
equal recall, `experiments` what docs/research/search.md reports.
"""
