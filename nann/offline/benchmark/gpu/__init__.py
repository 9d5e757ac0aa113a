"""The report that shows what the engine does on a GPU, rehearsed on a CPU.

corpus, model, graph    what is searched: made up here, seeded, of NANN's dimensions
programs, world, rig    the same in the forms that the engine takes, and engines over it
measure, loads, shapes  what is measured, on one lane and behind a batcher
preparation, session    the steps
plan                    their clock
verdict, report, plots  what is said of it
"""
