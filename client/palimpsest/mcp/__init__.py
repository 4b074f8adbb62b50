"""A server of the Model Context Protocol: programs in which people chat with a model have it edit pictures.

`palimpsest mcp` alone imports this, for it needs more than the client does: the extra `mcp` of this distribution.
"""
