"""`palimpsest doctor`: what a server needs of its machine, and what to do where something is wrong with it.

Nothing is changed and no server is started. What the server decides by, such as which Java and which GPU, is asked of
its own functions.
"""
