"""Searches in a process of their own, so that callers and searches do not wait for one interpreter.

    lanes.py     this side: `ProcessLanes`, the lanes of an engine, and the process that they live in
    messages.py  what crosses: batches, answers, failures
    worker.py    the other side: tables, programs and a thread a lane

Why: docs/adr/0020-searches-in-a-process-of-their-own.md.
"""
