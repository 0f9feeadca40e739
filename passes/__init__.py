"""Graph and tensor algebra of lmfx, in folders by stage. Imports torch, numpy and the standard library only.

A folder imports only folders above it in this list (`tests/project/test_boundaries.py` holds the order):

    errors, ir    what goes wrong, and the data types that pass between the stages
    model         a model before it is traced: interface, copy, behaviour
    graph         what a graph is made of: ops, modules, nodes, shapes, edits, checks
    identity      what a value or a graph is, as text: the keys of all that is kept
    algebra       convolutions with their values, composed and summed; knows no graph
    fit           one convolution fitted to data in closed form
    canonical     one spelling for everything that a network may be written in
    trace         nn.Module -> GraphModule in canonical form
    spans         GraphModule -> regions -> layers -> candidates and refusals
    solve         candidates with latency and importance -> every Pareto-optimal plan; knows no torch
    rewrite       a plan -> the trainable network -> the merged network
"""
