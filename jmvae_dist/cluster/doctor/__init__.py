"""The preflight: one table about ranks, nodes, network, data and disks, before a run spends its hours.

`diagnosis` runs it. A check (`check.Check`) has two halves: `gather` collects facts on some ranks and may fail or
hang, `judge` turns the facts of all ranks into rows of the table, a pure function on rank 0. Facts travel through a
store (`meeting`), not through collectives, so that they arrive also when some ranks or the network between them do
not work.
"""
