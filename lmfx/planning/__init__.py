"""From tables to the plan that holds its budget when it is measured, and plans and networks as files.

In: a LatencyTable and an ImportanceTable. Out: a `Frontier` of every budget (`frontier`), the plan whose *measured*
network is within the budget (`search`), plans as JSON (`plan_file`) and networks as folders (`saved_networks`, whose
files `saved_files` writes and reads).
"""
