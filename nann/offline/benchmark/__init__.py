"""`nann benchmark`: how fast answers come, and how much of that time is not the model's.

load        one request after another (closed loop) or at a rate (open loop), against any target
run         several of these, interleaved in rounds
overhead    a search against the scoring calls it is made of
"""
