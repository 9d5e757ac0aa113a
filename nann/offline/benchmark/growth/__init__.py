"""How the cost of search, memory, index and loading grows with the corpus: made-up versions, one a size.

`corpus` writes what `nann extract` would, around the made-up catalogue and the hand-made weights of the GPU
report; `nann index` and `nann export` do the rest; `opening` and `searching` measure the published version.
"""
